"""PostNAS 4: heads, key dim and value dim of the linear block at one size of its state, by speed and by accuracy.

Cache, and with it decode speed, stays about the same over the grid; parameters and accuracy do not. The speed of every
point is measured on the device at hand, with random weights; what is trained is compared on equal terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from postnas.blocks import make_block
from postnas.blocks.dims import Dims
from postnas.errors import UserError
from postnas.search.blocks import COSTS, SPEEDS, compare, gain, outcome
from postnas.search.variants import Comparison, Row, Terms, Variant
from postnas.trials import Size

EVEN = (128, 64, 32, 16, 8, 4, 2, 1)
"""A value dim is a multiple of the largest of these that the tolerance allows: kernels work in such tiles."""
LARGEST = 1 << 16
"""Value dims are looked for below."""


def grid(
    block: str,
    dims: Dims,
    cache_bytes: int,
    heads: Sequence[int],
    key_dims: Sequence[int],
    options: dict[str, Any] | None = None,
    tolerance: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[list[dict[str, Any]], list[Row]]:
    """The block's options for each number of heads with each key dim, and what cannot be: {heads, key_dim, reason}.

    The value dim is the one whose state of one layer and one sequence takes `cache_bytes`, the convolution's inputs in
    `dtype` included: where several miss it by no more than `tolerance`, the one that is divisible by the most of two.
    options: all others. Raises UserError where no size can be.
    """
    found: list[dict[str, Any]] = []
    refused: list[Row] = []
    for count in dict.fromkeys(heads):
        for key_dim in dict.fromkeys(key_dims):
            sized = (options or {}) | {"num_heads": count, "head_dim": key_dim}
            try:
                found.append(_valued(block, dims, sized, cache_bytes, tolerance, dtype))
            except UserError as error:
                refused.append({"heads": count, "key_dim": key_dim, "reason": str(error)})
    if not found:
        reason = refused[0]["reason"] if refused else "no heads and key dims are named"
        raise UserError(f"size: none of the sizes can be ({reason}); change size.heads, size.key_dims or cache_bytes")
    return found, refused


def asked_grid(
    settings: Size, block: str, own: Any, options: dict[str, Any], dtype: torch.dtype
) -> tuple[int, list[dict[str, Any]], list[Row]]:
    """The cache budget in bytes, and the `grid` at it. What the settings leave open is as in `own`, a mixer of these
    options. Raises UserError as `grid` does."""
    budget = settings.cache_bytes or own.state_bytes(1, dtype)
    heads, key_dims = settings.heads or [own.heads], settings.key_dims or [own.key_dim]
    return budget, *grid(block, own.dims, budget, heads, key_dims, options, settings.tolerance, dtype)


def _valued(
    block: str, dims: Dims, options: dict[str, Any], cache_bytes: int, tolerance: float, dtype: torch.dtype
) -> dict[str, Any]:
    """The options with the value dim that fits. Raises UserError where none does."""
    key_dim = options["head_dim"]

    def sized(value_dim: int) -> dict[str, Any]:
        return options | {"expand_v": expansion(key_dim, value_dim)}

    def missed(value_dim: int) -> float:
        """By how much of the budget, above 0 where the state is too large; a value dim that cannot be is too small."""
        try:
            return state_bytes(block, dims, sized(value_dim), dtype) / cache_bytes - 1
        except UserError:
            return -math.inf

    low, high = 0, 1  # a state grows with its value dim
    while missed(high) < 0:
        low, high = high, 2 * high
        if high > LARGEST:
            state_bytes(block, dims, sized(high), dtype)  # says what cannot be, where nothing can
            raise UserError(f"size.cache_bytes: {cache_bytes} is more than heads of {key_dim} can take; give less")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missed(middle) < 0 else (low, middle)
    for even in EVEN:
        near = {low // even * even, -(-high // even) * even} - {0}
        value_dim = min(near, key=lambda value: (abs(missed(value)), value))
        if abs(missed(value_dim)) <= tolerance:
            return sized(value_dim)
    raise UserError(
        f"size.cache_bytes: {cache_bytes} is missed by {min(map(abs, map(missed, near))):.1%} with "
        f"{options['num_heads']} heads of key dim {key_dim}; give other sizes, or a larger size.tolerance"
    )


def expansion(key_dim: int, value_dim: int) -> float:
    """The option expand_v that gives this value dim, which is cut to a whole number from key_dim * expand_v."""
    ratio = value_dim / key_dim
    return ratio if int(key_dim * ratio) == value_dim else math.nextafter(ratio, math.inf)


def state_bytes(block: str, dims: Dims, options: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of one layer's state of one sequence. Raises UserError for sizes that cannot be."""
    with torch.device("meta"):
        return int(make_block(block, dims, options).state_bytes(1, dtype))


def front(rows: Sequence[Row], accuracy: dict[str, float]) -> list[str]:
    """Names of the rows that no other beats: as good in accuracy and decode speed and better in one of them."""
    points = {row["name"]: (accuracy[row["name"]], row[SPEEDS["decode"]]) for row in rows}
    return [
        name
        for name, (good, fast) in points.items()
        if not any(g >= good and f >= fast and (g, f) != (good, fast) for g, f in points.values())
    ]


def size(settings: Size, terms: Terms, block: str, options: dict[str, Any]) -> Row:
    """The contents of sizes.json: every point of the grid with its speed; those trained as rows; what was chosen.

    block, options: what stands in the linear layers so far; its own sizes come first where they are at the budget.
    Of equally good points the one with fewer parameters is chosen. Raises UserError as `grid` and `compare` do.
    """
    own = terms.meta(Variant("", block, options))
    budget, found, refused = asked_grid(settings, block, own, options, terms.dtype)
    if abs(own.state_bytes(1, terms.dtype) / budget - 1) <= settings.tolerance:
        same = (own.heads, own.key_dim)
        found = [options, *(one for one in found if (one["num_heads"], one["head_dim"]) != same)]
    points = [Variant(_name(terms, block, one), block, one) for one in found]
    speeds = Comparison("size", settings, terms)
    table = [_point(terms, point) | {k: v for k, v in speeds.speed(point).items() if k != "key"} for point in points]
    fastest = sorted(table[1:], key=lambda row: (-row[SPEEDS["decode"]], row["params"]))
    trained = {row["name"] for row in [table[0], *fastest][: settings.trained]}
    rows = compare("size", [point for point in points if point.name in trained], settings, terms)
    rows = [{**point, **row} for row in rows for point in table if point["name"] == row["name"]]
    accuracy = {row["name"]: _accuracy(row, rows[0], settings.weights) for row in rows}
    best = front(rows, accuracy)
    made = {"cache_bytes": budget, "tolerance": settings.tolerance, "grid": table, "refused": refused, "front": best}
    return made | outcome(rows, settings, terms, best)


def _accuracy(row: Row, first: Row, weights: dict[str, float]) -> float:
    """The weighted gains in all that is no speed and no size."""
    weighed = {name: weight for name, weight in weights.items() if weight > 0 and name not in (*SPEEDS, *COSTS)}
    return sum(weight * gain(row, first, name) for name, weight in weighed.items())


def _name(terms: Terms, block: str, options: dict[str, Any]) -> str:
    """Key dim, value dim and heads, as the paper's table has them."""
    mixer = terms.meta(Variant("", block, options))
    return f"{mixer.key_dim}x{mixer.value_dim}x{mixer.heads}"


def _point(terms: Terms, point: Variant) -> Row:
    mixer = terms.meta(point)
    sizes = {"key_dim": mixer.key_dim, "value_dim": mixer.value_dim, "heads": mixer.heads}
    return {"name": point.name, **sizes, "options": point.options, "state_bytes": mixer.state_bytes(1, terms.dtype)}

"""What a hybrid will win and cost, as text, from nothing but the base's config."""

from __future__ import annotations

import re
from collections.abc import Iterator

from postnas.blocks import linear_blocks
from postnas.errors import UserError
from postnas.models.checkpoint import base_config
from postnas.recipe import Place
from postnas.search.cost import (
    GIB,
    GPUS,
    Decoder,
    Gpu,
    Stage,
    align_stage,
    break_even,
    decode_seconds,
    largest_batch,
    mixers_stage,
    prefill_seconds,
    search_stage,
    weights_stage,
)
from postnas.search.objectives import LENGTH
from postnas.search.strategies import uniform

KEPT = (0, 1, 2, 4, 8)
"""Layers that keep attention, as far as the base has more."""
UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach."""
LONGEST = 2**20
"""Tokens up to which a break-even is sought."""
CONTEXT_UNITS = {"": 1, "k": 2**10, "m": 2**20}
TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

Row = tuple[str, ...]


def plan(
    model: str,
    context: str = "64k",
    gpu: str = "h100",
    block: str = "jet",
    batch: int = 1,
    align_tokens: str = "6M",
    train_tokens: str = "1B",
    tokens_per_s: float | None = None,
    length: str = "2k",
) -> str:
    """Two tables: what a hybrid wins for each number of kept layers, and what making it costs.

    model: a config.json, a folder with one, or a hub id. context, and length (of a training sequence):
    `64k` is 65,536. align_tokens, train_tokens: `6M` is 6,000,000; `1B` and `1e9` are the same. batch:
    sequences prefilled and decoded together. tokens_per_s: what every stage is taken to run at; 40% of
    the GPU's peak where None. Raises UserError for a value that cannot be.
    """
    tokens, sequence = count("context", context, CONTEXT_UNITS), count("length", length, CONTEXT_UNITS)
    aligned, trained = (
        count("align_tokens", align_tokens, TOKEN_UNITS),
        count("train_tokens", train_tokens, TOKEN_UNITS),
    )
    if gpu not in GPUS:
        raise UserError(f"gpu: {gpu!r} is unknown; choose from {', '.join(GPUS)}")
    if block not in linear_blocks():
        raise UserError(f"block: {block!r} is not a linear block; choose from {', '.join(linear_blocks())}")
    if batch < 1:
        raise UserError(f"batch: {batch} is not possible; give 1 or more sequences")
    if tokens_per_s is not None and not 0 < tokens_per_s < float("inf"):
        raise UserError(f"tokens_per_s: {tokens_per_s} is not possible; give a number above 0")
    device, base = GPUS[gpu], Decoder(base_config(model))
    hybrids = {kept: _hybrid(base, block, kept) for kept in KEPT if kept < base.layers}
    linear = hybrids[0]
    align = align_stage(base, linear, aligned, sequence)
    search = search_stage(base, linear, Place().tokens, len(Place().objective), LENGTH)
    mixers = {kept: mixers_stage(base, hybrid, linear, trained, sequence) for kept, hybrid in hybrids.items()}
    weights = {kept: weights_stage(base, hybrid, linear, trained, sequence) for kept, hybrid in hybrids.items()}
    stages = [("any", align), ("any", search), *_named(mixers), *_named(weights)]
    pace = (
        f"{UTILISATION:.0%} of the peak, which takes fused kernels; measure, and give --tokens_per_s"
        if tokens_per_s is None
        else "the tokens/s given"
    )
    return "\n".join(
        [
            f"{model}: {base.layers} layers, {parameters(base)} weights, {block} in place of attention",
            f"{tokens:,} tokens of context, batch {batch:,}, {device.name}",
            "",
            *table(2, _speed_rows(base, hybrids, tokens, batch, device)),
            "",
            f"Rooflines at the data sheet's {device.bandwidth / 1e9:,.0f} GB/s and {device.flops / 1e12:.4g} TFLOP/s; "
            "real kernels stay below them.",
            "Weights, keys and values in bf16, states in float32. KV caches are allocated 256 tokens at a time.",
            "The largest batch fills the memory beside the weights; its tokens/s are of all sequences together.",
            "Decode wins from: the smallest context at which a step is faster than the base's. Where memory sets",
            "the pace, each layer pays for itself, so that it is the same in every row.",
            "",
            *table(1, _stage_rows(stages, device, tokens_per_s)),
            "",
            f"Hours on one GPU at {pace}.",
            f"Sequences of {sequence:,} tokens; search is `swap` at {Place().tokens:,} tokens each for "
            f"{' and '.join(Place().objective)}, {LENGTH} a sequence.",
            "Memory: base bf16; mixers float32, 16 bytes a weight that learns; activations left out.",
            f"* more than the {device.memory / GIB:.0f} GiB of the GPU",
        ]
    )


def count(name: str, text: str, units: dict[str, int]) -> int:
    """A number with a unit, `64k` or `1.5e9`, as a whole number. Raises UserError where `text` is none, or below 1."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)([a-z]?)", text.strip().lower(), re.ASCII)
    value = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if value < 1:
        examples = ", ".join(f"8{unit.upper()}" for unit in units)
        raise UserError(f"{name}: {text!r} is no number of tokens; give one such as {examples}")
    return value


def _hybrid(base: Decoder, block: str, kept: int) -> Decoder:
    return Decoder(base.config, uniform(lambda placements: [0.0] * len(placements), base.placement, block, kept, 0))


def _named(stages: dict[int, Stage]) -> list[tuple[str, Stage]]:
    return [(str(kept), stage) for kept, stage in stages.items()]


def _speed_rows(base: Decoder, hybrids: dict[int, Decoder], context: int, batch: int, gpu: Gpu) -> Iterator[Row]:
    yield "", "", "cache a", "decode ", "", "prefill", "", "decode", "largest", "its decode"
    yield "kept", "weights", "sequence", "tokens/s ", "gain", "tokens/s", "gain", "wins from", "batch", "tokens/s"
    base_decode, base_prefill = (f(base, context, batch, gpu) for f in (decode_seconds, prefill_seconds))
    for name, model in {
        f"{base.layers} (base)": base,
        **{str(kept): hybrid for kept, hybrid in hybrids.items()},
    }.items():
        decode, prefill = (f(model, context, batch, gpu) for f in (decode_seconds, prefill_seconds))
        most = largest_batch(model, context, gpu)
        yield (
            name,
            parameters(model),
            size(model.cache_bytes(context)),
            number(batch / decode) + ("*" if batch > most else " "),
            times(base_decode / decode),
            number(batch * context / prefill),
            times(base_prefill / prefill),
            "" if model is base else crossing(break_even(base, model, batch, gpu, LONGEST)),
            f"{most:,}",
            number(most / decode_seconds(model, context, most, gpu)),
        )


def _stage_rows(stages: list[tuple[str, Stage]], gpu: Gpu, tokens_per_s: float | None) -> Iterator[Row]:
    yield "stage", "kept", "tokens", "GFLOP a token", "FLOP", "memory ", "tokens/s", "hours"
    for kept, stage in stages:
        rate = tokens_per_s or UTILISATION * gpu.flops * stage.tokens / stage.flops
        hours = stage.tokens / rate / 3600
        yield (
            stage.name,
            kept,
            f"{stage.tokens:,}",
            number(stage.flops / stage.tokens / 1e9),
            f"{stage.flops:.1e}".replace("+", ""),
            size(stage.memory) + ("*" if stage.memory > gpu.memory else " "),
            number(rate),
            number(hours) if hours >= 0.01 else "<0.01",
        )


def table(heads: int, rows: Iterator[Row]) -> list[str]:
    """Lines of columns as wide as they need be, the first to the left; a rule stands below the first `heads` rows."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in cells
    ]
    lines.insert(heads, "-" * len(lines[0]))
    return lines


def parameters(model: Decoder) -> str:
    return f"{model.parameters / 1e9:.2f} B" if model.parameters >= 1e9 else f"{model.parameters / 1e6:.0f} M"


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves 1 or more: `1.75 GiB`."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:,.2f} GiB"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 99.95 else f"{value:#.3g}"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:,.1f}x"


def crossing(context: int | None) -> str:
    if context is None:
        return f"never to {LONGEST // 2**20}M"
    return "first token" if context == 1 else f"{context:,}"

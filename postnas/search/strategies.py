"""Which layers keep attention, by several strategies; each is one function of a score and a budget.

A strategy gets score(placements) -> their scores (lower is better), the all-attention placement, the linear
block, the budget (layers that keep attention) and a seed. It knows nothing of models. What can be scored together
it asks for together, so that several processes can share the work.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable, Iterable, Sequence

Placement = list[str]
Score = Callable[[list[Placement]], list[float]]
"""score(placements) -> the score of each, in their order."""
Strategy = Callable[[Score, Placement, str, int, int], Placement]

WIDTH = 8
"""Placements that `beam` keeps at a time. Of 1,400 planted searches over 10 layers (tests/test_strategies.py) it missed
the best placement in 2, both of budget 5 or 6; a width of 1 in 309, of 4 in 17, of 12 in none, and `greedy` in 514."""


def with_linear(attention: Placement, block: str, linear: set[int]) -> Placement:
    """The placement that has `block` in the layers of `linear` and attention in all others."""
    return [block if layer in linear else name for layer, name in enumerate(attention)]


def order_by_swap(score: Score, attention: Placement, block: str) -> list[int]:
    """Layers from the least to the most sensitive: each alone on its candidate, all others on attention."""
    scores = score([with_linear(attention, block, {layer}) for layer in range(len(attention))])
    return sorted(range(len(attention)), key=lambda layer: (scores[layer], layer))


def swap(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """The layers that hurt most when swapped alone keep attention."""
    order = order_by_swap(score, attention, block)
    return with_linear(attention, block, set(order[: len(attention) - budget]))


def greedy(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """One layer after the other goes to its candidate, always the one that then hurts least."""
    linear: set[int] = set()
    while len(linear) < len(attention) - budget:
        rest = [layer for layer in range(len(attention)) if layer not in linear]
        scores = score([with_linear(attention, block, linear | {layer}) for layer in rest])
        linear.add(min(zip(scores, rest))[1])
    return with_linear(attention, block, linear)


def uniform(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """Attention at even distances: the middles of `budget` equal stretches."""
    layers = len(attention)
    kept = {int((2 * i + 1) * layers / (2 * budget)) for i in range(budget)} if budget else set()
    return with_linear(attention, block, set(range(layers)) - kept)


def random(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """`budget` layers drawn by the seed."""
    kept = set(random_module.Random(seed).sample(range(len(attention)), budget))
    return with_linear(attention, block, set(range(len(attention))) - kept)


def beam(score: Score, attention: Placement, block: str, budget: int, seed: int, width: int = WIDTH) -> Placement:
    """The paper's beam search, over placements of `budget` attention layers and one linear block."""
    return beam_blocks(score, attention, [block], budget, width)


def beam_blocks(
    score: Score, attention: Placement, blocks: Sequence[str], budget: int, width: int = WIDTH
) -> Placement:
    """Beam search for `budget` attention layers where the other layers take any of `blocks`.

    It begins at the side with fewer changes: each one is a level that costs about width * layers scores, and a
    level at which a layer of the best placement can fall out of the beam. A small budget so begins with all
    layers linear, where the levels of one budget are also the first levels of the next. Of several blocks each
    linear layer has the first, and changes to another while that lowers the score, before the levels and after.
    """

    def settled(placement: Placement) -> Placement:
        return descend(score, placement, lambda now: reblocked(now, attention, blocks))

    layers = len(attention)
    if budget > layers - budget:
        return settled(beam_over(score, attention, [list(blocks)] * layers, layers - budget, width))
    start = settled(with_linear(attention, blocks[0], set(range(layers))))
    return settled(beam_over(score, start, [[name] for name in attention], budget, width))


def beam_over(score: Score, start: Placement, choices: list[list[str]], changes: int, width: int) -> Placement:
    """The best placement found that differs from `start` in just `changes` layers, each on one of its choices.

    choices: the mixers that each layer may change to; none for a layer that is fixed. A level changes one layer
    more in each of the `width` best placements of the level before. Raises ValueError where fewer than `changes`
    layers have a choice.
    """
    if changes > sum(bool(set(names) - {name}) for names, name in zip(choices, start)):
        raise ValueError(f"{changes} changes are more than the layers that have a choice")
    kept = [start]
    for _ in range(changes):
        grown = (
            changed(placement, {layer: name})
            for placement in kept
            for layer, names in enumerate(choices)
            for name in names
            if placement[layer] == start[layer] != name
        )
        kept = [placement for _, placement in _ranked(score, grown)[:width]]
    return kept[0]


def descend(score: Score, placement: Placement, near: Callable[[Placement], Iterable[Placement]]) -> Placement:
    """Go from a placement to the best of those near it, while that lowers the score."""
    [best] = score([placement])
    while ranked := _ranked(score, near(placement)):
        value, found = ranked[0]
        if not value < best:
            break
        placement, best = found, value
    return placement


def exchanges(placement: Placement, attention: Placement, blocks: Sequence[str]) -> list[Placement]:
    """All placements in which one attention layer goes to one of `blocks` and one linear layer to attention."""
    kept = [layer for layer, name in enumerate(placement) if name == attention[layer]]
    gone = [layer for layer, name in enumerate(placement) if name != attention[layer]]
    return [changed(placement, {lost: block, won: attention[won]}) for lost in kept for won in gone for block in blocks]


def reblocked(placement: Placement, attention: Placement, blocks: Sequence[str]) -> list[Placement]:
    """All placements in which one linear layer has another of `blocks`."""
    return [
        changed(placement, {layer: block})
        for layer, name in enumerate(placement)
        for block in blocks
        if name not in (attention[layer], block)
    ]


def changed(placement: Placement, names: dict[int, str]) -> Placement:
    """The placement with other mixers in these layers."""
    return [names.get(layer, name) for layer, name in enumerate(placement)]


def _ranked(score: Score, placements: Iterable[Placement]) -> list[tuple[float, Placement]]:
    """Each placement once with its score, the best first; equal scores in the order of their names."""
    once = [list(names) for names in sorted({tuple(placement) for placement in placements})]
    return sorted(zip(score(once), once)) if once else []


STRATEGIES: dict[str, Strategy] = {
    "swap": swap,
    "greedy": greedy,
    "beam": beam,
    "uniform": uniform,
    "random": random,
}
"""Every strategy by the name that a recipe uses."""

"""Which layers keep attention, by several strategies; each is one function of a score and a budget.

A strategy gets score(placement) -> float (lower is better), the all-attention placement, the linear
block, the budget (layers that keep attention) and a seed. It knows nothing of models.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable

Placement = list[str]
Score = Callable[[Placement], float]
Strategy = Callable[[Score, Placement, str, int, int], Placement]


def with_linear(attention: Placement, block: str, linear: set[int]) -> Placement:
    """The placement that has `block` in the layers of `linear` and attention in all others."""
    return [block if layer in linear else name for layer, name in enumerate(attention)]


def order_by_swap(score: Score, attention: Placement, block: str) -> list[int]:
    """Layers from the least to the most sensitive: each alone on its candidate, all others on attention."""
    scores = {layer: score(with_linear(attention, block, {layer})) for layer in range(len(attention))}
    return sorted(scores, key=lambda layer: (scores[layer], layer))


def swap(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """The layers that hurt most when swapped alone keep attention."""
    order = order_by_swap(score, attention, block)
    return with_linear(attention, block, set(order[: len(attention) - budget]))


def greedy(score: Score, attention: Placement, block: str, budget: int, seed: int) -> Placement:
    """One layer after the other goes to its candidate, always the one that then hurts least."""
    linear: set[int] = set()
    while len(linear) < len(attention) - budget:
        rest = [layer for layer in range(len(attention)) if layer not in linear]
        linear.add(min(rest, key=lambda layer: (score(with_linear(attention, block, linear | {layer})), layer)))
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


STRATEGIES: dict[str, Strategy] = {"swap": swap, "greedy": greedy, "uniform": uniform, "random": random}
"""Every strategy by the name that a recipe uses."""

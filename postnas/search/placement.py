"""PostNAS 1 as a stage: score, solve, and write what was found for every budget."""

from __future__ import annotations

from functools import partial
from math import comb
from typing import Any

import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.models.supernet import Placement
from postnas.progress import Progress
from postnas.recipe import Place
from postnas.search.gates import SoftNet, gates, minibatches, solve
from postnas.search.objectives import weights
from postnas.search.scores import Scorer, Values, combine, swaps
from postnas.search.strategies import STRATEGIES, Score, beam, with_linear
from postnas.search.windows import windows

ROWS = 4
"""Sequences of a step of `gates`, for each objective."""


def place(scorer: Scorer, attention: Placement, settings: Place, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of scores.json and placement.json.

    Strategies see the weighted objective only. The table holds, for every budget, the placement that
    the single swaps suggest with the sum of their scores, which costs nothing once those are known.
    Raises UserError for a budget above the number of layers.
    """
    layers = len(attention)
    if settings.budget > layers:
        raise UserError(
            f"place.budget: {settings.budget} is more than the base's {layers} layers; give at most {layers}"
        )
    base, objective = scorer(attention), weights(settings.objective)
    asked = _evaluations(settings, layers)
    with Progress("place", asked, unit="placements") as bar:

        def score(placement: Placement) -> float:
            value = combine(scorer(placement), base, objective)
            bar.advance(1, score=value)
            return value

        placement = _solved(scorer, score, attention, settings, seed)
        windowed: list[dict[str, Any]] = []
        if settings.windows:  # the second pass has an objective of its own
            score_windows = partial(_combined, scorer, base, weights(settings.windows_objective))
            placement, windowed = windows(score_windows, placement, settings.windows)
        values = scorer(placement)
    scores: dict[str, Any] = {"objective": settings.objective, "base": base}
    found: dict[str, Any] = {
        "placement": placement,
        "strategy": settings.strategy,
        "budget": settings.budget,
        "block": settings.block,
        "objective": settings.objective,
        "seed": seed,
        "scores": values | {"score": combine(values, base, objective)},
    }
    if settings.windows:
        found["windows"] = {"window": settings.window, "objective": settings.windows_objective, "chosen": windowed}
    if settings.strategy in ("swap", "greedy"):
        scores["swap"] = swaps(scorer, attention, settings.block, objective)
        found["table"] = _table(scores["swap"], attention, settings.block)
    return scores, found


def _combined(scorer: Scorer, base: Values, shares: dict[str, float], placement: Placement) -> float:
    return combine(scorer(placement), base, shares)


def _solved(scorer: Scorer, score: Score, attention: Placement, settings: Place, seed: int) -> Placement:
    """The placement that the strategy finds."""
    if settings.strategy == "gates":
        return _gated(scorer, score, attention, settings, seed)
    if settings.strategy == "beam":
        return beam(score, attention, settings.block, settings.budget, seed, settings.width)
    return STRATEGIES[settings.strategy](score, attention, settings.block, settings.budget, seed)


def _gated(scorer: Scorer, score: Score, attention: Placement, settings: Place, seed: int) -> Placement:
    """Logits trained on the sequences that placements are scored on, rounded, and mended by exchanges."""
    shares, nets = weights(settings.objective), {}
    for name in shares:
        one = scorer.objectives[name]
        # Rows of text are whole; those of tasks are padded, and only their answers count.
        batches = minibatches(one.tokens, one.scored if one.kind == "nll" else None, ROWS, seed)
        nets[name] = SoftNet(scorer.supernet, [settings.block], batches, one.kind, scorer.compute)

    def relaxed(probabilities: Tensor, step: int) -> Tensor:
        return torch.stack([share * nets[name](probabilities, step) for name, share in shares.items()]).sum()

    with Progress("gates", settings.steps, unit="steps") as bar:
        made = gates(
            relaxed,
            attention,
            [settings.block],
            settings.budget,
            seed,
            steps=settings.steps,
            lr=settings.lr,
            after=lambda made, loss: bar.advance(1, loss=loss),
        )
    return solve(score, made.probabilities().detach(), attention, [settings.block], settings.budget)


def _evaluations(settings: Place, layers: int) -> int:
    """Placements that a strategy asks the score of, at most; `gates` may go on exchanging for some rounds."""
    budget, width = settings.budget, settings.width
    changes = min(budget, layers - budget)
    levels = (min(width, comb(layers, level)) * (layers - level) for level in range(changes))
    asked = {
        "swap": layers,
        "greedy": sum(range(budget + 1, layers + 1)),
        "beam": 1 + sum(levels),
        "gates": 1 + budget * (layers - budget),
    }.get(settings.strategy, 0)
    return asked + settings.windows * (layers - budget)


def _table(swapped: list[dict[str, Any]], attention: Placement, block: str) -> list[dict[str, Any]]:
    order = sorted(swapped, key=lambda entry: (entry["score"], entry["layer"]))
    rows = []
    for budget in range(len(attention) + 1):
        linear = {entry["layer"] for entry in order[: len(attention) - budget]}
        predicted = sum(entry["score"] for entry in swapped if entry["layer"] in linear)
        rows.append({"budget": budget, "placement": with_linear(attention, block, linear), "predicted": predicted})
    return rows

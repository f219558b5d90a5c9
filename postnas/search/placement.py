"""PostNAS 1 as a stage: score, solve, and write what was found for every budget."""

from __future__ import annotations

from typing import Any

from postnas.errors import UserError
from postnas.models.supernet import Placement
from postnas.progress import Progress
from postnas.recipe import Place
from postnas.search.scores import Scorer, combine, swaps
from postnas.search.strategies import STRATEGIES, with_linear


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
    base = scorer(attention)
    asked = _evaluations(settings.strategy, layers, settings.budget)
    with Progress("place", asked, unit="placements") as bar:

        def score(placement: Placement) -> float:
            value = combine(scorer(placement), base, settings.objective)
            bar.advance(1, score=value)
            return value

        solve = STRATEGIES[settings.strategy]
        placement = solve(score, attention, settings.block, settings.budget, seed)
        values = scorer(placement)
    scores: dict[str, Any] = {"objective": settings.objective, "base": base}
    found: dict[str, Any] = {
        "placement": placement,
        "strategy": settings.strategy,
        "budget": settings.budget,
        "block": settings.block,
        "objective": settings.objective,
        "seed": seed,
        "scores": values | {"score": combine(values, base, settings.objective)},
    }
    if settings.strategy in ("swap", "greedy"):
        scores["swap"] = swaps(scorer, attention, settings.block, settings.objective)
        found["table"] = _table(scores["swap"], attention, settings.block)
    return scores, found


def _evaluations(strategy: str, layers: int, budget: int) -> int:
    """Placements that a strategy asks the score of."""
    return {"swap": layers, "greedy": sum(range(budget + 1, layers + 1))}.get(strategy, 0)


def _table(swapped: list[dict[str, Any]], attention: Placement, block: str) -> list[dict[str, Any]]:
    order = sorted(swapped, key=lambda entry: (entry["score"], entry["layer"]))
    rows = []
    for budget in range(len(attention) + 1):
        linear = {entry["layer"] for entry in order[: len(attention) - budget]}
        predicted = sum(entry["score"] for entry in swapped if entry["layer"] in linear)
        rows.append({"budget": budget, "placement": with_linear(attention, block, linear), "predicted": predicted})
    return rows

"""What a row's outputs are worth: the metrics of a task, each with its value a row and the score of a guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Outputs = list[dict[str, Any]]
"""What a model gave to each row, as JSON: `id` and whatever its metrics are computed from."""


@dataclass(frozen=True)
class Measure:
    """One metric of one task: a row's value, and how values make the score."""

    metric: str
    values: Callable[[Outputs], list[float]]
    chance: Callable[[Outputs], float] | None = None
    """Score of a guess; None where the metric is no share of right answers."""
    exponential: bool = False
    """The score is exp of the mean (perplexity), not the mean."""


def field(name: str) -> Callable[[Outputs], list[float]]:
    """The values that stand in the outputs under `name`."""
    return lambda rows: [float(row[name]) for row in rows]


def share(name: str) -> Measure:
    """A share of right answers that a guess does not raise above 0, under its own name in the outputs."""
    return Measure(name, field(name), chance=lambda rows: 0.0)


def nll() -> Measure:
    """Negative log-likelihood in nats."""
    return Measure("nll", field("nll"))

"""The numbers behind benchmarks/placement_table.py: paired scores with their errors, and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.measure import Measure, field
from postnas.evaluate.task import load_task
from postnas.evaluate.verdict import COPY, PERPLEXITY
from postnas.search import objectives

DRAWS = 10_000
"""Resamples of the placements, for an interval of a rank correlation."""
TOP = 4
"""Layers of an objective's ranking that are compared with another's."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One metric on one set of rows, and what it weighs in a score."""

    values: np.ndarray
    """[rows] float64."""
    ids: list[Any]
    weight: float = 1.0
    exponential: bool = False
    """The metric is exp of the mean, not the mean."""


def contrast(models: Sequence[Sequence[Part]], shares: Sequence[float]) -> tuple[float, float | None]:
    """The sum of the models' scores, each times its share, and its standard error over the rows.

    models: each model's parts of one score, alike; the parts' rows are independent of each other. So [1] is a score
    and [1, -1] a paired difference. exp goes through to first order. The error is None where a part has one row.
    Raises UserError where the models did not answer the same rows.
    """
    value = variance = 0.0
    for parts in zip(*models, strict=True):
        if any(part.ids != parts[0].ids for part in parts):
            raise UserError("placement: two models did not answer the same rows; distil again what is of other rows")
        scores = [math.exp(part.values.mean()) if part.exponential else float(part.values.mean()) for part in parts]
        value += parts[0].weight * sum(share * score for share, score in zip(shares, scores))
        slopes = [score if part.exponential else 1.0 for part, score in zip(parts, scores)]
        rows = sum(share * slope * part.values for share, slope, part in zip(shares, slopes, parts))
        error = np.var(rows, ddof=1) / len(rows) if len(rows) > 1 else math.nan
        variance += parts[0].weight ** 2 * float(error)
    return value, None if math.isnan(variance) else math.sqrt(variance)


def grouped(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Each objective by itself, and each group of several whose members are all there, weighed as it weighs them."""
    found = {name: [part] for name, part in parts.items()}
    for group, members in objectives.GROUPS.items():
        if len(members) > 1 and members.keys() <= parts.keys():
            found[group] = [replace(parts[name], weight=share) for name, share in members.items()]
    return found


def searched(rows: Mapping[str, Sequence[float]]) -> dict[str, list[Part]]:
    """The parts of what a scorer has of a placement, {objective: one loss a row}."""
    return grouped({name: Part(np.array(losses), list(range(len(losses)))) for name, losses in rows.items()})


def metrics(outputs: Mapping[str, list[Row]]) -> dict[tuple[str, str], list[Part]]:
    """{(task, metric): its parts} of what a hybrid gave to each row. An objective of a group keeps its prefix."""
    found: dict[tuple[str, str], list[Part]] = {}
    own: dict[str, Part] = {}
    for task, records in outputs.items():
        ids = [record["id"] for record in records]
        if task.startswith("objective "):
            own[task.removeprefix("objective ")] = Part(np.array(field("nll")(records)), ids)
            continue
        for one in _measures(task):
            found[task, one.metric] = [Part(np.array(one.values(records)), ids, exponential=one.exponential)]
    for name, parts in grouped(own).items():
        key = ("kl", "kl") if name == "kl" else (name if name in objectives.GROUPS else f"objective {name}", "nll")
        found[key] = parts
    return found


def _measures(task: str) -> tuple[Measure, ...]:
    known = {"perplexity": PERPLEXITY, "copy": COPY}
    return known[task] if task in known else suite.measures(load_task(task))


def ranks(values: np.ndarray) -> np.ndarray:
    """The ranks along the last axis, from 0 up; equal values share the mean of theirs."""
    own, other = values[..., :, None], values[..., None, :]
    return (own > other).sum(-1) + ((own == other).sum(-1) - 1) / 2


def correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson's, of ranks Spearman's, along the last axis; nan where one side is all equal."""
    first, second = (side - side.mean(-1, keepdims=True) for side in (first, second))
    with np.errstate(invalid="ignore"):
        return (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and from three seeds on its standard error over them."""
    count = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(count)) if count >= 3 else None


def correlations(
    scores: Mapping[str, np.ndarray], reached: Mapping[str, np.ndarray], draws: int = DRAWS
) -> Iterator[Row]:
    """Spearman of each score with each thing that was reached, with a 95% interval over resampled placements."""
    count = len(next(iter(scores.values())))
    resampled = np.random.default_rng(0).integers(count, size=(draws, count))
    drawn_scores, drawn_losses = (
        {name: ranks(values[resampled]) for name, values in side.items()} for side in (scores, reached)
    )
    for objective, values in scores.items():
        for task, losses in reached.items():
            value = float(correlation(ranks(values), ranks(losses)))
            spread = correlation(drawn_scores[objective], drawn_losses[task])
            if not math.isnan(value):
                low, high = np.nanpercentile(spread, [2.5, 97.5]).tolist()
                yield {"objective": objective, "task": task, "score": value, "low": low, "high": high}


def findings(effects: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """effects: {objective: what each layer is worth}; below 0, where a layer harms, counts as 0 in the sum."""
    orders = {name: np.argsort(-values, kind="stable") for name, values in effects.items()}
    for name, values in effects.items():
        shares = np.cumsum(np.maximum(values, 0)[orders[name]])
        if shares[-1] > 0:
            count = int(np.searchsorted(shares, shares[-1] / 2)) + 1
            yield {"kind": "half", "objective": name, "score": count, "layers": orders[name][:count].tolist()}
    for name, other in combinations(effects, 2):
        both = sorted(set(orders[name][:TOP].tolist()) & set(orders[other][:TOP].tolist()))
        value = float(correlation(ranks(effects[name]), ranks(effects[other])))
        score = None if math.isnan(value) else value
        row = {"kind": "likeness", "objective": name, "other": other, "score": score, "n": len(effects[name])}
        yield row | {"top": TOP, "common": both}

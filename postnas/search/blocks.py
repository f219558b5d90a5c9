"""PostNAS 2 and 3: which block stands in the linear layers, and with which options; by variants on equal terms."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postnas.evaluate import suite, verdict
from postnas.evaluate.measure import Measure, Outputs, field, nll
from postnas.evaluate.task import load_task
from postnas.search.speed import device_name
from postnas.search.variants import SCORED, Comparison, Row, Terms, Variant
from postnas.train import parallel
from postnas.trials import Design, Select, Trials

LOSSES = ("kl", "nll")
"""Metrics in nats, of which less is better."""
SPEEDS = {"train": "train_tokens_per_s", "decode": "decode_tokens_per_s"}
COSTS = {"params": "params", "cache": "cache_bytes"}
MEASURES = (*SCORED, "perplexity", "copy", "tasks", *SPEEDS, *COSTS)
"""What `rank` can weigh, besides single tasks by their names."""


def compare(stage: str, variants: Sequence[Variant], settings: Trials, terms: Terms) -> list[Row]:
    """A row a variant, in their order, each trained and measured alike; what was done before is not done again.

    A row has name, block, options; params, state_bytes (one linear layer), cache_bytes (the whole model), both of one
    sequence; lr, rates and tokens as `Comparison.trained` gives them; train_tokens_per_s; decode_tokens_per_s with its
    error; and scores: {task, metric, value, stderr, n, difference, difference_stderr}, the difference paired and from
    the first variant, None in its own row. stage: for messages. On several ranks batches are shared, and rank 0
    measures. Raises UserError as `Comparison` does.
    """
    comparison = Comparison(stage, settings, terms)
    for number, variant in enumerate(variants, start=1):
        if parallel.rank() == 0:
            print(f"{stage}: {variant.name}, {number} of {len(variants)}", file=sys.stderr, flush=True)
        comparison.trained(variant)
    first = comparison.trained(variants[0])["outputs"]
    rows = []
    for variant in variants:
        speed, made = comparison.speed(variant), comparison.trained(variant)
        row = {"name": variant.name, "block": variant.block, "options": variant.options}
        row |= {name: value for name, value in (made | speed).items() if name not in ("key", "outputs")}
        row["state_bytes"] = terms.meta(variant).state_bytes(settings.context, terms.dtype)
        rows.append(row | {"scores": paired_scores(first, made["outputs"], variant is variants[0])})
    return rows


def paired_scores(first: Mapping[str, Outputs], own: Mapping[str, Outputs], is_first: bool) -> list[Row]:
    """Every measure with its error, and the paired difference from the first variant."""
    found = verdict.result({name: _measures(name) for name in own}, {"base": first, "hybrid": own}, [], 0)
    scores = []
    pairs = {(pair["task"], pair["metric"]): pair for pair in found["paired"]}
    for row in (row for row in found["rows"] if row["model"] == "hybrid"):
        pair = {} if is_first else pairs[row["task"], row["metric"]]
        scores.append(
            {name: row[name] for name in ("task", "metric", "value", "stderr", "n")}
            | {"difference": pair.get("difference"), "difference_stderr": pair.get("stderr")}
        )
    return scores


def _measures(name: str) -> tuple[Measure, ...]:
    """A measure's metrics, the chief one first."""
    own: dict[str, tuple[Measure, ...]] = {"kl": (Measure("kl", field("nll")),), "needle": (nll(),)}
    own |= {"perplexity": verdict.PERPLEXITY, "copy": verdict.COPY}
    return own[name] if name in own else suite.measures(load_task(name))


def rank(rows: Sequence[Row], weights: Mapping[str, float]) -> list[Row]:
    """{name, score, gains} of each row, the best first; of equal ones that with fewer parameters, then the earlier.

    A gain is on the first row: nats less of `kl` and `needle`, the logarithm of how much lower the perplexity is, the
    points (as a share) more in `copy` or in a task by its chief metric, `tasks` their mean (0 without any), and the
    logarithm of how much faster (`train`, `decode`) or smaller (`params`, `cache`) a variant is. score: the sum of the
    gains by their weights. Raises KeyError for a measure that the rows do not have.
    """
    ranked = []
    for row in rows:
        gains = {measure: gain(row, rows[0], measure) for measure, weight in weights.items() if weight > 0}
        score = sum(weights[measure] * value for measure, value in gains.items())
        ranked.append({"name": row["name"], "score": score, "gains": gains})
    params = {row["name"]: row["params"] for row in rows}
    return sorted(ranked, key=lambda one: (-one["score"], params[one["name"]]))


def gain(row: Row, first: Row, measure: str) -> float:
    """What `rank` says of one measure; above 0 where `row` is better than `first`."""
    if measure in SPEEDS:
        return math.log(row[SPEEDS[measure]] / first[SPEEDS[measure]])
    if measure in COSTS:
        return math.log(first[COSTS[measure]] / row[COSTS[measure]])
    chief, before = chief_scores(row), chief_scores(first)
    if measure == "tasks":
        gains = [gain(row, first, task) for task in chief if task not in MEASURES]
        return sum(gains) / len(gains) if gains else 0.0
    new, old = chief[measure]["value"], before[measure]["value"]
    if measure == "perplexity":
        return math.log(old / new)
    return old - new if chief[measure]["metric"] in LOSSES else new - old


def chief_scores(row: Row) -> dict[str, Row]:
    """The score in the chief metric of each measure, by its name."""
    found: dict[str, Row] = {}
    for score in row["scores"]:
        found.setdefault(score["task"], score)
    return found


def select(settings: Select, terms: Terms) -> Row:
    """The contents of select.json: each block in all linear layers, ranked."""
    given = terms.align.options | settings.options
    variants = [Variant(block, block, given.get(block, {})) for block in settings.blocks]
    return outcome(compare("select", variants, settings, terms), settings, terms)


def design(settings: Design, terms: Terms, block: str, options: dict[str, Any]) -> Row:
    """The contents of design.json: the block as it is, then with other options, ranked.

    block, options: what stands in the linear layers so far.
    """
    variants = [Variant("base", block, options)]
    variants += [Variant(name, block, options | changed) for name, changed in settings.variants.items()]
    return outcome(compare("design", variants, settings, terms), settings, terms)


def outcome(rows: list[Row], settings: Trials, terms: Terms, among: Sequence[str] | None = None) -> Row:
    """Rows with their ranking, what comes out of it, and the device that chose. among: names; all where None."""
    ranking = rank(rows, settings.weights)
    best = next(one["name"] for one in ranking if among is None or one["name"] in among)
    chosen = next(row for row in rows if row["name"] == best)
    return {
        "device": device_name(terms.base.lm_head.weight.device),
        "torch": torch.__version__,
        "context": settings.context,
        "batch": settings.batch,
        "placement": terms.placed(chosen["block"]),
        "chosen": {name: chosen[name] for name in ("name", "block", "options")},
        "weights": settings.weights,
        "ranking": ranking,
        "rows": rows,
    }

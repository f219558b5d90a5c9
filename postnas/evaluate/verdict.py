"""The verdict: base and hybrid on the same rows, with paired differences and the share that was kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.perplexity import CausalLM, from_nll, mean_stderr, perplexity
from postnas.evaluate.recall import copy, copy_batch

CHOICES = {"accuracy": "choice", "accuracy_norm": "choice_norm"}
KEPT_NEEDS = 5.0  # standard errors above chance: a share of less than that is mostly noise

Outputs = list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """One metric of one task: a row's value, and how values make the score."""

    metric: str
    values: Callable[[Outputs], list[float]]
    chance: Callable[[Outputs], float] | None = None
    """Score of a guess; None where the metric is no share of right answers."""
    exponential: bool = False
    """The score is exp of the mean (perplexity), not the mean."""


def _right(choice: str) -> Callable[[Outputs], list[float]]:
    return lambda rows: [float(row[choice] == row["gold"]) for row in rows]


def _field(name: str) -> Callable[[Outputs], list[float]]:
    return lambda rows: [row[name] for row in rows]


def _guess(rows: Outputs) -> float:
    return math.fsum(1 / len(row["loglikelihoods"]) for row in rows) / len(rows)


PERPLEXITY = (Measure("perplexity", _field("nll"), exponential=True),)
COPY = (Measure("copy_accuracy", _field("accuracy"), chance=lambda rows: 0.0), Measure("copy_nll", _field("nll")))
CHOICE = tuple(Measure(metric, _right(choice), chance=_guess) for metric, choice in CHOICES.items())


def _measures(task: str) -> tuple[Measure, ...]:
    return {"perplexity": PERPLEXITY, "copy": COPY}.get(task, CHOICE)


def summary(rows: Outputs) -> dict[str, Any]:
    """accuracy, stderr, accuracy_norm, stderr_norm and n of the rows that `suite.score` gave.

    An error is None for a single row.
    """
    accuracy, stderr = mean_stderr(_right("choice")(rows))
    accuracy_norm, stderr_norm = mean_stderr(_right("choice_norm")(rows))
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "accuracy_norm": accuracy_norm,
        "stderr_norm": stderr_norm,
        "n": len(rows),
    }


def paired(base_rows: Outputs, hybrid_rows: Outputs, chance: float, metric: str = "accuracy") -> dict[str, Any]:
    """Difference (hybrid - base) in `accuracy` or `accuracy_norm` on the same rows, as `suite.score` gave them.

    Returns difference, stderr (of the mean of the rows' differences; None for a single row), n, and
    kept: the share of the base's score above `chance` that the hybrid has, None unless the base is
    at least five standard errors above chance. Raises UserError where the rows are not the same.
    """
    values = _right(CHOICES[metric])
    _same_rows(base_rows, hybrid_rows)
    return _paired(values(base_rows), values(hybrid_rows), chance)


def _same_rows(base: Outputs, hybrid: Outputs) -> None:
    if [row["id"] for row in base] != [row["id"] for row in hybrid]:
        raise UserError(
            f"evaluation: base ({len(base)} rows) and hybrid ({len(hybrid)} rows) did not answer the same rows; "
            "remove the kept results and evaluate both anew"
        )


def _paired(base: Sequence[float], hybrid: Sequence[float], chance: float | None) -> dict[str, Any]:
    difference, stderr = mean_stderr([new - old for old, new in zip(base, hybrid, strict=True)])
    kept = None
    if chance is not None:
        score, error = mean_stderr(base)
        if error is not None and score > chance and score - chance >= KEPT_NEEDS * error:
            kept = (mean_stderr(hybrid)[0] - chance) / (score - chance)
    return {"difference": difference, "stderr": stderr, "n": len(base), "kept": kept}


def _paired_perplexity(base: Sequence[float], hybrid: Sequence[float]) -> dict[str, Any]:
    """The delta method on both: to first order the difference moves as P_hybrid * nll - P_base * nll."""
    old, new = from_nll(base)[0], from_nll(hybrid)[0]
    _, stderr = mean_stderr([new * h - old * b for b, h in zip(base, hybrid, strict=True)])
    return {"difference": new - old, "stderr": stderr, "n": len(base), "kept": None}


def evaluate(
    models: Mapping[str, CausalLM],
    tokenizer: Any,
    heldout: Tensor,
    *,
    tasks: Sequence[str],
    limit: int | None,
    perplexity_tokens: int,
    length: int,
    copy_passages: int,
    copy_tokens: int,
    copy_filler: int,
    seed: int,
    done: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run every measure for every model, each on the same text and rows.

    models: by name; `base` and `hybrid` are compared. heldout: [M] int64. tasks, limit: as in
    `suite.load_task` and `suite.rows`. perplexity_tokens: the first of `heldout`, in sequences of
    `length`; a rest is left out. copy_*: as in `recall.copy`; 0 passages leave the copy test out.

    Returns rows: {model, task, metric, value, stderr, n, seed}; paired (hybrid - base): {task, metric,
    difference, stderr, n, kept}; outputs: {model: {task: one record a row}}. n counts rows, passages,
    or for perplexity predicted tokens (paired: sequences). Nothing in it depends on interruptions: `save`
    gets the result so far after each model's task, and `done`, such a result made with the same models,
    text and settings, spares what it holds. It survives JSON. Bad input is found before any model runs,
    as UserError: an unknown task, too little held-out text.
    """
    known = {name: suite.load_task(name) for name in tasks}
    sequences = check_text(heldout, perplexity_tokens, length, copy_passages, copy_tokens, copy_filler, seed)
    chances = {name: task.chance for name, task in known.items() if task.chance is not None}
    names = ["perplexity", *(["copy"] if copy_passages else []), *known]
    kept = done["outputs"] if done else {}
    outputs: dict[str, dict[str, Outputs]] = {model: dict(kept.get(model, {})) for model in models}
    for task in names:
        missing = [model for model in models if task not in outputs[model]]
        rows = suite.rows(known[task], limit, seed) if missing and task in known else []
        for name in missing:
            model = models[name]
            if task == "perplexity":
                nll = perplexity(model, sequences)["nll"]
                found = [{"id": index, "nll": value, "tokens": length - 1} for index, value in enumerate(nll)]
            elif task == "copy":
                found = copy(model, heldout, copy_passages, copy_tokens, copy_filler, seed)["passages"]
            else:
                found = suite.score(model, tokenizer, rows, label=f"{task} ({name})")
            outputs[name][task] = found
            if save:
                save(_result(names, outputs, chances, seed))
    return _result(names, outputs, chances, seed)


def check_text(
    heldout: Tensor, perplexity_tokens: int, length: int, passages: int, copy_tokens: int, filler: int, seed: int
) -> Tensor:
    """The sequences that perplexity is measured on, [count, length].

    Raises UserError where there is too little held-out text for them or for the copy test.
    """
    if passages:
        copy_batch(heldout, passages, copy_tokens, filler, seed)
    return _sequences(heldout, perplexity_tokens, length)


def _sequences(heldout: Tensor, tokens: int, length: int) -> Tensor:
    if tokens > len(heldout):
        raise UserError(
            f"evaluate.perplexity_tokens: {tokens} is more than the {len(heldout)} held-out tokens; "
            "give fewer, or hold out more text (data.heldout_tokens)"
        )
    if not 2 <= length <= tokens:
        raise UserError(f"evaluate.length: {length} does not fit; give 2 to {tokens} (evaluate.perplexity_tokens)")
    count = tokens // length
    return heldout[: count * length].view(count, length)


def _result(
    names: Sequence[str], outputs: Mapping[str, Mapping[str, Outputs]], chances: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Everything follows from the outputs, in an order that does not depend on when they came."""
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    ordered = {model: {task: found[task] for task in names if task in found} for model, found in outputs.items()}
    for model, found in ordered.items():
        for task, records in found.items():
            for measure in _measures(task):
                value, stderr = (from_nll if measure.exponential else mean_stderr)(measure.values(records))
                n = sum(record["tokens"] for record in records) if measure.exponential else len(records)
                row = {"task": task, "metric": measure.metric, "value": value, "stderr": stderr, "n": n, "seed": seed}
                rows.append({"model": model, **row})
    for task in names:
        if task in ordered.get("base", {}) and task in ordered.get("hybrid", {}):
            base, hybrid = ordered["base"][task], ordered["hybrid"][task]
            _same_rows(base, hybrid)
            for measure in _measures(task):
                old, new = measure.values(base), measure.values(hybrid)
                chance = chances.get(task, measure.chance(base)) if measure.chance else None
                pair = _paired_perplexity(old, new) if measure.exponential else _paired(old, new, chance)
                pairs.append({"task": task, "metric": measure.metric, **pair})
    return {"rows": rows, "paired": pairs, "outputs": ordered}

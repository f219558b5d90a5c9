"""The verdict: base and hybrid on the same rows, with paired differences and the share that was kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.measure import Measure, Outputs, field
from postnas.evaluate.perplexity import CausalLM, from_nll, mean_stderr, perplexity
from postnas.evaluate.recall import copy, copy_batch
from postnas.evaluate.suite import Wanted

KEPT_NEEDS = 5.0  # standard errors above chance: a share of less than that is mostly noise
PERPLEXITY = (Measure("perplexity", field("nll"), exponential=True),)
COPY = (Measure("copy_accuracy", field("accuracy"), chance=lambda rows: 0.0), Measure("copy_nll", field("nll")))


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
    allow_code: bool = False,
    excluded: Callable[[str], Collection[str]] = lambda task: frozenset(),
    done: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run every measure for every model, each on the same text and rows.

    models: by name; `base` and `hybrid` are compared. heldout: [M] int64. tasks: names of tasks, of long-context
    tasks with their length (`needle@4096`), or of groups. limit: rows a task, all where None. perplexity_tokens: the
    first of `heldout`, in sequences of `length`, a rest left out; 0 leaves perplexity out. copy_*: as in
    `recall.copy`; 0 passages leave the copy test out. allow_code: run programs that a model wrote, confined.
    excluded: ids of a task's rows that are left out, since a search has seen them.

    Returns rows: {model, task, metric, value, stderr, n, seed}; paired (hybrid - base): {task, metric, difference,
    stderr, n, kept}; kept: the mean share above chance that the hybrid kept, over the tasks that the base can do,
    with their names; skipped: {task, reason} of what a group names and cannot be done; outputs: {model: {task: one
    record a row}}, from which all figures follow. n counts rows, passages, or for perplexity predicted tokens (paired:
    sequences). Nothing in it depends on interruptions: `save` gets the result so far after each model's task, and
    `done`, such a result made with the same models, text and settings, spares what it holds. It survives JSON. Bad
    input is found before any model runs, as UserError: an unknown task, too little held-out text, a named task whose
    rows cannot be had or whose length no prompt fits.
    """
    known, skipped = suite.wanted(tasks, allow_code)
    sequences = check_text(heldout, perplexity_tokens, length, copy_passages, copy_tokens, copy_filler, seed)
    kept = done["outputs"] if done else {}
    outputs: dict[str, dict[str, Outputs]] = {model: dict(kept.get(model, {})) for model in models}
    needed = [one for one in known if any(one.task.name not in found for found in outputs.values())]
    rows, without = _rows(needed, tokenizer, limit, seed, excluded)
    skipped += without
    own = {one.task.name: one.task for one in known if one not in needed or one.task.name in rows}
    measures: dict[str, tuple[Measure, ...]] = {"perplexity": PERPLEXITY} if perplexity_tokens else {}
    measures |= {"copy": COPY} if copy_passages else {}
    measures |= {name: suite.measures(task) for name, task in own.items()}
    for name in measures:
        for model in [model for model in models if name not in outputs[model]]:
            if name == "perplexity":
                nll = perplexity(models[model], sequences)["nll"]
                found = [{"id": index, "nll": value, "tokens": length - 1} for index, value in enumerate(nll)]
            elif name == "copy":
                found = copy(models[model], heldout, copy_passages, copy_tokens, copy_filler, seed)["passages"]
            else:
                found = suite.outputs(own[name], models[model], tokenizer, rows[name], f"{name} ({model})")
            outputs[model][name] = found
            if save:
                save(result(measures, outputs, skipped, seed))
        rows.pop(name, None)
    return result(measures, outputs, skipped, seed)


def _rows(
    needed: Sequence[Wanted],
    tokenizer: Any,
    limit: int | None,
    seed: int,
    excluded: Callable[[str], Collection[str]],
) -> tuple[dict[str, list[Any]], list[dict[str, str]]]:
    """Each task's rows by its name, and what of a group has none: {task, reason}. Raises UserError for a named task.

    All are kept until their task is done: long prompts take too long to make them twice.
    """
    rows: dict[str, list[Any]] = {}
    without = []
    for one in needed:
        try:
            rows[one.task.name] = suite.rows(one.task, tokenizer, limit, seed, excluded(one.task.name))
        except UserError as error:
            if one.group is None:
                raise
            without.append({"task": one.task.name, "reason": str(error)})
    return rows, without


def check_text(
    heldout: Tensor, perplexity_tokens: int, length: int, passages: int, copy_tokens: int, filler: int, seed: int
) -> Tensor:
    """The sequences that perplexity is measured on, [count, length].

    Raises UserError where there is too little held-out text for them or for the copy test.
    """
    if passages:
        copy_batch(heldout, passages, copy_tokens, filler, seed)
    return _sequences(heldout, perplexity_tokens, length) if perplexity_tokens else heldout[:0].view(0, length)


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


def result(
    measures: Mapping[str, Sequence[Measure]],
    outputs: Mapping[str, Mapping[str, Outputs]],
    skipped: Sequence[dict[str, str]],
    seed: int,
) -> dict[str, Any]:
    """What `evaluate` returns: all of it follows from the outputs, in an order that does not depend on when they came.

    measures: the metrics of each task, in the order of the result.
    """
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    ordered = {model: {task: found[task] for task in measures if task in found} for model, found in outputs.items()}
    for model, found in ordered.items():
        for task, records in found.items():
            for measure in measures[task]:
                value, stderr = (from_nll if measure.exponential else mean_stderr)(measure.values(records))
                n = sum(record["tokens"] for record in records) if measure.exponential else len(records)
                row = {"task": task, "metric": measure.metric, "value": value, "stderr": stderr, "n": n, "seed": seed}
                rows.append({"model": model, **row})
    for task in measures:
        if task in ordered.get("base", {}) and task in ordered.get("hybrid", {}):
            for measure in measures[task]:
                pairs.append({"task": task, "metric": measure.metric, **paired(measure, ordered, task)})
    return {
        "rows": rows,
        "paired": pairs,
        "kept": _kept(measures, pairs),
        "skipped": list(skipped),
        "outputs": ordered,
    }


def paired(measure: Measure, outputs: Mapping[str, Mapping[str, Outputs]], task: str) -> dict[str, Any]:
    """Difference (hybrid - base) in one metric on the same rows.

    Returns difference, stderr (of the mean of the rows' differences; None for a single row), n, and kept: the share
    of the base's score above chance that the hybrid has, None unless the base is at least five standard errors above
    chance. Raises UserError where the rows are not the same.
    """
    base, hybrid = outputs["base"][task], outputs["hybrid"][task]
    if [row["id"] for row in base] != [row["id"] for row in hybrid]:
        raise UserError(
            f"evaluation: base ({len(base)} rows) and hybrid ({len(hybrid)} rows) did not answer the same rows of "
            f"{task}; remove the kept results and evaluate both anew"
        )
    old, new = measure.values(base), measure.values(hybrid)
    if measure.exponential:
        return _paired_perplexity(old, new)
    difference, stderr = mean_stderr([after - before for before, after in zip(old, new, strict=True)])
    kept = None
    if measure.chance is not None:
        chance, (score, error) = measure.chance(base), mean_stderr(old)
        if error is not None and score > chance and score - chance >= KEPT_NEEDS * error:
            kept = (mean_stderr(new)[0] - chance) / (score - chance)
    return {"difference": difference, "stderr": stderr, "n": len(base), "kept": kept}


def _paired_perplexity(base: Sequence[float], hybrid: Sequence[float]) -> dict[str, Any]:
    """The delta method on both: to first order the difference moves as P_hybrid * nll - P_base * nll."""
    old, new = from_nll(base)[0], from_nll(hybrid)[0]
    _, stderr = mean_stderr([new * h - old * b for b, h in zip(base, hybrid, strict=True)])
    return {"difference": new - old, "stderr": stderr, "n": len(base), "kept": None}


def _kept(measures: Mapping[str, Sequence[Measure]], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean share above chance that was kept, by each task's chief metric, and which tasks count.

    A task counts where the base is at least five standard errors above chance; of the others a share says nothing.
    """
    chief = {task: ones[0].metric for task, ones in measures.items() if ones[0].chance is not None}
    shares = {pair["task"]: pair["kept"] for pair in pairs if chief.get(pair["task"]) == pair["metric"]}
    able = [task for task, value in shares.items() if value is not None]
    mean = sum(shares[task] for task in able) / len(able) if able else None
    return {"mean": mean, "tasks": able, "base_cannot": [task for task, value in shares.items() if value is None]}

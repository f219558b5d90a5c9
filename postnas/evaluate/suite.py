"""All kinds of tasks behind one face: which are wanted, their rows, what a model gives to them, and the metrics."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from postnas import sources
from postnas.errors import UserError
from postnas.evaluate import batches, choice, code, groups, long, sandbox, written
from postnas.evaluate.answers import questions
from postnas.evaluate.measure import Measure, Outputs
from postnas.evaluate.task import LONG_ROWS, Task, drawn, load_task

CPU_TOKENS = 4096, 16_384
"""Tokens of a batch on a CPU: of likelihoods, and of generation."""
CUDA_TOKENS = 65_536, 1 << 20
"""The same on a GPU of 80 GB; less where less memory is free. What caches may hold, `batches.cache_room` says."""


@dataclass(frozen=True)
class Wanted:
    """A task that is to be done. One of a group is left out, with its reason, where it cannot be done."""

    task: Task
    group: str | None = None


def wanted(names: Sequence[str], allow_code: bool) -> tuple[list[Wanted], list[dict[str, str]]]:
    """The tasks that names of tasks and groups stand for, each once, and what cannot be done: {task, reason}.

    Raises UserError for an unknown name, and for a task that was named itself and may not run.
    """
    found: dict[str, Wanted] = {}
    skipped: dict[str, dict[str, str]] = {}
    for name in names:
        if name not in groups.group_names():
            task = load_task(name)
            if task.kind == "code" and (reason := _no_code(allow_code)):
                raise UserError(f"evaluate.tasks: {name} {reason}")
            found[task.name] = Wanted(task)
            continue
        for member in groups.resolve(name):
            if member.ours is None:
                reason = groups.runnable(member) or (
                    f"lm_eval runs it: postnas eval --harness {' '.join(member.harness_arguments())}"
                )
                skipped.setdefault(member.name, {"task": member.name, "reason": reason})
                continue
            task = load_task(member.ours)
            if task.kind == "code" and (reason := _no_code(allow_code)):
                skipped.setdefault(member.name, {"task": member.ours, "reason": reason})
            else:
                found.setdefault(member.ours, Wanted(task, name))
    return list(found.values()), list(skipped.values())


def check(names: Sequence[str], allow_code: bool) -> None:
    """What `wanted` refuses, without a look at the hub or at what is installed: for commands that do not evaluate.

    Raises UserError for an unknown name, and for a task that was named itself and may not run.
    """
    for name in names:
        if name not in groups.group_names():
            wanted([name], allow_code)


def _no_code(allow_code: bool) -> str:
    """Why code may not run here; empty where it may."""
    if not allow_code:
        return "runs programs that a model wrote; say --allow-code (evaluate.allow_code) to let it"
    reason = sandbox.available()
    return f"cannot be confined here: {reason}; run it elsewhere" if reason else ""


def rows(
    task: Task, tokenizer: Any, limit: int | None, seed: int, excluded: Collection[str] = frozenset()
) -> list[Any]:
    """The task's rows in the file's order; with a limit, that many of them, drawn by `seed`.

    excluded: ids of rows that are left out before any is drawn.
    Raises UserError where the file cannot be had or has no row.
    """
    if task.kind == "long":
        assert task.length is not None
        return list(long.make(task.name.partition("@")[0], tokenizer, task.length, limit or LONG_ROWS, seed))
    records = sources.records(task.source, task.sha256)
    found: list[Any]
    if task.kind == "choice":
        found = list(choice.rows(task, records))
    elif task.kind == "code":
        found = list(code.problems(asdict(task), records))
    else:
        found = list(questions(asdict(task), records))
    return drawn([row for row in found if row.id not in excluded], limit, seed)


def outputs(task: Task, model: Any, tokenizer: Any, rows: Sequence[Any], label: str) -> Outputs:
    """What the model gives to each row, in their order."""
    scored, made = batch_tokens(model)
    if task.kind == "choice":
        return choice.score(model, tokenizer, rows, scored, label)
    if task.kind == "last_word":
        return written.last_words(model, tokenizer, rows, scored, label)
    work: Any = {"answer": written.answers, "code": written.programs, "long": written.recalled}[task.kind]
    return work(task, model, tokenizer, rows, made, label)


def measures(task: Task) -> tuple[Measure, ...]:
    """The task's metrics, the chief one first."""
    return choice.measures(task) if task.kind == "choice" else written.measures(task)


def batch_tokens(model: Any) -> tuple[int, int]:
    """Tokens of a batch for this model on its device: of likelihoods, and of generation."""
    if model.device.type != "cuda":
        return CPU_TOKENS
    part = min(1.0, 3 * batches.cache_room(model.device) / 80e9)
    return max(4096, int(CUDA_TOKENS[0] * part)), max(4096, int(CUDA_TOKENS[1] * part))

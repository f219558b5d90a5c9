"""Code tasks: a model goes on with a prompt, and what it wrote is run with the task's tests, in the sandbox."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from postnas.errors import UserError
from postnas.evaluate import sandbox

SECONDS = 15
"""Wall clock of one program: the slowest right solution (MBPP 123) takes four on a machine with nothing else to do."""


@dataclass(frozen=True)
class Problem:
    """One function or script to write."""

    id: str
    """The data set's own name for it."""
    prompt: str
    """What the model goes on with."""
    before: str
    """What the program holds before the completion; empty where the completion is the whole script."""
    test: str
    """What the program holds after it: statements that raise where the completion is wrong."""
    stops: tuple[str, ...]
    """Where a completion ends: before the first of these."""
    solution: str
    """A right completion."""


def problems(task: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    """The problems of a task of the kind `code`, in the order of its records.

    task: the fields of its YAML. `context`, `before` (optional), `test` and `solution` are templates
    (str.format) over a record's fields, `stop` is a list. records: requests of olmo's files, each with
    a `doc` that has a `task_id`. Raises UserError at a record that lacks what a template names.
    """
    for number, record in enumerate(records, 1):
        try:
            yield Problem(
                id=str(record["doc"]["task_id"]),
                prompt=task["context"].format(**record),
                before=(task.get("before") or "").format(**record),
                test=task["test"].format(**record),
                stops=tuple(task["stop"]),
                solution=task["solution"].format(**record),
            )
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{task['source']}, row {number}: does not have what the task's templates name "
                f"({type(error).__name__}: {error}); give the file that the task pins"
            ) from error


def cut(problem: Problem, completion: str) -> str:
    """The completion up to the first of the problem's stops.

    A whole script loses the blanks that a tokenizer or a prompt puts in front; a function's body needs them.
    """
    if not problem.before:
        completion = completion.strip()
    ends = [place for stop in problem.stops if (place := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]


def program(problem: Problem, completion: str) -> str:
    """The source that is run: it reaches its end only where the completion passes the tests."""
    return f"{problem.before}{cut(problem, completion)}\n{problem.test}\n"


def check(problem: Problem, completion: str) -> dict[str, Any]:
    """Run one completion: {id, completion (as it was cut), passed (0 or 1), reason (one line)}.

    Raises UserError where the sandbox cannot be had.
    """
    outcome = sandbox.run(program(problem, completion), seconds=SECONDS)
    kept = cut(problem, completion)
    return {"id": problem.id, "completion": kept, "passed": int(outcome.passed), "reason": outcome.reason}

"""Multiple choice by log-likelihood.

Rows come in two shapes. Without `choices` a record is one request of olmo's files: doc_id, idx, label (the right
idx), doc, request; the records of one doc_id make a row. With `choices` a record is a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from postnas.evaluate.answers import examples
from postnas.evaluate.batches import Request, loglikelihoods
from postnas.evaluate.measure import Measure, Outputs
from postnas.evaluate.task import Task, encoded

PMI_DOC_ID = 1_000_000  # from this doc_id on, olmo's files repeat each question for unconditional scores
CHOICES = {"accuracy": "choice", "accuracy_norm": "choice_norm"}


@dataclass(frozen=True)
class Row:
    """One question. A context for each choice, since partial scoring puts the choice into the context."""

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    """What is scored; each begins with the space that divides it from its context."""
    gold: int


def rows(task: Task, records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """The rows of a task, in the order of its records."""
    return _plain_rows(task, records) if task.choices else _request_rows(task, records)


def _plain_rows(task: Task, records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    numbered = iter(enumerate(records))

    def row(number: int, record: dict[str, Any], lead: str) -> Row:
        continuations = tuple(" " + choice.format(**record) for choice in task.choices or ())
        gold = task.gold if isinstance(task.gold, int) else record[task.gold]
        return Row(
            id=str(number),
            contexts=(lead + task.context.format(**record),) * len(continuations),
            continuations=continuations,
            gold=task.labels.index(str(gold)) if task.labels else int(gold),
        )

    def solved(record: Any) -> str:
        one = row(0, record, "")
        return one.contexts[0] + one.continuations[one.gold]

    before = examples(asdict(task), (record for _, record in numbered), solved)
    for number, record in numbered:
        yield row(number, record, before(record))


def _request_rows(task: Task, records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    questions: dict[int, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["doc_id"] < PMI_DOC_ID:
            questions.setdefault(record["doc_id"], {})[record["idx"]] = record
    for doc_id, requests in questions.items():
        ordered = [requests[index] for index in sorted(requests)]
        yield Row(
            id=str(doc_id),
            contexts=tuple(task.context.format(**record) for record in ordered),
            continuations=tuple(record["request"]["continuation"] for record in ordered),
            gold=int(ordered[0]["label"]),
        )


def score(model: Any, tokenizer: Any, rows: Sequence[Row], batch_tokens: int = 4096, label: str = "score") -> Outputs:
    """Log-likelihood of every choice of every row, and the choice that each rule takes.

    tokenizer: a Hugging Face tokenizer, with the special tokens that it adds by itself. batch_tokens: as in
    `batches.loglikelihoods`. Returns, in the order of `rows`: id, gold, loglikelihoods (nats, one a choice), choice
    (the most likely), choice_norm (the most likely by character). The first of equals is taken. A character is one of
    Python's, without the leading space, as in acc_norm of lm-evaluation-harness.
    """
    pairs = [pair for row in rows for pair in zip(row.contexts, row.continuations, strict=True)]
    requests = [Request(*pair) for pair in encoded(tokenizer, pairs)]
    scored = iter(loglikelihoods(model, requests, batch_tokens=batch_tokens, label=label))
    results = []
    for row in rows:
        values = [next(scored).total for _ in row.continuations]
        by_character = [
            value / len(text.removeprefix(" ")) for value, text in zip(values, row.continuations, strict=True)
        ]
        results.append(
            {
                "id": row.id,
                "gold": row.gold,
                "loglikelihoods": values,
                "choice": values.index(max(values)),
                "choice_norm": by_character.index(max(by_character)),
            }
        )
    return results


def measures(task: Task) -> tuple[Measure, ...]:
    """accuracy and accuracy_norm; a guess scores the task's `chance`, or one over the number of choices."""

    def guess(rows: Outputs) -> float:
        if task.chance is not None:
            return task.chance
        return math.fsum(1 / len(row["loglikelihoods"]) for row in rows) / len(rows)

    return tuple(Measure(metric, right(choice), chance=guess) for metric, choice in CHOICES.items())


def right(choice: str) -> Callable[[Outputs], list[float]]:
    """1 where the choice under that name is the right one."""
    return lambda rows: [float(row[choice] == row["gold"]) for row in rows]

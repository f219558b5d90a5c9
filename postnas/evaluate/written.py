"""Tasks whose answer a model writes: the last word of a passage, an answer, a program, what a long context holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from postnas.evaluate import code, long
from postnas.evaluate.answers import METRICS, Question, cut, grade
from postnas.evaluate.batches import Request, Scored, generate, loglikelihoods
from postnas.evaluate.code import Problem
from postnas.evaluate.long import Case
from postnas.evaluate.measure import Measure, Outputs, nll, share
from postnas.evaluate.task import Task, encoded
from postnas.progress import Progress

TAIL = 16
"""Tokens that are read back after each new one, to see whether a stop text has come: longer than any of them."""


def last_words(model: Any, tokenizer: Any, rows: Sequence[Question], batch_tokens: int, label: str) -> Outputs:
    """Is each token of the last word the most likely one, and how likely is it? {id, accuracy, nll}, nll a word."""
    scored = _scored(model, tokenizer, [(row.prompt, row.answers[0]) for row in rows], batch_tokens, label)
    return [
        {"id": row.id, "accuracy": float(one.greedy), "nll": -one.total} for row, one in zip(rows, scored, strict=True)
    ]


def answers(task: Task, model: Any, tokenizer: Any, rows: Sequence[Question], batch_tokens: int, label: str) -> Outputs:
    """What the model writes, greedy, and what it is worth: {id, output, answers, and the metric's values}."""
    texts = _written(task, model, tokenizer, [row.prompt for row in rows], task.stop or (), batch_tokens, label)
    found = []
    for row, text in zip(rows, texts, strict=True):
        kept = cut(text, task.stop or ())
        found.append(
            {"id": row.id, "output": kept, "answers": list(row.answers)} | grade(asdict(task), kept, row.answers)
        )
    return found


def programs(task: Task, model: Any, tokenizer: Any, rows: Sequence[Problem], batch_tokens: int, label: str) -> Outputs:
    """What the model writes, run with its tests: {id, completion, passed, reason}."""
    texts = _written(task, model, tokenizer, [row.prompt for row in rows], task.stop or (), batch_tokens, label)
    found = []
    with Progress(f"{label}: run", total=len(rows)) as bar:
        for row, text in zip(rows, texts, strict=True):
            found.append(code.check(row, text))
            bar.advance(1)
    return found


def recalled(task: Task, model: Any, tokenizer: Any, rows: Sequence[Case], batch_tokens: int, label: str) -> Outputs:
    """What the model finds again: {id, output, answers, depth, recall, exact, nll}, nll a token of the answers."""
    texts = _written(task, model, tokenizer, [row.prompt for row in rows], (), batch_tokens, label)
    wanted = [(row.prompt, long.answer_text(row)) for row in rows]
    scored = _scored(model, tokenizer, wanted, batch_tokens, f"{label}: answers")
    return [
        {"id": row.id, "output": text, "answers": list(row.answers), "depth": row.depth}
        | long.score(row, text)
        | {"nll": -one.total / len(one.values)}
        for row, text, one in zip(rows, texts, scored, strict=True)
    ]


def measures(task: Task) -> tuple[Measure, ...]:
    """The metrics of a task of one of these kinds, the chief one first."""
    if task.kind == "last_word":
        return share("accuracy"), nll()
    if task.kind == "code":
        return (share("passed"),)
    if task.kind == "long":
        return share("recall"), share("exact"), nll()
    return tuple(share(name) for name in METRICS[task.metric or ""]("", ("",)))


def _scored(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_tokens: int, label: str
) -> list[Scored]:
    requests = [Request(*pair) for pair in encoded(tokenizer, pairs)]
    return loglikelihoods(model, requests, batch_tokens=batch_tokens, label=label)


def _written(
    task: Task,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    stop: Sequence[str],
    batch_tokens: int,
    label: str,
) -> list[str]:
    assert task.max_new_tokens is not None
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    made = generate(
        model,
        tokenizer(list(prompts))["input_ids"],
        max_new_tokens=task.max_new_tokens,
        stop=_stops(tokenizer, stop) if stop else None,
        end_ids=ends,
        batch_tokens=batch_tokens,
        label=label,
    )
    return [tokenizer.decode([token for token in tokens if token not in ends]) for tokens in made]


def _stops(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    return lambda tokens: any(text in tokenizer.decode(tokens[-TAIL:]) for text in stop)

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
"""Tokens that are read back after each new one, to see whether a stop text has come: longer than any of them. As many
of the prompt stand before what was written when it is decoded."""


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
    asked = tokenizer(list(prompts))["input_ids"]
    made = generate(
        model,
        asked,
        max_new_tokens=task.max_new_tokens,
        # All that a stop text needs is some text before it, so that of one prompt does for all.
        stop=_stops(_behind(tokenizer, asked[0]), stop) if stop else None,
        end_ids=ends,
        batch_tokens=batch_tokens,
        label=label,
    )
    return [
        _behind(tokenizer, prompt)([token for token in tokens if token not in ends])
        for prompt, tokens in zip(asked, made, strict=True)
    ]


def _behind(tokenizer: Any, prompt: list[int]) -> Callable[[list[int]], str]:
    """Decodes tokens as what stands behind the prompt.

    Decoded by themselves they are the beginning of a text, whose first space SentencePiece's decoder drops: a program
    would lose indentation. So the prompt's last tokens stand before them, and what those decode to is cut off.
    """
    # Where a character has several tokens, they must not begin inside it: one of four starts is a character's.
    ends = [prompt[-count:] for count in range(TAIL, TAIL + 4)]
    before = next((end for end in ends if "\ufffd" not in tokenizer.decode(end)), ends[0])
    head = tokenizer.decode(before)

    def text(tokens: list[int]) -> str:
        whole = tokenizer.decode([*before, *tokens])
        return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(tokens)

    return text


def _stops(text_of: Callable[[list[int]], str], stop: Sequence[str]) -> Callable[[list[int]], bool]:
    def stopped(tokens: list[int]) -> bool:
        end = text_of(tokens[-TAIL:])
        return any(text in end for text in stop)

    return stopped

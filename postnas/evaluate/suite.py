"""Multiple choice by log-likelihood. A task is data: one YAML in tasks/ says where its rows are and how to ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from postnas.errors import UserError
from postnas.evaluate.perplexity import CausalLM, token_nll
from postnas.progress import Progress

PMI_DOC_ID = 1_000_000  # from this doc_id on, olmo's files repeat each question for unconditional scores


@dataclass(frozen=True)
class Task:
    """One YAML of tasks/, under its file's name.

    Rows come in two shapes. Without `choices` a record is one request of olmo's files: doc_id, idx,
    label (the right idx), doc, request; the records of one doc_id make a row. With `choices` a record
    is a row.
    """

    name: str
    """The file's name without .yaml."""
    source: str
    """A file, as `postnas.sources.records` reads it."""
    licence: str
    """Licence of the data set."""
    split: str
    """Which part of the data set the file holds."""
    context: str
    """Template (str.format) of the prompt, over a record's fields; no space at its end."""
    sha256: str | None = None
    """SHA-256 of the file; checked when given."""
    choices: list[str] | None = None
    """Templates of the choices, over a record's fields."""
    gold: str | int = "label"
    """Field that holds the right choice: its number from 0, a boolean, or an entry of `labels`. A number
    here is the right choice of every row."""
    labels: list[str] | None = None
    """Values of the gold field in the order of the choices, where it is no number."""
    chance: float | None = None
    """Accuracy of the best blind guess, where that is not one over the number of choices."""


@dataclass(frozen=True)
class Row:
    """One question. A context for each choice, since partial scoring puts the choice into the context."""

    id: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    """What is scored; each begins with the space that divides it from its context."""
    gold: int


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    files = resources.files("postnas.evaluate").joinpath("tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """The task of that name. Raises UserError, with the names there are, where there is none."""
    import yaml

    if name not in task_names():
        raise UserError(f"evaluate.tasks: {name!r} is unknown; choose from {', '.join(task_names())}")
    text = resources.files("postnas.evaluate").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    return Task(name=name, **yaml.safe_load(text))


def rows(task: Task, limit: int | None, seed: int) -> list[Row]:
    """The task's rows in the file's order; with a limit, that many of them, drawn by `seed`.

    A larger limit holds the rows of a smaller one. Raises UserError where the file cannot be had or
    has no row.
    """
    from postnas import sources

    records = sources.records(task.source, task.sha256)
    found = list(_plain_rows(task, records) if task.choices else _request_rows(task, records))
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()[:limit]
    return [found[index] for index in sorted(drawn)]


def _plain_rows(task: Task, records: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records):
        continuations = tuple(" " + choice.format(**record) for choice in task.choices or ())
        gold = task.gold if isinstance(task.gold, int) else record[task.gold]
        yield Row(
            id=str(number),
            contexts=(task.context.format(**record),) * len(continuations),
            continuations=continuations,
            gold=task.labels.index(str(gold)) if task.labels else int(gold),
        )


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


@torch.inference_mode()
def score(
    model: CausalLM, tokenizer: Any, rows: Sequence[Row], batch_tokens: int = 4096, label: str = "score"
) -> list[dict[str, Any]]:
    """Log-likelihood of every choice of every row, and the choice that each rule takes.

    tokenizer: a Hugging Face tokenizer, with the special tokens that it adds by itself.
    batch_tokens: tokens of a batch, padding included; a longer request goes alone.
    Returns, in the order of `rows`: id, gold, loglikelihoods (nats, one a choice), choice (the most
    likely), choice_norm (the most likely by character). The first of equals is taken. A character is
    one of Python's, without the leading space, as in acc_norm of lm-evaluation-harness.
    """
    pairs = [pair for row in rows for pair in zip(row.contexts, row.continuations, strict=True)]
    likelihoods = iter(_loglikelihoods(model, _encode(tokenizer, pairs), batch_tokens, label))
    results = []
    for row in rows:
        values = [next(likelihoods) for _ in row.continuations]
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


def _encode(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """For each (context, continuation): the tokens of both as one text, and where the continuation begins.

    A tokenizer may merge over the border, so the continuation is what stands behind as many tokens
    as the context has alone.
    """
    whole = tokenizer([context + continuation for context, continuation in pairs])["input_ids"]
    alone = tokenizer([context for context, _ in pairs])["input_ids"]
    return [(tokens, len(context)) for tokens, context in zip(whole, alone, strict=True)]


def _loglikelihoods(
    model: CausalLM, requests: list[tuple[list[int], int]], batch_tokens: int, label: str
) -> list[float]:
    """Longest first: padding is least, and a batch that does not fit memory fails at once."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]))
    values = [0.0] * len(requests)
    with Progress(label, total=sum(len(tokens) for tokens, _ in requests)) as bar:
        while order:
            size = max(1, batch_tokens // len(requests[order[0]][0]))
            batch, order = order[:size], order[size:]
            tokens = pad_sequence([torch.tensor(requests[index][0]) for index in batch], batch_first=True)
            place = torch.arange(tokens.shape[1])
            ends = torch.tensor([len(requests[index][0]) for index in batch])[:, None]
            starts = torch.tensor([requests[index][1] for index in batch])[:, None]
            tokens, scored = tokens.to(model.device), (place >= starts) & (place < ends)
            mask = (place < ends).long().to(model.device)
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            nll = token_nll(logits, tokens, scored.to(model.device)).cpu()
            for index, part in zip(batch, nll.split(scored.sum(dim=1).tolist()), strict=True):
                values[index] = -part.double().sum().item()
            bar.advance(int(ends.sum()))
    return values

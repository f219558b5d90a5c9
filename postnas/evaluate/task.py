"""A task is data: one YAML in tasks/ says where its rows are, how to ask, and what an answer is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import torch

from postnas.errors import UserError
from postnas.evaluate import long

Item = TypeVar("Item")
LONG_ROWS = 100
"""Rows of a long-context task where no limit says how many; they are made, so there is no whole set."""


@dataclass(frozen=True)
class Task:
    """One YAML of tasks/ under its file's name, or a long-context task with its length, as in `needle@4096`."""

    name: str
    """The file's name without .yaml; of a long-context task NAME@TOKENS, the tokens as a plain number."""
    source: str
    """A file or several, as `postnas.sources.records` reads them."""
    licence: str
    """Licence of the data set."""
    split: str
    """Which part of the data set the file holds."""
    context: str
    """Template (str.format) of the question, over a record's fields; no space at its end."""
    kind: str = "choice"
    """`choice`, `last_word`, `answer`, `code` or `long`; what each does stands in its module."""
    form: str | None = None
    """The prompt in one line, for the table of tasks."""
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
    answers: str | list[str] | None = None
    """Where the right answers stand; this and the next fields as in answers.py."""
    metric: str | None = None
    stop: list[str] | None = None
    max_new_tokens: int | None = None
    shots: int | None = None
    shots_in: str | None = None
    shots_begin: str | None = None
    shots_from: str | None = None
    shots_sha256: str | None = None
    shots_by: str | None = None
    lead: str | None = None
    before: str | None = None
    """Templates of a program's parts, as in code.py."""
    test: str | None = None
    solution: str | None = None
    length: int | None = None
    """Tokens of a prompt that is made."""


def task_names() -> list[str]:
    """The names of all tasks that have a file, sorted."""
    files = resources.files("postnas.evaluate").joinpath("tasks").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """The task of that name. Raises UserError, with the names there are, where there is none."""
    import yaml

    if "@" in name:
        return _long(name)
    if name not in task_names():
        made = ", ".join(f"{known}@4096" for known in long.TASKS)
        raise UserError(f"evaluate.tasks: {name!r} is unknown; choose from {', '.join(task_names())}; or {made}")
    text = resources.files("postnas.evaluate").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    return Task(name=name, **yaml.safe_load(text))


def _long(name: str) -> Task:
    known, _, size = name.partition("@")
    found = re.fullmatch(r"(\d+)([kK]?)", size)
    if known not in long.TASKS or found is None:
        raise UserError(
            f"evaluate.tasks: {name!r} is no long-context task; give NAME@TOKENS with a name of {', '.join(long.TASKS)}"
        )
    length = int(found[1]) * (1024 if found[2] else 1)
    task = long.TASKS[known]
    return Task(
        name=f"{known}@{length}",  # so that needle@4k and needle@4096 are one task
        source="made by postnas.evaluate.long",
        licence="none: made here",
        split="made",
        context="",
        kind="long",
        form=f"{task.about}; {length:,} tokens",
        max_new_tokens=task.max_new_tokens,
        length=length,
    )


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """All items, or with a limit that many of them, drawn by `seed`, in their own order.

    A larger limit holds the items of a smaller one.
    """
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()[:limit]
    return [items[index] for index in sorted(chosen)]


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """For each (context, continuation): the tokens of both as one text, cut where the continuation begins.

    A tokenizer may merge over the border, so the continuation is what stands behind as many tokens as the
    context has alone, and one token at least. Nothing can be predicted without a token before it: where a context is
    empty, the tokenizer's first or last special token stands there.
    """
    if not pairs:
        return []
    whole = tokenizer([context + continuation for context, continuation in pairs])["input_ids"]
    alone = tokenizer([context for context, _ in pairs])["input_ids"]
    found = []
    for tokens, context in zip(whole, alone, strict=True):
        border = min(len(context), len(tokens) - 1)
        found.append((list(tokens[:border]) or _beginning(tokenizer), list(tokens[border:])))
    return found


def _beginning(tokenizer: Any) -> list[int]:
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            return [special]
    raise UserError("context: is empty, and the tokenizer has no special token to begin with; give a context")

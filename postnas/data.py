"""Text to tokens, once: one file of training tokens, one of held-out tokens, and batches as a function of the step.

A batch depends on the seed and the step alone, so the data's position in a checkpoint is the step,
and any number of ranks can take their share of a batch without talking to each other.
"""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.files import read_json, replacing, write_json
from postnas.progress import Progress
from postnas.recipe import Data, Text
from postnas.sources import documents

BATCH = 256
"""Documents that the tokenizer is handed at a time."""


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T] int64, and their positions [B, T] where documents are kept apart."""

    tokens: Tensor
    positions: Tensor | None


class Tokens:
    """A file of token ids, read through memory: documents joined, each followed by the end-of-text id."""

    def __init__(self, path: Path, dtype: str, end: int, repeat: float = 0.0) -> None:
        """repeat: share of a batch's windows that end with a copy of their beginning; see `repeated`."""
        self.path, self.end, self.repeat = path, end, repeat
        self.ids: Any = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self, step: int, batch: int, length: int, seed: int, borders: bool = False, rank: int = 0, world: int = 1
    ) -> Batch:
        """Windows of `length` tokens, every one once a pass, in an order drawn anew for each pass.

        On several ranks each gets its share of the `batch` windows. Raises UserError where the file is
        shorter than one window, or the batch cannot be shared out evenly.
        """
        if batch % world:
            raise UserError(f"batch: {batch} sequences cannot be shared by {world} ranks; give a multiple of {world}")
        windows = len(self) // length
        if windows == 0:
            raise UserError(
                f"{self.path}: {len(self)} tokens are fewer than one sequence of {length}; "
                "add text or ask for shorter sequences"
            )
        rows = []
        for number in range(step * batch + rank, (step + 1) * batch, world):
            order = _order(windows, seed, number // windows)
            row = self._window(int(order[number % windows]) * length, length)
            rows.append(repeated(row) if Random(f"{seed}:{number}").random() < self.repeat else row)
        tokens = torch.stack(rows)
        return Batch(tokens, positions(tokens, self.end) if borders else None)

    def sequences(self, count: int, length: int) -> Tensor:
        """The first `count` windows of `length` tokens, [count, length]; fewer where the file ends."""
        count = min(count, len(self) // length)
        if count == 0:
            raise UserError(
                f"{self.path}: {len(self)} tokens are fewer than one sequence of {length}; "
                "add text or ask for shorter sequences"
            )
        return self._window(0, count * length).view(count, length)

    def half(self, number: int) -> Tokens:
        """The first half (0) or the second (1), so that what is searched on is not what is measured on."""
        middle = len(self) // 2
        part = copy(self)
        part.ids = self.ids[:middle] if number == 0 else self.ids[middle:]
        return part

    def stream(self) -> Tensor:
        """All tokens, [N] int64."""
        return self._window(0, len(self))

    def _window(self, start: int, length: int) -> Tensor:
        return torch.from_numpy(self.ids[start : start + length].astype(np.int64))


def _order(windows: int, seed: int, epoch: int, _memory: dict[tuple[int, int, int], Tensor] = {}) -> Tensor:  # noqa: B006
    key = (windows, seed, epoch)
    if key not in _memory:
        _memory.clear()
        _memory[key] = torch.randperm(windows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return _memory[key]


def repeated(window: Tensor) -> Tensor:
    """A window [T] whose last three eighths are its first three eighths again.

    What a base's attention finds again in its context, a linear layer learns from text in which there is something to
    find. Short documents, one after another, hold next to none of it.
    """
    size = 3 * len(window) // 8
    return torch.cat([window[: len(window) - size], window[:size]])


def positions(tokens: Tensor, end: int) -> Tensor:
    """Positions [B, T] that begin again after each end-of-text id, so that documents do not see each other."""
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(tokens[:, :-1] == end, index[:, 1:], 0)
    return index - begins.cummax(dim=1).values


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base folder. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise UserError(f"{folder}: holds no tokenizer that can be read ({error}); add its tokenizer.json") from error


def held_out(document: str, share: float) -> bool:
    """Whether a document is held out: decided by its own hash, so by nothing else."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prepare(data: Data, tokenizer: Any, folder: Path) -> tuple[Tokens, Tokens]:
    """Training and held-out tokens of a recipe, tokenised into `folder` unless they are there already.

    Raises UserError for text that cannot be read, is empty, or is too short to hold anything out.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("base.model: its tokenizer has no end-of-text token; choose another base")
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    meta = folder / "tokens.json"
    if not all(path.exists() for path in (meta, folder / "train.bin", folder / "heldout.bin")):
        counts = _tokenise(data, tokenizer, folder, dtype, end)
        write_json(meta, counts | {"dtype": dtype, "end": end})
    stored = read_json(meta)
    return (
        Tokens(folder / "train.bin", stored["dtype"], stored["end"], data.repeat),
        Tokens(folder / "heldout.bin", stored["dtype"], stored["end"]),
    )


def _tokenise(data: Data, tokenizer: Any, folder: Path, dtype: str, end: int) -> dict[str, int]:
    wanted = {"train": data.tokens, "heldout": data.heldout_tokens}
    counts = {"train": 0, "heldout": 0}
    with (
        replacing(folder / "train.bin") as train_path,
        replacing(folder / "heldout.bin") as heldout_path,
        open(train_path, "wb") as train,
        open(heldout_path, "wb") as heldout,
        Progress("tokenise", sum(wanted.values())) as bar,
    ):
        files = {"train": train, "heldout": heldout}
        texts = _texts(data.text)
        while any(counts[part] < wanted[part] for part in wanted):
            batch = list(islice(texts, BATCH))
            if not batch:
                break
            chosen = [(text, "heldout" if held_out(text, data.heldout) else "train") for text in batch]
            chosen = [(text, part) for text, part in chosen if counts[part] < wanted[part]]
            if not chosen:
                continue
            encoded = tokenizer([text for text, _ in chosen], add_special_tokens=False)["input_ids"]
            for ids, (_, part) in zip(encoded, chosen, strict=True):
                kept = np.array([*ids, end], dtype=dtype)[: wanted[part] - counts[part]]
                kept.tofile(files[part])
                counts[part] += len(kept)
                bar.advance(len(kept))
        for part, count in counts.items():
            if count == 0:
                raise UserError(
                    f"data.text: no document fell to the {part} part; give more text, or another data.heldout"
                )
    return counts


def _texts(sources: list[Text]) -> Any:
    for source in sources:
        yield from documents(source.source, source.sha256, source.field)

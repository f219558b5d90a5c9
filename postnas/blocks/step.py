"""What a forward pass tells every mixer: which tokens are real, where they stand, who may see whom.

The model puts a row's real tokens first and its padding last before any layer runs, and back in
the caller's order after the last one. Mixers so meet one case only: `lengths` real tokens, then
padding, whatever side the caller padded on, in a first chunk or a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]


@dataclass
class Keys:
    """How one kind of attention (a window, or None for all) meets its keys in this step."""

    mask: Tensor | None
    """[B or 1, 1, T, S] bool, True where the query may see the key; None where `causal` says it all."""
    causal: bool
    """True where a plain causal mask over T x T tokens is right."""
    keep: int | Tensor | None
    """What the cache keeps of the S keys: all (None), the last n (int), or these slots ([B, n])."""


@dataclass
class Ledger:
    """Which token stands in each slot of the KV caches of one window; the layers share it."""

    window: int | None
    length: int = 0
    rank: Tensor | None = None
    """[B, length] running number of the token in its row, -1 for padding and for sequences that have
    ended; None while every row holds the same unbroken run of tokens."""

    def meet(self, step: Step) -> Keys:
        """The keys of this step's tokens; afterwards the ledger counts them as cached."""
        if self.rank is None and step.valid is None and step.segments is None:
            return self._meet_plain(step)
        return self._meet_ranked(step)

    def _limit(self, slots: int) -> int:
        """A window of W sees W - 1 earlier tokens, so no more are kept."""
        return slots if self.window is None else min(slots, self.window - 1)

    def _meet_plain(self, step: Step) -> Keys:
        tokens, slots = step.tokens, self.length + step.tokens
        within = self.window is None or slots <= self.window
        mask = None
        causal = self.length == 0 and tokens > 1 and within
        if not causal and not (tokens == 1 and within):
            key = torch.arange(slots, device=step.device)
            query = key[self.length :, None]
            mask = key <= query
            if self.window is not None:
                mask &= query - key < self.window
            mask = mask[None, None]
        kept = self._limit(slots)
        self.length = kept
        return Keys(mask, causal, None if self.window is None else kept)

    def _meet_ranked(self, step: Step) -> Keys:
        query = step.ranks()
        past = self.rank
        if past is None:
            past = step.counts()[:, None] - self.length + torch.arange(self.length, device=step.device)
        key = torch.cat([past, query], dim=1)
        allowed = (key[:, None] >= 0) & (key[:, None] <= query[:, :, None])
        if self.window is not None:
            allowed &= query[:, :, None] - key[:, None] < self.window
        if step.segments is not None:
            owner = F.pad(step.segments, (self.length, 0))
            allowed &= owner[:, None] == step.segments[:, :, None]
            key = torch.where(owner == step.segments[:, -1:], key, -1)
        # A query without any key would be NaN, and NaN spreads: padding sees everything instead.
        allowed |= (query < 0)[:, :, None]
        kept = self._limit(key.shape[1])
        keep: Tensor | None = None
        if self.window is not None:
            keep = key.argsort(dim=1, stable=True)[:, key.shape[1] - kept :]
            key = key.gather(1, keep)
        self.rank, self.length = key, kept
        return Keys(allowed[:, None], False, keep)


@dataclass
class Step:
    """One forward pass over T tokens of B rows."""

    batch: int
    tokens: int
    device: torch.device
    rope: Callable[[str], Rope]
    """cos and sin, each [B or 1, T, head_dim], for a kind of attention (`attn`, `swa`)."""
    ledgers: dict[int | None, Ledger] = field(default_factory=dict)
    """The KV caches' ledgers; empty ones are made where a layer asks for a window that is new."""
    valid: Tensor | None = None
    """[B, T] bool, True for real tokens, which come first in each row; None where all are real."""
    segments: Tensor | None = None
    """[B, T] int, rising by one where a new packed sequence begins; 0 goes on with what is cached. None where
    every row goes on with one sequence."""
    seen: int | Tensor = 0
    """Real tokens that each row's cache has seen: one number, or [B]."""
    _keys: dict[int | None, Keys] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor | None:
        """[B] real tokens of each row in this step; None where all are real."""
        return None if self.valid is None else self.valid.sum(1)

    def counts(self) -> Tensor:
        """[B] real tokens before this step."""
        return torch.as_tensor(self.seen, device=self.device).expand(self.batch)

    def ranks(self) -> Tensor:
        """[B, T] running number of each token in its row, -1 for padding."""
        number = self.counts()[:, None] + torch.arange(self.tokens, device=self.device)
        return number if self.valid is None else torch.where(self.valid, number, -1)

    def mask(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with zeros at padding."""
        if self.valid is None:
            return x
        return x * self.valid.view(self.valid.shape + (1,) * (x.ndim - 2)).to(x.dtype)

    def keys(self, window: int | None) -> Keys:
        """How attention of this window meets its keys, worked out once for all layers."""
        if window not in self._keys:
            self._keys[window] = self.ledgers.setdefault(window, Ledger(window)).meet(self)
        return self._keys[window]

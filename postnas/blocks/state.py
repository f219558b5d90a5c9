"""What a mixer remembers between steps: keys and values, or a recurrent state and a convolution's inputs.

States change in place. `tensors()` names what a row holds, so that rows can be picked, copied and counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Slots that a KV cache grows by: large enough that copying the old ones costs nothing a token."""


class RowState:
    """Picking rows and counting bytes, the same for every kind of state."""

    names: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, each with the batch first."""
        return {name: value for name in self.names if (value := getattr(self, name)) is not None}

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; rows may repeat (beam search). rows: [B'] int64."""
        for name, value in self.tensors().items():
            setattr(self, name, value.index_select(0, rows.to(value.device)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


class KVState(RowState):
    """Keys and values, [B, kv_heads, slots, head_dim], of full or windowed attention."""

    names = ("k", "v")

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.length = 0

    def append(self, k: Tensor, v: Tensor, keep: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Add k, v [B, kv_heads, T, head_dim]; return all keys and values that the step may see.

        keep: what stays afterwards, as `Keys.keep` says.
        """
        before = self.length
        if keep is None:
            self._reserve(k, before + k.shape[2])
            assert self.k is not None and self.v is not None
            self.length += k.shape[2]
            self.k[:, :, before : self.length] = k.detach()
            self.v[:, :, before : self.length] = v.detach()
            if before == 0:
                return k, v
            return self.k[:, :, : self.length], self.v[:, :, : self.length]
        if before:
            assert self.k is not None and self.v is not None
            k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.k, self.v = _kept(k, keep), _kept(v, keep)
        self.length = self.k.shape[2]
        return k, v

    def _reserve(self, like: Tensor, slots: int) -> None:
        if self.k is not None and self.k.shape[2] >= slots:
            return
        shape = (*like.shape[:2], -(-slots // BLOCK) * BLOCK, like.shape[3])
        k, v = like.new_empty(shape), like.new_empty(shape)
        if self.k is not None and self.v is not None:
            k[:, :, : self.length], v[:, :, : self.length] = self.k[:, :, : self.length], self.v[:, :, : self.length]
        self.k, self.v = k, v


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """A copy of the slots that stay, so that the rest is freed."""
    x = x.detach()
    if isinstance(keep, int):
        return x[:, :, x.shape[2] - keep :].clone()
    return x.gather(2, keep[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class LinearState(RowState):
    """A linear block's memory: conv [B, W - 1, channels], the last inputs of its convolutions, and
    recurrent [B, heads, key_dim, value_dim] in float32."""

    names = ("conv", "recurrent")

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.recurrent: Tensor | None = None

    def store(self, **values: Tensor) -> None:
        """Take new values, in place where the shapes are those held already."""
        for name, value in values.items():
            held: Any = getattr(self, name)
            if held is not None and held.shape == value.shape and held.dtype == value.dtype:
                held.copy_(value.detach())
            else:
                setattr(self, name, value.detach().clone())

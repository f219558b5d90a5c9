"""Full and sliding-window attention with grouped keys, RoPE, and the options of the base families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.norm import RMSNorm
from postnas.blocks.state import KVState
from postnas.blocks.step import Keys, Step
from postnas.errors import UserError

FEW = 8
"""Tokens of a step whose mask is small beside its keys."""


@dataclass(frozen=True)
class AttentionOptions:
    """Full attention has no options of its own: everything is the base's."""

    def resolve(self, dims: Dims) -> AttentionOptions:
        return self


@dataclass(frozen=True)
class WindowOptions:
    """Options of sliding-window attention."""

    window_size: int = 1152
    """Tokens a query sees, itself included."""

    def resolve(self, dims: Dims) -> WindowOptions:
        if self.window_size < 2:
            raise UserError(f"swa.window_size: {self.window_size} is too small; give 2 or more tokens")
        return self


class Attention(nn.Module):
    """Causal softmax attention; `window` limits what a query sees to that many tokens, itself included."""

    Options: type[Any] = AttentionOptions
    State = KVState
    kind = "attn"
    window: int | None = None

    def __init__(self, dims: Dims, options: AttentionOptions | WindowOptions) -> None:
        super().__init__()
        self.dims, self.options = dims, options
        heads, kv_heads, size = dims.heads, dims.kv_heads, dims.head_dim
        self.q_proj = nn.Linear(dims.hidden, heads * size, bias=dims.qkv_bias)
        self.k_proj = nn.Linear(dims.hidden, kv_heads * size, bias=dims.qkv_bias)
        self.v_proj = nn.Linear(dims.hidden, kv_heads * size, bias=dims.qkv_bias)
        self.o_proj = nn.Linear(heads * size, dims.hidden, bias=dims.out_bias)
        if dims.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(size, dims.eps, dims.norm_offset) for _ in range(2))

    def forward(self, x: Tensor, step: Step, state: KVState | None = None) -> tuple[Tensor, KVState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is appended to in place."""
        dims = self.dims
        q = self.q_proj(x).unflatten(-1, (dims.heads, dims.head_dim))
        k = self.k_proj(x).unflatten(-1, (dims.kv_heads, dims.head_dim))
        v = self.v_proj(x).unflatten(-1, (dims.kv_heads, dims.head_dim)).transpose(1, 2)
        if dims.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = step.rope(self.kind)
        q, k = _rotate(q, cos, sin).to(v.dtype).transpose(1, 2), _rotate(k, cos, sin).to(v.dtype).transpose(1, 2)
        keys = step.keys(self.window)
        if state is not None:
            k, v = state.append(k, v, keys.keep)
        if dims.softcap is not None:
            y = self._capped(q, k, v, keys, dims.softcap)
        elif q.is_cuda and not keys.causal:
            y = self._folded(q, k, v, keys.mask)
        else:
            grouped = dims.kv_heads != dims.heads
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=keys.mask, is_causal=keys.causal, scale=dims.scale, enable_gqa=grouped
            )
        return self.o_proj(y.transpose(1, 2).flatten(2)), state

    def _folded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention under a mask, or of one token to all keys, on a GPU. The queries that share a key stand one after
        another as rows of it: with a mask the fast kernels there do not know grouped heads, and would repeat the keys.
        The mask is then repeated instead, so beyond FEW tokens, where it is the larger one, the keys are.
        """
        group = self.dims.heads // self.dims.kv_heads
        tokens = q.shape[2]
        if tokens > FEW:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.dims.scale)
        folded = q.unflatten(1, (-1, group)).flatten(2, 3)
        if mask is not None and group > 1:
            mask = mask.repeat(1, 1, group, 1)
        y = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=self.dims.scale)
        return y.unflatten(2, (group, tokens)).flatten(1, 2)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, keys: Keys, softcap: float) -> Tensor:
        """Attention with a cap on its scores, which scaled_dot_product_attention does not have; softmax in float32."""
        dims = self.dims
        k, v = (x.repeat_interleave(dims.heads // dims.kv_heads, dim=1) for x in (k, v))
        scale = dims.head_dim**-0.5 if dims.scale is None else dims.scale
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
        mask = keys.mask
        if keys.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of the KV cache of one sequence of `context` tokens."""
        slots = context if self.window is None else min(context, self.window - 1)
        return 2 * slots * self.dims.kv_heads * self.dims.head_dim * dtype.itemsize

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens after `past` cached ones.

        Scores and their product with values count the pairs that causality and the window leave.
        """
        dims = self.dims
        width = dims.heads * dims.head_dim
        linear = 2 * tokens * dims.hidden * (2 * width + 2 * dims.kv_heads * dims.head_dim)
        return linear + 4 * width * visible_pairs(tokens, past, self.window)


def visible_pairs(tokens: int, past: int, window: int | None) -> int:
    """Query-key pairs of `tokens` causal queries after `past` cached tokens, within a window."""
    total = tokens * past + tokens * (tokens + 1) // 2
    if window is None:
        return total
    first = max(0, min(tokens, window - past))  # queries that still see everything before them
    return first * past + first * (first + 1) // 2 + (tokens - first) * window


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout: x [B, T, heads, head_dim], cos and sin [B or 1, T, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


class WindowAttention(Attention):
    """Attention over the last `window_size` tokens."""

    Options = WindowOptions
    kind = "swa"

    def __init__(self, dims: Dims, options: WindowOptions) -> None:
        super().__init__(dims, options)
        self.window = options.window_size

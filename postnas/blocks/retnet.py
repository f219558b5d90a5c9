"""Retention (RetNet, arXiv 2307.08621): linear attention with one fixed decay a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.linear import LinearMixer, LinearOptions
from postnas.blocks.norm import GatedRMSNorm
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.linear_attention import attention_flops, linear_attention


@dataclass(frozen=True)
class RetNetOptions(LinearOptions):
    """Options of retention; None means: as in the base's attention."""

    expand_v: float = 2.0
    """Value dim as a multiple of the key dim, cut to a whole number; 2 as in the paper."""


class RetNet(LinearMixer):
    """S <- (1 - 2^-e) S + k v^T, o = K^-0.5 S^T q, a head's e from 5 to 12; then W_o(RMSNorm(o) * SiLU(W_g x)).

    q, k, v and o are attention's. With 8 heads e is 5 + h, as in the paper; with more it is spread over the same range,
    since a head of e = 20 would forget nothing. Left out: the rotary embedding of q and k (xPos), as in all linear
    blocks here, so that nothing but the decay tells positions apart; and the paper's scaling of scores by their sums,
    which the norm undoes but for its epsilon. A q/k norm of the base comes along as its weight only.
    """

    Options = RetNetOptions
    squashes_values = False

    def __init__(self, dims: Dims, options: RetNetOptions) -> None:
        super().__init__(dims, options)
        values = self.heads * self.value_dim
        self.g_proj = nn.Linear(dims.hidden, values, bias=False)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.o_norm = GatedRMSNorm(self.value_dim, options.norm_eps)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        keys, values = (self.heads, self.key_dim), (self.heads, self.value_dim)
        o, recurrent = linear_attention(
            q=self.q_proj(x).unflatten(-1, keys),
            k=step.mask(self.k_proj(x)).unflatten(-1, keys),
            v=self.v_proj(x).unflatten(-1, values),
            g=step.mask(log_decays(self.heads, x).expand(*x.shape[:2], -1)),
            state=None if state is None else state.recurrent,
            segments=step.segments,
            scale=self.key_dim**-0.5,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, values)).flatten(2)), state

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens: projections and the rule's products."""
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        rule = attention_flops(tokens, self.key_dim, self.value_dim)
        return 2 * tokens * self.dims.hidden * (2 * keys + 3 * values) + self.heads * rule


def log_decays(heads: int, like: Tensor) -> Tensor:
    """log(1 - 2^-e) of each head [heads], in float32, or in float64 where `like` is; made anew each time, so that a
    model in bfloat16 does not round them."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    step = min(1.0, 7 / max(1, heads - 1))
    return torch.log1p(-torch.exp2(-5.0 - step * torch.arange(heads, dtype=dtype, device=like.device)))

"""RWKV-7's time mix (arXiv 2503.14456): a delta rule with decay, removal and write strength a key channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.kda import LowRank
from postnas.blocks.linear import LinearMixer, LinearOptions
from postnas.blocks.norm import RMSNorm, normalised, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.dplr import rule_flops, rwkv7
from postnas.ops.dynamic_conv import last_inputs

FASTEST_DECAY = math.exp(-0.5)
"""The log of a decay stays above minus this (section 4.1 of the paper)."""
MIXES = 6
"""Inputs that a token shift makes: of receptance, decay, key, value, rate and gate."""


@dataclass(frozen=True)
class RWKV7Options(LinearOptions):
    """Options of RWKV-7; None means: as in the base's attention, or as the paper sizes it for the hidden width."""

    norm_eps: float = 1e-5
    """Epsilon of the norm a head, times the value dim."""
    decay_rank: int | None = None
    """Inner width of the decay; 1.8 times the root of the hidden width where None, in whole 32s."""
    rate_rank: int | None = None
    """Inner width of the in-context learning rate; as decay_rank where None."""
    gate_rank: int | None = None
    """Inner width of the output gate; 0.6 times the hidden width to the 0.8 where None, in whole 32s."""

    def resolve(self, dims: Dims) -> Self:
        filled = super().resolve(dims)
        small, large = (max(32, 32 * round(size / 32)) for size in (1.8 * dims.hidden**0.5, 0.6 * dims.hidden**0.8))
        filled = replace(
            filled,
            decay_rank=small if filled.decay_rank is None else filled.decay_rank,
            rate_rank=small if filled.rate_rank is None else filled.rate_rank,
            gate_rank=large if filled.gate_rank is None else filled.gate_rank,
        )
        for name in ("decay_rank", "rate_rank", "gate_rank"):
            filled.at_least(name, 1)
        return filled


class HeadNorm(RMSNorm):
    """Each head centred and divided by its deviation; then weight and bias, one a channel of each head."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__(heads * size, eps)
        self.bias = nn.Parameter(torch.zeros(heads * size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, size] -> [..., heads * size]."""
        wide = widened(x)
        even = normalised(wide - wide.mean(-1, keepdim=True), self.eps).flatten(-2).to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), self.weight.to(x.dtype), even)


class RWKV7(LinearMixer):
    """S <- diag(exp(w)) S - (rate kk) (kk^T S) + k v^T;  o = S^T r, with kk the removal key, normalised a head.

    Each projection reads its own mix of the token and the one before it. After the rule: a norm a head, plus the bonus
    (r . r_k k) v of the token itself, times a low-rank gate, and W_o.

    From attention: W_q is that of the receptance (`q_proj`), which is scaled by K^-0.5 as queries are; W_k, W_v and W_o
    keep their places. The token shift
    starts as the identity (each mix 0: the token itself), the bonus at 0, the write and removal strengths at 1/2, and
    all channels of a head with the same slow decay. Left out: the mixing of v with the first layer's, since a mixer
    here knows no other layer; attention's rotary embedding; of attention's q/k norm all but its weight.
    """

    Options = RWKV7Options
    squashes_values = False
    options: RWKV7Options
    g_proj: LowRank

    def __init__(self, dims: Dims, options: RWKV7Options) -> None:
        super().__init__(dims, options)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        assert options.decay_rank is not None and options.rate_rank is not None and options.gate_rank is not None
        self.w_proj = LowRank(dims.hidden, options.decay_rank, keys, bias=True, between=torch.tanh)
        self.a_proj = LowRank(dims.hidden, options.rate_rank, keys, bias=True)
        self.g_proj = LowRank(dims.hidden, options.gate_rank, values, bias=False, between=torch.sigmoid)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.o_norm = HeadNorm(self.heads, self.value_dim, options.norm_eps * self.value_dim)
        self.mixes = nn.Parameter(torch.empty(MIXES * dims.hidden))
        self.k_k = nn.Parameter(torch.empty(keys))
        self.k_a = nn.Parameter(torch.empty(keys))
        self.r_k = nn.Parameter(torch.empty(keys))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start what is a channel's own: no shift, no bonus, rates of 1/2, decays log-uniform in [1e-3, 1e-1] a head.

        generator: on the CPU, so that the draw is the same on every device; torch's own where None.
        """
        self.mixes.zero_()
        self.r_k.zero_()
        self.k_k.fill_(1.0)
        self.k_a.fill_(1.0)
        self.a_proj.up.bias.zero_()
        device = None if generator is None else generator.device
        share = torch.empty(self.heads, dtype=torch.float32, device=device)
        share.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().div_(FASTEST_DECAY)
        self.w_proj.up.bias.copy_(share.logit().repeat_interleave(self.key_dim))

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Decay and rate nearly the same for all tokens; an output gate that is nearly 1."""
        self.w_proj.start(0.1, generator)
        self.a_proj.start(0.1, generator)
        self.g_proj.start(0.1, generator)
        self.g_proj.up.weight += 2.0 / self.g_proj.up.in_features  # sigmoids around 1/2 add up to 1
        self.reset_parameters(generator)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""

        def by_head(channels: Tensor) -> Tensor:
            return channels.unflatten(-1, (self.heads, -1))

        change = self.shifted(x, step, state) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(x, mix, change) for mix in self.mixes.to(x.dtype).unflatten(0, (MIXES, -1))
        )
        # At the size that attention's queries have, the bonus alone would make up the gradient's norm.
        r, v = by_head(self.q_proj(x_r)) * self.key_dim**-0.5, by_head(self.v_proj(x_v))
        k, rate = widened(self.k_proj(x_k)), torch.sigmoid(widened(self.a_proj(x_a)))
        removal = by_head(k * widened(self.k_k))
        removal = removal * torch.rsqrt(removal.square().sum(-1, keepdim=True) + 1e-6)
        k = by_head(k * (1 + (rate - 1) * widened(self.k_a)))
        o, recurrent = rwkv7(
            r=r,
            w=by_head(step.mask(-FASTEST_DECAY * torch.sigmoid(widened(self.w_proj(x_w))))),
            k=step.mask(k),
            v=v,
            a=-removal,
            b=step.mask(removal * by_head(rate)),
            state=None if state is None else state.recurrent,
            segments=step.segments,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        bonus = (widened(r) * k * by_head(widened(self.r_k))).sum(-1, keepdim=True).to(v.dtype) * v
        return self.o_proj((self.o_norm(o) + bonus.flatten(2)) * self.g_proj(x_g)), state

    def shifted(self, x: Tensor, step: Step, state: LinearState | None) -> Tensor:
        """The token before each in its sequence, zeros before the first; `state.conv` [B, 1, hidden] keeps the last."""
        history = None if state is None else state.conv
        first = torch.zeros_like(x[:, :1]) if history is None else history.to(x.dtype)
        before = torch.cat([first, x[:, :-1]], dim=1)
        if step.segments is not None:
            same = step.segments == F.pad(step.segments[:, :-1], (1, 0))
            before = before * same[..., None]
        if state is not None:
            state.store(conv=last_inputs(x, 2, history=history, segments=step.segments, lengths=step.lengths))
        return before

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence, whatever its length: the state in float32, the last input in dtype."""
        return super().state_bytes(context, dtype) + self.dims.hidden * dtype.itemsize

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens, chunked where that is more than one."""
        linear = 4 * self.dims.hidden * self.heads * (self.key_dim + self.value_dim)
        linear += self.w_proj.flops() + self.a_proj.flops() + self.g_proj.flops()
        return tokens * linear + self.heads * rule_flops(tokens, self.key_dim, self.value_dim, writes=2)

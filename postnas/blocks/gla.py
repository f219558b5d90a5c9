"""Gated linear attention (GLA, arXiv 2312.06635): a decay for every key channel, made from the token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.linear import LinearMixer, LinearOptions, normal
from postnas.blocks.norm import GatedRMSNorm, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.linear_attention import attention_flops, linear_attention

SOFTEN = 16
"""The log of the decay is divided by this (section 4.4 of the paper), so that even a random gate forgets slowly."""
SLOWEST, FASTEST = 1e-3, 1e-1
"""Share of the state that a head forgets a token at the start."""


@dataclass(frozen=True)
class GLAOptions(LinearOptions):
    """Options of gated linear attention; None means: as in the base's attention."""

    expand_v: float = 2.0
    """Value dim as a multiple of the key dim, cut to a whole number; 2 as in the paper."""
    rank: int = 16
    """Inner width of the decay's projection."""

    def resolve(self, dims: Dims) -> Self:
        filled = super().resolve(dims)
        filled.at_least("rank", 1)
        return filled


class GLA(LinearMixer):
    """S <- exp(g) S + k v^T, o = K^-0.5 S^T q, with g = log sigmoid(W2 W1 x + b) / 16 a key channel; then
    W_o(RMSNorm(o) * SiLU(W_g x)).

    q, k, v and o are attention's; nothing convolves, nothing is squashed. The paper's norm is a LayerNorm a head, and
    its output gate has a bias; here both are as in the other blocks. A q/k norm of the base comes along as its weight
    only: its division has no place here, so keys of different lengths weigh differently.
    """

    Options = GLAOptions
    squashes_values = False
    options: GLAOptions

    def __init__(self, dims: Dims, options: GLAOptions) -> None:
        super().__init__(dims, options)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.gk_down = nn.Linear(dims.hidden, options.rank, bias=False)
        self.gk_up = nn.Linear(options.rank, keys, bias=False)
        self.g_proj = nn.Linear(dims.hidden, values, bias=False)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.o_norm = GatedRMSNorm(self.value_dim, options.norm_eps)
        self.gk_bias = nn.Parameter(torch.empty(keys))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start the decay: a head's channels alike, heads log-uniform between SLOWEST and FASTEST."""
        device = None if generator is None else generator.device
        rate = torch.empty(self.heads, dtype=torch.float32, device=device)
        rate.uniform_(math.log(SLOWEST), math.log(FASTEST), generator=generator).exp_().mul_(SOFTEN)
        self.gk_bias.copy_(-torch.log(torch.expm1(rate)).repeat_interleave(self.key_dim))  # softplus(-b) is the rate

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gate; a decay that starts slow and nearly the same for all tokens."""
        super().start_gates(sample, start, generator)
        for projection, size in ((self.gk_down, 1.0), (self.gk_up, 0.1)):
            weight = projection.weight
            weight.copy_(normal(tuple(weight.shape), size * weight.shape[1] ** -0.5, generator, weight))
        self.reset_parameters(generator)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        keys, values = (self.heads, self.key_dim), (self.heads, self.value_dim)
        g = F.logsigmoid(widened(self.gk_up(self.gk_down(x))) + widened(self.gk_bias)) / SOFTEN
        o, recurrent = linear_attention(
            q=self.q_proj(x).unflatten(-1, keys),
            k=step.mask(self.k_proj(x)).unflatten(-1, keys),
            v=self.v_proj(x).unflatten(-1, values),
            g=step.mask(g).unflatten(-1, keys),
            state=None if state is None else state.recurrent,
            segments=step.segments,
            scale=self.key_dim**-0.5,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, values)).flatten(2)), state

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens: projections and the rule's products.

        Left out, as everywhere, is what works element by element: exp of the decays and their sums.
        """
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        linear = self.dims.hidden * (2 * keys + 3 * values + self.options.rank) + self.options.rank * keys
        rule = attention_flops(tokens, self.key_dim, self.value_dim, by_channel=True)
        return 2 * tokens * linear + self.heads * rule

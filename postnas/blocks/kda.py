"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay of its own for each key channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.delta import DeltaOptions
from postnas.blocks.delta_net import ShortConvMixer
from postnas.blocks.dims import Dims
from postnas.blocks.linear import normal, time_bias
from postnas.blocks.norm import GatedRMSNorm, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.dplr import kda, rule_flops


@dataclass(frozen=True)
class KDAOptions(DeltaOptions):
    """Options of Kimi Delta Attention; None means: as in the base's attention."""

    expand_v: float = 1.0
    """Value dim as a multiple of the key dim, cut to a whole number."""
    rank: int | None = None
    """Inner width of the decay and of the output gate; the key dim where None, as in the paper."""

    def resolve(self, dims: Dims) -> Self:
        filled = super().resolve(dims)
        filled = replace(filled, rank=filled.head_dim if filled.rank is None else filled.rank)
        filled.at_least("rank", 1)
        return filled


class LowRank(nn.Module):
    """up(between(down(x))): [..., hidden] -> [..., channels] through `rank` channels."""

    def __init__(
        self, hidden: int, rank: int, channels: int, bias: bool, between: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.between = between
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(x)
        return self.up(inner if self.between is None else self.between(inner))

    @torch.no_grad()
    def start(self, std: float, generator: torch.Generator) -> None:
        """For x of unit size the result starts random around the bias, which is zero, with about this deviation."""
        for part, size in ((self.down, 1.0), (self.up, std)):
            shape = (part.out_features, part.in_features)
            part.weight.copy_(normal(shape, size * part.in_features**-0.5, generator, part.weight))
        if self.up.bias is not None:
            self.up.bias.zero_()

    def flops(self) -> int:
        """Operations a token."""
        return 2 * (self.down.weight.numel() + self.up.weight.numel())


class SigmoidRMSNorm(GatedRMSNorm):
    """RMSNorm(x) * sigmoid(gate)."""

    act = "sigmoid"


class KDA(ShortConvMixer):
    """S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q; then RMSNorm, a sigmoid gate, and W_o.

    g = -exp(A_log) softplus(low-rank(x) + dt_bias): A_log a head, dt_bias a key channel. From attention: W_q, W_k, W_v
    and W_o head by head; convolutions start as the identity, and all channels of a head with the same decay, so
    that the block starts as Gated DeltaNet does. Left out: attention's rotary embedding, which no linear block keeps.
    """

    Options = KDAOptions
    options: KDAOptions
    g_proj: LowRank

    def __init__(self, dims: Dims, options: KDAOptions) -> None:
        super().__init__(dims, options)
        assert options.rank is not None
        self.f_proj = LowRank(dims.hidden, options.rank, self.heads * self.key_dim, bias=False)
        self.g_proj = LowRank(dims.hidden, options.rank, self.heads * self.value_dim, bias=True)
        self.o_norm = SigmoidRMSNorm(self.value_dim, options.norm_eps)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads * self.key_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self, lowest: float = 1.0, highest: float = 16.0, generator: torch.Generator | None = None
    ) -> None:
        """Start the decay: A uniform in (lowest, highest), the time step log-uniform in [1e-3, 1e-1], both a head.

        generator: on the CPU, so that the draw is the same on every device; torch's own where None.
        """
        device = None if generator is None else generator.device
        rate = torch.empty(self.heads, dtype=torch.float32, device=device)
        rate.uniform_(lowest, highest, generator=generator)
        self.A_log.copy_(rate.log())
        self.dt_bias.copy_(time_bias(self.heads, generator).repeat_interleave(self.key_dim))

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gates near 1/2 for all tokens, write strengths too; a slow decay, A uniform in (0.5, 8)."""
        self.g_proj.start(0.1, generator)
        if start == "plus_minus":
            own, rows = self.dims.head_dim, self.g_proj.up.weight.unflatten(0, (self.heads, self.value_dim))
            mirrored = rows[:, own : 2 * own]
            mirrored.copy_(rows[:, : mirrored.shape[1]])
        self.f_proj.start(0.1, generator)
        self.start_strength(generator)
        self.reset_parameters(0.5, 8.0, generator)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        q, k, v = self.convolved(x, step, state)
        time = F.softplus(widened(self.f_proj(x)) + widened(self.dt_bias)).unflatten(-1, (self.heads, -1))
        o, recurrent = kda(
            q=q,
            k=k,
            v=v,
            g=step.mask(-widened(self.A_log).exp()[:, None] * time),
            beta=self.strength(x, step),
            state=None if state is None else state.recurrent,
            segments=step.segments,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        gate = self.g_proj(x).unflatten(-1, (self.heads, -1))
        return self.o_proj(self.o_norm(o, gate).flatten(2)), state

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens, chunked where that is more than one."""
        linear = self.projection_flops() + self.f_proj.flops() + self.g_proj.flops()
        return tokens * linear + self.heads * rule_flops(tokens, self.key_dim, self.value_dim, writes=1)

"""What the blocks of the gated delta rule share: sizes, gates, rule, gated norm, start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.linear import LinearMixer, LinearOptions, normal, time_bias
from postnas.blocks.norm import GatedRMSNorm
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.gated_delta_rule import gated_delta_rule, rule_flops


@dataclass(frozen=True)
class DeltaOptions(LinearOptions):
    """Options of a gated-delta-rule block; None means: as in the base's attention."""

    expand_v: float = 2.0
    """Value dim as a multiple of the key dim, cut to a whole number."""
    conv_size: int = 4
    """Taps of the convolution."""

    def resolve(self, dims: Dims) -> Self:
        filled = super().resolve(dims)
        filled.at_least("conv_size", 2)
        return filled


class DeltaMixer(LinearMixer):
    """Projections, gates and output of a gated-delta-rule block; what convolves is the block's own."""

    options: DeltaOptions

    def __init__(self, dims: Dims, options: DeltaOptions) -> None:
        super().__init__(dims, options)
        values = self.heads * self.value_dim
        self.a_proj = nn.Linear(dims.hidden, self.heads, bias=False)
        self.b_proj = nn.Linear(dims.hidden, self.heads, bias=False)
        self.g_proj = nn.Linear(dims.hidden, values, bias=False)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.o_norm = GatedRMSNorm(self.value_dim, options.norm_eps)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self, lowest: float = 0.0, highest: float = 16.0, generator: torch.Generator | None = None
    ) -> None:
        """Start the decay: A uniform in (lowest, highest), the time step log-uniform in [1e-3, 1e-1].

        generator: on the CPU, so that the draw is the same on every device; torch's own where None.
        """
        device = None if generator is None else generator.device
        rate = torch.empty(self.heads, dtype=torch.float32, device=device)
        rate.uniform_(lowest, highest, generator=generator).clamp_(min=1e-4)
        self.A_log.copy_(rate.log())
        self.dt_bias.copy_(time_bias(self.heads, generator))

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gate; small write-strength and decay projections; a slow decay, A uniform in (0.5, 8)."""
        super().start_gates(sample, start, generator)
        for projection in (self.a_proj, self.b_proj):
            weight = projection.weight
            weight.copy_(normal(tuple(weight.shape), 0.1 * self.dims.hidden**-0.5, generator, weight))
        self.reset_parameters(0.5, 8.0, generator)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Step, state: LinearState | None) -> Tensor:
        """x [B, T, hidden]; q, k [B, T, heads * key_dim] and v [B, T, heads * value_dim] ready for the rule."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        beta = step.mask(torch.sigmoid(self.b_proj(x).to(wide)))
        g = step.mask(-self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide)))
        o, recurrent = gated_delta_rule(
            q=q.unflatten(-1, (self.heads, self.key_dim)),
            k=k.unflatten(-1, (self.heads, self.key_dim)),
            v=v.unflatten(-1, (self.heads, self.value_dim)),
            g=g,
            beta=beta,
            state=None if state is None else state.recurrent,
            segments=step.segments,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, (self.heads, self.value_dim))).flatten(2))

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens, chunked where there is more than one.

        What the rule needs a head says `rule_flops`.
        """
        dims, keys, values = self.dims, self.key_dim, self.value_dim
        linear = 2 * dims.hidden * (self.heads * (2 * keys + 3 * values) + 2 * self.heads)
        return tokens * (linear + self.extra_flops()) + self.heads * rule_flops(tokens, keys, values)

    def extra_flops(self) -> int:
        """Operations a token of the block's own convolution."""
        return 2 * self.conv_channels * self.options.conv_size

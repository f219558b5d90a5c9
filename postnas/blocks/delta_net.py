"""DeltaNet (arXiv 2406.06484): the delta rule without a decay, with short convolutions on q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postnas.blocks.delta import DeltaOptions
from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import ShortConv, convolved
from postnas.blocks.linear import LinearMixer, normal
from postnas.blocks.norm import GatedRMSNorm, RMSNorm, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.gated_delta_rule import gated_delta_rule, rule_flops


class ShortConvMixer(LinearMixer):
    """q, k, v = SiLU(conv(W x)) with a static kernel of `conv_size` taps a channel, and a write strength b a head."""

    options: DeltaOptions

    def __init__(self, dims: Dims, options: DeltaOptions) -> None:
        super().__init__(dims, options)
        self.b_proj = nn.Linear(dims.hidden, self.heads, bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, dims.hidden, bias=False)
        self.conv_channels = self.heads * (2 * self.key_dim + self.value_dim)
        self.q_conv1d = ShortConv(self.heads * self.key_dim, options.conv_size)
        self.k_conv1d = ShortConv(self.heads * self.key_dim, options.conv_size)
        self.v_conv1d = ShortConv(self.heads * self.value_dim, options.conv_size)

    def convolved(self, x: Tensor, step: Step, state: LinearState | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> q, k [B, T, heads, key_dim], v [B, T, heads, value_dim]; `state` keeps the inputs."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in convolved(self, x, step, state))
        return q, k, v

    def strength(self, x: Tensor, step: Step) -> Tensor:
        """beta = sigmoid(W_b x), [B, T, heads] in float32 at least; 0 at padding, which so writes nothing."""
        return step.mask(torch.sigmoid(widened(self.b_proj(x))))

    def start_strength(self, generator: torch.Generator) -> None:
        """beta starts near 1/2 everywhere."""
        weight = self.b_proj.weight
        weight.copy_(normal(tuple(weight.shape), 0.1 * self.dims.hidden**-0.5, generator, weight))

    def projection_flops(self) -> int:
        """Operations a token of q, k, v, o, the write strength and the convolution."""
        width = self.heads * (2 * self.key_dim + 2 * self.value_dim) + self.heads
        return 2 * self.dims.hidden * width + 2 * self.conv_channels * self.options.conv_size


@dataclass(frozen=True)
class DeltaNetOptions(DeltaOptions):
    """Options of DeltaNet; None means: as in the base's attention."""

    expand_v: float = 1.0
    """Value dim as a multiple of the key dim, cut to a whole number."""
    use_gate: bool = True
    """SiLU(W_g x) on the normed output. The paper has the norm alone; the other blocks have a gate."""


class DeltaNet(ShortConvMixer):
    """S <- S + k (beta (v - S^T k))^T; o = S^T q; then a norm, gated where `use_gate`, and W_o.

    From attention: W_q, W_k, W_v and W_o head by head; convolutions start as the identity. Left out: attention's
    rotary embedding, which no linear block keeps, and the paper's feature maps other than SiLU with an L2 norm.
    """

    Options = DeltaNetOptions
    options: DeltaNetOptions

    def __init__(self, dims: Dims, options: DeltaNetOptions) -> None:
        super().__init__(dims, options)
        if options.use_gate:
            self.g_proj = nn.Linear(dims.hidden, self.heads * self.value_dim, bias=False)
        self.o_norm = (GatedRMSNorm if options.use_gate else RMSNorm)(self.value_dim, options.norm_eps)

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gate, where there is one, as in the other blocks; write strengths near 1/2."""
        if self.options.use_gate:
            super().start_gates(sample, start, generator)
        self.start_strength(generator)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        q, k, v = self.convolved(x, step, state)
        o, recurrent = gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=None,
            beta=self.strength(x, step),
            state=None if state is None else state.recurrent,
            segments=step.segments,
        )
        if state is not None:
            state.store(recurrent=recurrent)
        gate = (self.g_proj(x).unflatten(-1, (self.heads, -1)),) if self.options.use_gate else ()
        return self.o_proj(self.o_norm(o, *gate).flatten(2)), state

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens, chunked where that is more than one."""
        gate = 2 * self.dims.hidden * self.heads * self.value_dim if self.options.use_gate else 0
        rule = self.heads * rule_flops(tokens, self.key_dim, self.value_dim)
        return tokens * (self.projection_flops() + gate) + rule

"""Mamba-2 (arXiv 2405.21060): linear attention whose time step sets both the decay and how much is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import ShortConv
from postnas.blocks.linear import LinearMixer, LinearOptions, normal, time_bias
from postnas.blocks.norm import GatedRMSNorm, RMSNorm, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.ops.dynamic_conv import causal_conv
from postnas.ops.linear_attention import attention_flops, linear_attention


@dataclass(frozen=True)
class Mamba2Options(LinearOptions):
    """Options of Mamba-2; None means: as in the base's attention.

    With n_groups 1, qkv_bias false, the base's own epsilon as norm_eps, and an inner width (heads times value dim) of
    twice the hidden size, the layer is exactly GraniteMoeHybrid's: num_heads = hidden / 32, head_dim 128, expand_v 0.5.
    """

    expand_v: float = 2.0
    """Value dim as a multiple of the key dim (the state dim), cut to a whole number; 2 as in the other blocks."""
    n_groups: int | None = None
    """Heads of q (C) and k (B), shared by equal runs of value heads; None gives each head its own."""
    conv_size: int = 4
    """Taps of the convolution."""
    conv_bias: bool = True
    """A bias after the convolution."""
    norm_before_gate: bool = False
    """RMSNorm(y) * SiLU(z) instead of RMSNorm(y * SiLU(z)); either norm is over all heads at once."""

    def resolve(self, dims: Dims) -> Self:
        filled = super().resolve(dims)
        filled.at_least("conv_size", 2)
        heads = filled.num_heads or 0
        filled = replace(filled, n_groups=heads if self.n_groups is None else self.n_groups)
        filled.at_least("n_groups", 1)
        assert filled.n_groups is not None
        if heads % filled.n_groups:
            raise UserError(f"n_groups: {filled.n_groups} does not divide {heads} heads; give a divisor")
        return filled


class BiasedConv(ShortConv):
    """A short convolution with, where wanted, a bias [D] that starts at zero."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__(channels, taps)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        bias = getattr(self, "bias", None)  # the parent calls this before there is one
        if bias is not None:
            bias.zero_()


class GateThenNorm(RMSNorm):
    """RMSNorm(x * SiLU(gate)), the product in float32."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(widened(x) * F.silu(widened(gate))).to(x.dtype)


class Mamba2(LinearMixer):
    """x, B, C = SiLU(conv(W x) + b); dt = softplus(W_dt x + dt_bias); S <- exp(-exp(A_log) dt) S + dt B x^T;
    y = S^T C + D x; out = W_o RMSNorm(y * SiLU(z)), the norm over all heads at once.

    From attention: C is q, B is k, x is v, z is `g_proj`, dt is `a_proj`; the convolution's channels stand in
    the order x, B, C. Left out: the clamp of dt, which the stock layers leave open too, and norms a group.
    """

    Options = Mamba2Options
    options: Mamba2Options

    def __init__(self, dims: Dims, options: Mamba2Options) -> None:
        super().__init__(dims, options, key_heads=options.n_groups)
        assert options.n_groups is not None
        self.groups = options.n_groups
        values = self.heads * self.value_dim
        self.conv_channels = values + 2 * self.groups * self.key_dim
        self.a_proj = nn.Linear(dims.hidden, self.heads, bias=False)
        self.g_proj = nn.Linear(dims.hidden, values, bias=False)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.conv1d = BiasedConv(self.conv_channels, options.conv_size, options.conv_bias)
        self.o_norm = (GatedRMSNorm if options.norm_before_gate else GateThenNorm)(values, options.norm_eps)
        self.A_log, self.dt_bias, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self, lowest: float = 1.0, highest: float = 16.0, generator: torch.Generator | None = None
    ) -> None:
        """Start the decay: A uniform in (lowest, highest), dt log-uniform in [1e-3, 1e-1]; the skip D is 1.

        generator: on the CPU, so that the draw is the same on every device; torch's own where None.
        """
        device = None if generator is None else generator.device
        rate = torch.empty(self.heads, dtype=torch.float32, device=device)
        rate.uniform_(lowest, highest, generator=generator)
        self.A_log.copy_(rate.log())
        self.dt_bias.copy_(time_bias(self.heads, generator))
        self.D.fill_(1.0)

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gate; a time step nearly the same for all tokens and a slow decay, A uniform in (0.5, 8); no skip,
        since attention has none: at D = 1 a token's own value would drown what the state says."""
        super().start_gates(sample, start, generator)
        weight = self.a_proj.weight
        weight.copy_(normal(tuple(weight.shape), 0.1 * self.dims.hidden**-0.5, generator, weight))
        self.reset_parameters(0.5, 8.0, generator)
        self.D.zero_()

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        mixed, conv = causal_conv(
            step.mask(torch.cat([self.v_proj(x), self.k_proj(x), self.q_proj(x)], dim=-1)),
            self.conv1d.weight[:, 0].T,
            history=None if state is None else state.conv,
            segments=step.segments,
            lengths=step.lengths,
        )
        if self.conv1d.bias is not None:
            mixed = mixed + self.conv1d.bias.to(mixed.dtype)
        keys, values = (self.groups, self.key_dim), (self.heads, self.value_dim)
        v, k, q = F.silu(mixed).split([math.prod(values), math.prod(keys), math.prod(keys)], dim=-1)
        v, k, q = v.unflatten(-1, values), self._per_head(k.unflatten(-1, keys)), self._per_head(q.unflatten(-1, keys))
        # zero at padding, so that it neither writes nor fades anything, whatever the convolution's bias left there
        dt = step.mask(F.softplus(widened(self.a_proj(x)) + widened(self.dt_bias)))
        o, recurrent = linear_attention(
            q=q,
            k=k,
            v=(widened(v) * dt[..., None]).to(v.dtype),
            g=-widened(self.A_log).exp() * dt,
            state=None if state is None else state.recurrent,
            segments=step.segments,
        )
        if state is not None:
            state.store(conv=conv, recurrent=recurrent)
        o = o + self.D.to(v.dtype)[:, None] * v
        return self.o_proj(self.o_norm(o.flatten(2), self.g_proj(x))), state

    def _per_head(self, x: Tensor) -> Tensor:
        """x [B, T, groups, K] repeated to [B, T, heads, K]: head h reads group h // (heads / groups)."""
        return x if self.groups == self.heads else x.repeat_interleave(self.heads // self.groups, dim=2)

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens: projections, convolution and the
        rule's products. Left out, as everywhere, is what works element by element."""
        keys, values = self.groups * self.key_dim, self.heads * self.value_dim
        linear = self.dims.hidden * (2 * keys + 3 * values + self.heads) + self.conv_channels * self.options.conv_size
        return 2 * tokens * linear + self.heads * attention_flops(tokens, self.key_dim, self.value_dim)

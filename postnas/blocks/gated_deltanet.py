"""Gated DeltaNet (arXiv 2412.06464): the gated delta rule with static short convolutions on q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.delta import DeltaMixer, DeltaOptions
from postnas.blocks.dims import Dims
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops.dynamic_conv import causal_conv


class ShortConv(nn.Module):
    """One kernel a channel, weight [D, 1, W], starting as the identity."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.weight[:, :, -1] = 1.0


class GatedDeltaNet(DeltaMixer):
    """q, k, v = SiLU(conv(W x)), then the gated delta rule."""

    Options = DeltaOptions

    def __init__(self, dims: Dims, options: DeltaOptions) -> None:
        super().__init__(dims, options)
        self.conv_channels = self.heads * (2 * self.key_dim + self.value_dim)
        self.q_conv1d = ShortConv(self.heads * self.key_dim, options.conv_size)
        self.k_conv1d = ShortConv(self.heads * self.key_dim, options.conv_size)
        self.v_conv1d = ShortConv(self.heads * self.value_dim, options.conv_size)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        inputs = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])[:, 0].T
        mixed, conv = causal_conv(
            step.mask(inputs),
            taps,
            history=None if state is None else state.conv,
            segments=step.segments,
            lengths=step.lengths,
        )
        if state is not None:
            state.store(conv=conv)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        q, k, v = F.silu(mixed).split([keys, keys, values], dim=-1)
        return self.mix(x, q, k, v, step, state), state

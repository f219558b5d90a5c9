"""Gated DeltaNet (arXiv 2412.06464): the gated delta rule with static short convolutions on q, k and v."""

from __future__ import annotations

from typing import Any

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


def convolved(mixer: Any, x: Tensor, step: Step, state: LinearState | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, T, heads * key_dim] and v [B, T, heads * value_dim], each SiLU(conv(W x)) by a ShortConv of the mixer's.

    `state` keeps the convolutions' inputs.
    """
    inputs = torch.cat([mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)], dim=-1)
    taps = torch.cat([mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight])[:, 0].T
    mixed, conv = causal_conv(
        step.mask(inputs),
        taps,
        history=None if state is None else state.conv,
        segments=step.segments,
        lengths=step.lengths,
    )
    if state is not None:
        state.store(conv=conv)
    keys, values = mixer.heads * mixer.key_dim, mixer.heads * mixer.value_dim
    q, k, v = F.silu(mixed).split([keys, keys, values], dim=-1)
    return q, k, v


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
        return self.mix(x, *convolved(self, x, step, state), step, state), state

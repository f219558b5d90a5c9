"""RMSNorm(x) * act(gate), the norm at the end of most linear blocks.

Plain PyTorch reads and writes every element once a step of the formula. On a GPU the kernels of `gated_norm_triton`
take over, which read and write once in all; they import triton only then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops.dynamic_conv import KERNEL_TYPES, has_triton

Act = Literal["silu", "sigmoid"]
ACTS: dict[Act, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
WIDEST = 1024
"""Channels a row that the Triton kernels are written for."""


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: Act = "silu") -> Tensor:
    """weight * x / rms(x) * act(gate), the mean of squares over the last dimension.

    x, gate: [..., V], any float types; weight: [V]. Computed in float32 (float64 where x is). Returns [..., V] in the
    type that x's and gate's give together. The norm is rounded to x's type before the weight and before the gate, and
    act(gate) to gate's type, as in `plain_gated_norm`; the kernels' gradients are rounded only at their end.
    """
    form = plain_gated_norm
    if _has_kernels(x, gate, weight):
        from postnas.ops import gated_norm_triton

        form = gated_norm_triton.gated_norm
    return form(x, gate, weight, eps, act)


def plain_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: Act = "silu") -> Tensor:
    """`gated_norm` in plain PyTorch, on any device and in any type."""
    return weight.to(x.dtype) * normalised(x, eps) * ACTS[act](gate)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, in x's type."""
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def _has_kernels(x: Tensor, gate: Tensor, weight: Tensor) -> bool:
    """May the Triton kernels take these?"""
    known = all(part.is_cuda and part.dtype in KERNEL_TYPES for part in (x, gate, weight))
    return known and 1 <= x.shape[-1] <= WIDEST and x.numel() > 0 and has_triton()

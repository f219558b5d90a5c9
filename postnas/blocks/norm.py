"""RMS norms, computed in float32 whatever the input's type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    offset: added to the stored weight, 1 in Gemma; its product is then taken in float32, as Gemma takes it.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset
        RMSNorm.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0 - self.offset)

    @property
    def scale(self) -> Tensor:
        """[size] What the normalised input is multiplied by, in float32 at least."""
        return widened(self.weight) + self.offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:
            return (normalised(widened(x), self.eps) * self.scale).to(x.dtype)
        return self.weight.to(x.dtype) * normalised(x, self.eps)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, in x's type."""
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * SiLU(gate): the norm at the end of the delta-rule blocks."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * F.silu(gate)

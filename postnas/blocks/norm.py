"""RMS norms, computed in float32 whatever the input's type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.ops.gated_norm import Act, gated_norm, normalised, widened


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
        weight = self.weight.to(x.dtype)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch_norm(x, weight, self.eps)
        return weight * normalised(x, self.eps)


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) in x's type by torch's own kernel, which on a GPU reads x once; weight [V] in x's type.

    It rounds once, after the weight, so 16-bit results differ from `RMSNorm`'s plain form by a last digit at most.
    """
    with torch.autocast(x.device.type, enabled=False):  # which from torch 2.12 on would make it float32
        return F.rms_norm(x, weight.shape, weight, eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * SiLU(gate): the norm at the end of the delta-rule blocks."""

    act: Act = "silu"

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_norm(x, gate, self.weight, self.eps, self.act)

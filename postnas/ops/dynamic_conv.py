"""Causal depthwise convolution whose taps may differ from token to token (the JetBlock's dynamic convolution).

A static convolution is the same function with taps that do not depend on the token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x: Tensor,
    taps: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t, d] = sum over w of taps[w, t, d] * x[t - W + 1 + w, d].

    x: [B, T, D]; at tokens that are padding it must be zero. taps: [W, B, T, D] or, for a static
    convolution, [W, D]; taps first, so that each is one dense tensor. history: the W - 1 inputs
    before x, [B, W - 1, D], zeros where None. segments: [B, T] integers from 0 that never fall;
    no tap reaches into another segment, and `history` belongs to segment 0. lengths: [B], how many
    of the T tokens are real; the real ones come first, all of them where None.

    Returns y [B, T, D] in x's type and the last W - 1 inputs of each row, [B, W - 1, D].
    """
    width = taps.shape[0]
    length = x.shape[1]
    if history is None:
        padded = F.pad(x, (0, 0, width - 1, 0))
    else:
        padded = torch.cat([history.to(x.dtype), x], dim=1)
    if segments is not None:
        owners = F.pad(segments, (width - 1, 0))
    *earlier, now = taps.to(x.dtype).unbind(0)
    y = now * x
    for w, tap in enumerate(earlier):
        past = padded[:, w : w + length]
        if segments is not None:
            past = past * (owners[:, w : w + length] == segments)[..., None]
        y = torch.addcmul(y, tap, past)
    if lengths is None and segments is None:
        return y, padded[:, length:]
    ends = lengths if lengths is not None else torch.full((x.shape[0],), length, device=x.device)
    last = ends[:, None] + torch.arange(width - 1, device=x.device)
    kept = padded.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    if segments is not None:  # what another segment left must not reach the next chunk
        final = owners.gather(1, (ends + width - 2)[:, None])
        kept = kept * (owners.gather(1, last) == final)[..., None]
    return y, kept

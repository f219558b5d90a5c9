"""Causal depthwise convolution whose taps may differ from token to token (the JetBlock's dynamic convolution).

`causal_conv` is given its taps; a static convolution is the same function with taps that do not depend on the
token. `dynamic_conv` makes each token's taps from the kernel generator's inner activations on the way. The plain
forms run anywhere; on a GPU the kernels of `dynamic_conv_triton` take over, which import triton only then.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernels compute; sums are float32 in all of them."""
WIDEST = 8
"""Taps that the Triton kernels are written for."""
ROOM = {4: 196_608, 3: 98_304}
"""Bytes of shared memory that the fused kernel's pipeline stages take in 16 bits: all four stand in it on Hopper, on
other chips one fewer than there are. What holds no more has two: 65,536 bytes on Turing, 49,152 elsewhere."""


def dynamic_conv(
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """y[t, d] = sum over w of k[t, d, w] * x[t - W + 1 + w, d], with k[t] = inner[t] @ weight.T + bias.

    x: [B, T, D]; inner: [B, T, R]; weight: [D * W, R] and bias: [D * W], the taps of a channel side by side,
    the last tap on the token itself. silu: give SiLU(y). history, segments, lengths and both results as in
    `causal_conv`. Gradients reach x, inner, weight and bias; into `history` they need not.

    On a GPU the taps never reach memory, and the weight is used in inner's type.
    """
    form = plain_dynamic_conv
    if _has_kernels(x, weight.shape[0] // x.shape[-1]):
        from postnas.ops import dynamic_conv_triton

        form = dynamic_conv_triton.dynamic_conv
    return form(x, inner, weight, bias, history=history, segments=segments, lengths=lengths, silu=silu)


def plain_dynamic_conv(
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`dynamic_conv` in plain PyTorch, on any device and in any type."""
    taps = generated_taps(inner, weight, bias, x.shape[-1])
    y, kept = plain_causal_conv(x, taps, history=history, segments=segments, lengths=lengths)
    return F.silu(y) if silu else y, kept


def generated_taps(inner: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    """inner [B, T, R], weight [D * W, R], bias [D * W] -> taps [W, B, T, D].

    For many tokens one product a tap gives each tap as a dense tensor; for one token that would only
    copy the weights.
    """
    taps = weight.shape[0] // channels
    if inner.shape[1] == 1:
        return F.linear(inner, weight, bias).unflatten(-1, (channels, taps)).movedim(-1, 0)
    by_tap = weight.unflatten(0, (channels, taps)).permute(1, 2, 0)
    start = bias.unflatten(0, (channels, taps)).T[:, None]
    return torch.baddbmm(start, inner.flatten(0, 1).expand(taps, -1, -1), by_tap).unflatten(1, inner.shape[:2])


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
    form = plain_causal_conv
    if taps.ndim == 4 and _has_kernels(x, taps.shape[0]):
        from postnas.ops import dynamic_conv_triton

        form = dynamic_conv_triton.causal_conv
    return form(x, taps, history=history, segments=segments, lengths=lengths)


def plain_causal_conv(
    x: Tensor,
    taps: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv` in plain PyTorch, on any device and in any type."""
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
    return y, last_inputs(x, width, history=history, segments=segments, lengths=lengths)


def last_inputs(
    x: Tensor,
    width: int,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The last `width` - 1 inputs of each row, [B, W - 1, D], as a copy: x's real tokens, before them `history`.

    What another segment than the last left is zero, since it must not reach the next chunk.
    """
    keep, (batch, length, channels) = width - 1, x.shape
    old = x.new_zeros(batch, keep, channels) if history is None else history.to(x.dtype)
    if lengths is None and segments is None:
        return x[:, length - keep :].clone() if length >= keep else torch.cat([old[:, length:], x], dim=1)
    ends = lengths if lengths is not None else torch.full((batch,), length, device=x.device)
    place = ends[:, None] + torch.arange(-keep, 0, device=x.device)  # below zero it stands in `history`
    of_x = x.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, channels))
    of_old = old.gather(1, (place + keep).clamp(max=keep - 1)[..., None].expand(-1, -1, channels))
    kept = torch.where((place >= 0)[..., None], of_x, of_old)
    if segments is not None:
        final = segments.gather(1, (ends - 1).clamp(min=0)[:, None]).masked_fill(ends[:, None] == 0, 0)
        owners = segments.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
        kept = kept * (owners == final)[..., None]
    return kept


def _has_kernels(x: Tensor, width: int) -> bool:
    """May the Triton kernels take x [B, T, D]? One token a row is decoding, which they are not made for."""
    return x.is_cuda and x.shape[1] > 1 and x.dtype in KERNEL_TYPES and 2 <= width <= WIDEST and has_triton()


def stages_within(limit: int) -> int:
    """Pipeline stages of the fused kernel where a block of threads may have `limit` bytes of shared memory."""
    return next((stages for stages, room in ROOM.items() if room <= limit), 2)


@cache
def has_triton() -> bool:
    """Is Triton installed? Without it every device takes the plain forms."""
    return importlib.util.find_spec("triton") is not None

"""The dynamic convolution as Triton kernels; import this only where a GPU (or TRITON_INTERPRET=1) is there.

Tokens of all rows stand in one line, n = b * T + t; a tap that would reach before its row reads `history`.
`dynamic_conv` makes taps in a matrix product and uses them at once, so they never reach memory; its backward makes
them again, a chunk of tokens at a time. `causal_conv` is given them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from postnas.ops.dynamic_conv import last_inputs, stages_within

CHUNK = 8192
"""Tokens whose taps exist at one time in the backward: 2 x 200 MB in bfloat16 at D 3072, W 4."""


class Tile(NamedTuple):
    """What one program computes, and with how many warps and pipeline stages."""

    tokens: int
    channels: int
    inner: int
    warps: int
    stages: int


FUSED = Tile(tokens=128, channels=64, inner=64, warps=8, stages=4)
"""Of the product in 16 bits, at four taps: 128 x 256 sums, as in a usual matrix product on Hopper; the stages too."""
FUSED_WIDE = Tile(tokens=32, channels=16, inner=32, warps=4, stages=2)
"""The same in float32, which has no tensor cores at full precision."""
GIVEN = Tile(tokens=16, channels=128, inner=0, warps=4, stages=1)
"""Of the kernels that are given their taps; they wait for memory only."""


@triton.jit
def _earlier(
    x: tl.tensor,
    history: tl.tensor,
    segments: tl.tensor,
    n: tl.tensor,
    t: tl.tensor,
    d: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    W: tl.constexpr,
    BACK: tl.constexpr,
) -> tl.tensor:
    """x[n - BACK, d] as a float32 tile; zero beyond a border and beyond channel D."""
    inside = t >= BACK
    seen = inside
    rows = x + (n - BACK).to(tl.int64) * D
    if BACK > 0:
        if history is not None:
            old = history + ((n // T) * (W - 1) + t + (W - 1 - BACK)).to(tl.int64) * D
            rows = tl.where(inside, rows, old)
            seen = t >= 0
        if segments is not None:
            owner = tl.load(segments + n - BACK, mask=inside, other=0)
            seen = seen & (owner == tl.load(segments + n))
    return tl.load(rows[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _halves(tile: tl.tensor) -> tl.tensor:
    """The left and the right half of a tile's columns."""
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))


@triton.jit
def _tap(taps: tl.tensor, SLOTS: tl.constexpr, w: tl.constexpr) -> tl.tensor:
    """Tap w out of `taps` [tokens, SLOTS * channels], by halving; nothing moves between threads."""
    if SLOTS == 8:
        left, right = _halves(taps)
        taps = left if w < 4 else right
    if SLOTS >= 4:
        left, right = _halves(taps)
        taps = left if w % 4 < 2 else right
    left, right = _halves(taps)
    return left if w % 2 == 0 else right


@triton.jit(do_not_specialize=["N", "T"])
def _fused_kernel(
    x: tl.tensor,
    inner: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    history: tl.tensor,
    segments: tl.tensor,
    y: tl.tensor,
    N: tl.tensor,
    T: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    # Programs of one tile of tokens follow each other: its part of `inner` and the whole weight stay in the L2 cache.
    tiles: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    first = (tl.program_id(0) % tiles) * CHANNELS
    token = (tl.program_id(0) // tiles) * TOKENS + tl.arange(0, TOKENS)
    n = tl.minimum(token, N - 1)
    # One product for all taps. Its columns are tap 0 of each channel, then tap 1, ..., so that halves are taps; SLOTS
    # is W or the next power of two, and a slot without a tap repeats the last one and is never read.
    column = tl.arange(0, SLOTS * CHANNELS)
    channel = tl.minimum(first + column % CHANNELS, D - 1)
    row = channel * W + tl.minimum(column // CHANNELS, W - 1)
    r = tl.arange(0, INNER)
    left = inner + n.to(tl.int64)[:, None] * R + r[None, :]
    right = weight + row[None, :] * R + r[:, None]
    taps = tl.full((TOKENS, SLOTS * CHANNELS), 0.0, tl.float32)
    for start in range(0, R, INNER):
        if R % INNER == 0:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(start + r < R)[None, :], other=0.0)
            b = tl.load(right, mask=(start + r < R)[:, None], other=0.0)
        taps = tl.dot(a, b, taps, input_precision=PRECISION)
        left += INNER
        right += INNER
    taps += tl.load(bias + row).to(tl.float32)[None, :]
    taps = taps.to(x.dtype.element_ty)  # as the plain form does; it halves what the threads must exchange

    d = first + tl.arange(0, CHANNELS)
    t = n % T
    out = tl.full((TOKENS, CHANNELS), 0.0, tl.float32)
    for w in tl.static_range(W):
        out += _tap(taps, SLOTS, w).to(tl.float32) * _earlier(x, history, segments, n, t, d, T, D, W, W - 1 - w)
    if SILU:
        out = out * tl.sigmoid(out)
    place = y + token.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, out.to(y.dtype.element_ty), mask=(token < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["begin", "count", "T"])
def _given_kernel(
    x: tl.tensor,
    taps: tl.tensor,
    history: tl.tensor,
    segments: tl.tensor,
    dy: tl.tensor,
    out: tl.tensor,
    begin: tl.tensor,
    count: tl.tensor,
    T: tl.tensor,
    stride_n: tl.tensor,
    stride_w: tl.tensor,
    D: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """y of `count` tokens from token `begin`; with dy, dy through SiLU: the gradient of y before it.

    taps, dy and out begin at token `begin`; x and segments at token 0.
    """
    tiles: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    d = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    token = (tl.program_id(0) // tiles) * TOKENS + tl.arange(0, TOKENS)
    there = (token < count)[:, None] & (d < D)[None, :]
    n = begin + tl.minimum(token, count - 1)
    t = n % T
    result = tl.full((TOKENS, CHANNELS), 0.0, tl.float32)
    for w in tl.static_range(W):
        tap = tl.load(taps + token.to(tl.int64)[:, None] * stride_n + w * stride_w + d[None, :], mask=there, other=0.0)
        result += tap.to(tl.float32) * _earlier(x, history, segments, n, t, d, T, D, W, W - 1 - w)
    place = token.to(tl.int64)[:, None] * D + d[None, :]
    if dy is not None:
        gate = tl.sigmoid(result)
        grad = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        result = grad * gate * (1.0 + result * (1.0 - gate))
    tl.store(out + place, result.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["begin", "count", "T"])
def _backward_kernel(
    x: tl.tensor,
    taps: tl.tensor,
    history: tl.tensor,
    segments: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    dtaps: tl.tensor,
    begin: tl.tensor,
    count: tl.tensor,
    T: tl.tensor,
    stride_n: tl.tensor,
    stride_w: tl.tensor,
    D: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """dx and dtaps of `count` tokens from token `begin`.

    taps and dy begin at token `begin` and reach W - 1 tokens further, where the row does; dx and dtaps begin there
    too; x and segments at token 0. dtaps has the strides of taps.
    """
    tiles: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    d = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    token = (tl.program_id(0) // tiles) * TOKENS + tl.arange(0, TOKENS)
    there = (token < count)[:, None] & (d < D)[None, :]
    n = begin + tl.minimum(token, count - 1)
    t = n % T
    place = token.to(tl.int64)[:, None] * D + d[None, :]
    tap_place = token.to(tl.int64)[:, None] * stride_n + d[None, :]
    grad = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    result = tl.full((TOKENS, CHANNELS), 0.0, tl.float32)
    for w in tl.static_range(W):
        back = W - 1 - w
        dtap = grad * _earlier(x, history, segments, n, t, d, T, D, W, W - 1 - w)
        tl.store(dtaps + tap_place + w * stride_w, dtap.to(dtaps.dtype.element_ty), mask=there)
        reached = t + back < T  # the token that met this one with tap w, in the same row
        if segments is not None:
            owner = tl.load(segments + n + back, mask=reached, other=-1)
            reached = reached & (owner == tl.load(segments + n))
        seen = there & reached[:, None]
        later = tl.load(dy + place + back * D, mask=seen, other=0.0).to(tl.float32)
        tap = tl.load(taps + tap_place + back * stride_n + w * stride_w, mask=seen, other=0.0)
        result += later * tap.to(tl.float32)
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=there)


def fused_forward(
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    tile: Tile | None = None,
) -> Tensor:
    """y of `dynamic_conv`, [B, T, D] in x's type. All tensors are dense; weight is in inner's type."""
    batch, length, channels = x.shape
    width = weight.shape[0] // channels
    slots = triton.next_power_of_2(width)
    wide = inner.dtype == torch.float32
    if tile is None:
        tile = FUSED_WIDE if wide else FUSED
        if x.is_cuda and not wide:
            chip: Any = torch.cuda.get_device_properties(x.device)  # whose type hints lack the field
            tile = tile._replace(stages=stages_within(chip.shared_memory_per_block_optin))
        tile = tile._replace(channels=tile.channels * 4 // slots)  # as many sums at any width
    y = torch.empty_like(x)
    grid = triton.cdiv(batch * length, tile.tokens) * triton.cdiv(channels, tile.channels)
    with torch.cuda.device_of(x):
        _fused_kernel[(grid,)](
            x,
            inner,
            weight,
            bias,
            history,
            segments,
            y,
            batch * length,
            length,
            D=channels,
            R=inner.shape[-1],
            W=width,
            SLOTS=slots,
            SILU=silu,
            PRECISION="ieee" if wide else "tf32",
            TOKENS=tile.tokens,
            CHANNELS=tile.channels,
            INNER=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


def _given(kernel: Any, x: Tensor, taps: Tensor, *tensors: Tensor | None, begin: int, count: int) -> None:
    """Run `_given_kernel` or `_backward_kernel` on x [B, T, D] and taps [W, tokens, D], each tap's rows dense."""
    length, channels = x.shape[1:]
    grid = triton.cdiv(count, GIVEN.tokens) * triton.cdiv(channels, GIVEN.channels)
    with torch.cuda.device_of(x):
        kernel[(grid,)](
            x,
            taps,
            *tensors,
            begin=begin,
            count=count,
            T=length,
            stride_n=taps.stride(1),
            stride_w=taps.stride(0),
            D=channels,
            W=taps.shape[0],
            TOKENS=GIVEN.tokens,
            CHANNELS=GIVEN.channels,
            num_warps=GIVEN.warps,
        )


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor,
        weight: Tensor,
        bias: Tensor,
        history: Tensor | None,
        segments: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, inner, weight, bias, history, segments)
        ctx.silu = silu
        return fused_forward(x, inner, weight.to(inner.dtype).contiguous(), bias.contiguous(), history, segments, silu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, bias, history, segments = ctx.saved_tensors
        channels, reduced = x.shape[-1], inner.shape[-1]
        width, total = weight.shape[0] // channels, x.shape[0] * x.shape[1]
        dy, rows = grads[0].contiguous().view(total, channels), inner.view(total, reduced)
        # Taps first, so that each tap of a chunk is dense in the channels.
        by_tap = weight.to(inner.dtype).view(channels, width, reduced).transpose(0, 1).reshape(-1, reduced)
        start = bias.to(inner.dtype).view(channels, width).T.reshape(-1)
        dx, dinner = torch.empty_like(x), torch.empty_like(rows)
        dweight = torch.zeros_like(by_tap, dtype=torch.float32)
        dbias = torch.zeros_like(start, dtype=torch.float32)
        for begin in range(0, total, CHUNK):
            end = min(begin + CHUNK, total)
            reach = min(end + width - 1, total)  # dx of the last tokens meets the taps of the next ones
            taps = F.linear(rows[begin:reach], by_tap, start).view(-1, width, channels).transpose(0, 1)
            part = dy[begin:reach]
            if ctx.silu:
                before = torch.empty_like(part)
                _given(_given_kernel, x, taps, history, segments, part, before, begin=begin, count=reach - begin)
                part = before
            dtaps = torch.empty((end - begin, width, channels), dtype=taps.dtype, device=x.device)
            context = (history, segments, part, dx.view(total, channels)[begin:end], dtaps)
            _given(_backward_kernel, x, taps, *context, begin=begin, count=end - begin)
            flat = dtaps.view(-1, width * channels)
            torch.mm(flat, by_tap, out=dinner[begin:end])
            dweight += flat.T @ rows[begin:end]
            dbias += flat.sum(0, dtype=torch.float32)
        dweight = dweight.view(width, channels, reduced).transpose(0, 1).reshape(weight.shape).to(weight.dtype)
        dbias = dbias.view(width, channels).T.reshape(bias.shape).to(bias.dtype)
        return dx, dinner.view_as(inner), dweight, dbias, None, None, None


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, history: Tensor | None, segments: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, taps, history, segments)
        y = torch.empty_like(x)
        _given(_given_kernel, x, taps, history, segments, None, y, begin=0, count=x.shape[0] * x.shape[1])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, history, segments = ctx.saved_tensors
        dx, dtaps = torch.empty_like(x), torch.empty_like(taps)
        context = (history, segments, grads[0].contiguous(), dx, dtaps)
        _given(_backward_kernel, x, taps, *context, begin=0, count=x.shape[0] * x.shape[1])
        return dx, dtaps, None, None


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
    """`ops.dynamic_conv.dynamic_conv` by the kernels; no gradient reaches `history` or comes from the result's.

    x and inner may be of different types out of bfloat16, float16 and float32. Weight and bias are used in inner's type
    and get gradients in their own.
    """
    past, owners = _context(x, history, segments)
    y = _DynamicConv.apply(x.contiguous(), inner.contiguous(), weight, bias, past, owners, silu)
    with torch.no_grad():
        return y, last_inputs(x, weight.shape[0] // x.shape[-1], history, segments, lengths)


def causal_conv(
    x: Tensor,
    taps: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.dynamic_conv.causal_conv` for taps [W, B, T, D] by the kernels; gradients reach x and taps.

    Taps are read as they lie where they are dense or a view of a dense [B, T, W, D]; in any other order, such as a
    view of [B, T, D, W], they are copied first.
    """
    past, owners = _context(x, history, segments)
    if not taps.permute(1, 2, 0, 3).is_contiguous():
        taps = taps.contiguous()
    y = _CausalConv.apply(x.contiguous(), taps.flatten(1, 2), past, owners)
    with torch.no_grad():
        return y, last_inputs(x, taps.shape[0], history, segments, lengths)


def _context(x: Tensor, history: Tensor | None, segments: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """History in x's type and segments, both dense and without a gradient."""
    past = None if history is None else history.detach().to(x.dtype).contiguous()
    return past, None if segments is None else segments.contiguous()

"""The Triton forms of `jet_decode`; imported only where there is CUDA, or where the interpreter is asked for.

Both kernels wait for memory, not for arithmetic. A program of `jet_decode` is one head of one row: it walks over its
state [K, V] in tiles [K, tile], each loaded once, corrected and stored. With S the state before the token,
    S^T q after = exp(g) S^T q + (k . q) delta,   delta = beta (v - exp(g) S^T k),
so both sums over K come from the tile as it was loaded, and the store waits for nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How a program of `jet_decode` walks over its state."""

    tile: int
    """Columns of the state a step, a power of two."""
    warps: int
    """Warps of a program."""
    joined: bool = False
    """Are both sums over the keys one reduction?"""


TILES = {torch.float32: Tile(64, 4), torch.bfloat16: Tile(64, 2)}
"""By the state's type: the fastest on an H100 at each batch from 1 to 384 that was tried
(benchmarks/jetblock_h100.py)."""


def jet_decode_triton(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    kernels: Tensor | None,
    conv: Tensor | None,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    settings: Tile | None = None,
) -> Tensor:
    """See `jet_decode`. settings: those of TILES where None."""
    batch, heads, key_dim, value_dim = state.shape
    settings = settings or TILES[state.dtype]
    tile = min(settings.tile, triton.next_power_of_2(value_dim))
    out = v.new_empty(batch, heads * value_dim) if out is None else out
    taps = 0 if kernels is None else kernels.shape[-1]
    assert all(x.stride(-1) == 1 for x in (q, k, v, gate, a, b)), "channels must lie side by side"
    assert all(x.is_contiguous() for x in (state, out, kernels, conv) if x is not None), "must be contiguous"
    with torch.cuda.device_of(state):
        _jet_decode[(batch * heads,)](
            q,
            k,
            v,
            gate,
            a,
            b,
            v if kernels is None else kernels,
            v if conv is None else conv,
            state,
            A_log,
            dt_bias,
            norm_weight,
            out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            gate.stride(0),
            a.stride(0),
            b.stride(0),
            eps,
            key_dim**-0.5,
            heads,
            K=key_dim,
            V=value_dim,
            W=taps,
            BK=triton.next_power_of_2(key_dim),
            BV=tile,
            TILES_V=triton.cdiv(value_dim, tile),
            ROWS=triton.next_power_of_2(triton.cdiv(value_dim, tile)),
            JOINED=settings.joined,
            num_warps=settings.warps,
        )
    return out


@triton.jit
def _silu(x):  # type: ignore[no-untyped-def]
    return x * tl.sigmoid(x)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) to float32's last digits: the device's fast logarithm is poor near 1, where small steps lie.

    With e = exp(-|x|) in (0, 1], log(1 + e) = 2 atanh(e / (2 + e)), a series that is done after seven terms.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    y = z * z
    series = 1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def _part(state_at, tile, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses [BK, BV] of a tile of the state, and which of them are inside."""
    key = tl.arange(0, BK)[:, None]
    column = tile * BV + tl.arange(0, BV)[None, :]
    return state_at + key * V + column, (key < K) & (column < V)


@triton.jit
def _both(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


@triton.jit
def _jet_decode(  # type: ignore[no-untyped-def]
    q_at,
    k_at,
    v_at,
    gate_at,
    a_at,
    b_at,
    kernels_at,
    conv_at,
    state_at,
    rate_at,
    time_at,
    norm_at,
    out_at,
    q_row,
    k_row,
    v_row,
    gate_row,
    a_row,
    b_row,
    eps,
    scale,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES_V: tl.constexpr,
    ROWS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """One head of one row. W: taps, 0 where v is convolved already. Vectors of V stand as [ROWS, BV], a row a tile."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    # All loads stand before the first sum: a sum waits for every thread, and what is asked for later waits once more.
    # A tile is loaded while the one before it is worked on, the first before all else.
    state_at += (row * heads + head) * K * V
    place, real = _part(state_at, 0, K, V, BK, BV)
    ahead = tl.load(place, mask=real, other=0.0)
    key = tl.arange(0, BK)
    q = tl.load(q_at + row * q_row + head * K + key, mask=key < K, other=0.0)
    k = tl.load(k_at + row * k_row + head * K + key, mask=key < K, other=0.0)
    a = tl.load(a_at + row * a_row + head).to(tl.float32)
    b = tl.load(b_at + row * b_row + head).to(tl.float32)
    rate = tl.load(rate_at + head).to(tl.float32)
    time = tl.load(time_at + head).to(tl.float32)
    number = tl.arange(0, ROWS)[:, None]
    column = number * BV + tl.arange(0, BV)[None, :]
    inside = column < V
    channel = head * V + column
    gate = tl.load(gate_at + row * gate_row + channel, mask=inside, other=0.0)
    weight = tl.load(norm_at + column, mask=inside, other=0.0)
    if W == 0:
        values = tl.load(v_at + row * v_row + channel, mask=inside, other=0.0).to(tl.float32)
    else:
        window = ()
        taps = ()
        for tap in tl.static_range(W):
            tap_at = kernels_at + (row * heads * V + channel) * W + tap
            input_at = v_at + row * v_row if tap == W - 1 else conv_at + (row * (W - 1) + tap) * heads * V
            taps += (tl.load(tap_at, mask=inside, other=0.0),)  # type: ignore[assignment]
            window += (tl.load(input_at + channel, mask=inside, other=0.0),)  # type: ignore[assignment]
        values = tl.zeros([ROWS, BV], tl.float32)
        for tap in tl.static_range(W):
            values += window[tap].to(tl.float32) * taps[tap].to(tl.float32)
        values = _silu(values)
        # Several threads may hold an input: all must have read it before one of them replaces it.
        tl.debug_barrier()
        for tap in tl.static_range(1, W):
            at = conv_at + (row * (W - 1) + tap - 1) * heads * V + channel
            tl.store(at, window[tap].to(conv_at.dtype.element_ty), mask=inside)

    q = _silu(q.to(tl.float32))
    k = _silu(k.to(tl.float32))
    meeting = tl.sum(q * k, 0)
    q_size = tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k_size = tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    meeting *= q_size * k_size
    q *= q_size
    k *= k_size
    beta = tl.sigmoid(b)
    decay = tl.exp(-tl.exp(rate) * _softplus(a + time))
    gate = _silu(gate.to(tl.float32)) * weight.to(tl.float32)

    outputs = tl.zeros([ROWS, BV], tl.float32)
    for tile in range(0, TILES_V):
        before = ahead.to(tl.float32)
        here, inner = place, real
        place, real = _part(state_at, tile + 1, K, V, BK, BV)  # past the last tile nothing is inside or read
        ahead = tl.load(place, mask=real, other=0.0)
        if JOINED:
            said, asked = tl.reduce((k[:, None] * before, q[:, None] * before), 0, _both)
        else:
            said = tl.sum(k[:, None] * before, 0)
            asked = tl.sum(q[:, None] * before, 0)
        delta = beta * (tl.sum(tl.where(number == tile, values, 0.0), 0) - decay * said)
        after = decay * before + k[:, None] * delta[None, :]
        tl.store(here, after.to(state_at.dtype.element_ty), mask=inner)
        outputs = tl.where(number == tile, (decay * asked + meeting * delta)[None, :], outputs)

    size = tl.sum(tl.sum(outputs * outputs, 1), 0) / V
    outputs *= tl.rsqrt(size + eps) * gate
    tl.store(out_at + row * heads * V + channel, outputs.to(out_at.dtype.element_ty), mask=inside)


def conv_step_triton(
    *,
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv: Tensor,
    out: Tensor | None = None,
    channels: int = 16,
    warps: int | None = None,
) -> Tensor:
    """See `conv_step`. channels: channels of a program, a power of two; warps of a program, by the rows where None."""
    batch, width = x.shape
    taps = conv.shape[1] + 1
    out = x.new_empty(batch, width) if out is None else out
    assert x.stride(1) == inner.stride(1) == 1, "channels must lie side by side"
    assert all(part.is_contiguous() for part in (weight, bias, conv, out)), "must be contiguous"
    rows = min(max(triton.next_power_of_2(batch), 16), 64)
    with torch.cuda.device_of(conv):
        _conv_step[(triton.cdiv(width, channels), triton.cdiv(batch, rows))](
            x,
            inner,
            weight,
            bias,
            conv,
            out,
            x.stride(0),
            inner.stride(0),
            batch,
            width,
            R=inner.shape[1],
            W=taps,
            TAPS=triton.next_power_of_2(taps),
            BB=rows,
            BD=channels,
            BR=min(128, triton.next_power_of_2(inner.shape[1])) if inner.shape[1] > 16 else 16,
            num_warps=warps or (4 if rows == 16 else 8),  # with four, 64 rows spill registers
            num_stages=3,
        )
    return out


@triton.jit
def _conv_step(  # type: ignore[no-untyped-def]
    x_at,
    inner_at,
    weight_at,
    bias_at,
    conv_at,
    out_at,
    x_row,
    inner_row,
    batch,
    width,
    R: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """BD channels of BB rows: their taps [BB, BD * TAPS] by tl.dot, then times the inputs and summed over the taps."""
    row = (tl.program_id(1) * BB + tl.arange(0, BB)).to(tl.int64)[:, None]
    flat = tl.arange(0, BD * TAPS)
    tap = (flat % TAPS)[None, :]
    channel = (tl.program_id(0) * BD + flat // TAPS)[None, :]
    line = channel * W + tap  # of w2
    known = (channel < width) & (tap < W)
    inside = known & (row < batch)
    past_at = conv_at + (row * (W - 1) + tap) * width + channel
    old = tl.load(past_at, mask=inside & (tap < W - 1), other=0.0)
    new = tl.load(x_at + row * x_row + channel, mask=inside & (tap == W - 1), other=0.0)
    inputs = old.to(tl.float32) + new.to(tl.float32)  # each place has one of the two

    taps = tl.zeros([BB, BD * TAPS], tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inner = tl.load(inner_at + row * inner_row + r[None, :], mask=(row < batch) & (r < R)[None, :], other=0.0)
        inner = _silu(inner.to(tl.float32)).to(weight_at.dtype.element_ty)
        weight = tl.load(weight_at + line * R + r[:, None], mask=known & (r < R)[:, None], other=0.0)
        taps = tl.dot(inner, weight, taps, input_precision="ieee")
    taps += tl.load(bias_at + line, mask=known, other=0.0).to(tl.float32)

    y = _silu(tl.sum(tl.reshape(taps * inputs, [BB, BD, TAPS]), 2))
    d = (tl.program_id(0) * BD + tl.arange(0, BD))[None, :]
    tl.store(out_at + row * width + d, y.to(out_at.dtype.element_ty), mask=(row < batch) & (d < width))
    # Several threads may hold an input: all must have read it before one of them replaces it.
    tl.debug_barrier()
    tl.store(past_at - width, inputs.to(conv_at.dtype.element_ty), mask=inside & (tap > 0))

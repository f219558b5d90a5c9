"""The gated norm as Triton kernels; import this only where a GPU (or TRITON_INTERPRET=1) is there.

Rows [N, V] of all tokens and heads stand under each other. Both kernels wait for memory only: the forward reads x and
gate and writes y and a float32 a row, the backward reads these and dy and writes dx and dgate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from postnas.ops.gated_norm import WIDEST, Act

TILE = 4096
"""Bytes of x in a program's tile of whole rows: two loads of 16 bytes for each of its threads. Twice as much spills
registers in float32, half as much leaves too few bytes under way in 16 bits (by the compiled kernels, not timed)."""
WARPS = 4
PROGRAMS = 2048
"""Most programs of the backward, each with its own part of the weight's gradient. A number and not the chip's: so the
order of the sums depends on nothing but the shape."""


@triton.jit
def _rounded(values: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Rounded to a type, in float32 again."""
    return values.to(KIND).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    x_at: tl.tensor,
    gate_at: tl.tensor,
    weight_at: tl.tensor,
    y_at: tl.tensor,
    scale_at: tl.tensor,
    eps: tl.tensor,
    N: tl.tensor,
    x_row: tl.tensor,
    gate_row: tl.tensor,
    V: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    column = channel[None, :]
    there = (row < N)[:, None] & (column < V)
    line = row.to(tl.int64)[:, None]
    x = tl.load(x_at + line * x_row + column, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(gate_at + line * gate_row + column, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_at + channel, mask=channel < V, other=0.0).to(tl.float32)[None, :]
    scale = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    share = tl.sigmoid(gate)
    if SILU:
        share = gate * share
    # Rounded where the plain form rounds.
    kind: tl.constexpr = x_at.dtype.element_ty
    normed = _rounded(_rounded(weight, kind) * _rounded(x * scale[:, None], kind), kind)
    y = normed * _rounded(share, gate_at.dtype.element_ty)
    tl.store(y_at + line * V + column, y.to(y_at.dtype.element_ty), mask=there)
    tl.store(scale_at + row, scale, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    x_at: tl.tensor,
    gate_at: tl.tensor,
    weight_at: tl.tensor,
    scale_at: tl.tensor,
    dy_at: tl.tensor,
    dx_at: tl.tensor,
    dgate_at: tl.tensor,
    dweight_at: tl.tensor,
    N: tl.tensor,
    x_row: tl.tensor,
    gate_row: tl.tensor,
    dy_row: tl.tensor,
    V: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """STEPS tiles of rows, each as far from the last as there are programs: so those at work are close in memory."""
    channel = tl.arange(0, COLUMNS)
    column = channel[None, :]
    weight = tl.load(weight_at + channel, mask=channel < V, other=0.0).to(tl.float32)
    weight = _rounded(weight, x_at.dtype.element_ty)[None, :]
    dweight = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for step in tl.range(0, STEPS):
        row = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        there = (row < N)[:, None] & (column < V)
        line = row.to(tl.int64)[:, None]
        scale = tl.load(scale_at + row, mask=row < N, other=0.0)[:, None]
        x = tl.load(x_at + line * x_row + column, mask=there, other=0.0).to(tl.float32) * scale
        gate = tl.load(gate_at + line * gate_row + column, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dy_at + line * dy_row + column, mask=there, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        if SILU:
            slope = share * (1.0 + gate * (1.0 - share))
            share = gate * share
        else:
            slope = share * (1.0 - share)
        dgate = dy * x * weight * slope
        dnormed = dy * share
        dweight += dnormed * x
        dnormed *= weight
        dx = scale * (dnormed - x * (tl.sum(dnormed * x, 1) / V)[:, None])
        tl.store(dx_at + line * V + column, dx.to(dx_at.dtype.element_ty), mask=there)
        tl.store(dgate_at + line * V + column, dgate.to(dgate_at.dtype.element_ty), mask=there)
    tl.store(dweight_at + tl.program_id(0) * V + channel, tl.sum(dweight, 0), mask=channel < V)


def tile(x: Tensor) -> dict[str, int]:
    """The kernels' sizes for x [N, V]."""
    columns = triton.next_power_of_2(x.shape[1])
    return {"ROWS": TILE // (columns * x.itemsize), "COLUMNS": columns}


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: Act) -> Tensor:
        """x, gate: [N, V] with a dense last dimension; weight: [V], dense."""
        rows, channels = x.shape
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype), device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        sizes = tile(x)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
                x,
                gate,
                weight,
                y,
                scale,
                eps,
                rows,
                x.stride(0),
                gate.stride(0),
                V=channels,
                SILU=act == "silu",
                **sizes,
                num_warps=WARPS,
            )
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph, for which these gradients would be constants without a word
            raise RuntimeError("gated_norm: the kernels have no second derivative; use plain_gated_norm")
        x, gate, weight, scale = ctx.saved_tensors
        rows, channels = x.shape
        dy = _dense_rows(dy)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        sizes = tile(x)
        tiles = triton.cdiv(rows, sizes["ROWS"])
        steps = triton.next_power_of_2(triton.cdiv(tiles, PROGRAMS))  # few numbers, since each is compiled
        programs = triton.cdiv(tiles, steps)
        dweight = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _backward_kernel[(programs,)](
                x,
                gate,
                weight,
                scale,
                dy,
                dx,
                dgate,
                dweight,
                rows,
                x.stride(0),
                gate.stride(0),
                dy.stride(0),
                V=channels,
                SILU=ctx.act == "silu",
                STEPS=steps,
                **sizes,
                num_warps=WARPS,
            )
        return dx, dgate, dweight.sum(0).to(weight.dtype), None, None


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: Act = "silu") -> Tensor:
    """`ops.gated_norm.gated_norm` by the kernels, for x and gate of one shape with at most WIDEST channels.

    Rows are read where they lie, at any one distance from each other; other orders of memory are copied first.
    Gradients reach x, gate and weight, each in its own type; a second derivative is refused.
    """
    assert x.shape == gate.shape and weight.shape == x.shape[-1:], "x and gate [..., V], weight [V]"
    assert x.shape[-1] <= WIDEST, "too many channels"
    y = _GatedNorm.apply(_dense_rows(x), _dense_rows(gate), weight.contiguous(), eps, act)
    return y.view(x.shape)


def _dense_rows(x: Tensor) -> Tensor:
    """[..., V] as [N, V] with channels side by side; a copy only where it must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()

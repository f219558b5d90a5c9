"""KL between two models' logits as one Triton kernel; import this only where a GPU (or TRITON_INTERPRET=1) is there.

A program takes a row. Its first pass over the vocabulary gives the loss, its second writes the gradient over the
student's logits: in 16 bits ten bytes a logit at most, where plain PyTorch moves about 90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Words of the vocabulary at a time: one load of 16 bytes of either logits for each thread in 16 bits. Twice as many
take twice the registers, which leaves half the warps on Hopper (by the compiled kernel, not timed)."""
WARPS = 8


@triton.jit
def _read(row_at: tl.tensor, word: tl.tensor, V: tl.constexpr, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Capped logits in float32, -inf beyond the vocabulary."""
    logit = tl.load(row_at + word, mask=word < V, other=0.0).to(tl.float32)
    if SOFTCAP is not None:
        logit = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp(logit * (2.0 / SOFTCAP))))  # tanh; at +-inf right too
    return tl.where(word < V, logit, float("-inf"))


@triton.jit
def _kl_kernel(
    student_at: tl.tensor,
    teacher_at: tl.tensor,
    loss_at: tl.tensor,
    V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """student_at, teacher_at: [N, V], dense; loss_at: [N] float32. A program a row."""
    row = tl.program_id(0).to(tl.int64)
    student_at += row * V
    teacher_at += row * V
    lane = tl.arange(0, TILE)
    TILES: tl.constexpr = (V + TILE - 1) // TILE
    # The largest logits so far, and of each lane the sums of exp(logit - largest) and of exp(t - largest) (t - s).
    # Maxima are the whole row's, so that a lane has one exponential a logit.
    top_s, top_t = float("-inf"), float("-inf")
    sum_s = tl.full((TILE,), 0.0, tl.float32)
    sum_t = tl.full((TILE,), 0.0, tl.float32)
    moment = tl.full((TILE,), 0.0, tl.float32)
    for tile in tl.range(0, TILES):
        word = tile * TILE + lane
        s = _read(student_at, word, V, SOFTCAP)
        t = _read(teacher_at, word, V, SOFTCAP)
        new_s = tl.maximum(top_s, tl.max(s, 0))
        new_t = tl.maximum(top_t, tl.max(t, 0))
        weight = tl.exp(t - new_t)
        shrink = tl.exp(top_t - new_t)
        sum_s = sum_s * tl.exp(top_s - new_s) + tl.exp(s - new_s)
        sum_t = sum_t * shrink + weight
        moment = moment * shrink + weight * tl.where(word < V, t - s, 0.0)
        top_s, top_t = new_s, new_t
    total_s = tl.sum(sum_s, 0)
    total_t = tl.sum(sum_t, 0)
    # Not the difference of two log-sum-exps, which would round at the size of logits. Equal sums must divide to 1.
    loss = tl.sum(moment, 0) / total_t - (top_t - top_s) + tl.log(tl.div_rn(total_s, total_t))
    tl.store(loss_at + row, loss)
    if GRADIENT:
        share_s, share_t = 1.0 / total_s, 1.0 / total_t
        for step in tl.range(0, TILES):
            word = (TILES - 1 - step) * TILE + lane  # backwards, since the last tiles may still be in the cache
            s = _read(student_at, word, V, SOFTCAP)
            t = _read(teacher_at, word, V, SOFTCAP)
            grad = tl.exp(s - top_s) * share_s - tl.exp(t - top_t) * share_t
            if SOFTCAP is not None:
                slope = s * (1.0 / SOFTCAP)
                grad *= 1.0 - slope * slope
            tl.store(student_at + word, grad.to(student_at.dtype.element_ty), mask=word < V)


def kl_rows(student: Tensor, teacher: Tensor, softcap: float | None, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`ops.chunked_loss.kl_rows` by the kernel; the gradient, where wanted, replaces the student's logits in memory."""
    assert student.shape == teacher.shape and student.is_contiguous() and teacher.is_contiguous(), "dense [N, vocab]"
    rows, vocab = student.shape
    losses = torch.empty(rows, dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        _kl_kernel[(rows,)](
            student,
            teacher,
            losses,
            V=vocab,
            SOFTCAP=softcap,
            GRADIENT=gradient,
            TILE=min(TILE, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
            enable_fp_fusion=False,  # a fused difference of equal products is not 0
        )
    return losses, student if gradient else None

"""Losses on a language model's head without its logits: a chunk of tokens at a time, gradients at once.

Logits of two models over a vocabulary of 150,000 would be the largest tensors of a distillation
step. Here a chunk of tokens makes its logits, its loss and its gradient, and forgets them. Chunks
run along the tokens rather than the vocabulary: memory is bounded alike, and no product is done twice.

Plain PyTorch widens the logits and goes over them once a step of the formula. On a GPU the kernel of
`chunked_loss_triton` takes over between the products, which reads them twice and writes the gradient
in their place; it imports triton only then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops.dynamic_conv import KERNEL_TYPES, has_triton
from postnas.ops.gated_norm import widened

CHUNK = 128
"""Tokens whose logits exist at one time on a CPU, where a chunk should stay near the caches."""
CHUNK_CUDA = 1024
"""The same on a GPU, where a product wants many rows, for the plain forms: they hold float32 copies of logits."""
ROOM = 2**30
"""Bytes that the student's and the teacher's logits of a chunk may take together where the kernel takes them: no others
exist then. It is 1,024 tokens at 262,144 words in 16 bits, and 4,096 at 49,152, within what the plain form takes for
1,024: more rows fill the chip in the gradient's product, which is no wider than the hidden states, and the head's
gradient is added up less often."""


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, softcap: float | None
    ) -> Tensor:
        tokens = student.shape[0]
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(student) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        losses = student.new_empty(tokens, dtype=wide)
        low = weight.to(student.dtype)
        teacher_low = low if teacher_weight is weight else teacher_weight.to(teacher.dtype)
        for rows in _chunks(tokens, _kl_chunk(student, teacher, len(weight))):
            logits = student[rows] @ low.T, teacher[rows] @ teacher_low.T
            losses[rows], grad = kl_rows(*logits, softcap=softcap, gradient=wants_hidden or wants_weight)
            if grad is not None and grad_hidden is not None:
                grad_hidden[rows] = grad @ low / tokens
            if grad is not None and grad_weight is not None:
                grad_weight += grad.T @ student[rows] / tokens
            del logits, grad  # before the next chunk makes its own
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum() / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def kl_rows(student: Tensor, teacher: Tensor, softcap: float | None, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL of each row in nats, [N] float32 (float64 where logits are), and its gradient by the student's logits.

    student, teacher: logits [N, vocab] before the softcap, dense, each in any float type. gradient: is it wanted? It
    is [N, vocab] in the student's type, else None, and may stand in the place of the student's logits.
    """
    form = plain_kl_rows
    if _has_kernels(student, teacher):
        from postnas.ops import chunked_loss_triton

        form = chunked_loss_triton.kl_rows
    return form(student, teacher, softcap, gradient)


def plain_kl_rows(
    student: Tensor, teacher: Tensor, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`kl_rows` in plain PyTorch, on any device and in any type."""
    logits = capped(widened(student), softcap)
    log_s = F.log_softmax(logits, dim=-1)
    log_t = F.log_softmax(capped(widened(teacher), softcap), dim=-1)
    p_t = log_t.exp()
    losses = log_t.sub_(log_s).mul_(p_t).sum(-1)
    if not gradient:
        return losses, None
    grad = log_s.exp_().sub_(p_t)
    if softcap is not None:
        grad *= 1 - (logits / softcap).square()
    return losses, grad.to(student.dtype)


def _has_kernels(student: Tensor, teacher: Tensor) -> bool:
    """May the Triton kernel take these logits, or the logits of these hidden states?"""
    known = all(part.is_cuda and part.dtype in KERNEL_TYPES for part in (student, teacher))
    return known and student.numel() > 0 and has_triton()


def _kl_chunk(student: Tensor, teacher: Tensor, vocab: int) -> int:
    """Tokens of a chunk of KL: with the kernel the largest power of two whose logits have ROOM, at least one."""
    if not _has_kernels(student, teacher):
        return _chunk(student)
    fits = ROOM // (vocab * (student.itemsize + teacher.itemsize))
    return 1 << max(fits.bit_length() - 1, 0)


def _chunk(hidden: Tensor) -> int:
    return CHUNK_CUDA if hidden.is_cuda else CHUNK


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))


def _logits(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    return capped(widened(hidden @ head.T), softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), in the logits' type; the logits as they are where softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunked_kl(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, softcap: float | None = None
) -> Tensor:
    """Mean forward KL, sum of p_teacher (log p_teacher - log p_student), in nats a token.

    student, teacher: last hidden states [N, hidden]; weight, teacher_weight: heads [vocab, hidden]
    (the same tensor where both models share it). softcap: Gemma's cap on logits. Gradients flow to
    `student` and `weight`; the teacher has none.
    """
    return _ChunkedKL.apply(student, weight, teacher, teacher_weight, softcap)


def chunked_nll(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of each target, [N] float32 in nats, without gradients.

    hidden: [N, hidden], weight: [vocab, hidden], targets: [N] int64.
    """
    losses = []
    low = weight.to(hidden.dtype)
    for rows in _chunks(len(hidden), _chunk(hidden)):
        losses.append(F.cross_entropy(_logits(hidden[rows], low, softcap), targets[rows], reduction="none"))
    return torch.cat(losses)

"""Losses on a language model's head without its logits: a chunk of tokens at a time, gradients at once.

Logits of two models over a vocabulary of 150,000 would be the largest tensors of a distillation
step. Here a chunk of tokens makes its logits, its loss and its gradient, and forgets them. Chunks
run along the tokens rather than the vocabulary: memory is bounded alike, and no product is done twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Tokens whose logits exist at one time on a CPU, where a chunk should stay near the caches."""
CHUNK_CUDA = 1024
"""The same on a GPU, where a product wants many rows."""


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
        total = student.new_zeros((), dtype=wide)
        low = weight.to(student.dtype)
        teacher_low = low if teacher_weight is weight else teacher_weight.to(teacher.dtype)
        for rows in _chunks(student):
            logits = _logits(student[rows], low, softcap)
            log_s = F.log_softmax(logits, dim=-1)
            log_t = F.log_softmax(_logits(teacher[rows], teacher_low, softcap), dim=-1)
            p_t = log_t.exp()
            total += torch.dot(p_t.flatten(), log_t.sub_(log_s).flatten())
            if not (wants_hidden or wants_weight):
                continue
            grad = log_s.exp_().sub_(p_t)
            if softcap is not None:
                grad *= 1 - (logits / softcap).square()
            grad = grad.to(student.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ low / tokens
            if grad_weight is not None:
                grad_weight += grad.T @ student[rows] / tokens
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunks(hidden: Tensor) -> Iterator[slice]:
    size = CHUNK_CUDA if hidden.is_cuda else CHUNK
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _logits(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ head.T
    return capped(logits if logits.dtype == torch.float64 else logits.float(), softcap)


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
    for rows in _chunks(hidden):
        losses.append(F.cross_entropy(_logits(hidden[rows], low, softcap), targets[rows], reduction="none"))
    return torch.cat(losses)

"""Losses in chunks of tokens against torch's own on full logits: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops import chunked_loss
from postnas.ops.chunked_loss import chunked_kl, chunked_nll

VOCAB, WIDTH = 37, 8
COUNTS = (1, 127, 128, 129, 300)
TYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
CAPS = pytest.mark.parametrize("softcap", [None, 3.0])


def heads_and_hidden(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((count, WIDTH), (VOCAB, WIDTH), (count, WIDTH), (VOCAB, WIDTH))
    student, weight, teacher, teacher_weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return student, weight, teacher, teacher_weight


def full_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@CAPS
@TYPES
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shared", [False, True])
def test_chunked_kl_equals_kl_on_full_logits(
    count: int, dtype: torch.dtype, tolerance: float, softcap: float | None, shared: bool
) -> None:
    student, weight, teacher, teacher_weight = heads_and_hidden(count, dtype)
    if shared:
        teacher_weight = weight
    found = chunked_kl(student, weight, teacher, teacher_weight, softcap)
    with torch.no_grad():
        target = F.log_softmax(full_logits(teacher, teacher_weight, softcap), dim=-1)
    log_s = F.log_softmax(full_logits(student, weight, softcap), dim=-1)
    expected = F.kl_div(log_s, target, reduction="sum", log_target=True) / count
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    scaled = torch.autograd.grad(3.0 * found, [student, weight, teacher], allow_unused=True)
    wanted = torch.autograd.grad(3.0 * expected, [student, weight])
    torch.testing.assert_close(list(scaled[:2]), list(wanted), rtol=0, atol=20 * tolerance)
    assert scaled[2] is None


@TYPES
def test_chunked_kl_gives_the_teacher_no_gradient(dtype: torch.dtype, tolerance: float) -> None:
    student, weight, teacher, teacher_weight = heads_and_hidden(130, dtype)
    chunked_kl(student, weight, teacher, teacher_weight).backward()
    assert teacher.grad is None
    assert teacher_weight.grad is None
    assert student.grad is not None and student.grad.abs().max() > tolerance


def test_chunked_kl_with_a_frozen_head_or_frozen_hidden_states() -> None:
    student, weight, teacher, teacher_weight = heads_and_hidden(130, torch.float64)
    both = torch.autograd.grad(chunked_kl(student, weight, teacher, teacher_weight), [student, weight])
    head_frozen = chunked_kl(student, weight.detach(), teacher, teacher_weight)
    hidden_frozen = chunked_kl(student.detach(), weight, teacher, teacher_weight)
    torch.testing.assert_close(torch.autograd.grad(head_frozen, student)[0], both[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(hidden_frozen, weight)[0], both[1], rtol=0, atol=0)


def test_chunked_kl_of_a_model_with_itself_is_zero() -> None:
    student, weight, _, _ = heads_and_hidden(200, torch.float32)
    loss = chunked_kl(student, weight, student.detach(), weight)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@CAPS
@TYPES
@pytest.mark.parametrize("count", COUNTS)
def test_chunked_nll_equals_cross_entropy_on_full_logits(
    count: int, dtype: torch.dtype, tolerance: float, softcap: float | None
) -> None:
    hidden, weight, _, _ = heads_and_hidden(count, dtype)
    targets = torch.randint(0, VOCAB, (count,))
    found = chunked_nll(hidden, weight, targets, softcap)
    expected = F.cross_entropy(full_logits(hidden, weight, softcap), targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=5 * tolerance)
    mix = torch.randn(count, dtype=dtype)
    a, b = (torch.autograd.grad((losses * mix).sum(), [hidden, weight]) for losses in (found, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=50 * tolerance)


def test_losses_never_hold_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product with the head stays under a chunk of rows."""
    rows: list[int] = []
    capped = chunked_loss.capped

    def watched(logits: Tensor, softcap: float | None) -> Tensor:
        rows.append(logits.shape[0])
        return capped(logits, softcap)

    monkeypatch.setattr(chunked_loss, "capped", watched)
    student, weight, teacher, teacher_weight = heads_and_hidden(1000, torch.float32)
    chunked_kl(student, weight, teacher, teacher_weight).backward()
    chunked_nll(student, weight, torch.zeros(1000, dtype=torch.int64))
    assert max(rows) == chunked_loss.CHUNK
    assert sum(rows) == 3 * 1000

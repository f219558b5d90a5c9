"""Losses in chunks of tokens against torch's own on full logits: values and gradients; the kernel against plain.

Without a GPU the kernel runs under Triton's interpreter: TRITON_INTERPRET=1, with triton installed.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from modules import kernel_module
from torch import Tensor

from postnas.ops import chunked_loss
from postnas.ops.chunked_loss import chunked_kl, chunked_nll, kl_rows, plain_kl_rows

VOCAB, WIDTH = 37, 8
COUNTS = (1, 127, 128, 129, 300)
TYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
CAPS = pytest.mark.parametrize("softcap", [None, 3.0])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def kernels() -> ModuleType:
    return kernel_module("chunked_loss_triton")


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


def test_a_chunk_of_the_kernels_logits_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both logits within ROOM and over half of it, except where one token alone has more."""
    monkeypatch.setattr(chunked_loss, "_has_kernels", lambda *parts: True)
    low, wide = torch.empty(0, 8, dtype=torch.bfloat16), torch.empty(0, 8)
    for vocab in (1, 50, 49_152, 151_936, 262_144, 10**6):
        for student, teacher in ((low, low), (wide, wide), (low, wide)):
            token = vocab * (student.itemsize + teacher.itemsize)
            size = chunked_loss._kl_chunk(student, teacher, vocab)
            assert chunked_loss.ROOM / 2 < size * token <= chunked_loss.ROOM
    assert chunked_loss._kl_chunk(low, low, 262_144) == 1024
    assert chunked_loss._kl_chunk(low, low, 10**9) == 1


def test_a_cpu_takes_the_plain_form() -> None:
    student, teacher = torch.randn(2, 5, VOCAB)
    losses, grad = kl_rows(student, teacher, softcap=3.0, gradient=True)
    expected, expected_grad = plain_kl_rows(student, teacher, softcap=3.0, gradient=True)
    assert grad is not None and expected_grad is not None
    assert torch.equal(losses, expected) and torch.equal(grad, expected_grad)
    assert kl_rows(student, teacher, softcap=None, gradient=False)[1] is None


# The kernel, on the GPU or under the interpreter


def logits(rows: int, vocab: int, dtype: torch.dtype, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's, which agree in part."""
    generator = torch.Generator().manual_seed(rows + vocab)
    teacher = size * torch.randn(rows, vocab, generator=generator)
    student = 0.7 * teacher + 0.3 * size * torch.randn(rows, vocab, generator=generator)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    """The whole tensor's error as a share of its size; a NaN fails."""
    assert found.shape == expected.shape
    error, size = (found.double() - expected).norm(), expected.norm()
    assert bool(error <= bound * size), f"{float(error / size)} above {bound}"


def compare(kernels: ModuleType, student: Tensor, teacher: Tensor, softcap: float | None) -> None:
    """Losses and gradient against the plain form in float64; the gradient stands where the student's logits did."""
    expected, expected_grad = plain_kl_rows(student.double(), teacher.double(), softcap, True)
    kept, kept_teacher = student.clone(), teacher.clone()
    alone, none = kernels.kl_rows(student, teacher, softcap, False)
    assert none is None and torch.equal(student, kept)
    losses, grad = kernels.kl_rows(student, teacher, softcap, True)
    assert torch.equal(losses, alone) and losses.dtype == torch.float32
    assert grad is student and grad.dtype == kept.dtype and torch.equal(teacher, kept_teacher)
    assert_near(losses, expected, 1e-5)
    assert expected_grad is not None
    assert_near(grad, expected_grad, BOUNDS[grad.dtype])


@pytest.mark.parametrize("softcap", [None, 30.0, 3.0])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows, vocab", [(1, 1000), (5, 2), (3, 4096), (3, 4097), (2, 9_999), (2, 50_257)])
def test_kernel_equals_plain(
    kernels: ModuleType, poison: None, rows: int, vocab: int, dtype: torch.dtype, softcap: float | None
) -> None:
    compare(kernels, *logits(rows, vocab, dtype), softcap)


@CAPS
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 31, 32, 33, 100])
def test_any_number_of_tiles(
    kernels: ModuleType, poison: None, monkeypatch: pytest.MonkeyPatch, vocab: int, softcap: float | None
) -> None:
    monkeypatch.setattr(kernels, "TILE", 16)
    compare(kernels, *logits(4, vocab, torch.float32), softcap)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (100.0, -100.0)])
def test_large_logits_do_not_overflow(
    kernels: ModuleType,
    poison: None,
    monkeypatch: pytest.MonkeyPatch,
    shift: tuple[float, float],
    softcap: float | None,
) -> None:
    """Of size 60, up to about 200; a shift of all of a row's logits is none of the loss where there is no cap."""
    monkeypatch.setattr(kernels, "TILE", 64)
    student, teacher = logits(3, 1000, torch.float32, size=60.0)
    if softcap is None:
        student, teacher = student + shift[0], teacher + shift[1]
    compare(kernels, student, teacher, softcap)


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_logit_may_come_first_or_last(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """The student's maximum and the teacher's are met at opposite ends."""
    monkeypatch.setattr(kernels, "TILE", 16)
    up = torch.linspace(-40, 40, 100, device=DEVICE).expand(2, -1)
    student, teacher = (up, 0.5 * up.flip(1)) if order == 1 else (0.5 * up.flip(1), up)
    compare(kernels, student.contiguous(), teacher.contiguous(), None)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_kernel_of_a_model_with_itself_is_zero(kernels: ModuleType, dtype: torch.dtype, softcap: float | None) -> None:
    _, teacher = logits(4, 5000, dtype)
    losses, grad = kernels.kl_rows(teacher.clone(), teacher, softcap, True)
    assert losses.abs().max() == 0
    assert grad.abs().max() == 0


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_kernel_of_near_equal_models_is_not_negative(kernels: ModuleType, softcap: float | None) -> None:
    """KL of about 1e-6 to 1e-11, under the rounding of the sums."""
    _, teacher = logits(16, 5000, torch.float32)
    for distance in (1e-3, 1e-4, 1e-5):
        student = teacher + distance * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1)).to(
            teacher
        )
        losses = kernels.kl_rows(student, teacher, softcap, False)[0]
        assert losses.min() > -1e-6 and losses.max() < 3e-6


def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not(kernels: ModuleType) -> None:
    for value in (float("nan"), float("inf")):
        student, teacher = logits(3, 100, torch.float32)
        student[1, 7] = value
        losses = kernels.kl_rows(student, teacher, None, True)[0]
        assert losses.isfinite().tolist() == [True, False, True]


@CAPS
@pytest.mark.parametrize("wanted", ["both", "hidden", "head", "none"])
@pytest.mark.parametrize("count", [1, 33])
def test_chunked_kl_by_the_kernel(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, count: int, wanted: str, softcap: float | None
) -> None:
    """Over chunks of sixteen tokens: loss and gradients as float64 has them, with gradients of any of the two."""
    monkeypatch.setattr(chunked_loss, "_has_kernels", lambda student, teacher: student.dtype == torch.float32)
    monkeypatch.setattr(chunked_loss, "ROOM", 16 * 8 * VOCAB)
    parts = [part.detach().to(DEVICE) for part in heads_and_hidden(count, torch.float32)]
    wide = [part.double() for part in parts]
    places = {"both": (0, 1), "hidden": (0,), "head": (1,), "none": ()}[wanted]
    for place in places:
        parts[place].requires_grad_()
        wide[place].requires_grad_()
    found, expected = chunked_kl(*parts, softcap), chunked_kl(*wide, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert found.requires_grad == bool(places)
    if places:
        grads = torch.autograd.grad(2.0 * found, [parts[place] for place in places])
        wanted_grads = torch.autograd.grad(2.0 * expected, [wide[place] for place in places])
        for a, b in zip(grads, wanted_grads):
            assert_near(a, b, 1e-5)

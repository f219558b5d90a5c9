"""The gated norm: the plain form against its formula, the Triton kernels against the plain form; torch's norm.

Without a GPU the kernels run under Triton's interpreter: TRITON_INTERPRET=1, with triton installed.
"""

from __future__ import annotations

from types import ModuleType
from typing import get_args

import pytest
import torch
from modules import kernel_module
from torch import Tensor

from postnas.blocks.kda import SigmoidRMSNorm
from postnas.blocks.norm import GatedRMSNorm, RMSNorm, torch_norm
from postnas.ops.gated_norm import WIDEST, Act, gated_norm, normalised, plain_gated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTS = list(get_args(Act))
EPS = 1e-5
BOUNDS = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = ("x", "gate", "weight")
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def kernels() -> ModuleType:
    return kernel_module("gated_norm_triton")


def inputs(*shape: int, dtype: torch.dtype = torch.float32, wide: torch.dtype | None = None) -> Inputs:
    """x and gate [*shape] in dtype and weight [V] in `wide`, else dtype too; leaves. Rows of x differ in size."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = torch.exp(2 * draw(*shape[:-1], 1))
    parts = draw(*shape) * size, 2 * draw(*shape), 1 + 0.3 * draw(shape[-1])
    x, gate, weight = (
        part.to(DEVICE, kind).requires_grad_() for part, kind in zip(parts, (dtype, dtype, wide or dtype), strict=True)
    )
    return x, gate, weight


def gradients(y: Tensor, leaves: Inputs) -> list[Tensor]:
    """Of a fixed random weighting of y, the same in every type."""
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y)
    return list(torch.autograd.grad(y, leaves, along))


def assert_near(found: Tensor, expected: Tensor, bound: float, name: str) -> None:
    """The whole tensor's error as a share of its size; a NaN fails."""
    assert found.shape == expected.shape, name
    size = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    assert bool(error <= bound * size), f"{name}: {float(error / size)} above {bound}"


def compare(kernels: ModuleType, leaves: Inputs, act: Act) -> None:
    """Output and every gradient of the kernels against the plain form in float64, as coarse as the coarsest type."""
    eps = 1.0 if leaves[0].shape[-1] == 1 else EPS  # in a row of one channel x has no gradient but through epsilon
    bound = max(BOUNDS[part.dtype] for part in leaves)
    x, gate, weight = (part.detach().double().requires_grad_() for part in leaves)
    y, expected = kernels.gated_norm(*leaves, eps, act), plain_gated_norm(x, gate, weight, eps, act)
    assert y.dtype == torch.promote_types(leaves[0].dtype, leaves[1].dtype)
    assert_near(y, expected, bound, "y")
    for name, leaf, a, b in zip(NAMES, leaves, gradients(y, leaves), gradients(expected, (x, gate, weight))):
        assert a.dtype == leaf.dtype
        assert_near(a, b, bound, f"gradient of {name}")


def ulps(found: Tensor, expected: Tensor) -> Tensor:
    """How many numbers of their 16-bit type lie between them, sign by sign."""
    assert found.dtype == expected.dtype and found.dtype.itemsize == 2
    assert found.isfinite().all() and bool((found.sign() * expected.sign() >= 0).all())
    return (found.abs().view(torch.int16).int() - expected.abs().view(torch.int16).int()).abs()


# The plain form


@pytest.mark.parametrize("act", ACTS)
def test_plain_is_the_formula_with_every_gradient(act: Act) -> None:
    """One element after the other, and derivatives by differences."""
    x, gate, weight = (part.detach().cpu().double() for part in inputs(2, 3, 5))
    y = plain_gated_norm(x, gate, weight, EPS, act)
    for place in [(0, 0), (0, 2), (1, 1)]:
        root = (sum(float(value) ** 2 for value in x[place]) / 5 + EPS) ** 0.5
        for v in range(5):
            opened = 1 / (1 + float(torch.exp(-gate[place][v])))
            opened *= float(gate[place][v]) if act == "silu" else 1
            assert float(y[place][v]) == pytest.approx(float(weight[v]) * float(x[place][v]) / root * opened, abs=1e-12)
    leaves = tuple(part.requires_grad_() for part in (x, gate, weight))
    assert torch.autograd.gradcheck(lambda *parts: plain_gated_norm(*parts, EPS, act), leaves)


def test_the_blocks_norms_are_this_one() -> None:
    x, gate, weight = (part.detach().cpu() for part in inputs(3, 8))
    for kind, act in ((GatedRMSNorm, "silu"), (SigmoidRMSNorm, "sigmoid")):
        norm = kind(8, EPS)
        with torch.no_grad():
            norm.weight.copy_(weight)
        torch.testing.assert_close(norm(x, gate), plain_gated_norm(x, gate, weight, EPS, act), rtol=0, atol=0)


def test_a_cpu_takes_the_plain_form() -> None:
    parts = tuple(part.detach().cpu() for part in inputs(7, 16))
    torch.testing.assert_close(gated_norm(*parts, EPS), plain_gated_norm(*parts, EPS), rtol=0, atol=0)


# The kernels, on the GPU or under the interpreter


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels", [1, 64, 96, 100, 128, 256, WIDEST])
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_kernels_equal_plain(kernels: ModuleType, poison: None, rows: int, channels: int, act: Act) -> None:
    compare(kernels, inputs(rows, channels), act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("programs", [1, 2, 3, 5, 100])
def test_any_number_of_programs_adds_up_the_weight_gradient(
    kernels: ModuleType, poison: None, monkeypatch: pytest.MonkeyPatch, programs: int, act: Act
) -> None:
    """77 rows are ten tiles, the last one not full: one program has all of them, or each one."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    compare(kernels, inputs(7, 11, 100), act)


@pytest.mark.parametrize("order", ["heads of a wider product", "every other row", "channels apart", "the same for all"])
def test_any_order_of_memory(kernels: ModuleType, poison: None, order: str) -> None:
    """Of x, gate and the output's gradient; what leads to the leaf is torch's."""
    shape, heads, channels = (2, 5), 3, 24
    leaf = {
        "heads of a wider product": lambda: torch.randn(*shape, heads * channels + 8),
        "every other row": lambda: torch.randn(*shape, heads, 2 * channels),
        "channels apart": lambda: torch.randn(*shape, channels, heads),
        "the same for all": lambda: torch.randn(channels),
    }[order]()
    view = {
        "heads of a wider product": lambda t: t[..., : heads * channels].unflatten(-1, (heads, channels)),
        "every other row": lambda t: t[..., :channels],
        "channels apart": lambda t: t.transpose(-1, -2),
        "the same for all": lambda t: t.expand(*shape, heads, channels),
    }[order]
    leaf = leaf.to(DEVICE).requires_grad_()
    weight = torch.randn(channels, device=DEVICE)
    wide = leaf.detach().double().requires_grad_()
    y = kernels.gated_norm(view(leaf), view(leaf) + 0 * leaf.sum(), weight, EPS)
    expected = plain_gated_norm(view(wide), view(wide), weight.double(), EPS)
    assert_near(y, expected, 1e-5, "y")
    along = view(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE))
    (found,), (right,) = torch.autograd.grad(y, leaf, along), torch.autograd.grad(expected, wide, along.double())
    assert_near(found, right, 1e-5, "gradient")
    (found,), (right,) = (
        torch.autograd.grad(kernels.gated_norm(view(leaf), view(leaf), weight, EPS).sum(), leaf),
        torch.autograd.grad(plain_gated_norm(view(wide), view(wide), weight.double(), EPS).sum(), wide),
    )
    assert_near(found, right, 1e-5, "gradient of a sum")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_kernels_round_where_the_plain_form_does(kernels: ModuleType, dtype: torch.dtype, act: Act) -> None:
    """All but the rare element near the middle of two numbers has the plain form's bits; weights in float32 too.

    Triton's interpreter cuts bfloat16 off instead of rounding, so that type is for a GPU.
    """
    for wide in (None, torch.float32):
        parts = tuple(part.detach() for part in inputs(512, 256, dtype=dtype, wide=wide))
        apart = ulps(kernels.gated_norm(*parts, EPS, act), plain_gated_norm(*parts, EPS, act))
        assert apart.max() <= 4  # a step at the first rounding can be two at the next one, which has its own
        assert (apart > 0).float().mean() < 1e-2


def test_equal_bits_on_equal_runs(kernels: ModuleType) -> None:
    leaves = inputs(333, 64)
    first, second = (
        [y, *gradients(y, leaves)] for y in (kernels.gated_norm(*leaves, EPS), kernels.gated_norm(*leaves, EPS))
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused(kernels: ModuleType) -> None:
    x, gate, weight = inputs(3, 8)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernels.gated_norm(x, gate, weight, EPS).sum(), x, create_graph=True)


def test_what_is_frozen_gets_no_gradient(kernels: ModuleType) -> None:
    x, gate, weight = inputs(5, 8)
    kernels.gated_norm(x, gate.detach(), weight.detach(), EPS).sum().backward()
    assert x.grad is not None and gate.grad is None and weight.grad is None
    with torch.no_grad():
        assert not kernels.gated_norm(x, gate, weight, EPS).requires_grad


# torch's own norm, which `RMSNorm` takes on a GPU in 16 bits


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 64, 96, 576])
def test_torchs_norm_is_within_one_digit(channels: int, dtype: torch.dtype, autocast: bool) -> None:
    x, _, weight = inputs(500, channels, dtype=dtype)
    expected = weight * normalised(x, EPS)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        found = torch_norm(x, weight, EPS)
    assert ulps(found, expected).max() <= 1
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(wide[1] * normalised(wide[0], EPS), wide, along.double())
    for name, a, b in zip(("x", "weight"), torch.autograd.grad(found, (x, weight), along), exact):
        if not (name == "x" and channels == 1):  # its gradient is what cancellation leaves
            assert_near(a, b, 2 * BOUNDS[dtype], f"gradient of {name}")


# On the GPU, at the sizes of real models: heads, value dim

SHAPES = {"2B": (12, 256), "4B": (16, 256), "135M": (9, 128), "odd": (5, 100)}


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("length", [1, 7, 130, 4099])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_cuda_equals_plain(
    kernels: ModuleType, poison: None, shape: str, dtype: torch.dtype, length: int, act: Act
) -> None:
    compare(kernels, inputs(1, length, *SHAPES[shape], dtype=dtype), act)


@pytest.mark.gpu
def test_cuda_takes_mixed_types(kernels: ModuleType, poison: None) -> None:
    """Activations in bfloat16 and weights in float32, as under autocast, and a gate of another type than x's."""
    compare(kernels, inputs(2, 130, 12, 256, dtype=torch.bfloat16, wide=torch.float32), "silu")
    x, gate, weight = inputs(130, 256)
    compare(kernels, (x, gate.detach().bfloat16().requires_grad_(), weight), "sigmoid")
    compare(kernels, (x.detach().half().requires_grad_(), gate.detach().bfloat16().requires_grad_(), weight), "silu")


@pytest.mark.gpu
def test_cuda_dispatches_by_type_and_size(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    form = kernels.gated_norm
    monkeypatch.setattr(kernels, "gated_norm", lambda x, *rest: calls.append(x.shape) or form(x, *rest))
    for channels, dtype, taken in ((64, torch.float32, 1), (64, torch.float64, 0), (WIDEST + 1, torch.float32, 0)):
        calls.clear()
        y = gated_norm(*inputs(3, channels, dtype=dtype), EPS)
        assert len(calls) == taken and y.isfinite().all()
    assert gated_norm(*inputs(0, 64), EPS).shape == (0, 64)


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward(kernels: ModuleType) -> None:
    x, gate, weight = inputs(2, 65, 9, 128, dtype=torch.bfloat16, wide=torch.float32)
    along = torch.randn_like(x)

    def work() -> list[Tensor]:
        y = gated_norm(x, gate, weight, EPS)
        return [y.detach(), *torch.autograd.grad(y, (x, gate, weight), along)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        for part in (x, gate, weight):
            part.copy_(torch.randn_like(part))
    graph.replay()
    for a, b in zip(captured, work(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_rms_norm_takes_torchs_in_16_bits(dtype: torch.dtype) -> None:
    """Within a digit of the plain form, in x's type under autocast too; float32 stays exactly as it was."""
    x, _, weight = inputs(300, 576, dtype=dtype, wide=torch.float32)
    norm = RMSNorm(576, EPS).cuda()
    with torch.no_grad():
        norm.weight.copy_(weight)
        for autocast in (False, True):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                found = norm(x)
            assert ulps(found, weight.to(dtype) * normalised(x, EPS)).max() <= 1
        assert torch.equal(norm(x.float()), weight * normalised(x.float(), EPS))

"""The dynamic convolution: the plain form against its formula, the Triton kernels against the plain form.

Without a GPU the kernels run under Triton's interpreter: TRITON_INTERPRET=1, with triton installed.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from modules import kernel_module
from torch import Tensor

from postnas.ops.dynamic_conv import dynamic_conv, plain_causal_conv, plain_dynamic_conv, stages_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 5, 130]
BATCH, INNER = 2, 18
Arguments = dict[str, Tensor]


@pytest.fixture
def kernels() -> ModuleType:
    return kernel_module("dynamic_conv_triton")


def arguments(
    length: int,
    channels: int = 24,
    width: int = 4,
    batch: int = BATCH,
    inner: int = INNER,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    taken = {
        "x": draw(batch, length, channels),
        "inner": draw(batch, length, inner),
        "weight": (draw(channels * width, inner) / inner**0.5).detach().requires_grad_(),
        "bias": draw(channels * width),
    }
    return taken


def packs(length: int, batch: int = BATCH, pattern: tuple[int, ...] = (1, 2, 3, 5)) -> Tensor:
    """[batch, length] segments of one, two, three and five tokens, again and again; each row begins elsewhere."""
    rows = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        begin, turn = pattern[row % len(pattern)], row + 1
        while begin < length:
            rows[row, begin:] += 1
            begin, turn = begin + pattern[turn % len(pattern)], turn + 1
    return rows.to(DEVICE)


def history_of(x: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(x.shape[0], width - 1, x.shape[2], generator=generator).to(x)


def formula(
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    segments: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """One row, token and tap at a time."""
    channels = x.shape[2]
    width = weight.shape[0] // channels
    rows = []
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            taps = (weight @ inner[row, t] + bias).view(channels, width)
            total = torch.zeros_like(x[row, t])
            for w in range(width):
                source = t - width + 1 + w
                owner = 0 if source < 0 else int(segments[row, source]) if segments is not None else 0
                if segments is not None and owner != segments[row, t]:
                    continue
                if source >= 0:
                    total = total + taps[:, w] * x[row, source]
                elif history is not None:
                    total = total + taps[:, w] * history[row, source + width - 1]
            rows.append(total * torch.sigmoid(total) if silu else total)
    return torch.stack(rows).view_as(x)


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed random weighting of y."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return list(torch.autograd.grad((y * weights).sum(), inputs))


def assert_near(found: Tensor, expected: Tensor, bound: float, name: str) -> None:
    """The whole tensor's error as a share of its size; a NaN fails."""
    assert found.shape == expected.shape, name
    size = expected.double().norm()
    error = (found.double() - expected.double()).norm()
    assert bool(error <= bound * size), f"{name}: {float(error / size)} above {bound}"


def compare(kernels: ModuleType, taken: Arguments, bound: float, silu: bool, **context: Tensor | None) -> None:
    """Outputs, history and every gradient of the kernels against the plain form in float64."""
    wide = {name: value.detach().double().requires_grad_() for name, value in taken.items()}
    y, kept = kernels.dynamic_conv(**taken, **context, silu=silu)
    y_plain, kept_plain = plain_dynamic_conv(**wide, **context, silu=silu)
    assert y.dtype == taken["x"].dtype
    assert_near(y, y_plain, bound, "y")
    torch.testing.assert_close(kept.double(), kept_plain.detach(), rtol=0, atol=0)
    found, expected = gradients(y, list(taken.values())), gradients(y_plain, list(wide.values()))
    for name, a, b in zip(taken, found, expected, strict=True):
        assert a.dtype == taken[name].dtype
        assert_near(a, b, bound, f"gradient of {name}")


# The plain form


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_plain_is_the_formula_with_every_gradient(length: int, filled: bool, packed: bool, silu: bool) -> None:
    taken = {name: value.detach().double().requires_grad_() for name, value in arguments(length, 6).items()}
    history = history_of(taken["x"], 4) if filled else None
    segments = packs(length) if packed else None
    y, _ = plain_dynamic_conv(**taken, history=history, segments=segments, silu=silu)
    expected = formula(**taken, history=history, segments=segments, silu=silu)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    leaves = list(taken.values())
    torch.testing.assert_close(gradients(y, leaves), gradients(expected, leaves), rtol=0, atol=1e-11)


def test_a_cpu_takes_the_plain_form() -> None:
    taken = {name: value.detach().cpu() for name, value in arguments(7).items()}
    torch.testing.assert_close(dynamic_conv(**taken), plain_dynamic_conv(**taken), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("limit", "stages", "taken"),
    [(232_448, 4, 196_608), (166_912, 3, 98_304), (101_376, 3, 98_304), (98_303, 2, 49_152), (65_536, 2, 65_536)],
)
def test_stages_fit_into_the_shared_memory_of_a_block(limit: int, stages: int, taken: int) -> None:
    """Hopper, A100, three generations of consumer cards, less than those, Turing; `taken` by the compiled kernels."""
    assert stages_within(limit) == stages
    assert taken <= limit


# The kernels, on the GPU or under the interpreter


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_equal_plain(kernels: ModuleType, poison: None, length: int, packed: bool, silu: bool) -> None:
    compare(kernels, arguments(length), 1e-5, silu, segments=packs(length) if packed else None)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("channels", [24, 64])
def test_kernels_equal_plain_at_every_width(kernels: ModuleType, poison: None, channels: int, width: int) -> None:
    taken = arguments(13, channels, width)
    compare(kernels, taken, 1e-5, True, history=history_of(taken["x"], width), segments=packs(13))


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks_of_the_backward_leave_no_seam(
    kernels: ModuleType, poison: None, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Of dx above all, which needs the taps of up to W - 1 later tokens."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    taken = arguments(17)
    compare(kernels, taken, 1e-5, True, history=history_of(taken["x"], 4))
    compare(kernels, taken, 1e-5, False, segments=packs(17))


@pytest.mark.parametrize("sizes", [(1,) * 13, (2, 2, 3, 1, 2, 3), (3, 3, 3, 3, 1), (7, 1, 5)])
def test_pieces_on_a_filled_history_equal_one_piece(kernels: ModuleType, sizes: tuple[int, ...]) -> None:
    taken = {name: value.detach() for name, value in arguments(13).items()}
    history = history_of(taken["x"], 4)
    whole, last = plain_dynamic_conv(**taken, history=history, silu=True)
    outputs = []
    for begin, end in pairwise([sum(sizes[:i]) for i in range(len(sizes) + 1)]):
        piece = taken | {name: taken[name][:, begin:end] for name in ("x", "inner")}
        y, history = kernels.dynamic_conv(**piece, history=history, silu=True)
        outputs.append(y)
    assert_near(torch.cat(outputs, dim=1), whole, 1e-5, "y")
    torch.testing.assert_close(history, last, rtol=0, atol=0)


def test_right_padded_rows_hand_on_the_history_of_their_real_tokens(kernels: ModuleType) -> None:
    for lengths in ([0, 8], [1, 2], [3, 5]):
        counts = torch.tensor(lengths, device=DEVICE)
        taken = arguments(8)
        real = torch.arange(8, device=DEVICE) < counts[:, None]
        taken["x"] = (taken["x"].detach() * real[..., None]).requires_grad_()
        compare(kernels, taken, 1e-5, False, history=history_of(taken["x"], 4), lengths=counts)


def test_segments_of_32_bits_and_a_jump_in_number(kernels: ModuleType) -> None:
    taken = arguments(9)
    segments = torch.tensor([[1] * 9, [0] * 4 + [7] * 5], dtype=torch.int64, device=DEVICE)
    history = history_of(taken["x"], 4)
    compare(kernels, taken, 1e-5, True, history=history, segments=segments)
    y, _ = kernels.dynamic_conv(**taken, history=history, segments=segments.int())
    torch.testing.assert_close(y, kernels.dynamic_conv(**taken, history=history, segments=segments)[0], rtol=0, atol=0)


def test_no_gradient_crosses_a_border(kernels: ModuleType) -> None:
    taken = arguments(20)
    segments = (torch.arange(20, device=DEVICE) >= 9).long().expand(BATCH, -1)
    y, _ = kernels.dynamic_conv(**taken, segments=segments)
    of_x, of_inner = torch.autograd.grad(y[:, 9:].sum(), [taken["x"], taken["inner"]])
    for gradient in (of_x, of_inner):
        assert gradient[:, :9].abs().max() == 0
        assert gradient[:, 9:].abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("order", ["taps first", "[B, T, W, D]", "[B, T, D, W]", "one row", "the same for all"])
@pytest.mark.parametrize("packed", [False, True])
def test_given_taps_equal_plain_in_any_order_of_memory(
    kernels: ModuleType, poison: None, packed: bool, order: str
) -> None:
    batch = 1 if order == "one row" else BATCH
    x = arguments(37, batch=batch)["x"]
    shapes = {"[B, T, W, D]": (batch, 37, 4, 24), "[B, T, D, W]": (batch, 37, 24, 4), "the same for all": (4, 1, 1, 24)}
    leaf = torch.randn(shapes.get(order, (4, batch, 37, 24)), device=DEVICE).requires_grad_()
    views = {"[B, T, W, D]": (2, 0, 1, 3), "[B, T, D, W]": (3, 0, 1, 2)}
    taps = leaf.permute(views.get(order, (0, 1, 2, 3))).expand(4, batch, 37, 24)
    history, segments = history_of(x, 4), packs(37, batch) if packed else None
    y, kept = kernels.causal_conv(x, taps, history=history, segments=segments)
    x_wide, wide = x.detach().double().requires_grad_(), taps.detach().double().requires_grad_()
    expected, kept_plain = plain_causal_conv(x_wide, wide, history=history, segments=segments)
    assert_near(y, expected, 1e-5, "y")
    torch.testing.assert_close(kept.double(), kept_plain, rtol=0, atol=0)
    dx, dleaf = gradients(y, [x, leaf])
    dx_plain, dtaps = gradients(expected, [x_wide, wide])
    assert_near(dx, dx_plain, 1e-5, "gradient of x")
    back = torch.autograd.grad(taps, leaf, dtaps.float())[0]
    assert_near(dleaf, back, 1e-5, "gradient of taps")


def test_only_x_may_want_a_gradient(kernels: ModuleType) -> None:
    """Only x wants a gradient, as where the generator is frozen."""
    taken = {name: value.detach() for name, value in arguments(9).items()}
    x = taken.pop("x").requires_grad_()
    y, kept = kernels.dynamic_conv(x, **taken)
    y.sum().backward()
    assert x.grad is not None and not kept.requires_grad


# On the GPU, at the sizes of real models: D, R

SHAPES = {"2B": (3072, 384), "4B": (4096, 512), "135M": (1152, 144)}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 130, 1000, 4097])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_cuda_equals_plain(kernels: ModuleType, shape: str, dtype: torch.dtype, length: int, packed: bool) -> None:
    channels, inner = SHAPES[shape]
    batch = 1 if length > 1000 else 2
    taken = arguments(length, channels, batch=batch, inner=inner, dtype=dtype)
    segments = packs(length, batch, (1, 2, 3, 5, 1000)) if packed else None
    compare(kernels, taken, BOUNDS[dtype], True, history=history_of(taken["x"], 4), segments=segments)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2, 3, 8])
def test_cuda_equals_plain_at_other_widths(kernels: ModuleType, width: int) -> None:
    taken = arguments(130, 192, width, inner=80, dtype=torch.bfloat16)
    compare(kernels, taken, BOUNDS[torch.bfloat16], True, history=history_of(taken["x"], width), segments=packs(130))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", list(SHAPES))
def test_cuda_under_autocast_takes_wide_weights(shape: str) -> None:
    """Activations in bfloat16, weights and their gradients in float32."""
    channels, inner = SHAPES[shape]
    taken = arguments(130, channels, inner=inner)
    taken |= {name: taken[name].detach().bfloat16().requires_grad_() for name in ("x", "inner")}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, _ = dynamic_conv(**taken, silu=True)
        expected, _ = plain_dynamic_conv(**taken, silu=True)
    assert y.dtype == torch.bfloat16
    for name, a, b in zip(taken, gradients(y, list(taken.values())), gradients(expected, list(taken.values()))):
        assert a.dtype == taken[name].dtype
        assert_near(a, b, 2e-2, name)

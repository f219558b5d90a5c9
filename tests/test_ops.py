"""The gated delta rule and the causal convolution against loops from their formulas: values, states, gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from postnas.ops.dynamic_conv import causal_conv
from postnas.ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    gated_delta_rule,
    recurrent_gated_delta_rule,
)

BATCH, HEADS, KEY, VALUE = 2, 2, 4, 6
LENGTHS = (1, 2, 63, 64, 65, 150)
FORMS = pytest.mark.parametrize("form", [recurrent_gated_delta_rule, chunk_gated_delta_rule, gated_delta_rule])


# The gated delta rule


def rule_inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shape = (BATCH, length, HEADS)
    inputs = {
        "q": torch.randn(*shape, KEY),
        "k": torch.randn(*shape, KEY),
        "v": torch.randn(*shape, VALUE),
        "g": -torch.rand(shape),
        "beta": torch.rand(shape),
        "state": torch.randn(BATCH, HEADS, KEY, VALUE),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def borders(length: int) -> Tensor:
    """[BATCH, length] segments that never fall: some of one token, some longer than a chunk, a jump in number."""
    rows = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, starts in enumerate([(1, 2, 63, 64, 66, 140), (70,)]):
        for start in starts:
            rows[row, start:] += 1 + (start == 64)
    return rows


def naive_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q, one row, head and token at a time."""
    outputs = []
    states = []
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            s = state[row, head]
            for t in range(q.shape[1]):
                if segments is not None and t > 0 and segments[row, t] != segments[row, t - 1]:
                    s = torch.zeros_like(s)
                key = k[row, t, head] / (k[row, t, head].square().sum() + 1e-6).sqrt()
                query = q[row, t, head] / (q[row, t, head].square().sum() + 1e-6).sqrt() / math.sqrt(q.shape[-1])
                s = math.exp(g[row, t, head]) * s
                s = s + torch.outer(key, beta[row, t, head] * (v[row, t, head] - s.T @ key))
                outputs.append(s.T @ query)
            states.append(s)
    o = torch.stack(outputs).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return o, torch.stack(states).view_as(state)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Of a fixed random weighting of all outputs."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


@FORMS
@pytest.mark.parametrize("packed", [False, True])
def test_rule_is_the_formula(form: object, packed: bool) -> None:
    inputs = {name: value.detach() for name, value in rule_inputs(70).items()}
    segments = borders(70) if packed else None
    expected = naive_rule(**inputs, segments=segments)
    found = form(**inputs, segments=segments)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_equals_recurrent_in_outputs_states_and_every_gradient(length: int, packed: bool) -> None:
    inputs = rule_inputs(length)
    segments = borders(length) if packed else None
    slow = recurrent_gated_delta_rule(**inputs, segments=segments)
    fast = chunk_gated_delta_rule(**inputs, segments=segments)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)
    leaves = list(inputs.values())
    for name, a, b in zip(inputs, gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, name=name: f"gradient of {name}: {text}")


@FORMS
def test_rule_without_a_state_starts_from_zeros(form: object) -> None:
    inputs = rule_inputs(65)
    state = inputs.pop("state")
    found = form(**inputs)  # type: ignore[operator]
    expected = form(**inputs, state=torch.zeros_like(state))  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rule_in_uneven_pieces_equals_one_piece() -> None:
    inputs = rule_inputs(150)
    state: Tensor = inputs["state"]
    leaves = list(inputs.values())
    whole = gated_delta_rule(**inputs)
    outputs, begin = [], 0
    for size in (1, 7, 64, 1, 2, 75):
        piece = {name: inputs[name][:, begin : begin + size] for name in ("q", "k", "v", "g", "beta")}
        o, state = gated_delta_rule(**piece, state=state)
        outputs.append(o)
        begin += size
    pieces = torch.cat(outputs, dim=1), state
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(gradients(pieces, leaves), gradients(whole, leaves), rtol=0, atol=1e-10)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decay_and_strength_stay_finite(form: object, dtype: torch.dtype) -> None:
    """Decays of exp(-30) and 1 and strengths of 0 and 1 side by side, so that sums of g reach -2,000 in a chunk."""
    inputs = {name: value.detach() for name, value in rule_inputs(150, dtype).items()}
    pattern = torch.arange(150)
    inputs["g"] = torch.where(pattern % 3 == 0, 0.0, -30.0).to(dtype)[None, :, None].expand(BATCH, -1, HEADS).clone()
    inputs["beta"] = (pattern % 2).to(dtype)[None, :, None].expand(BATCH, -1, HEADS).clone()
    leaves = [value.requires_grad_() for value in inputs.values()]
    found = form(**inputs)  # type: ignore[operator]
    expected = recurrent_gated_delta_rule(**{name: value.double() for name, value in inputs.items()})
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=0, atol=tolerance)
    for name, gradient in zip(inputs, gradients(found, leaves), strict=True):
        assert gradient.isfinite().all(), name


@FORMS
@pytest.mark.parametrize("decay", [-30.0, 0.0])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_constant_extremes_stay_finite(form: object, decay: float, strength: float) -> None:
    inputs = {name: value.detach() for name, value in rule_inputs(130, torch.float32).items()}
    inputs["g"] = torch.full_like(inputs["g"], decay)
    inputs["beta"] = torch.full_like(inputs["beta"], strength)
    leaves = [value.requires_grad_() for value in inputs.values()]
    found = form(**inputs)  # type: ignore[operator]
    assert all(x.isfinite().all() for x in (*found, *gradients(found, leaves)))


@FORMS
def test_a_zero_key_stays_finite(form: object) -> None:
    """What padding looks like after the mask: all zeros, and the norm of a key divides."""
    inputs = rule_inputs(66, torch.float32)
    zeroed = {name: value.detach() * (0 if name in "qkv" else 1) for name, value in inputs.items()}
    leaves = [value.requires_grad_() for value in zeroed.values()]
    found = form(**zeroed)  # type: ignore[operator]
    assert all(x.isfinite().all() for x in (*found, *gradients(found, leaves)))


@FORMS
def test_tokens_without_strength_and_decay_change_no_state(form: object) -> None:
    """Real tokens then 40 still ones: the state is that of the real ones alone, to the last bit of a float64 sum."""
    inputs = {name: value.detach() for name, value in rule_inputs(90).items()}
    inputs["g"][:, 50:] = 0.0
    inputs["beta"][:, 50:] = 0.0
    _, after = form(**inputs)  # type: ignore[operator]
    _, before = form(**{n: x if n == "state" else x[:, :50] for n, x in inputs.items()})  # type: ignore[operator]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


@FORMS
def test_no_gradient_crosses_a_border(form: object) -> None:
    inputs = rule_inputs(100)
    segments = (torch.arange(100) >= 71).long().expand(BATCH, -1)
    o, state = form(**inputs, segments=segments)  # type: ignore[operator]
    of_second = torch.autograd.grad(o[:, 71:].sum() + state.sum(), list(inputs.values()))
    for name, gradient in zip(inputs, of_second, strict=True):
        first = gradient if name == "state" else gradient[:, :71]
        # the chunked form takes sums of g apart again, which leaves their rounding
        assert first.abs().max() < 1e-13, name


@FORMS
@pytest.mark.parametrize("length", [1, 70])
def test_a_row_that_starts_in_a_new_segment_forgets_the_state(form: object, length: int) -> None:
    """`state` belongs to segment 0: a chunk that begins with segment 1 begins a sequence."""
    inputs = rule_inputs(length)
    segments = torch.tensor([[1], [0]]).expand(-1, length)
    o, state = form(**inputs, segments=segments)  # type: ignore[operator]
    fresh = inputs | {"state": inputs["state"] * torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)}
    torch.testing.assert_close((o, state), form(**fresh), rtol=0, atol=1e-12)  # type: ignore[operator]


def test_rule_keeps_the_type_of_values_and_a_float32_state() -> None:
    inputs = {name: value.detach() for name, value in rule_inputs(5, torch.bfloat16).items()}
    for form in (recurrent_gated_delta_rule, chunk_gated_delta_rule):
        o, state = form(**inputs)
        assert o.dtype == torch.bfloat16
        assert state.dtype == torch.float32


# The causal convolution

CHANNELS = 5


def naive_conv(x: Tensor, taps: Tensor, history: Tensor | None, segments: Tensor | None) -> Tensor:
    """y[t, d] = sum over w of taps[w, t, d] * x[t - W + 1 + w, d], where that token is of the same segment."""
    width, (batch, length, channels) = taps.shape[0], x.shape
    y = torch.zeros_like(x)
    for row in range(batch):
        for t in range(length):
            for w in range(width):
                source = t - width + 1 + w
                owner = 0 if segments is None else int(segments[row, max(source, 0)] if source >= 0 else 0)
                if segments is not None and owner != segments[row, t]:
                    continue
                if source < 0 and history is None:
                    continue
                value = x[row, source] if source >= 0 else history[row, source + width - 1]  # type: ignore[index]
                tap = taps[w, row, t] if taps.ndim == 4 else taps[w]
                y[row, t] += tap * value
    assert channels == y.shape[-1]
    return y


def conv_inputs(length: int, static: bool, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shape = (width, CHANNELS) if static else (width, BATCH, length, CHANNELS)
    x, taps = torch.randn(BATCH, length, CHANNELS).double(), torch.randn(shape).double()
    return x, taps, torch.randn(BATCH, width - 1, CHANNELS).double()


def packs(length: int) -> Tensor:
    """Segments with borders one, two and five tokens apart; the second row has none."""
    rows = torch.zeros(BATCH, length, dtype=torch.int64)
    for start in (2, 3, 5, 10):
        rows[0, start:] += 1
    return rows


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 13])
def test_conv_is_the_formula(length: int, static: bool, filled: bool, packed: bool, width: int) -> None:
    x, taps, history = conv_inputs(length, static, width)
    segments = packs(length) if packed else None
    past = history if filled else None
    found, _ = causal_conv(x, taps, history=past, segments=segments)
    torch.testing.assert_close(found, naive_conv(x, taps, past, segments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 13, (2, 2, 3, 1, 2, 3), (3, 3, 3, 3, 1), (7, 1, 5)])
def test_conv_in_pieces_equals_one_piece(sizes: tuple[int, ...], static: bool) -> None:
    """Pieces of one, two and three tokens on a filled history of three shift it by as many."""
    x, taps, history = conv_inputs(13, static)
    whole, last = causal_conv(x, taps, history=history)
    outputs, begin = [], 0
    for size in sizes:
        part = taps if static else taps[:, :, begin : begin + size]
        y, history = causal_conv(x[:, begin : begin + size], part, history=history)
        outputs.append(y)
        begin += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(history, last, rtol=0, atol=0)


@pytest.mark.parametrize("static", [False, True])
def test_no_tap_crosses_a_border_in_the_gradient(static: bool) -> None:
    x, taps, history = (value.requires_grad_() for value in conv_inputs(13, static))
    segments = packs(13)
    y, _ = causal_conv(x, taps, history=history, segments=segments)
    for start, stop in pairwise((0, 2, 3, 5, 10, 13)):
        of_x, of_history = torch.autograd.grad(y[0, start:stop].sum(), [x, history], retain_graph=True)
        outside = torch.ones(13, dtype=torch.bool)
        outside[start:stop] = False
        assert of_x[0, outside].abs().max() == 0
        assert of_x[0, stop - 1].abs().min() > 0
        assert (of_history.abs().max() > 0) == (start == 0)
    packed = gradients((y[:1],), [x, taps])
    separate = torch.cat(
        [
            causal_conv(
                x[:1, start:stop],
                taps if static else taps[:, :1, start:stop],
                history=history[:1] if start == 0 else None,
            )[0]
            for start, stop in pairwise((0, 2, 3, 5, 10, 13))
        ],
        dim=1,
    )
    torch.testing.assert_close(packed, gradients((separate,), [x, taps]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [1, 2, 3, 5])
def test_the_history_handed_on_holds_nothing_of_an_ended_sequence(last: int) -> None:
    x, taps, history = conv_inputs(9, static=False)
    segments = (torch.arange(9) >= 9 - last).long().expand(BATCH, -1)
    _, kept = causal_conv(x, taps, history=history, segments=segments)
    _, alone = causal_conv(x[:, 9 - last :], taps[:, :, 9 - last :])
    torch.testing.assert_close(kept, alone, rtol=0, atol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_right_padded_rows_hand_on_the_history_of_their_real_tokens(static: bool, packed: bool) -> None:
    x, taps, history = conv_inputs(8, static)
    for lengths in ([0, 8], [1, 2], [3, 5]):
        counts = torch.tensor(lengths)
        real = torch.arange(8) < counts[:, None]
        segments = packs(8) if packed else None
        if segments is not None:  # padding belongs to the row's last segment
            segments = torch.where(real, segments, segments.masked_fill(~real, 0).amax(1, keepdim=True))
        y, kept = causal_conv(x * real[..., None], taps, history=history, segments=segments, lengths=counts)
        for row, count in enumerate(lengths):
            if count == 0:
                torch.testing.assert_close(kept[row], history[row], rtol=0, atol=0)
                continue
            alone, alone_kept = causal_conv(
                x[row : row + 1, :count],
                taps if static else taps[:, row : row + 1, :count],
                history=history[row : row + 1],
                segments=None if segments is None else segments[row : row + 1, :count],
            )
            torch.testing.assert_close(y[row, :count], alone[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(kept[row], alone_kept[0], rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_a_row_that_starts_in_a_new_segment_forgets_the_history(length: int) -> None:
    """`history` belongs to segment 0: a chunk that begins with segment 1 begins a sequence."""
    x, taps, history = conv_inputs(length, static=False)
    segments = torch.tensor([[1], [0]]).expand(-1, length)
    y, kept = causal_conv(x, taps, history=history, segments=segments)
    fresh = history * torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)
    torch.testing.assert_close((y, kept), causal_conv(x, taps, history=fresh), rtol=0, atol=1e-12)

"""Linear attention with decay against a loop from its formula: values, states, gradients, both kinds of decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_ops import gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from postnas.ops.linear_attention import (
    attention_flops,
    chunk_linear_attention,
    linear_attention,
    recurrent_linear_attention,
)

BATCH, HEADS, KEY, VALUE = 2, 2, 3, 4
LENGTHS = (1, 2, 15, 16, 17, 64, 65, 150)
SCALE = 0.6
every_form = pytest.mark.parametrize(
    "form", [recurrent_linear_attention, chunk_linear_attention, linear_attention], ids=["recurrent", "chunk", "chosen"]
)
both_decays = pytest.mark.parametrize("by_channel", [False, True], ids=["head", "channel"])


def drawn(length: int, by_channel: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, length, HEADS)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(*shape, KEY),
        "k": normal(*shape, KEY),
        "v": normal(*shape, VALUE),
        "g": -normal(*shape, *([KEY] if by_channel else [])).abs(),
        "state": normal(BATCH, HEADS, KEY, VALUE),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def borders(length: int) -> Tensor:
    """[BATCH, length] segments that never fall: some of one token, one longer than a chunk, a jump in number."""
    rows = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, starts in enumerate([(1, 2, 15, 16, 18, 63, 64, 140), (70,)]):
        for start in starts:
            rows[row, start:] += 1 + (start == 64)
    return rows


def naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, segments: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S + k v^T; o = scale S^T q, one row, head and token at a time."""
    o, states = torch.zeros_like(v), torch.zeros_like(state)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            s = state[row, head]
            for t in range(q.shape[1]):
                if segments is not None and t > 0 and segments[row, t] != segments[row, t - 1]:
                    s = torch.zeros_like(s)
                fade = g[row, t, head].exp()
                s = (fade[:, None] if fade.ndim else fade) * s + torch.outer(k[row, t, head], v[row, t, head])
                o[row, t, head] = scale * (s.T @ q[row, t, head])
            states[row, head] = s
    return o, states


@every_form
@both_decays
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_is_the_formula(form: Any, by_channel: bool, packed: bool) -> None:
    inputs = {name: value.detach() for name, value in drawn(70, by_channel).items()}
    segments = borders(70) if packed else None
    expected = naive(**inputs, segments=segments, scale=SCALE)
    found = form(**inputs, segments=segments, scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@both_decays
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_equals_recurrent_in_outputs_states_and_every_gradient(
    length: int, packed: bool, by_channel: bool
) -> None:
    inputs = drawn(length, by_channel)
    segments = borders(length) if packed else None
    slow = recurrent_linear_attention(**inputs, segments=segments, scale=SCALE)
    fast = chunk_linear_attention(**inputs, segments=segments, scale=SCALE)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    leaves = list(inputs.values())
    for name, a, b in zip(inputs, gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda text, name=name: f"gradient of {name}: {text}")


@both_decays
@pytest.mark.parametrize("length", [1, 18])
def test_gradients_are_those_of_finite_differences(length: int, by_channel: bool) -> None:
    sizes = [(1, length, 1, 2)] * 3 + [(1, length, 1, 2) if by_channel else (1, length, 1), (1, 1, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    q, k, v, g, state = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    leaves = [value.requires_grad_() for value in (q, k, v, -g.abs(), state)]
    segments = (torch.arange(length) >= 13)[None].long()
    assert torch.autograd.gradcheck(
        lambda q, k, v, g, state: linear_attention(q, k, v, g, state, segments, SCALE), leaves
    )


@both_decays
def test_uneven_pieces_equal_one_piece(by_channel: bool) -> None:
    inputs = drawn(150, by_channel)
    leaves = list(inputs.values())
    whole = linear_attention(**inputs)
    state, outputs, begin = inputs["state"], [], 0
    for size in (1, 7, 64, 1, 2, 75):
        piece = {name: inputs[name][:, begin : begin + size] for name in "qkvg"}
        o, state = linear_attention(**piece, state=state)
        outputs.append(o)
        begin += size
    pieces = torch.cat(outputs, dim=1), state
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(pieces, leaves), gradients(whole, leaves), rtol=0, atol=1e-11)


@both_decays
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["always", "every third", "all but every third", "at first", "at last"])
def test_strong_decay_stays_finite_and_right(pattern: str, dtype: torch.dtype, by_channel: bool) -> None:
    """g = -50 a token: sums of -3,200 in a chunk, beside tokens that forget nothing. The gradients too."""
    inputs = {name: value.detach() for name, value in drawn(150, by_channel, dtype).items()}
    place = torch.arange(150)
    strong = {
        "always": place >= 0,
        "every third": place % 3 == 0,
        "all but every third": place % 3 != 0,
        "at first": place < 70,
        "at last": place >= 70,
    }[pattern]
    g = torch.where(strong, -50.0, 0.0).to(dtype)
    inputs["g"] = g.view(1, -1, 1, *([1] if by_channel else [])).expand_as(inputs["g"]).clone()
    leaves = [value.requires_grad_() for value in inputs.values()]
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    found, expected = chunk_linear_attention(**inputs), recurrent_linear_attention(**wide)
    tolerance = {"rtol": 0.0, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close([x.double() for x in found], list(expected), **tolerance)
    grads = gradients(found, leaves)
    assert all(gradient.isfinite().all() for gradient in grads)
    if dtype == torch.float64:
        torch.testing.assert_close(grads, gradients(expected, list(wide.values())), rtol=0, atol=1e-10)


def test_channels_may_fade_each_in_its_own_way() -> None:
    """One channel forgets all at once, one nothing, one a little: a common scale for all would overflow."""
    inputs = drawn(100, by_channel=True, dtype=torch.float32)
    inputs["g"] = torch.tensor([-50.0, 0.0, -0.3]).expand(BATCH, 100, HEADS, KEY)
    found = chunk_linear_attention(**inputs)
    expected = recurrent_linear_attention(**{name: value.double() for name, value in inputs.items()})
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_equal_channels_are_one_decay_a_head(packed: bool) -> None:
    inputs = drawn(90, by_channel=False)
    segments = borders(90) if packed else None
    found = chunk_linear_attention(
        **inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, KEY)}, segments=segments, scale=SCALE
    )
    torch.testing.assert_close(
        found, chunk_linear_attention(**inputs, segments=segments, scale=SCALE), rtol=0, atol=1e-12
    )


@every_form
@both_decays
def test_without_a_state_it_starts_from_zeros(form: Any, by_channel: bool) -> None:
    inputs = drawn(65, by_channel)
    state = inputs.pop("state")
    torch.testing.assert_close(form(**inputs), form(**inputs, state=torch.zeros_like(state)), rtol=0, atol=0)


@every_form
@both_decays
def test_tokens_without_key_and_decay_change_no_state(form: Any, by_channel: bool) -> None:
    inputs = {name: value.detach() for name, value in drawn(90, by_channel).items()}
    inputs["g"][:, 50:] = 0.0
    inputs["k"][:, 50:] = 0.0
    _, after = form(**inputs)
    _, before = form(**{name: x if name == "state" else x[:, :50] for name, x in inputs.items()})
    torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


@every_form
@both_decays
def test_no_gradient_crosses_a_border(form: Any, by_channel: bool) -> None:
    inputs = drawn(100, by_channel)
    segments = (torch.arange(100) >= 71).long().expand(BATCH, -1)
    o, state = form(**inputs, segments=segments)
    of_second = torch.autograd.grad(o[:, 71:].sum() + state.sum(), list(inputs.values()))
    for name, gradient in zip(inputs, of_second, strict=True):
        first = gradient if name == "state" else gradient[:, :71]
        # the chunked form takes sums of g apart again, which leaves their rounding
        assert first.abs().max() < 1e-13, name


@every_form
@both_decays
@pytest.mark.parametrize("length", [1, 70])
def test_a_row_that_starts_in_a_new_segment_forgets_the_state(form: Any, length: int, by_channel: bool) -> None:
    inputs = drawn(length, by_channel)
    segments = torch.tensor([[1], [0]]).expand(-1, length)
    fresh = inputs | {"state": inputs["state"] * torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)}
    torch.testing.assert_close(form(**inputs, segments=segments), form(**fresh), rtol=0, atol=1e-12)


@both_decays
@pytest.mark.parametrize("length", [1, 20])
def test_it_keeps_the_type_of_values_and_a_float32_state(length: int, by_channel: bool) -> None:
    inputs = {name: value.detach() for name, value in drawn(length, by_channel, torch.bfloat16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention(**inputs)
    wide, last = linear_attention(**{name: value.float() for name, value in inputs.items()})
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, last, rtol=0, atol=0)
    torch.testing.assert_close(o, wide.bfloat16(), rtol=0, atol=0)


@both_decays
@pytest.mark.parametrize("length", [1, 5, 33, 64, 130])
def test_flops_are_those_of_the_products(length: int, by_channel: bool) -> None:
    inputs = {name: value.detach() for name, value in drawn(length, by_channel).items()}

    def outer(*shapes: Any, out_shape: Any, **rest: Any) -> int:  # k v^T as addcmul, a multiply-add an element
        return 2 * math.prod(out_shape)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addcmul: outer}) as counter:
        linear_attention(**inputs)
    assert counter.get_total_flops() == BATCH * HEADS * attention_flops(length, KEY, VALUE, by_channel)

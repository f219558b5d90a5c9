"""The rules with a decay a key channel, and the delta rule without one, against loops from papers and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive_rules import naive_kda, naive_rwkv7
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from postnas.ops import dplr, gated_delta_rule

BATCH, HEADS, KEY, VALUE = 2, 2, 4, 6
LENGTHS = (1, 2, 7, 63, 64, 65, 150)
EXACT = {"rtol": 0.0, "atol": 1e-10}


# The rules


def kda_inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shape = (BATCH, length, HEADS)
    inputs = {
        "q": torch.randn(*shape, KEY),
        "k": torch.randn(*shape, KEY),
        "v": torch.randn(*shape, VALUE),
        "g": -torch.rand(*shape, KEY),
        "beta": torch.rand(shape),
        "state": torch.randn(BATCH, HEADS, KEY, VALUE),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def rwkv7_inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """As the block makes them: a removal key of length 1, and b that key times rates below 1."""
    shape = (BATCH, length, HEADS)
    removal = F.normalize(torch.randn(*shape, KEY), dim=-1)
    inputs = {
        "r": torch.randn(*shape, KEY),
        "w": -torch.rand(*shape, KEY),
        "k": torch.randn(*shape, KEY),
        "v": torch.randn(*shape, VALUE),
        "a": -removal,
        "b": removal * torch.rand(*shape, KEY),
        "state": torch.randn(BATCH, HEADS, KEY, VALUE),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def delta_inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs: dict[str, Any] = kda_inputs(length, dtype)
    return inputs | {"g": None}


RULES: dict[str, tuple[Callable[..., Any], ...]] = {
    "kda": (kda_inputs, dplr.kda, dplr.recurrent_kda, dplr.chunk_kda),
    "rwkv7": (rwkv7_inputs, dplr.rwkv7, dplr.recurrent_rwkv7, dplr.chunk_rwkv7),
    "delta_rule": (
        delta_inputs,
        gated_delta_rule.gated_delta_rule,
        gated_delta_rule.recurrent_gated_delta_rule,
        gated_delta_rule.chunk_gated_delta_rule,
    ),
}
every_rule = pytest.mark.parametrize("rule", list(RULES))
channel_rules = pytest.mark.parametrize("rule", ["kda", "rwkv7"])
both_forms = pytest.mark.parametrize("form", [2, 3], ids=["recurrent", "chunked"])


def borders(length: int) -> Tensor:
    """[BATCH, length] segments that never fall: some of one token, some longer than a chunk, a jump in number."""
    rows = torch.zeros(BATCH, length, dtype=torch.int64)
    for row, starts in enumerate([(1, 2, 63, 64, 66, 140), (70,)]):
        for start in starts:
            rows[row, start:] += 1 + (start == 64)
    return rows


def detached(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.detach() for name, value in inputs.items()}


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of a fixed random weighting of all outputs, by name."""
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    total = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    leaves = {name: value for name, value in inputs.items() if value is not None}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@both_forms
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rule", "naive"), [("kda", naive_kda), ("rwkv7", naive_rwkv7)])
def test_rule_is_the_papers(rule: str, naive: Callable[..., Any], form: int, packed: bool) -> None:
    inputs = detached(RULES[rule][0](70))
    segments = borders(70) if packed else None
    found = RULES[rule][form](**inputs, segments=segments)
    torch.testing.assert_close(found, naive(**inputs, segments=segments), **EXACT)


@every_rule
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunk_equals_recurrent_in_outputs_states_and_every_gradient(rule: str, length: int, packed: bool) -> None:
    make, _, recurrent, chunked = RULES[rule]
    inputs, segments = make(length), borders(length) if packed else None
    slow, fast = recurrent(**inputs, segments=segments), chunked(**inputs, segments=segments)
    torch.testing.assert_close(fast, slow, **EXACT)
    torch.testing.assert_close(gradients(fast, inputs), gradients(slow, inputs), **EXACT)


@every_rule
@pytest.mark.parametrize("packed", [False, True])
def test_uneven_pieces_equal_one_piece(rule: str, packed: bool) -> None:
    make, dispatched, _, _ = RULES[rule]
    inputs, segments = make(150), borders(150) if packed else None
    whole = dispatched(**inputs, segments=segments)
    state, outputs, begin = inputs["state"], [], 0
    for size in (1, 7, 64, 1, 2, 75):
        now = slice(begin, begin + size)
        piece = {name: x if x is None else x[:, now] for name, x in inputs.items() if name != "state"}
        own = None
        if segments is not None:  # a chunk counts from the segment that the state belongs to
            own = segments[:, now] - segments[:, max(begin - 1, 0)][:, None]
        o, state = dispatched(**piece, state=state, segments=own)
        outputs.append(o)
        begin += size
    pieces = torch.cat(outputs, dim=1), state
    torch.testing.assert_close(pieces, whole, **EXACT)
    torch.testing.assert_close(gradients(pieces, inputs), gradients(whole, inputs), **EXACT)


@every_rule
@both_forms
def test_without_a_state_it_starts_from_zeros(rule: str, form: int) -> None:
    inputs = detached(RULES[rule][0](65))
    zeros = torch.zeros_like(inputs.pop("state"))
    torch.testing.assert_close(RULES[rule][form](**inputs), RULES[rule][form](**inputs, state=zeros), rtol=0, atol=0)


@channel_rules
@both_forms
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decays_stay_finite(rule: str, form: int, packed: bool, dtype: torch.dtype) -> None:
    """Decays of exp(-50) and of 1 side by side, in time and over the channels: sums of g reach -7,500 in a row."""
    inputs = detached(RULES[rule][0](150, dtype))
    name = "g" if rule == "kda" else "w"
    pattern = torch.arange(150)[:, None] + torch.arange(KEY)
    inputs[name] = torch.where(pattern % 5 == 0, 0.0, -50.0).to(dtype)[None, :, None].expand_as(inputs[name]).clone()
    inputs[name][:, :, 1, 0] = 0.0  # one channel that never fades beside three that do
    for value in inputs.values():
        value.requires_grad_()
    segments = borders(150) if packed else None
    found = RULES[rule][form](**inputs, segments=segments)
    wide = {key: value.double() for key, value in inputs.items()}
    expected = RULES[rule][2](**wide, segments=segments)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=tolerance, atol=tolerance)
    for key, gradient in gradients(found, inputs).items():
        assert gradient.isfinite().all(), key


@channel_rules
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_are_those_of_finite_differences(rule: str, tokens: int, packed: bool) -> None:
    inputs = RULES[rule][0](tokens)
    segments = torch.arange(tokens).clamp(max=2).expand(BATCH, -1) if packed else None

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = RULES[rule][1](**dict(zip(inputs, values, strict=True)), segments=segments)
        return found

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()), fast_mode=True)


@both_forms
@pytest.mark.parametrize("packed", [False, True])
def test_kda_with_equal_gates_is_the_gated_delta_rule(form: int, packed: bool) -> None:
    inputs, segments = detached(kda_inputs(150)), borders(150) if packed else None
    inputs["g"] = inputs["g"][..., :1].expand_as(inputs["g"])
    expected = gated_delta_rule.gated_delta_rule(**inputs | {"g": inputs["g"][..., 0]}, segments=segments)
    torch.testing.assert_close(RULES["kda"][form](**inputs, segments=segments), expected, **EXACT)


@both_forms
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_no_gate_is_a_gate_of_one(form: int, length: int, packed: bool) -> None:
    inputs, segments = detached(delta_inputs(length)), borders(length) if packed else None
    ungated = RULES["delta_rule"][form]
    expected = ungated(**inputs | {"g": torch.zeros_like(inputs["beta"])}, segments=segments)
    torch.testing.assert_close(ungated(**inputs, segments=segments), expected, **EXACT)


def test_kda_is_rwkv7_with_its_terms() -> None:
    inputs = detached(kda_inputs(100))
    q, k = (F.normalize(inputs[name], dim=-1) for name in "qk")
    strength = inputs["beta"][..., None]
    terms = {"a": inputs["g"].exp() * k, "b": -strength * k, "k": strength * k, "v": inputs["v"]}
    found = dplr.rwkv7(r=q * KEY**-0.5, w=inputs["g"], **terms, state=inputs["state"])
    torch.testing.assert_close(found, dplr.kda(**inputs), rtol=0, atol=1e-4)  # the rule's 1e-6 under its root


@channel_rules
@pytest.mark.parametrize("length", [1, 70])
def test_a_token_that_says_nothing_leaves_the_state(rule: str, length: int) -> None:
    make, dispatched, _, _ = RULES[rule]
    inputs = detached(make(length))
    for name in ("g", "beta") if rule == "kda" else ("w", "k", "b"):
        inputs[name] = torch.zeros_like(inputs[name])
    torch.testing.assert_close(dispatched(**inputs)[1], inputs["state"], rtol=0, atol=0)


@channel_rules
@pytest.mark.parametrize("length", [1, 70])
def test_autocast_does_not_round_the_rule(rule: str, length: int) -> None:
    make, dispatched, _, _ = RULES[rule]
    inputs = detached(make(length, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dispatched(**inputs)
    torch.testing.assert_close(found, dispatched(**inputs), rtol=0, atol=0)


def solve_flops(a: Any, b: Any, *args: Any, **settings: Any) -> int:
    return int(torch.Size(b).numel() * b[-2])


def counted(call: Callable[[], Any]) -> int:
    """What the counter sees, with the triangular system, which it does not know."""
    solve: Any = {torch.ops.aten.linalg_solve_triangular: solve_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=solve) as counter:
        call()
    return counter.get_total_flops()


@channel_rules
@pytest.mark.parametrize("length", [1, 2, 7, 64, 130])
def test_rule_flops_are_those_counted(rule: str, length: int) -> None:
    make, dispatched, _, _ = RULES[rule]
    inputs = make(length)
    expected = BATCH * HEADS * dplr.rule_flops(length, KEY, VALUE, writes=1 if rule == "kda" else 2)
    assert counted(lambda: dispatched(**inputs)) == expected

"""fla's kernels behind our keywords: types, packing, states, and what a trial compares.

Here kernels that compute each sequence token by token take fla's place, so that what is tested is what we hand to it
and take from it. `gpu` tests run the real ones.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fla_kernels import KERNELS, OPERATORS, inputs, install, instead, operator
from torch import Tensor

from postnas.ops import fla


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


SEGMENTS = torch.tensor([[0] * 7 + [1] * 13, [0] * 20, [1] + [2] * 18 + [3]])
"""A row with a border, one without, and one whose first sequence is not the cache's."""


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rule", list(fla.RULES))
def test_rows_and_states_are_those_of_the_plain_form(fake: None, rule: str, packed: bool, filled: bool) -> None:
    given, segments = inputs(rule), SEGMENTS if packed else None
    state = torch.randn(3, 2, 4, 6, dtype=torch.float64) if filled else None
    expected = operator(rule)(**given, state=state, segments=segments)
    found = fla.run(rule, **given, state=state, segments=segments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", ["linear_attention", "gla"])
def test_the_callers_scale_is_taken(fake: None, rule: str) -> None:
    given = inputs(rule)
    torch.testing.assert_close(fla.run(rule, **given, scale=0.3)[0], 0.3 * fla.run(rule, **given)[0])


def test_a_delta_rule_with_a_decay_is_no_delta_rule(fake: None) -> None:
    with pytest.raises(AssertionError, match=r"has no .*'g'"):
        fla.run("delta_rule", **inputs("gated_delta_rule"))


@pytest.mark.parametrize("rule", list(fla.RULES))
def test_inputs_reach_a_kernel_in_its_types(fake: None, rule: str) -> None:
    """The gates may come rounded, and what a block computed in float32 meets values in bfloat16; fakes check both."""
    given = {name: x if x is None else x.float() for name, x in inputs(rule).items()}
    low = given | {"v": given["v"].bfloat16()}
    o, state = fla.run(rule, **low | {name: low[name].bfloat16() for name in fla.RULES[rule].wide})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = operator(rule)(**given)
    assert F.mse_loss(o.float(), expected).sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize(("packed", "gradients"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("rule", list(fla.RULES))
def test_the_trial_compares_outputs_state_and_gradients(
    fake: None, monkeypatch: pytest.MonkeyPatch, rule: str, packed: bool, gradients: bool
) -> None:
    shape = fla.Shape(rule, 2, 4, 6, "bfloat16", packed, gradients)
    errors = fla.compare(shape, "cpu", tokens=30)
    own = fla.RULES[rule]
    assert errors.keys() == {"o", "state", *(f"d{name}" for name in (*own.low, *own.wide) if gradients)}
    assert all(error < fla.CLOSE for error in errors.values()) and errors["o"] > 0, errors
    module = own.kernel.split(":")[0]
    right, gate = KERNELS[module], own.wide[0]

    def weaker_gate(**given: Any) -> tuple[Tensor, Tensor]:
        return right(**given | {gate: given[gate] * 0.5})

    def deaf(**given: Any) -> tuple[Tensor, Tensor]:
        return right(**given | {gate: given[gate].detach() + 0 * given[gate]})

    def misplaced(**given: Any) -> tuple[Tensor, Tensor]:
        return right(**given | {"cu_seqlens": given["cu_seqlens"] + torch.tensor([0, 5, 0])})

    def forgetful(**given: Any) -> tuple[Tensor, Tensor]:
        return right(**given | {"initial_state": None})

    wrong: list[tuple[str, Any]] = [("o", weaker_gate), (f"d{gate}", deaf) if gradients else ("o", forgetful)]
    wrong += [("dv", misplaced)] if packed else []
    for place, kernel in wrong:
        instead(monkeypatch, module, kernel)
        assert fla.compare(shape, "cpu", tokens=30)[place] > fla.CLOSE


def test_nothing_is_tried_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "works", lambda shape: pytest.fail("a trial on a CPU"))
    low = torch.zeros(1, 4, 2, 4, dtype=torch.bfloat16)
    assert not fla.usable("gated_delta_rule", low, low, None)


IMPORTS = """
import sys, torch
from transformers.modeling_utils import PreTrainedModel
before = set(sys.modules)  # where triton is installed, torch._dynamo imports it
import postnas.models.model
from postnas.ops.gated_delta_rule import gated_delta_rule
q = torch.randn(1, 70, 2, 4)
gated_delta_rule(q, q, q, -q[..., 0].abs(), q[..., 0].sigmoid())
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("fla", "triton")))
"""


def test_neither_fla_nor_triton_is_imported_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def real(rule: str, packed: bool, gradients: bool) -> None:
    """The real kernel passes its trial, or fla says that it does not serve this machine."""
    if fla.missing():
        pytest.skip(str(fla.missing()))
    problem = fla.trial(fla.Shape(rule, 2, 64, 64, "bfloat16", packed, gradients))
    if problem is not None and problem.startswith(fla.REFUSES):
        pytest.skip(problem)
    assert problem is None


@pytest.mark.gpu
@pytest.mark.parametrize("rule", list(fla.RULES))
def test_the_real_kernels_pass_their_trial_in_training(rule: str) -> None:
    real(rule, packed=True, gradients=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", list(fla.RULES))
def test_the_real_kernels_pass_their_trial_in_prefill(rule: str) -> None:
    real(rule, packed=False, gradients=False)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("rule", OPERATORS)
def test_an_operator_asks_for_its_rule_and_gets_its_result(
    rule: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the operator itself, several rows, a border and a filled state; after the trials of the tests above."""
    if fla.missing():
        pytest.skip(str(fla.missing()))
    monkeypatch.setattr(fla, "asked", {})
    drawn = fla.RULES[rule].draw(lambda *size: torch.randn(3, 100, 2, *size), 64, 64)
    low = {
        name: x.cuda().to(torch.bfloat16 if name in fla.RULES[rule].low else torch.float32) for name, x in drawn.items()
    }
    given: dict[str, Any] = dict.fromkeys(fla.RULES[rule].absent)
    segments = (torch.arange(100) >= 41).int().expand(3, -1).cuda() if gradients else None
    state = torch.randn(3, 2, 64, 64).cuda()
    with torch.set_grad_enabled(gradients):
        found = operator(rule)(
            **{n: x.requires_grad_(gradients) for n, x in low.items()}, **given, state=state, segments=segments
        )
    ((shape, _),) = fla.asked.items()
    assert (shape.rule, shape.packed, shape.gradients) == (rule, gradients, gradients)
    with torch.no_grad():
        wide = {name: x.detach().double() for name, x in low.items()}
        expected = operator(rule)(**wide, **given, state=state.double(), segments=segments)
    for one, other in zip(found, expected, strict=True):
        assert F.mse_loss(one.double(), other).sqrt() < fla.CLOSE * other.square().mean().sqrt()

"""fla's kernels behind our keywords: packing, states, and the trial that decides whether they are used.

fla itself needs a GPU. Here its place is taken by a kernel that computes each sequence by our recurrent form, so that
what is tested is what we hand to it and take from it. `gpu` tests run the real one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from postnas.ops import fla
from postnas.ops.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule

SHAPE = fla.Shape(heads=2, key_dim=4, value_dim=6, dtype="bfloat16", packed=False, gradients=True)


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What fla promises: with cu_seqlens one row of sequences, each with its own state."""
    assert output_final_state and use_qk_l2norm_in_kernel and scale == q.shape[-1] ** -0.5
    if cu_seqlens is None:
        return recurrent_gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta, state=initial_state)
    assert q.shape[0] == 1
    outputs, states = [], []
    for number, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        state = None if initial_state is None else initial_state[number : number + 1]
        given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        parts = {name: x[:, begin:end] for name, x in given.items()}
        o, last = recurrent_gated_delta_rule(**parts, state=state)
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, dim=1), torch.cat(states)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = kernel
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)


def inputs(tokens: int = 20) -> dict[str, Tensor]:
    shape = (3, tokens, 2)
    drawn = {"q": torch.randn(*shape, 4), "k": torch.randn(*shape, 4), "v": torch.randn(*shape, 6)}
    drawn |= {"g": -torch.rand(shape), "beta": torch.rand(shape)}
    return {name: value.double() for name, value in drawn.items()}


SEGMENTS = torch.tensor([[0] * 7 + [1] * 13, [0] * 20, [1] + [2] * 18 + [3]])
"""A row with a border, one without, and one whose first sequence is not the cache's."""


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_and_states_are_those_of_the_plain_form(fake: None, packed: bool, filled: bool) -> None:
    given, segments = inputs(), SEGMENTS if packed else None
    state = torch.randn(3, 2, 4, 6, dtype=torch.float64) if filled else None
    expected = chunk_gated_delta_rule(**given, state=state, segments=segments)
    found = fla.gated_delta_rule(**given, state=state, segments=segments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_the_trial_compares_outputs_state_and_gradients(
    fake: None, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    shape = fla.Shape(2, 4, 6, "bfloat16", packed, True)
    errors = fla.compare(shape, "cpu", tokens=30)
    assert errors.keys() == {"o", "state", "dq", "dk", "dv", "dg", "dbeta"}
    assert all(0 < error < fla.CLOSE for error in errors.values()), errors
    wrong: Any = ModuleType("fla.ops.gated_delta_rule")

    def forgets_the_decay(**given: Any) -> tuple[Tensor, Tensor]:
        return kernel(**given | {"g": given["g"] * 0.5})

    wrong.chunk_gated_delta_rule = forgets_the_decay
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", wrong)
    errors = fla.compare(shape, "cpu", tokens=30)
    assert max(errors.values()) > fla.CLOSE


OUTCOMES: dict[str, tuple[Any, str | None]] = {
    "right": (SimpleNamespace(returncode=0, stdout='noise\n{"o": 0.004}', stderr=""), None),
    "wrong": (SimpleNamespace(returncode=0, stdout='{"o": 0.004, "dk": 0.3}', stderr=""), "wrong.*dk"),
    "nan": (SimpleNamespace(returncode=0, stdout='{"o": NaN}', stderr=""), "wrong"),
    "refused": (SimpleNamespace(returncode=1, stdout="", stderr="a\nRuntimeError: see #640\n"), "see #640"),
    "endless": (subprocess.TimeoutExpired("python", 300), "did not come back in 300 s"),
}


@pytest.mark.parametrize("outcome", list(OUTCOMES))
def test_a_trial_is_made_once_and_kept(outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer, expected = OUTCOMES[outcome]
    calls = []

    def run(command: list[str], **settings: Any) -> Any:
        calls.append(json.loads(command[-1]))
        assert settings["timeout"] == fla.LIMIT
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setenv("POSTNAS_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    found = [fla.trial(SHAPE), fla.trial(SHAPE)]
    assert found[0] == found[1]
    assert calls == [
        {"heads": 2, "key_dim": 4, "value_dim": 6, "dtype": "bfloat16", "packed": False, "gradients": True}
    ]
    if expected is None:
        assert found[0] is None
    else:
        assert found[0] is not None
        assert re.search(expected, found[0])
        with pytest.warns(UserWarning, match="plain PyTorch form"):
            fla.works.cache_clear()
            monkeypatch.setattr(fla, "missing", lambda: None)
            assert not fla.works(SHAPE)
    fla.works.cache_clear()


def test_nothing_is_tried_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "works", lambda shape: pytest.fail("a trial on a CPU"))
    low = torch.zeros(1, 4, 2, 4, dtype=torch.bfloat16)
    assert not fla.usable(low, low, None)


IMPORTS = """
import sys, torch
import postnas.models.model
from postnas.ops.gated_delta_rule import gated_delta_rule
q = torch.randn(1, 70, 2, 4)
gated_delta_rule(q, q, q, -q[..., 0].abs(), q[..., 0].sigmoid())
print(sorted(name for name in sys.modules if name.split(".")[0] in ("fla", "triton")))
"""


def test_neither_fla_nor_triton_is_imported_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"], capture_output=True, text=True
    )
    if "True" in before.stdout:
        pytest.skip("torch itself imports triton here")
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_the_real_kernels_pass_their_trial(packed: bool) -> None:
    if fla.missing():
        pytest.skip(str(fla.missing()))
    shape = fla.Shape(9, 64, 128, "bfloat16", packed, True)
    assert fla.trial(shape) is None

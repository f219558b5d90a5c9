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
from tiny import make_base, tiny_recipe, write_recipe
from torch import Tensor

from postnas import commands
from postnas.__main__ import main
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


def failed(line: str) -> Any:
    return SimpleNamespace(returncode=1, stdout="", stderr=f"a\n{line}\n")


DAY = 24 * 3600
OUTCOMES: dict[str, tuple[Any, str | None, float]] = {
    "right": (SimpleNamespace(returncode=0, stdout='noise\n{"o": 0.004}', stderr=""), None, torch.inf),
    "wrong": (SimpleNamespace(returncode=0, stdout='{"o": 0.004, "dk": 0.3}', stderr=""), "is wrong.*dk", torch.inf),
    "nan": (SimpleNamespace(returncode=0, stdout='{"o": NaN}', stderr=""), "is wrong", torch.inf),
    "refused": (failed("RuntimeError: see #640"), "refuses: .*see #640", torch.inf),
    "refused, tilelang": (failed("ValueError: TileLang takes no float32"), "refuses", torch.inf),
    "endless": (subprocess.TimeoutExpired("python", 300), "did not come back in 300 s", DAY),
    "full": (failed("torch.OutOfMemoryError: CUDA out of memory"), "failed: .*out of memory", 0),
    "no compiler": (failed("RuntimeError: tilelang found no nvcc"), "failed: .*nvcc", 0),
    "killed": (SimpleNamespace(returncode=-9, stdout="", stderr=""), "failed: exit code -9", 0),
}
"""What the trial's process does, what is said of it, and for how many seconds that holds for later starts."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of our own: `now` in seconds, moved on by sleeping."""
    hand = SimpleNamespace(now=1e9)
    monkeypatch.setattr(fla, "time", hand)
    hand.time = hand.monotonic = lambda: hand.now
    hand.sleep = lambda seconds: setattr(hand, "now", hand.now + seconds)
    return hand


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, where triton and fla seem to be installed, and no result is remembered by this process."""
    monkeypatch.setenv("POSTNAS_CACHE", str(tmp_path))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fla, "missing", lambda: None)
    fla.works.cache_clear()


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[list[str]]:
    """The trial's process gives this answer; what it was called with."""
    calls: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        assert settings["timeout"] == fla.LIMIT
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.parametrize("outcome", list(OUTCOMES))
def test_a_trial_is_kept_as_long_as_it_says_something(
    outcome: str, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, place: None
) -> None:
    answer, expected, holds = OUTCOMES[outcome]
    calls = answering(monkeypatch, answer)
    found = fla.trial(SHAPE)
    assert found is None if expected is None else re.search(expected, str(found))
    given = {"heads": 2, "key_dim": 4, "value_dim": 6, "dtype": "bfloat16", "packed": False, "gradients": True}
    assert json.loads(calls[0][-2]) == given
    for later in (0, DAY - 1, DAY + 1):
        clock.now = 1e9 + later
        before = len(calls)
        assert fla.trial(SHAPE) == found
        assert len(calls) - before == (later >= holds)
        if len(calls) > before:
            break
    if expected is not None:
        hint = "the next start tries again" if holds == 0 else f"to try again, remove {fla.record()}"
        with pytest.warns(UserWarning, match=f"plain PyTorch form.*{re.escape(hint)}$"):
            assert not fla.works(SHAPE)
    fla.works.cache_clear()


def test_an_older_record_is_not_trusted(monkeypatch: pytest.MonkeyPatch, place: None) -> None:
    """Version 0.1 kept every failure as plain text."""
    calls = answering(monkeypatch, OUTCOMES["right"][0])
    fla.trial(SHAPE)
    (key,) = json.loads(fla.record().read_text())
    fla.record().write_text(json.dumps({key: "fla failed: out of memory"}))
    assert fla.trial(SHAPE) is None and len(calls) == 2


def test_the_child_gets_the_parents_device(monkeypatch: pytest.MonkeyPatch, place: None) -> None:
    calls = answering(monkeypatch, OUTCOMES["right"][0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    fla.trial(SHAPE)
    assert calls[0][-1] == "3"


@pytest.mark.parametrize("outcome", ["right", "refused", "full"])
def test_of_several_ranks_the_first_tries_and_the_others_wait(
    outcome: str, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, place: None
) -> None:
    """Whatever it finds, also what later starts will not be told."""
    calls = answering(monkeypatch, OUTCOMES[outcome][0])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds
        waited.append(seconds)
        if len(waited) == 5:
            monkeypatch.setenv("LOCAL_RANK", "0")
            waited.append(float(fla.trial(SHAPE) is None))
            monkeypatch.setenv("LOCAL_RANK", "1")

    clock.sleep = sleep
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = fla.trial(SHAPE)
    assert len(calls) == 1 and len(waited) == 6
    assert (found is None) == (outcome == "right") == bool(waited[-1])
    monkeypatch.setattr("os.getppid", lambda: -1)  # another start
    monkeypatch.setenv("LOCAL_RANK", "0")
    fla.trial(SHAPE)
    assert len(calls) == (2 if outcome == "full" else 1)


def test_a_rank_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, place: None) -> None:
    calls = answering(monkeypatch, OUTCOMES["right"][0])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "rank 0 left no word" in str(fla.trial(SHAPE))
    assert not calls and fla.LIMIT < clock.now - 1e9 < fla.LIMIT + 120


def warmed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any
) -> tuple[list[fla.Shape], list[torch.dtype]]:
    """The shapes that `postnas warm` tries and the types in which it runs a layer, here on the CPU."""
    shapes: list[fla.Shape] = []
    types: list[torch.dtype] = []
    real = commands._warm_layer

    def layer(block: Any) -> float:
        types.append(block.o_proj.weight.dtype)
        return real(block)

    def works(shape: fla.Shape) -> bool:
        shapes.append(shape)
        return True

    monkeypatch.setattr(fla, "works", works)
    monkeypatch.setattr(commands, "_warm_layer", layer)
    on_gpu = commands._warm
    monkeypatch.setattr(commands, "_warm", lambda recipe, device: on_gpu(recipe, "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = tiny_recipe(tmp_path, make_base(tmp_path / "base"), tmp_path / "text.jsonl", **changes)
    assert main(["warm", str(write_recipe(tmp_path / "recipe.yaml", plain))]) == 0
    return shapes, types


def test_warm_tries_what_training_and_prefill_will_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"align": {"blocks": ["jet"]}, "data": {"borders": True}, "compute": "bfloat16"}
    shapes, types = warmed(monkeypatch, tmp_path, **changes)
    assert [(shape.dtype, shape.packed, shape.gradients) for shape in shapes] == [
        ("bfloat16", True, True),
        ("bfloat16", False, False),
    ]
    assert types == [torch.bfloat16, torch.float32]
    said = capsys.readouterr().out
    assert "jet: training with borders in bfloat16: fla is right" in said
    assert "jet: one layer in float32 read 128 tokens and made one" in said


def test_warm_tries_no_kernel_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert warmed(monkeypatch, tmp_path, align={"blocks": ["jet"]}) == ([], [torch.float32])


def test_warm_checks_the_recipe_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_recipe(tmp_path, tmp_path, tmp_path, align={"blocks": ["jet", "swa"]})
    assert main(["warm", str(write_recipe(tmp_path / "recipe.yaml", plain))]) == 2
    assert "align.blocks: 'swa' is not a linear block" in capsys.readouterr().err


def test_nothing_is_tried_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "works", lambda shape: pytest.fail("a trial on a CPU"))
    low = torch.zeros(1, 4, 2, 4, dtype=torch.bfloat16)
    assert not fla.usable(low, low, None)


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


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_the_real_kernels_pass_their_trial(packed: bool) -> None:
    if fla.missing():
        pytest.skip(str(fla.missing()))
    shape = fla.Shape(9, 64, 128, "bfloat16", packed, True)
    assert fla.trial(shape) is None

"""The trial that decides whether a kernel of fla's is used: its process, its record, ranks, detours."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fla_kernels import KERNELS, OPERATORS, inputs, install, instead, operator

from postnas.ops import fla

SHAPE = fla.Shape("gated_delta_rule", heads=2, key_dim=4, value_dim=6, dtype="bfloat16", packed=False, gradients=True)


def failed(line: str) -> Any:
    return SimpleNamespace(returncode=1, stdout="", stderr=f"a\n{line}\n")


DAY = 24 * 3600
OUTCOMES: dict[str, tuple[Any, str | None, float]] = {
    "right": (SimpleNamespace(returncode=0, stdout='noise\n{"o": 0.004}', stderr=""), None, torch.inf),
    "wrong": (SimpleNamespace(returncode=0, stdout='{"o": 0.004, "dk": 0.3}', stderr=""), "is wrong.*dk", torch.inf),
    "nan": (SimpleNamespace(returncode=0, stdout='{"o": NaN}', stderr=""), "is wrong", torch.inf),
    "refused": (failed("RuntimeError: see #640"), "refuses: .*see #640", torch.inf),
    "refused, tilelang": (failed("ValueError: TileLang takes no float32"), "refuses", torch.inf),
    "endless": (subprocess.TimeoutExpired("python", fla.LIMIT), f"did not come back in {fla.LIMIT} s", DAY),
    "full": (failed("torch.OutOfMemoryError: CUDA out of memory"), "failed: .*out of memory", 0),
    "too wide": (failed("AssertionError: heads of 256 at most"), "refuses: .*256 at most", torch.inf),
    "bare assertion": (failed("AssertionError"), "failed: AssertionError", 0),
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
    monkeypatch.setattr(fla, "asked", {})


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
    given = {
        "rule": "gated_delta_rule",
        "heads": 2,
        "key_dim": 4,
        "value_dim": 6,
        "dtype": "bfloat16",
        "packed": False,
        "gradients": True,
    }
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
        with pytest.warns(UserWarning, match=f"^gated_delta_rule: the plain PyTorch form.*{re.escape(hint)}$"):
            assert not fla.works(SHAPE)


def test_a_second_process_waits_for_the_first_ones_trial(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, place: None
) -> None:
    """Here both are threads, since a lock of flock belongs to an open file."""
    calls: list[list[str]] = []
    both = threading.Barrier(2, timeout=30)

    def run(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        time.sleep(0.3)
        return OUTCOMES["right"][0]

    kept = fla._kept

    def look(key: str) -> Any:
        found = kept(key)
        if threading.current_thread() not in looked:  # neither has found anything when both begin
            looked.add(threading.current_thread())
            both.wait()
        return found

    looked: set[threading.Thread] = set()
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fla, "_kept", look)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(fla.trial, [SHAPE, SHAPE])) == [None, None]
    assert len(calls) == 1


def test_an_older_record_is_not_trusted(monkeypatch: pytest.MonkeyPatch, place: None) -> None:
    """Version 0.1 kept every failure as plain text; version 0.2 knew one rule and did not name it."""
    calls = answering(monkeypatch, OUTCOMES["right"][0])
    fla.trial(SHAPE)
    ((key, kept),) = json.loads(fla.record().read_text()).items()
    fla.record().write_text(json.dumps({key: "fla failed: out of memory"}))
    assert fla.trial(SHAPE) is None and len(calls) == 2
    assert " rule=gated_delta_rule " in key
    unnamed = key.replace("rule=gated_delta_rule ", "")
    fla.record().write_text(json.dumps({unnamed: kept}))
    for rule in fla.RULES:
        fla.trial(replace(SHAPE, rule=rule))
    assert len(calls) == 2 + len(fla.RULES)
    assert json.loads(fla.record().read_text())[unnamed] == kept


def test_what_holds_for_one_rule_says_nothing_of_another(
    monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace, place: None
) -> None:
    wrong = {rule for rule in fla.RULES if rule in ("kda", "gla")}
    calls: list[str] = []

    def run(command: list[str], **settings: Any) -> Any:
        calls.append(json.loads(command[-2])["rule"])
        return OUTCOMES["wrong" if calls[-1] in wrong else "right"][0]

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert {rule for rule in fla.RULES if fla.trial(replace(SHAPE, rule=rule))} == wrong
    assert calls == list(fla.RULES)


LINEAR, DETOUR = "linear_attention", "linear_attention_by_gla"


@pytest.mark.parametrize(
    ("own", "other", "taken", "hint"),
    [
        ("right", "right", LINEAR, None),
        ("refused", "right", DETOUR, None),
        ("refused", "wrong", None, "refuses.*, then fla is wrong.*to try again, remove"),
        ("refused", "full", None, "refuses.*, then fla failed.*the next start tries again"),
    ],
)
def test_where_a_kernel_fails_its_detour_is_tried(
    own: str, other: str, taken: str | None, hint: str | None, monkeypatch: pytest.MonkeyPatch, place: None
) -> None:
    answers = {LINEAR: OUTCOMES[own][0], DETOUR: OUTCOMES[other][0]}
    calls: list[str] = []

    def run(command: list[str], **settings: Any) -> Any:
        calls.append(json.loads(command[-2])["rule"])
        return answers[calls[-1]]

    monkeypatch.setattr(subprocess, "run", run)
    shape = replace(SHAPE, rule=LINEAR, gradients=False)
    if hint is None:
        assert fla.works(shape) and fla.works(shape)
    else:
        with pytest.warns(UserWarning, match=f"^linear_attention: .*{hint}") as warned:
            assert not fla.works(shape) and not fla.works(shape)
        assert len(warned) == 1
    assert fla.asked == {shape: taken}
    assert calls == ([LINEAR] if own == "right" else [LINEAR, DETOUR])
    asked = dict(fla.asked)
    install(monkeypatch)
    fla.asked.update(asked)
    used: list[str] = []
    for module in ("fla.ops.gla", "fla.ops.simple_gla"):
        instead(monkeypatch, module, lambda module=module, **given: used.append(module) or KERNELS[module](**given))
    given = {name: x.bfloat16() for name, x in inputs(LINEAR).items()}
    expected, _ = operator(LINEAR)(**given)
    assert F.mse_loss(fla.run(LINEAR, **given)[0], expected).sqrt() < 0.05 * expected.std()
    assert used == ["fla.ops.gla" if taken == DETOUR else "fla.ops.simple_gla"]


def test_each_rule_is_asked_for_by_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[fla.Shape] = []
    monkeypatch.setattr(fla, "works", lambda shape: shapes.append(shape) or True)
    q: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 9, 2, 4), requires_grad=False)
    v: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 9, 2, 6), requires_grad=True)
    for rule in OPERATORS:
        assert fla.usable(rule, q, v, None)
        with torch.no_grad():
            assert fla.usable(rule, q, v, torch.zeros(1, 9))
    both = [
        fla.Shape(rule, 2, 4, 6, "bfloat16", no_grad, not no_grad) for rule in OPERATORS for no_grad in (False, True)
    ]
    assert shapes == both
    v.dtype = q.dtype = torch.float32
    assert not fla.usable("kda", q, v, None) and len(shapes) == len(both)


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

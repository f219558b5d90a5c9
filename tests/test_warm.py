"""`postnas warm`: layers do what the run will do, and so ask for the kernels that it will ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fla_kernels import OPERATORS
from tiny import make_base, tiny_recipe, write_recipe

from postnas import warm
from postnas.__main__ import main
from postnas.blocks import linear_blocks
from postnas.ops import fla

SHAPE = fla.Shape("gated_delta_rule", heads=2, key_dim=4, value_dim=6, dtype="bfloat16", packed=False, gradients=True)


def warmed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any) -> list[tuple[Any, ...]]:
    """What `postnas warm` lets layers do, here on the CPU: tokens, autocast type, border, gradients."""
    passes: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fla, "asked", {})
    real = warm.plain

    def step(tokens: int, device: Any, segments: Any = None) -> Any:
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        passes.append((tokens, compute, segments is not None, torch.is_grad_enabled()))
        return real(tokens, device, segments)

    monkeypatch.setattr(warm, "plain", step)
    on_gpu = warm.warm_layers
    monkeypatch.setattr(warm, "warm_layers", lambda recipe, device: on_gpu(recipe, "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = tiny_recipe(tmp_path, make_base(tmp_path / "base"), tmp_path / "text.jsonl", **changes)
    assert main(["warm", str(write_recipe(tmp_path / "recipe.yaml", plain))]) == 0
    return passes


def test_warm_does_with_a_layer_what_training_and_prefill_will_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU the layers so ask for the kernels of their rules, whichever these are; see the `gpu` test."""
    blocks = linear_blocks()
    changes = {"align": {"blocks": blocks}, "data": {"borders": True}, "compute": "bfloat16"}
    training = (128, torch.bfloat16, True, True)
    reading = [(128, None, False, False), (1, None, False, False)]
    assert warmed(monkeypatch, tmp_path, **changes) == [training, *reading, *reading] * len(blocks)
    said = capsys.readouterr().out
    for block in blocks:
        assert f"{block}: one layer learnt from 128 tokens with a border in bfloat16" in said
        assert f"{block}: one layer in float32 read 128 tokens and made one" in said
        assert f"{block}: one layer in bfloat16 read 128 tokens and made one" in said
    assert "no layer asked for fla's kernels" in said


def test_warm_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passes = warmed(monkeypatch, tmp_path, align={"blocks": ["jet"]})
    assert passes == [(128, None, False, True), (128, None, False, False), (1, None, False, False)]


def test_warm_says_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = warm.reading

    def reading(block: Any) -> float:
        fla.asked[SHAPE] = SHAPE.rule
        fla.asked[replace(SHAPE, rule="linear_attention", packed=True)] = "linear_attention_by_gla"
        fla.asked[replace(SHAPE, rule="kda", gradients=False)] = None
        return real(block)

    monkeypatch.setattr(warm, "reading", reading)
    warmed(monkeypatch, tmp_path, align={"blocks": ["jet"]})
    said = capsys.readouterr().out
    assert "gated_delta_rule: training in bfloat16, 2 heads of 4 x 6: fla is right" in said
    assert (
        "linear_attention: training with borders in bfloat16, 2 heads of 4 x 6: fla as linear_attention_by_gla" in said
    )
    assert "kda: prefill in bfloat16, 2 heads of 4 x 6: the plain form" in said


def test_warm_checks_the_recipe_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_recipe(tmp_path, tmp_path, tmp_path, align={"blocks": ["jet", "swa"]})
    assert main(["warm", str(write_recipe(tmp_path / "recipe.yaml", plain))]) == 2
    assert "align.blocks: 'swa' is not a linear block" in capsys.readouterr().err


@pytest.mark.gpu
def test_warm_asks_for_every_rule_that_the_blocks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial is run here: what the layers ask for is all."""
    monkeypatch.setattr(fla, "asked", {})
    shapes: list[fla.Shape] = []
    monkeypatch.setattr(fla, "works", lambda shape: shapes.append(shape))
    changes = {"align": {"blocks": linear_blocks()}, "data": {"borders": True}, "compute": "bfloat16"}
    plain = tiny_recipe(tmp_path, make_base(tmp_path / "base"), tmp_path / "text.jsonl", device="cuda", **changes)
    assert main(["warm", str(write_recipe(tmp_path / "recipe.yaml", plain))]) == 0
    asked = {(shape.rule, shape.packed, shape.gradients) for shape in shapes}
    assert asked == {(rule, on, on) for rule in {shape.rule for shape in shapes} for on in (True, False)}
    assert {rule for rule, *_ in asked} <= set(OPERATORS) and "gated_delta_rule" in {rule for rule, *_ in asked}

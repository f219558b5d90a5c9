"""A run directory belongs to what has been made in it: mistakes can be corrected, what was used cannot change."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.__main__ import main
from postnas.claim import _with_defaults
from postnas.evaluate import groups
from postnas.files import locked, read_json, read_jsonl
from postnas.recipe import Base, Data, Recipe, Text

STAGES = {"stages": ["align", "place"]}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, text = make_base(tmp_path / "base", layers=3), make_text(tmp_path / "text.jsonl")
    return write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, base, text, **STAGES))


def test_a_corrected_recipe_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that is told before anything was made leaves the directory free for the mended recipe."""
    assert main(["run", str(recipe), "--base.model", "nowhere/there.gguf"]) == 2
    assert main(["run", str(recipe), "--place.budget", "99"]) == 2
    assert main(["run", str(recipe), "--evaluate.perplexity_tokens", "99999", "--stages", "[align,evaluate]"]) == 2
    assert "evaluate.perplexity_tokens" in capsys.readouterr().err
    assert main(["run", str(recipe)]) == 0


def test_later_sections_may_change_until_they_are_used(recipe: Path, tmp_path: Path) -> None:
    assert main(["align", str(recipe)]) == 0
    assert main(["place", str(recipe), "--train.tokens", "1024", "--place.budget", "1"]) == 0
    assert read_json(tmp_path / "run" / "placement.json")["placement"].count("attn") == 1
    assert main(["place", str(recipe), "--align.lr", "1e-4"]) == 2


def test_a_base_that_changed_is_aligned_anew(recipe: Path, tmp_path: Path) -> None:
    """Following the printed mend must not write the old base's candidates under the new base's key."""
    run = tmp_path / "run"
    assert main(["run", str(recipe)]) == 0
    old = load_file(run / "candidates" / "jet" / "00.safetensors")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"].mul_(-2)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert main(["align", str(recipe)]) == 2
    for path in (run / "candidates" / "jet").iterdir():
        path.unlink()
    assert main(["align", str(recipe)]) == 0
    new = load_file(run / "candidates" / "jet" / "00.safetensors")
    assert not torch.equal(old["v_proj.weight"], new["v_proj.weight"])
    before = len(read_jsonl(run / "scored.jsonl"))
    assert main(["place", str(recipe)]) == 0
    assert len(read_jsonl(run / "scored.jsonl")) > before  # the old base's scores are not the new one's


def test_two_processes_do_not_share_a_directory(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "run"):
        assert main(["run", str(recipe)]) == 2
    assert "another process runs in it" in capsys.readouterr().err


def test_bench_may_be_asked_again(recipe: Path, tmp_path: Path) -> None:
    assert main(["run", str(recipe), "--stages", "[align,place,train,bench]"]) == 0
    model = hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert main(["bench", str(recipe), "--bench.contexts", "[16]"]) == 0
    assert {row["context"] for row in read_json(tmp_path / "run" / "bench.json")["rows"]} == {16}
    assert hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest() == model


def test_a_run_made_before_a_field_existed_goes_on(recipe: Path, tmp_path: Path) -> None:
    """Fields that came later stand at their defaults, in sections and in lists; other values are still another run."""
    assert main(["run", str(recipe)]) == 0
    path = tmp_path / "run" / "recipe.yaml"
    whole = yaml.safe_load(path.read_text())
    old = yaml.safe_load(path.read_text())
    del old["align"]["start"], old["evaluate"]["allow_code"], old["data"]["borders"], old["data"]["text"][0]["field"]
    del old["bench"]["batch"]
    path.write_text(yaml.safe_dump(old))
    assert main(["align", str(recipe), "--align.start", "plus_minus"]) == 2
    assert main(["align", str(recipe), "--data.borders", "true"]) == 2
    assert yaml.safe_load(path.read_text()) == old
    assert main(["align", str(recipe)]) == 0
    assert yaml.safe_load(path.read_text()) == whole


def test_defaults_of_a_whole_section_are_filled_in() -> None:
    whole = Recipe(Base("x"), Data([Text("y")])).to_dict()
    bare = {"base": {"model": "x"}, "data": {"text": [{"source": "y"}]}}
    assert _with_defaults(Recipe, bare) == whole
    assert _with_defaults(Recipe, bare | {"gone": 1})["gone"] == 1  # a field that is no more still tells a difference
    assert _with_defaults(Recipe, {"data": {"text": "y"}, "align": None})["align"] is None  # damage is left as it is


def test_a_check_of_names_does_not_ask_the_hub(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(groups, "runnable", asked)
    assert main(["align", str(recipe), "--evaluate.tasks", "[paper, commonsense, piqa]"]) == 0
    assert main(["place", str(recipe), "--evaluate.tasks", "[paper, no_such_task]"]) == 2
    assert main(["place", str(recipe), "--evaluate.tasks", "[humaneval]"]) == 2

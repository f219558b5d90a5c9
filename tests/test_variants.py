"""Around comparisons: what is refused, what may be asked again, how measures rank, and placements of several blocks."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_text
from trial_runs import CHOSEN_BY, TRIAL, written

from postnas.__main__ import main
from postnas.files import read_json, read_jsonl
from postnas.models.load import load
from postnas.report.html import write_report
from postnas.search.blocks import rank


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_base(folder / "base"), make_text(folder / "text.jsonl")


def test_without_their_sections_the_stages_are_left_out(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, inputs, select={"blocks": []}, design={"variants": {}}, stages=["align", "place"])
    assert main(["run", recipe, "--stages", "[align,place,select,design,size]"]) == 0
    assert list(read_json(tmp_path / "run" / "stages.json")) == ["align", "place"]
    assert not (tmp_path / "run" / "trials.jsonl").exists()


def test_a_choice_that_is_aligned_already_is_not_aligned_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """jet has fewer parameters than the wide block beside it: training starts from the candidates of `align`."""
    select = TRIAL | CHOSEN_BY | {"blocks": ["jet", "gated_deltanet"], "options": {"gated_deltanet": {"expand_v": 4.0}}}
    recipe = written(
        tmp_path, inputs, select=select, design={"variants": {}}, stages=["align", "place", "select", "train"]
    )
    assert main(["run", recipe]) == 0
    run = tmp_path / "run"
    assert read_json(run / "select.json")["chosen"]["block"] == "jet"
    assert not (run / "chosen").exists()
    plain = written(tmp_path / "plain", inputs, select={"blocks": []}, design={"variants": {}})
    assert main(["run", plain, "--stages", "[align,place,train]"]) == 0
    models = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "plain" / "run")]
    assert models[0] == models[1]


def test_stages_may_be_asked_again_until_training_begins(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, run = written(tmp_path, inputs), tmp_path / "run"
    assert main(["run", fresh, "--stages", "[align,place,select,design]"]) == 0
    count = len(read_jsonl(run / "trials.jsonl"))
    assert main(["run", fresh, "--stages", "[align,place,select,design]", "--design.tokens", "256"]) == 2
    assert main(["select", fresh, "--select.weights", "{params: 1.0}"]) == 0  # nothing is trained for other weights
    assert len(read_jsonl(run / "trials.jsonl")) == count
    assert "design" not in read_json(run / "stages.json")  # which began with another choice
    assert main(["train", fresh, "--select.weights", "{params: 1.0}"]) == 2
    assert "train: needs design" in capsys.readouterr().err
    assert main(["place", fresh, "--place.budget", "1"]) == 2  # select is done with other weights
    assert main(["place", fresh, "--place.budget", "1", "--select.weights", "{params: 1.0}"]) == 0
    assert list(read_json(run / "stages.json")) == ["align", "place"]
    other = ["--place.budget", "1", "--select.weights", "{params: 1.0}"]
    assert main(["run", fresh, *other, "--stages", "[align,place,select,design,train]"]) == 0
    assert main(["select", fresh, *other, "--select.tokens", "256"]) == 2
    assert "select.tokens was 512 and is 256" in capsys.readouterr().err


BAD: list[tuple[list[str], str]] = [
    (["--select.blocks", "[jet, gla, swa]"], "select.blocks: 'swa' is not a linear block"),
    (["--select.blocks", "[jet, jet]"], "select.blocks: ['jet', 'jet'] is not possible; name each block once"),
    (["--select.options", "{gla: {rank: 0}}"], "rank: 0 is too small"),
    (["--select.weights", "{speed: 1.0}"], "select.weights: 'speed' is not measured; choose from kl, needle"),
    (["--select.weights", "{copy: 1.0}", "--evaluate.copy_passages", "0"], "select.weights: 'copy' is not measured"),
    (["--select.weights", "{}"], "select.weights: {} is not possible"),
    (["--select.lrs", "[]"], "select.lrs: [] is not possible"),
    (["--select.lrs", "[-1.0]"], "select.lrs: -1.0 is not possible"),
    (["--design.variants", "{base: {}}"], "design.variants: 'base' is not possible"),
    (["--design.variants", "{odd: {expand: 2}}"], "design.variants.odd: blocks.jet.expand: no such option"),
    (["--select.blocks", "[]", "--place.blocks", "[jet, gla]", "--place.strategy", "beam"], "design: place.blocks may"),
    (["--place.blocks", "[jet, gla]", "--place.strategy", "swap"], "place.blocks: swap places one block"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_is_one_line_before_anything_is_made(
    flags: list[str], message: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, inputs, align={"blocks": ["jet", "gla"]})
    assert main(["run", recipe, *flags]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"postnas: {message}")
    assert not (tmp_path / "run" / "candidates").exists()


def test_a_stage_that_is_left_out_says_what_to_name(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, inputs, select={"blocks": []})
    assert main(["select", recipe]) == 2
    assert "select: is left out by the recipe; name it in stages, and what it compares in select.blocks" in (
        capsys.readouterr().err
    )


def test_a_mixed_placement_reaches_the_hybrid(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Each linear layer has the block that is best for it: with eight placements a beam sees them all."""
    for strategy in ("beam", "gates"):
        recipe = written(
            tmp_path / strategy,
            inputs,
            align={"blocks": ["gla", "jet"], "tokens": 128},
            place={"strategy": strategy, "blocks": ["jet", "gla"], "budget": 1, "steps": 3, "objective": {"kl": 1.0}},
            select={"blocks": []},
            design={"variants": {}},
            stages=["align", "place", "train"],
        )
        assert main(["run", recipe]) == 0
        run = tmp_path / strategy / "run"
        found = read_json(run / "placement.json")
        assert found["blocks"] == ["jet", "gla"] and found["placement"].count("attn") == 1
        hybrid, _ = load(run / "model")
        assert hybrid.config.placement == found["placement"]
        scored = {tuple(r["placement"]): statistics.fmean(r["rows"]["kl"]) for r in read_jsonl(run / "scored.jsonl")}
        own = scored[tuple(found["placement"])]
        near = [
            statistics.fmean([scored[one]])
            for one in scored
            if one.count("attn") == 1 and sum(a != b for a, b in zip(one, found["placement"])) == 1
        ]
        assert len(near) >= 3 and own <= min(near)
    assert "linear (jet, gla)" in write_report(run).read_text()


def made_row(name: str, **values: float) -> dict[str, Any]:
    scores = [
        {"task": "kl", "metric": "kl", "value": values.get("kl", 0.5)},
        {"task": "perplexity", "metric": "perplexity", "value": values.get("perplexity", 20.0)},
        {"task": "copy", "metric": "copy_accuracy", "value": values.get("copy", 0.5)},
        {"task": "copy", "metric": "copy_nll", "value": 99.0},
        {"task": "arc_easy", "metric": "accuracy", "value": values.get("arc_easy", 0.4)},
        {"task": "piqa", "metric": "accuracy", "value": values.get("piqa", 0.6)},
    ]
    speeds = {"train_tokens_per_s": values.get("train", 100.0), "decode_tokens_per_s": values.get("decode", 10.0)}
    sizes = {"params": values.get("params", 1000), "cache_bytes": values.get("cache", 64)}
    return {"name": name, "scores": scores, **speeds, **sizes}


@pytest.mark.parametrize(
    ("better", "measure", "gain"),
    [
        ({"kl": 0.4}, "kl", 0.1),
        ({"perplexity": 20.0 / math.e}, "perplexity", 1.0),
        ({"copy": 0.75}, "copy", 0.25),
        ({"arc_easy": 0.5, "piqa": 0.62}, "tasks", 0.06),
        ({"piqa": 0.62}, "piqa", 0.02),
        ({"train": 200.0}, "train", math.log(2)),
        ({"decode": 20.0}, "decode", math.log(2)),
        ({"params": 500}, "params", math.log(2)),
        ({"cache": 32}, "cache", math.log(2)),
    ],
)
def test_every_measure_ranks_the_better_one_first(better: dict[str, float], measure: str, gain: float) -> None:
    first, second = rank([made_row("first"), made_row("second", **better)], {"kl": 0.0, measure: 2.0})
    assert (first["name"], second["name"]) == ("second", "first")
    assert first["gains"] == {measure: pytest.approx(gain)}
    assert first["score"] == pytest.approx(2 * gain) and second["score"] == 0


def test_weights_trade_measures_and_ties_go_to_fewer_parameters() -> None:
    rows = [made_row("a"), made_row("b", kl=0.4, decode=5.0), made_row("c", params=900)]
    assert [one["name"] for one in rank(rows, {"kl": 1.0, "decode": 0.1})] == ["b", "c", "a"]
    assert [one["name"] for one in rank(rows, {"kl": 1.0, "decode": 1.0})] == ["c", "a", "b"]

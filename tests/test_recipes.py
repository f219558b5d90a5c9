"""The recipes of bases on the hub: sound, at the shapes of their bases; what they will cost; and a tiny dry run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import benchmark

from postnas.__main__ import main, parse, read_recipe
from postnas.blocks import linear_blocks
from postnas.errors import UserError
from postnas.evaluate.verdict import check_text
from postnas.export.jet_nemotron import refusal
from postnas.files import read_json
from postnas.models.checkpoint import base_config
from postnas.pipeline import check
from postnas.recipe import Recipe
from postnas.search.cost import GPUS, Decoder
from postnas.search.plan import UTILISATION, plan_recipe, recipe_stages
from postnas.search.strategies import with_linear
from postnas.sources.text import DATASET

ROOT = Path(__file__).parents[1]
SHAPES = Path(__file__).parent / "shapes"
WEIGHTS = {
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-1.7b": 1_720_574_976,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-3-1b": 999_885_952,
}
"""Weights of each base as the hub counts them, a tied head once."""
NAMES = list(WEIGHTS)


def recipe_of(name: str) -> Recipe:
    return read_recipe("run", [str(ROOT / "recipes" / f"{name}.yaml")])


def sizes(name: str) -> Decoder:
    """The base with the options that the recipe gives its blocks."""
    config = base_config(str(SHAPES / f"{name}.json"))
    config.blocks = (config.blocks or {}) | recipe_of(name).align.options
    return Decoder(config)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_have_the_published_number_of_weights(name: str) -> None:
    assert sizes(name).parameters == WEIGHTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_sound_before_anything_is_loaded(name: str) -> None:
    recipe = recipe_of(name)
    check(recipe)
    assert recipe.out == f"runs/{name}" and recipe.base.licence != type(recipe.base)("x").licence
    assert all(DATASET.fullmatch(text.source) for text in recipe.data.text)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_fits_its_base(name: str) -> None:
    recipe, base = recipe_of(name), sizes(name)
    assert 0 < recipe.place.budget < base.layers
    linear = Decoder(base.config, [recipe.place.block] * base.layers)
    wide = linear.mixers[0].value_dim / base.config.head_dim
    assert wide == (2 if recipe.align.start == "plus_minus" else 1)
    memory = {stage: taken.memory for stage, taken, *_ in recipe_stages(recipe, base)}
    assert set(memory) == {"align", "place", "train", "stage2"}
    assert max(memory.values()) < GPUS["h100"].memory


@pytest.mark.parametrize("name", NAMES)
def test_text_is_enough_for_search_and_measurement(name: str) -> None:
    """Training reads nothing twice, and the halves of what is held out suffice."""
    recipe = recipe_of(name)
    data, asked = recipe.data, recipe.evaluate
    assert data.tokens >= max(recipe.train.tokens, recipe.stage2.tokens, recipe.align.tokens)
    assert data.heldout_tokens < data.heldout * data.tokens
    half = torch.zeros(data.heldout_tokens // 2, dtype=torch.int64)
    copy = (asked.copy_passages, asked.copy_tokens, asked.copy_filler)
    check_text(half, asked.perplexity_tokens, asked.length, *copy, recipe.seed)
    assert recipe.place.tokens <= len(half)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("qwen2.5-1.5b", None, None),
        ("qwen2.5-1.5b", {}, "blocks.jet.qkv_bias"),  # the base's own biases
        ("llama-3.2-1b", None, None),
        ("qwen3-1.7b", None, "qk_norm"),
        ("gemma-3-1b", None, "qk_norm"),
    ],
)
def test_what_a_recipe_makes_is_exported_where_the_base_allows(
    name: str, options: dict[str, Any] | None, told: str | None
) -> None:
    recipe, config = recipe_of(name), base_config(str(SHAPES / f"{name}.json"))
    linear = set(range(len(config.placement) - recipe.place.budget))
    config.placement = with_linear(config.placement, recipe.place.block, linear)
    config.blocks = (config.blocks or {}) | (recipe.align.options if options is None else options)
    reason = refusal(config)
    assert reason is None if told is None else reason is not None and reason.startswith(told)


def test_gemmas_budget_takes_from_its_full_layers_whatever_is_kept() -> None:
    """At 32K, the cache of the worst placement of the recipe's budget; one of four may win nothing."""
    recipe, base = recipe_of("gemma-3-1b"), sizes("gemma-3-1b")
    full = {layer for layer, name in enumerate(base.placement) if name == "attn"}
    assert full == {5, 11, 17, 23} and base.config.blocks["swa"] == {"window_size": 512}

    def worst(budget: int) -> float:
        """Full layers are kept first."""
        kept = sorted(range(base.layers), key=lambda layer: layer not in full)[:budget]
        linear = set(range(base.layers)) - set(kept)
        hybrid = Decoder(base.config, with_linear(base.placement, recipe.place.block, linear))
        return hybrid.cache_bytes(32768) / base.cache_bytes(32768)

    assert worst(recipe.place.budget) < 2 / 3 and worst(4) > 1
    windowed, linear = (
        Decoder(base.config, [name] * base.layers).mixers[0].state_bytes(32768, torch.bfloat16)
        for name in ("swa", recipe.place.block)
    )
    assert 0.99 < windowed / 2**19 <= 1 and linear > 2 * windowed


@pytest.mark.parametrize("name", [*NAMES, "smollm2-cpu", "smollm2-135m"])
def test_plan_reads_a_recipe_as_run_does(name: str) -> None:
    path = str(ROOT / "recipes" / f"{name}.yaml")
    assert parse("plan", [path])[1]["recipe"] == recipe_of(name)
    flags = [path, "--train.tokens", "1e6", "--seed", "3", "--gpu", "l4"]
    assert parse("plan", flags)[1]["recipe"] == read_recipe("run", flags[:-2])


# What a recipe costs

QWEN = ROOT / "recipes" / "qwen2.5-1.5b.yaml"
QWEN_CONFIG = str(SHAPES / "qwen2.5-1.5b.json")


def lines_of(text: str) -> dict[str, list[str]]:
    """The words of each line of the table, by its stage."""
    _, _, rest = text.partition("\n\n")
    return {line.split()[0]: line.split() for line in rest.split("\n\n")[0].splitlines()}


def dry_rows(path: Path, *rows: dict[str, Any]) -> Path:
    shared = {"model": "Qwen/Qwen2.5-1.5B", "block": "jet"}
    path.write_text(json.dumps({"device": "a card", "rows": [shared | row for row in rows]}))
    return path


def changed(path: Path, **sections: dict[str, Any]) -> Any:
    recipe = read_recipe("run", [str(path)])
    return replace(recipe, **{name: replace(getattr(recipe, name), **fields) for name, fields in sections.items()})


def test_a_recipe_without_measurements_is_priced_at_forty_percent() -> None:
    recipe = recipe_of("qwen2.5-1.5b")
    text = plan_recipe(recipe, config=QWEN_CONFIG)
    assert max(map(len, text.splitlines())) <= 110 and "measured" not in text
    total = 0.0
    for stage, taken, *_ in recipe_stages(recipe, sizes("qwen2.5-1.5b")):
        words = lines_of(text)[stage]
        hours = taken.flops / (UTILISATION * GPUS["h100"].flops) / 3600
        assert words[words.index("assumed") + 1] == f"{hours:#.3g}"
        total += hours
    assert lines_of(text)["in"][4:] == [f"{total:#.3g}", "450", "B", "8,968"]


def test_measured_rows_set_the_pace_of_their_stage(tmp_path: Path) -> None:
    path = dry_rows(
        tmp_path / "dry.json",
        {"stage": "train", "tokens_per_s": 500_000_000 / 3600 / 2, "batch": 4, "length": 2048},
        {"stage": "stage2", "tokens_per_s": 200_000_000 / 3600 / 3, "batch": 1, "length": 2048},
        {"stage": "align", "error": "none"},
        {"stage": "align", "tokens_per_s": 1.0, "block": "gla"},
        {"stage": "place", "tokens_per_s": 1.0, "model": "another"},
    )
    lines = lines_of(plan_recipe(recipe_of("qwen2.5-1.5b"), path, config=QWEN_CONFIG))
    assert lines["train"][-5:] == ["measured", "2.00", "50", "B", "624"]
    assert lines["stage2"][-5:] == ["measured*", "3.00", "350", "B", "7,536"]  # at half of the batch
    assert "assumed" in lines["align"] and "assumed" in lines["place"]


def test_each_stage_of_a_recipe_is_priced() -> None:
    """Paths, several blocks and what is left out."""
    base = sizes("qwen2.5-1.5b")

    def priced(recipe: Any) -> dict[str, Any]:
        return {name: stage for name, stage, *_ in recipe_stages(recipe, base)}

    one, both = priced(recipe_of("qwen2.5-1.5b")), priced(changed(QWEN, align={"blocks": ["jet", "gla"]}))
    other = changed(QWEN, align={"blocks": ["gla"], "options": {}}, place={"block": "gla"})
    alone = priced(other)["align"].flops
    shared = base.body_flops(512) * 100_000_000 // 512
    assert both["align"].flops == one["align"].flops + alone - shared
    with_paths = priced(changed(QWEN, paths={"tokens": 5_000_000}, stage2={"tokens": 0}))
    assert list(with_paths) == ["align", "paths", "place", "train"]
    assert with_paths["paths"].tokens == 5_000_000
    assert list(priced(replace(recipe_of("qwen2.5-1.5b"), stages=["place"]))) == ["place"]
    swap, beam = (priced(changed(QWEN, place={"strategy": name}))["place"] for name in ("swap", "beam"))
    assert swap.tokens == (2 + 28) * 5 * 16_384 and beam.tokens > 30 * swap.tokens
    assert beam.flops / beam.tokens == pytest.approx(swap.flops / swap.tokens)


def test_plan_takes_a_recipe_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dry_rows(tmp_path / "dry.json", {"stage": "train", "tokens_per_s": 1e5, "batch": 4, "length": 2048})
    assert main(["plan", str(QWEN), "--config", QWEN_CONFIG, "--measured", str(path), "--gpu", "l4"]) == 0
    text = capsys.readouterr().out
    assert "7 keep attention, jet in the others" in text and "a card" in text
    assert "GiB!" in " ".join(lines_of(text)["stage2"])


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ("[]", "holds no rows of stages"),
        ('{"rows": [{"model": 1}]}', "holds no rows of stages"),
        ('{"rows": [{"model": "Qwen/Qwen2.5-1.5B", "block": "jet", "stage": "train", "tokens_per_s": "x"}]}', "is 'x'"),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_file_of_measurements_is_one_line(
    held: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dry.json"
    path.write_text(held)
    assert main(["plan", str(QWEN), "--config", QWEN_CONFIG, "--measured", str(path)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([str(QWEN), "--length", "4k"], "--length: is not understood"),
        (["some/model", "--measured", "x.json"], "--measured: is not understood"),
        (["some/model", "--config", "x.json"], "--config: is not understood"),
        ([str(QWEN), "--gpu", "h10"], "gpu: 'h10' is unknown"),
        (["none/such.yaml"], "cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "base: {model: x}",
        "base: {model: x}\ndata: {text: [{source: y}], token: 5}",
        "base: {model: x}\ndata: {text: [{source: y}], tokens: many}",
        "base: [",
        "",
    ],
)
def test_a_bad_recipe_is_the_line_that_run_gives(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = []
    for command in ("plan", "run"):
        assert main([command, str(path)]) == 2
        said.append(capsys.readouterr().err.replace(f"postnas {command}", "postnas"))
    assert said[0] == said[1] and said[0].count("\n") == 1


def test_exponents_in_a_recipe_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: {model: x}\ndata: {text: [{source: y}], tokens: 2e9}\ntrain: {tokens: 1.5e6, lr: 1e-3}")
    recipe = parse("plan", [str(path)])[1]["recipe"]
    assert (recipe.data.tokens, recipe.train.tokens, recipe.train.lr) == (2_000_000_000, 1_500_000, 1e-3)


def test_a_budget_above_the_layers_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^place.budget: 29 is more than the base's 28 layers"):
        plan_recipe(changed(QWEN, place={"budget": 29}), config=QWEN_CONFIG)


# The dry run


def started(module: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> list[dict[str, Any]]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(sys, "argv", ["dry_run_h100.py", "gemma-3-1b", "--tiny", *flags])
    module.main()
    path = folder / "dry-run-h100.json"
    return read_json(path)["rows"] if path.exists() else []


def test_dry_run_gives_a_row_a_stage_by_which_plan_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("dry_run_h100")
    assert started(module, monkeypatch, tmp_path, "--seconds", "-1") == []
    rows = started(module, monkeypatch, tmp_path)
    assert [row["stage"] for row in rows] == ["align", "place", "train", "stage2"]
    for row in rows:
        assert row["model"] == "google/gemma-3-1b-pt" and "error" not in row
        assert row["batch"] == row["asked_batch"] and row["peak_bytes"] > 2**20
        counted = 1 if row["stage"] == "place" else module.STEPS
        assert row["steps"] == counted and row["warm_up_seconds"] > 0
        if row["stage"] != "place":
            tokens = counted * row["batch"] * row["length"]
            assert math.isclose(row["tokens_per_s"] * row["seconds"], tokens)
    assert started(module, monkeypatch, tmp_path) == rows  # measured once
    text = plan_recipe(recipe_of("gemma-3-1b"), tmp_path / "dry-run-h100.json", config=str(SHAPES / "gemma-3-1b.json"))
    assert text.count("  measured") == 4 and "assumed" not in text


def test_dry_run_halves_what_does_not_fit_and_keeps_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("dry_run_h100")
    whole = module.DryRun._train

    def narrow(self: Any, settings: Any, folder: Path) -> None:
        if settings.batch > 1:
            raise torch.OutOfMemoryError("memory: none left\nat all")
        whole(self, settings, folder)

    def broken(self: Any, settings: Any, folder: Path) -> None:
        raise ValueError("out of luck\nand more")

    monkeypatch.setattr(module.DryRun, "_train", narrow)
    monkeypatch.setattr(module.DryRun, "_align", broken)
    align, train = started(module, monkeypatch, tmp_path, "--stages", "align", "train")
    assert (train["asked_batch"], train["batch"], train["steps"]) == (2, 1, module.STEPS)
    assert align["error"] == "ValueError: out of luck" and "tokens_per_s" not in align


def test_dry_run_does_not_mix_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("dry_run_h100")
    started(module, monkeypatch, tmp_path, "--stages", "align")
    monkeypatch.setattr(module, "device_name", lambda device: "another")
    with pytest.raises(SystemExit, match="is of CPU"):
        started(module, monkeypatch, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "placements").glob("*.json")), ids=lambda path: path.stem)
def test_published_placements_fit_their_base(path: Path) -> None:
    found = read_json(path)
    assert len(found["placement"]) == read_json(SHAPES / "smollm2-135m.json")["num_hidden_layers"]
    assert found["placement"].count("attn") == found["budget"]
    assert set(found["placement"]) == {"attn", found["block"]} and found["block"] in linear_blocks()
    files = (f"placement-{name}h100.json" for name in ("", "unrepeated-"))
    measured = [row for file in files for row in read_json(ROOT / "benchmarks" / "results" / file)["rows"]]
    assert any(row.get("placement") == found["placement"] and row["kind"] == "search" for row in measured)

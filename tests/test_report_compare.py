"""Several runs on one page."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from made_run import LAYERS, evaluation, make_run, many_tasks, placement, recipe, row_values

from postnas.errors import UserError
from postnas.files import read_json, write_json, write_text
from postnas.report.compare import write_comparison
from postnas.report.comparison import comparable, front
from postnas.report.runs import difference, read_member, recipe_changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one base: another placement, and the third without a bench."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for number, name in enumerate(("swap", "uniform", "half-done")):
        found.append(make_run(folder / name))
        write_json(found[-1] / "eval.json", many_tasks(number))
    mixers = ["attn" if layer % 2 else "jet" for layer in range(LAYERS)]
    write_json(found[1] / "placement.json", placement() | {"placement": mixers, "strategy": "uniform"})
    (found[2] / "bench.json").unlink()
    return found


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    return write_comparison(runs, runs[0].parent / "compare.html").read_text(encoding="utf-8")


def cells(page: str, table: str, row: str) -> list[str]:
    """The cells behind the name `row` in a table of the page."""
    body = page.split(f'aria-label="{table}"')[1].split("</table>")[0].replace("<wbr>", "")
    line = re.search(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', body)
    assert line, row
    return re.findall(r">([^<]*)</td>", line.group(1))


def test_scores_stand_beside_the_base_with_paired_differences(page: str, runs: list[Path]) -> None:
    results = [read_json(run / "eval.json") for run in runs]
    values = [row_values(result["outputs"]["hybrid"]["arc_easy"], "accuracy") for result in results]
    base = row_values(results[0]["outputs"]["base"]["arc_easy"], "accuracy")
    gaps = [y - x for x, y in zip(values[0], values[1])]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    found = cells(page, "Scores", "arc_easy")
    assert found[0].startswith(f"{100 * statistics.fmean(base):.1f}% ± ")
    assert [cell.split("%")[0] for cell in found[1:4]] == [f"{100 * statistics.fmean(one):.1f}" for one in values]
    assert found[4] == f"{100 * statistics.fmean(gaps):+.1f} ± {100 * error:.1f}"
    assert found[6] == "300"


@pytest.mark.parametrize("key", [("perplexity", "perplexity"), ("copy", "copy_accuracy"), ("needle@1024", "recall")])
def test_rows_that_the_run_makes_are_paired_only_where_made_alike(runs: list[Path], key: tuple[str, str]) -> None:
    members = [read_member(letter, run) for letter, run in zip("AB", runs)]
    gap = difference(*members, key)
    assert gap is not None and gap.paired and gap.stderr is not None
    assert gap.value == pytest.approx(members[1].kept[key].hybrid - members[0].kept[key].hybrid)
    members[1].results.recipe["seed"] += 1
    other = difference(*members, key)
    assert other is not None and not other.paired and other.value == gap.value
    assert other.stderr == pytest.approx(math.hypot(*(one.kept[key].hybrid_stderr or 0 for one in members)))


def test_runs_of_other_texts_are_paired_where_the_rows_do_not_come_from_it(runs: list[Path]) -> None:
    members = [read_member(letter, run) for letter, run in zip("AB", runs)]
    members[1].results.recipe["data"]["tokens"] += 1
    members[1].results.recipe["evaluate"]["allow_code"] = True
    gaps = {key: difference(*members, key) for key in members[0].kept}
    unpaired = {key[0] for key, gap in gaps.items() if gap is not None and not gap.paired}
    assert unpaired == {"perplexity", "copy"}
    assert {"gsm8k", "squad", "lambada", "needle@1024", "humaneval"} <= {key[0] for key in gaps}


def test_every_kind_of_record_is_read(runs: list[Path]) -> None:
    members = [read_member(letter, run) for letter, run in zip("AB", runs)]
    gaps = {key: difference(*members, key) for key in members[0].kept}
    assert len(gaps) > 40 and all(gap is not None and gap.paired for gap in gaps.values())


def test_perplexities_differ_by_the_delta_method(runs: list[Path]) -> None:
    members = [read_member(letter, run) for letter, run in zip("AB", runs)]
    key = ("perplexity", "perplexity")
    nll = [row_values(read_json(run / "eval.json")["outputs"]["hybrid"]["perplexity"], "perplexity") for run in runs]
    old, new = (math.exp(statistics.fmean(one)) for one in nll[:2])
    moves = [new * y - old * x for x, y in zip(nll[0], nll[1])]
    gap = difference(*members, key)
    assert gap is not None and gap.stderr == pytest.approx(statistics.stdev(moves) / math.sqrt(len(moves)))


def test_records_that_do_not_give_the_score_are_not_paired(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "run"))
    result = read_json(other / "eval.json")
    for record in result["outputs"]["hybrid"]["piqa"]:
        record["choice"] = 0
    write_json(other / "eval.json", result)
    gap = difference(read_member("A", runs[0]), read_member("B", other), ("piqa", "accuracy"))
    assert gap is not None and not gap.paired


def test_other_rows_are_not_paired(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "run"))
    write_json(other / "eval.json", many_tasks(1, rows=200))
    gap = difference(read_member("A", runs[0]), read_member("B", other), ("piqa", "accuracy"))
    assert gap is not None and not gap.paired
    page = write_comparison([runs[0], other], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert cells(page, "Scores", "piqa")[3].endswith(", unpaired") and cells(page, "Scores", "piqa")[4] == "300 / 200"


def test_a_run_shows_what_it_has(page: str) -> None:
    assert page.count("has not run") == 1 and "The stage bench has not run." in page
    assert page.count('<th scope="row">C</th>') == 1  # cost; no speed
    assert 'aria-label="Placements of the runs A, B, C"' in page
    assert page.count("15 of 30 layers are linear (jet), strategy uniform") == 1


def test_comparisons_are_counted_and_named_in_the_cost(runs: list[Path], page: str, tmp_path: Path) -> None:
    assert cells(page, "Cost", "A")[-4:] == ["88.0", "1,012.1", "200,704", "2.90 GiB"]
    assert not any(f">{name}, s<" in page for name in ("select", "design", "size"))
    other = Path(shutil.copytree(runs[1], tmp_path / "run"))
    compared = {"select": {"seconds": 50.0, "tokens": 3072}, "size": {"seconds": 20.0}}  # before tokens were kept
    write_json(other / "stages.json", read_json(other / "stages.json") | compared)
    both = write_comparison([runs[0], other], tmp_path / "compare.html").read_text(encoding="utf-8")
    heads = re.findall(r">([^<]*), s</th>", both.split('aria-label="Cost"')[1])
    assert heads == ["align", "place", "select", "size", "train", "evaluate", "bench", "all"]
    assert cells(both, "Cost", "A")[2:4] == ["–", "–"]
    assert cells(both, "Cost", "B")[2:4] == ["50.0", "20.0"]
    assert cells(both, "Cost", "B")[-3:-1] == ["1,082.1", "203,776"]


def test_runs_of_one_base_and_device_are_not_warned_of(page: str) -> None:
    assert "different bases" not in page and "different devices" not in page
    assert "://" not in page and "<script" not in page and "None" not in page.split("The resolved recipe")[0]


def test_other_bases_and_devices_are_said_so(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", model="Qwen/Qwen2.5-1.5B")
    write_json(other / "bench.json", read_json(other / "bench.json") | {"device": "another"})
    page = write_comparison([runs[0], other], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "These runs have different bases." in page
    assert "The speeds were measured on different devices:" in page
    assert "times its own base&#x27;s" in page or "times its own base's" in page
    assert '<th scope="col" class="number">base of A</th>' in page
    assert cells(page, "How the recipes differ", "base.model")[1] == "Qwen/Qwen2.5-1.5B"


def test_runs_of_which_nothing_has_run(tmp_path: Path) -> None:
    for name in "ab":
        write_text(tmp_path / name / "recipe.yaml", yaml.safe_dump(recipe()))
    page = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<svg" not in page and page.count("has run in none of them") == 3 and "They do not." in page


def test_quality_is_a_mean_over_the_measures_that_all_have(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "run")  # perplexity, copy, arc_easy, piqa
    members = [read_member("A", runs[0]), read_member("B", other), read_member("C", runs[2])]
    points = comparable(members)
    assert [point.member.letter for point in points] == ["A", "B"]  # C has no bench
    assert [(point.at.phase, point.at.context) for point in points] == [("decode", 8192)] * 2
    common = [key for key, row in members[1].kept.items() if row.share is not None and members[0].kept[key].share]
    shares = {("arc_easy", "accuracy"): 0.917, ("arc_easy", "accuracy_norm"): 0.941, ("piqa", "accuracy"): 0.908}
    shares |= {("copy", "copy_accuracy"): 0.731 / 0.812, ("perplexity", "perplexity"): 15.91 / 18.69}
    assert points[1].kept == pytest.approx(100 * statistics.fmean(shares[key] for key in common))


def test_front_leaves_out_what_another_beats() -> None:
    assert front([(1.0, 5.0), (2.0, 4.0), (1.5, 4.0), (2.0, 4.0)]) == [True, True, False, True]


def test_recipes_differ_by_field(runs: list[Path]) -> None:
    members = [read_member(letter, run) for letter, run in zip("AB", runs)]
    assert recipe_changes(members) == []
    members[1].results.recipe["place"]["budget"] = 3
    members[1].results.recipe["out"] = "elsewhere"
    assert recipe_changes(members) == [["place.budget", str(members[0].results.recipe["place"]["budget"]), "3"]]


def test_equal_runs_give_equal_bytes(runs: list[Path], page: str, tmp_path: Path) -> None:
    assert write_comparison(runs, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_markup_in_a_run_is_escaped(runs: list[Path], tmp_path: Path) -> None:
    evil = make_run(tmp_path / "run", model="<script>alert(1)</script>")
    result = evaluation()
    for row in [*result["rows"], *result["paired"]]:
        row["task"] = row["task"].replace("piqa", "<script>")
    write_json(evil / "eval.json", result)
    assert "<script" not in write_comparison([runs[0], evil], tmp_path / "c.html").read_text(encoding="utf-8")


def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    cases = [
        ([runs[0]], "runs: 1 cannot be compared; give 2 to 6 run directories"),
        ([runs[0]] * 7, "runs: 7 cannot be compared; give 2 to 6 run directories"),
        ([runs[0], runs[1], runs[0] / "."], "runs: the same directory is given twice; give each run once"),
        ([runs[0], tmp_path / "no"], "recipe.yaml: cannot be read"),
    ]
    for folders, words in cases:
        with pytest.raises(UserError) as error:
            write_comparison(folders, out)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()

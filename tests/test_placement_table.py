"""The published table of placements, from a made-up folder of what was kept, whose answers are planted."""

from __future__ import annotations

import importlib
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postnas.errors import UserError
from postnas.evaluate.measure import field
from postnas.evaluate.verdict import PERPLEXITY, paired
from postnas.files import read_json, write_json, write_jsonl
from postnas.search.strategies import STRATEGIES, with_linear

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
numbers: Any = importlib.import_module("placement_numbers")
table: Any = importlib.import_module("placement_table")
render: Any = importlib.import_module("render")

LAYERS = 10
ATTENTION = ["attn"] * LAYERS
WORTH = {
    "kl": [0.05, 0.01, 0.3, 0.02, 0.01, 0.2, 0.03, 0.01, 0.02, 0.04],
    "copy": [0.1, 2.0, 0.1, 0.2, 0.1, 0.1, 0.3, 1.0, 0.1, 0.2],
    "needle": [0.1, 1.5, 0.1, 0.1, 0.2, 0.1, 0.2, 1.2, 0.1, 0.1],
    "key_value": [0.2, 1.0, 0.2, 0.3, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1],
    "arc": [0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.1],
    "mmlu": [0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.2, 0.1, 0.6, 0.1],
}
"""What a linear layer adds to the loss of each objective; a window adds half."""
ROWS = {"kl": 6, "copy": 4, "needle": 3, "key_value": 3, "arc": 8, "mmlu": 9}
RETRIEVAL = ("copy", "needle", "key_value")


def kept(*layers: int) -> list[str]:
    return with_linear(ATTENTION, "jet", set(range(LAYERS)) - set(layers))


def loss(name: str, one: Sequence[str]) -> float:
    share = {"attn": 0.0, "jet": 1.0, "swa": 0.5}
    return (0.0 if name == "kl" else 1.0) + sum(share[mixer] * worth for mixer, worth in zip(one, WORTH[name]))


def losses(name: str, one: Sequence[str], noise: str = "") -> list[float]:
    """A row's own difficulty is the same for every placement; `noise` adds what differs."""
    draw, own = random.Random(name), random.Random(f"{noise} {name} {' '.join(one)}")
    values = [draw.gauss(0, 0.3) + (own.gauss(0, 0.02) if noise else 0.0) for _ in range(ROWS[name])]
    return [loss(name, one) + value - statistics.fmean(values) * (not noise) for value in values]


def outputs(one: Sequence[str], seed: int) -> dict[str, Any]:
    noise = f"distilled {seed}"
    found: dict[str, Any] = {
        "perplexity": [{"id": n, "nll": 2 + v, "tokens": 255} for n, v in enumerate(losses("kl", one, noise))],
        "copy": [
            {"id": n, "nll": v, "accuracy": min(1.0, 1 / max(v, 1.0))} for n, v in enumerate(losses("copy", one, noise))
        ],
    }
    for name in WORTH:
        found[f"objective {name}"] = [{"id": f"{name}-{n}", "nll": v} for n, v in enumerate(losses(name, one, noise))]
    found["arc_easy"] = [
        {"id": str(n), "gold": 0, "loglikelihoods": [0.0] * 4, "choice": int(v > 2), "choice_norm": int(v > 1.5)}
        for n, v in enumerate(losses("arc", one, noise))
    ]
    return found


def searches(seed: int) -> dict[tuple[str, str, int], list[str]]:
    found = {("aligned", "beam", 4): kept(1, 6, 7, 3), ("aligned", "swap", 4): kept(1, 7, 3, 9 if seed else 6)}
    found |= {("feature", "beam", 4): kept(1, 7, 3, 6), ("feature", "beam", 2): kept(1, 7)}
    return found | {("aligned", "beam", 2): kept(1, 7), ("kl", "beam", 4): kept(1, 7, 0, 9)}


def baselines(budget: int) -> list[list[str]]:
    found = [STRATEGIES["uniform"](lambda _: 0.0, ATTENTION, "jet", budget, 0)]
    return found + [STRATEGIES["random"](lambda _: 0.0, ATTENTION, "jet", budget, n) for n in range(3)]


FILLERS = [kept(0, 1, 2, 3), kept(0, 4, 5, 8), kept(2, 4, 7, 8), kept(3, 4, 5, 6)]
WINDOWED = [{2: "swa", 8: "swa"}.get(layer, name) for layer, name in enumerate(kept(1, 7, 3, 6))]


def make_seed(folder: Path, seed: int) -> None:
    write_json(folder / "warm.json", {"seconds": 20.0, "device": "a card", "torch": "2.13.0"})
    for kind, tokens in (("aligned", 4000), ("feature", 1000), ("kl", 1000)):
        write_json(
            folder / kind / "aligned.json", {"seconds": 10.0 + seed, "tokens": tokens, "set": kind, "seed": seed}
        )
        for strategy in ("beam", "swap"):
            known = [ATTENTION, *(one for (k, s, _), one in searches(seed).items() if (k, s) == (kind, strategy))]
            rows = [{"placement": one, "rows": {name: losses(name, one) for name in RETRIEVAL}} for one in known]
            write_jsonl(folder / f"scored-{kind}-{strategy}.jsonl", [{"key": f"{seed}"} | row for row in rows])
    for (kind, strategy, budget), one in searches(seed).items():
        score = statistics.fmean(loss(name, one) - loss(name, ATTENTION) for name in RETRIEVAL)
        found = {"placement": one, "strategy": strategy, "budget": budget, "block": "jet", "seed": seed}
        found |= {"objective": {"retrieval": 1.0}, "scores": {"score": score}, "candidates": kind, "seconds": 2.0}
        found["resumed"] = False
        write_json(
            folder / f"search-{kind}-{strategy}-{budget}.json",
            found | {"scored": 5, "tokens": 500, "score_tokens": 100},
        )
    write_json(folder / "windows-feature.json", {"placement": WINDOWED, "chosen": [], "seconds": 1.0})
    known = [
        {"rows": {n: losses(n, one) for n in ("arc", "mmlu")}, "placement": one} for one in (kept(1, 7, 3, 6), WINDOWED)
    ]
    write_jsonl(folder / "scored-feature-windows.jsonl", known)
    distilled = [*baselines(4), *baselines(2), *searches(seed).values(), WINDOWED, *(FILLERS if seed == 0 else [])]
    for number, one in enumerate(distilled):
        record = {"placement": one, "seconds": 30.0, "tokens": 1_000_000, "outputs": outputs(one, seed), "seed": seed}
        write_json(folder / "distilled" / f"{number:02}.json", record)
    write_json(folder / "distilled" / "base.json", {"outputs": outputs(ATTENTION, seed), "seed": seed})
    ones = [ATTENTION, *(one for one in distilled if "swa" not in one)]
    scores = [{"placement": one, "scores": {n: loss(n, one) for n in ("kl", *RETRIEVAL)}} for one in ones]
    write_json(folder / "scores-aligned.json", {"scores": scores, "seconds": 3.0})
    write_jsonl(folder / "scored-aligned-all.jsonl", [{"placement": ATTENTION, "rows": {"kl": [0.0, 0.0]}}])
    heat = {"base": ATTENTION, "none": kept()}
    heat |= {f"only {layer}": kept(layer) for layer in range(LAYERS)}
    heat |= {f"without {layer}": with_linear(ATTENTION, "jet", {layer}) for layer in range(LAYERS)}
    rows = {name: {n: losses(n, one) for n in WORTH} for name, one in heat.items()}
    write_json(folder / "heat-aligned.json", {"rows": rows, "seconds": 4.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("kept")
    for seed in range(3):
        make_seed(found / f"seed-{seed}", seed)
    return found


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return table.table(folder)


def rows(result: dict[str, Any], kind: str, **wanted: Any) -> list[dict[str, Any]]:
    ones = [row for row in result["rows"] if row["kind"] == kind]
    return [row for row in ones if all(row.get(name) == value for name, value in wanted.items())]


def one(result: dict[str, Any], kind: str, **wanted: Any) -> dict[str, Any]:
    (row,) = rows(result, kind, **wanted)
    return row


# The numbers


def test_a_contrast_is_the_verdict_s_paired_difference() -> None:
    base, hybrid = (
        [{"id": n, "nll": v} for n, v in enumerate(values)] for values in ([2.0, 2.5, 3.1], [2.1, 2.9, 3.0])
    )
    for exponential in (False, True):
        measure = PERPLEXITY[0] if exponential else type(PERPLEXITY[0])("nll", field("nll"))
        parts = [
            [numbers.Part(np.array(measure.values(side)), [0, 1, 2], exponential=exponential)]
            for side in (hybrid, base)
        ]
        wanted = paired(measure, {"base": {"x": base}, "hybrid": {"x": hybrid}}, "x")
        assert numbers.contrast(parts, [1, -1]) == pytest.approx((wanted["difference"], wanted["stderr"]))


def test_a_contrast_weighs_independent_parts() -> None:
    parts = [
        numbers.Part(np.array([1.0, 3.0]), [0, 1], 0.25),
        numbers.Part(np.array([4.0, 4.0, 10.0]), [0, 1, 2], 0.75),
    ]
    value, error = numbers.contrast([parts], [1])
    assert value == pytest.approx(0.25 * 2 + 0.75 * 6)
    assert error == pytest.approx(math.sqrt(0.25**2 * 1.0 + 0.75**2 * 4.0))
    assert numbers.contrast([[numbers.Part(np.array([1.0]), [0])]], [1]) == (1.0, None)


def test_a_contrast_of_other_rows_is_refused() -> None:
    models = [[numbers.Part(np.array([1.0, 2.0]), ids)] for ids in ([0, 1], [1, 0])]
    with pytest.raises(UserError, match="same rows"):
        numbers.contrast(models, [1, -1])


def test_spearman_with_ties() -> None:
    assert numbers.ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 5.0])
    assert numbers.correlation(numbers.ranks(first), numbers.ranks(second)) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert math.isnan(numbers.correlation(numbers.ranks(first), numbers.ranks(first * 0)))


def test_an_interval_holds_what_it_should() -> None:
    """Of 100 planted samples of a known correlation, the 95% interval holds it in about 95."""
    draw, truth, held = np.random.default_rng(1), 6 / math.pi * math.asin(0.6 / 2), 0
    for _ in range(100):
        x = draw.normal(size=24)
        y = 0.6 * x + 0.8 * draw.normal(size=24)
        (row,) = numbers.correlations({"s": x}, {"t": y}, draws=400)
        assert row["low"] < row["score"] < row["high"]
        held += row["low"] <= truth <= row["high"]
    assert 86 <= held <= 100


def test_half_of_the_effect_counts_harm_as_nothing() -> None:
    found = list(
        numbers.findings({"a": np.array([1.0, -9.0, 5.0, 2.0, 3.0]), "b": np.array([0.0, 9.0, 5.0, 2.0, 3.0])})
    )
    assert [(row["objective"], row["score"], row["layers"]) for row in found[:2]] == [
        ("a", 2, [2, 4]),
        ("b", 2, [1, 2]),
    ]
    assert found[2]["common"] == [2, 3, 4] and found[2]["top"] == 4 and found[2]["n"] == 5


# The rows


def test_a_search_has_its_score_with_an_error(result: dict[str, Any]) -> None:
    row = one(result, "search", strategy="beam", candidates="aligned", budget=4, seed=0)
    assert row["placement"] == kept(1, 3, 6, 7) and row["objective"] == "retrieval" and row["distilled"] is False
    assert row["score"] == pytest.approx(
        statistics.fmean(sum(WORTH[n]) - sum(WORTH[n][i] for i in (1, 3, 6, 7)) for n in RETRIEVAL)
    )
    assert row["stderr"] == pytest.approx(0, abs=1e-9)  # every row loses the same here
    assert (row["seconds"], row["scored"], row["tokens"]) == (2.0, 5, 500) and "trained_tokens" not in row
    assert one(result, "search", candidates="feature", budget=4, seed=0)["trained_tokens"] == 1000


def test_a_hybrid_has_all_its_names_and_is_paired(result: dict[str, Any]) -> None:
    row = one(result, "hybrid", task="retrieval", attn=[1, 3, 6, 7], swa=None, seed=0)
    assert set(row["strategy"].split(", ")) == {"beam/aligned", "swap/aligned", "beam/feature"}
    own, others = kept(1, 3, 6, 7), baselines(4)

    def values(name: str, one: list[str]) -> list[float]:
        return [record["nll"] for record in outputs(one, 0)[f"objective {name}"]]

    score, variance, against, spread = 0.0, 0.0, 0.0, 0.0
    for name in RETRIEVAL:
        mine = values(name, own)
        rest = [statistics.fmean(three) for three in zip(*(values(name, other) for other in others[1:]))]
        gaps = [a - b for a, b in zip(mine, rest)]
        score, against = score + statistics.fmean(mine) / 3, against + statistics.fmean(gaps) / 3
        variance += statistics.variance(mine) / len(mine) / 9
        spread += statistics.variance(gaps) / len(gaps) / 9
    assert (row["score"], row["stderr"]) == pytest.approx((score, math.sqrt(variance)))
    assert (row["minus_random"], row["minus_random_stderr"]) == pytest.approx((against, math.sqrt(spread)))
    assert row["n"] == sum(ROWS[name] for name in RETRIEVAL)
    assert (row["budget"], row["tokens"], row["seconds"], row["distilled"]) == (4, 1_000_000, 30.0, True)


def test_every_metric_of_every_task_is_there(result: dict[str, Any]) -> None:
    keys = {(row["task"], row["metric"]) for row in rows(result, "hybrid", strategy="uniform", budget=4, seed=0)}
    wanted = {("perplexity", "perplexity"), ("copy", "copy_accuracy"), ("copy", "copy_nll"), ("kl", "kl")}
    wanted |= {("retrieval", "nll"), ("knowledge", "nll"), ("arc_easy", "accuracy"), ("arc_easy", "accuracy_norm")}
    assert keys == wanted | {(f"objective {name}", "nll") for name in WORTH if name != "kl"}
    assert keys == {(row["task"], row["metric"]) for row in rows(result, "base", seed=0)}
    assert not any(row["distilled"] for row in rows(result, "base"))


def test_baselines_are_compared_with_the_other_one_alone(result: dict[str, Any]) -> None:
    uniform = one(result, "hybrid", strategy="uniform", budget=4, task="kl", seed=0)
    assert "minus_uniform" not in uniform and "minus_random" in uniform
    drawn = [one(result, "hybrid", strategy=f"random-{n}", budget=4, task="kl", seed=0) for n in range(3)]
    mean = one(result, "hybrid", strategy="random", budget=4, task="kl", seed=0)
    assert mean["score"] == pytest.approx(statistics.fmean(row["score"] for row in drawn))
    assert "minus_random" not in mean and mean["minus_uniform"] == pytest.approx(-uniform["minus_random"])
    assert {row["strategy"] for row in rows(result, "hybrid", task="kl", attn=[0, 1, 2, 3])} == {"filler"}


def test_means_go_by_the_strategy_s_name(result: dict[str, Any]) -> None:
    """`swap` finds another placement with seed 0 than with the others."""
    ones = [row for row in rows(result, "hybrid", task="retrieval", budget=4) if "swap/aligned" in row["strategy"]]
    assert len({tuple(row["attn"]) for row in ones}) == 2
    row = one(result, "mean", strategy="swap/aligned", task="retrieval")
    for name, error in (("score", "stderr"), ("minus_uniform", "minus_uniform_stderr")):
        values = [one[name] for one in ones]
        assert row[name] == pytest.approx(statistics.fmean(values))
        assert row[error] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert (row["n"], row["seeds"]) == (3, [0, 1, 2])
    assert rows(result, "mean", strategy="filler") == []


def test_rank_correlation_of_planted_scores(result: dict[str, Any]) -> None:
    """Distilled losses are the scores with little noise: each ranks its own objective, and not the other."""
    everything = {"candidates": "aligned", "among": "all", "seed": 0}
    own = one(result, "rank", objective="retrieval", task="retrieval", **everything)
    other = one(result, "rank", objective="retrieval", task="kl", **everything)
    assert own["score"] > 0.95 > 0.8 > other["score"] and own["low"] <= own["score"] <= own["high"]
    placements = {tuple(p) for p in [*baselines(4), *FILLERS, *(s for (_, _, b), s in searches(0).items() if b == 4)]}
    assert own["n"] == len(placements)
    free = one(
        result, "rank", objective="retrieval", task="retrieval", candidates="aligned", among="not chosen", seed=0
    )
    assert free["n"] == 7  # three random ones and four fillers
    assert (own["score_tokens"], own["trained_tokens"]) == (100, 0)
    assert one(result, "rank", objective="kl", task="kl", **everything)["score_tokens"] == 512
    assert one(result, "rank", objective="retrieval + kl", task="kl", **everything)["score_tokens"] == 612


def test_heat_maps_and_their_findings(result: dict[str, Any]) -> None:
    row = one(result, "heat", candidates="aligned", objective="copy", seed=0)
    assert row["one_linear"] == pytest.approx(WORTH["copy"]) and row["base"] == pytest.approx(1.0)
    assert row["one_full"] == pytest.approx([1 + sum(WORTH["copy"]) - worth for worth in WORTH["copy"]])
    assert row["one_linear_stderr"] == pytest.approx([0.0] * LAYERS, abs=1e-9) and min(row["one_full_stderr"]) > 0.01
    for effect in ("one_linear", "one_full"):
        assert one(result, "half", objective="retrieval", effect=effect, seed=0)["layers"] == [1, 7]
        alike = one(result, "likeness", objective="arc", other="mmlu", effect=effect, seed=0)
        apart = one(result, "likeness", objective="copy", other="arc", effect=effect, seed=0)
        assert alike["score"] > apart["score"] and {2, 8} <= set(alike["common"])


def test_windows_are_measured_before_and_after(result: dict[str, Any]) -> None:
    gain = statistics.fmean((WORTH[name][2] + WORTH[name][8]) / 2 for name in ("arc", "mmlu"))
    searched = one(result, "window", distilled=False, seed=0)
    assert searched["score"] == pytest.approx(gain) and searched["swa"] == [2, 8]
    distilled = one(result, "window", distilled=True, task="knowledge", seed=0)
    assert distilled["score"] == pytest.approx(gain, abs=0.05) and distilled["stderr"] > 0
    assert {row["strategy"] for row in rows(result, "hybrid", swa=[2, 8])} == {"windows/feature"}


def test_costs(result: dict[str, Any]) -> None:
    assert one(result, "cost", step="align", seed=1)["seconds"] == 11.0
    assert one(result, "cost", step="paths", candidates="kl", seed=1)["tokens"] == 1000
    assert one(result, "cost", step="warm-up", seed=0)["seconds"] == 20.0


# The file, its figures and its tables


def test_the_file_has_a_row_a_line(result: dict[str, Any]) -> None:
    text = table.text(result)
    again = json.loads(text)
    assert again.keys() == {"command", "device", "torch", "date", "rows"} and again["device"] == "a card"
    assert len(again["rows"]) == len(result["rows"]) == sum(line.startswith("  {") for line in text.splitlines())
    assert again["rows"][0]["kind"] == "cost"


def test_main_writes_beside_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["placement_table.py", str(folder)])
    before = sorted((ROOT / "docs").iterdir())
    assert table.main() == 0
    figures = ["placement-budgets.svg", "placement-heat.svg", "placement-layers.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*figures[:1], "placement-h100.json", *figures[1:]]
    assert sorted((ROOT / "docs").iterdir()) == before
    text = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
    for name in (name for name in render.TABLES if name.startswith("placement-")):
        text = render.rendered(text, name, tmp_path)
    for figure in figures:
        assert f"]({figure})" in text
    assert "No figures yet" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| swap/aligned | ") and line.endswith(" | 3 |") for line in tables)
    assert any(line.startswith("| base | ") for line in tables)
    assert not any("filler" in line or "random-0" in line for line in tables)
    assert "| aligned | retrieval | +" in text and "| retrieval | 2: 1, 7 | 2: 1, 7 |" in text
    assert (
        "| beam | aligned | 2, 4 | 10 | 1,000 | 4.0 |" in tables and "| paths | kl | – | – | 1,000 | 11.0 |" in tables
    )


def test_the_figure_of_layers_has_a_row_a_strategy(result: dict[str, Any]) -> None:
    found = table._layers(result["rows"])
    assert found["uniform"] == baselines(4)[0] and found["windows/feature"] == WINDOWED
    assert found["beam/kl"] == kept(0, 1, 7, 9) and found["swap/aligned"] == kept(1, 3, 6, 7)
    assert found.keys() == {"swap/aligned", "beam/aligned", "beam/feature", "beam/kl", "uniform", "windows/feature"}


def test_tables_have_as_many_cells_in_every_line(result: dict[str, Any]) -> None:
    for made in (render.placed, render.placed_ranks, render.placed_layers, render.placed_windows, render.placed_cost):
        blocks: list[list[str]] = [[]]
        for line in made(result).splitlines():
            blocks = [*blocks, []] if not line.startswith("|") else [*blocks[:-1], [*blocks[-1], line]]
        assert any(blocks) and all(len({line.count("|") for line in block}) <= 1 for block in blocks), made


def test_what_is_not_there_yet_is_left_out(folder: Path, tmp_path: Path) -> None:
    early = tmp_path / "seed-0"
    for name in ("warm.json", "search-aligned-beam-4.json", "aligned/aligned.json"):
        write_json(early / name, read_json(folder / "seed-0" / name))
    (early / "scored-aligned-beam.jsonl").write_text((folder / "seed-0" / "scored-aligned-beam.jsonl").read_text())
    write_json(tmp_path / "seed-1" / "aligned" / "aligned.json", {})  # a seed that has only begun
    found = table.table(tmp_path)
    assert {row["kind"] for row in found["rows"]} == {"cost", "search"}
    assert table.figures(found["rows"]).keys() == {"placement-budgets.svg", "placement-layers.svg"}
    assert "No figures yet" in render.placed_ranks(found) and "No figures yet" in render.placed_layers(found)


def test_nothing_kept_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["placement_table.py", str(tmp_path)])
    assert table.main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "placement-h100.json").exists()


def test_a_seed_must_say_what_it_was_measured_on(folder: Path, tmp_path: Path) -> None:
    write_json(
        tmp_path / "seed-0" / "search-aligned-beam-4.json", read_json(folder / "seed-0" / "search-aligned-beam-4.json")
    )
    write_json(tmp_path / "seed-0" / "warm.json", {"seconds": 1.0})
    with pytest.raises(UserError, match="device"):
        table.table(tmp_path)

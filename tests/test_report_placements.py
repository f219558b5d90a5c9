"""Plots of placements, and what of a run's scored placements its report shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from made_run import LAYERS, make_run, placement
from test_report_page import AXES, CONTRAST, OUTSIDE

from postnas.files import read_json, write_json, write_jsonl
from postnas.report import placements
from postnas.report.html import write_report
from postnas.report.results import Alone, alone, chosen
from postnas.search.strategies import with_linear

ATTENTION = ["attn"] * LAYERS
ALL = set(range(LAYERS))


def record(linear: set[int], key: str = "now", **rows: list[float]) -> dict[str, Any]:
    return {"key": key, "placement": with_linear(ATTENTION, "jet", linear), "rows": rows}


def scored(left_out: int | None = None) -> list[dict[str, Any]]:
    """The base, each layer alone linear and alone on attention, and placement.json's own; one layer may be missing."""
    found = [record(set(), kl=[0.0, 0.0], copy=[0.5, 1.1])]
    for layer in range(LAYERS):
        found.append(record({layer}, kl=[0.01 * layer, 0.03 * layer], copy=[0.5, 1.1 + layer]))
        if layer != left_out:
            found.append(record(ALL - {layer}, kl=[0.6, 0.7], copy=[4.0, 4.0 + 0.1 * layer]))
    own = placement()
    return [*found, {"key": "now", "placement": own["placement"], "rows": {"kl": [0.291], "copy": [1.013]}}]


def test_alone_is_added_loss_and_left_loss() -> None:
    found = alone(scored(), placement())
    assert found.one_linear["kl"] == pytest.approx([0.02 * layer for layer in range(LAYERS)])
    assert found.one_linear["copy"] == pytest.approx([layer / 2 for layer in range(LAYERS)])
    assert found.one_full["copy"] == pytest.approx([4.0 + 0.05 * layer for layer in range(LAYERS)])


def test_a_map_with_a_hole_is_no_map() -> None:
    found = alone(scored(left_out=7), placement())
    assert found.one_full == {} and len(found.one_linear["kl"]) == LAYERS


def test_scores_of_other_candidates_are_left_out() -> None:
    """The key of placement.json's own scores counts, whatever stands last in the file."""
    stale = [record({layer}, key="old", kl=[9.0]) for layer in range(LAYERS)]
    stale += [record(set(), key="old", kl=[0.0]), {**scored()[-1], "key": "old", "rows": {"kl": [0.4]}}]
    assert (
        alone([*stale, *scored()], placement())
        == alone([*scored(), *stale], placement())
        == alone(scored(), placement())
    )
    assert alone(stale, placement()) == Alone({}, {})
    assert alone([], placement()) == Alone({}, {})


def test_an_objective_that_some_layers_lack_is_left_out() -> None:
    extra = record({3}, arc=[2.0])
    assert alone([*scored(), extra], placement()).one_linear.keys() == {"kl", "copy"}


def test_choices_are_placements_that_differ() -> None:
    table = [
        {"budget": b, "placement": with_linear(ATTENTION, "jet", set(range(LAYERS - b))), "predicted": 1.0}
        for b in range(LAYERS + 1)
    ]
    found = chosen(placement() | {"table": table})
    assert list(found) == ["1", "2", "4", "8", "15", "16"]
    assert found["4"].count("attn") == 4
    same = [row | {"placement": ATTENTION} for row in table]
    assert chosen(placement() | {"table": same}) == chosen({"placement": ATTENTION, "budget": 15}) == {}


def squares(svg: str) -> list[str]:
    return re.findall(r"fill: (#[0-9a-f]{6})", svg)


def test_each_row_of_a_heat_map_has_its_own_colours() -> None:
    """Yellow is the largest of what is added, and the smallest of what is left."""
    yellow, dark = "#fde725", "#440154"
    added = squares(placements.alone({"kl": [0.001, 0.1, 0.0], "copy": [10.0, 0.05, 1.0]}, {}))
    assert (added[1], added[3]) == (yellow, yellow)
    assert (added[0], added[2], added[4]) == (dark, dark, dark)
    left = squares(placements.alone({}, {"kl": [0.2, 0.6, 0.4]}))
    assert (left[0], left[1]) == (yellow, dark) and left[2] not in (yellow, dark)
    assert squares(placements.alone({}, {"kl": [0.2, 0.2]})) == [dark, dark]


def test_a_heat_map_says_the_ends_of_its_rows() -> None:
    svg = placements.alone({"kl": [0.001, 0.123]}, {"copy": [2.43, 4.72]})
    assert "≤ 0.12" in svg and "2.43–4.72" in svg and "nats a token" in svg


POINTS = {
    "before": {"beam": [(1, 1.9, 0.1), (2, 0.9, None), (8, 0.05, 0.02)], "uniform": [(1, 2.0, 0.1), (8, 1.0, 0.1)]},
    "after": {"beam": [(2, 0.4, 0.02), (4, 0.3, 0.01)], "gates": [(2, 0.41, 0.02)]},
}


def test_budgets_have_a_line_a_strategy_and_plain_ticks() -> None:
    svg = placements.by_budget(POINTS)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [texts.count(name) for name in ("beam", "gates", "uniform", "before", "after")] == [1] * 5
    assert texts.count("full attention, layers") == 2
    ticks = [text for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert {"1", "2", "4", "8"} <= set(ticks) and not any("10^" in text for text in texts)


def test_budgets_below_zero_are_drawn_too() -> None:
    assert "<svg" in placements.by_budget({"x": {"beam": [(0, -0.2, None), (1, -0.3, 0.1), (2, 5.0, 0.1)]}})


def test_equal_values_give_equal_bytes() -> None:
    assert placements.by_budget(POINTS) == placements.by_budget(POINTS)
    values = {"kl": [0.1, 0.2]}
    assert placements.alone(values, values) == placements.alone(values, values)


def test_choices_name_their_rows() -> None:
    svg = placements.choices({"beam": ["attn", "jet"], "gates": ["swa", "attn"]}, "strategy")
    for text in ("beam", "gates", "strategy", "full attention", "windowed attention", "jet"):
        assert f">{text}<" in svg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `beam` with every layer alone, and a table whose placements differ."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "beam")
    (folder / "scores.json").unlink()
    table = [
        {"budget": b, "placement": with_linear(ATTENTION, "jet", set(range(LAYERS - b))), "predicted": 4.2 * 0.86**b}
        for b in range(LAYERS + 1)
    ]
    write_json(folder / "placement.json", read_json(folder / "placement.json") | {"table": table})
    write_jsonl(folder / "scored.jsonl", scored())
    return folder


def test_report_shows_what_was_scored(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<svg ") == page.count("<figure>") == 11
    assert 'aria-label="What each layer does alone, by objective"' in page
    assert 'aria-label="Mixers of the layers, by budget"' in page
    assert "loss added, nats a token" in page and "loss left, nats a token" in page


def test_report_does_not_show_the_single_swaps_twice(run: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "swap")
    write_jsonl(folder / "scored.jsonl", scored())
    page = write_report(folder).read_text(encoding="utf-8")
    assert "loss left, nats a token" in page and "loss added, nats a token" not in page
    write_jsonl(folder / "scored.jsonl", scored(left_out=0))
    assert 'aria-label="What each layer does alone' not in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_page_opens_on_a_phone(run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    browser = Browser(tmp_path)
    try:
        browser.open(page, 390, "dark")
        assert browser.run(OUTSIDE) == [] and browser.run(CONTRAST) >= 3
        for plot in browser.run(AXES):
            assert len(plot["axes"]) >= 2
            for axis in plot["axes"]:
                assert axis["name"] and (", " in axis["name"] or not axis["numbers"]), plot
    finally:
        browser.close()

"""The search as a stage: every strategy, candidates from random paths, windows; through a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas import recipe as recipes
from postnas.__main__ import parse
from postnas.errors import UserError
from postnas.files import read_json, read_jsonl
from postnas.models.load import load
from postnas.pipeline import run
from postnas.progress import Progress
from postnas.recipe import Place
from postnas.search import placement
from postnas.search.objectives import GROUPS, OBJECTIVES
from postnas.search.scores import Scored


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_base(folder / "base"), make_text(folder / "text.jsonl")


def placed(folder: Path, inputs: tuple[Path, Path], **changes: Any) -> Path:
    values: dict[str, Any] = {"stage2": {"tokens": 0}, "stages": ["align", "place"]}
    recipe = tiny_recipe(folder, *inputs, **values | changes)
    _, arguments = parse("run", [str(write_recipe(folder / "recipe.yaml", recipe))])
    return run(arguments["recipe"])


def test_a_recipe_names_the_objectives_that_there_are() -> None:
    assert (*OBJECTIVES, *GROUPS) == recipes.OBJECTIVES


@pytest.mark.parametrize("strategy", ["swap", "greedy", "beam", "gates", "uniform", "random"])
def test_every_strategy_places(strategy: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    found = read_json(placed(tmp_path, inputs, place={"strategy": strategy, "steps": 5}) / "placement.json")
    assert found["placement"].count("attn") == 2
    assert found["placement"].count("jet") == 2
    assert found["strategy"] == strategy
    assert set(found["scores"]) == {"kl", "copy", "score"}


def test_beam_is_not_worse_than_what_greedy_finds(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Four layers, two kept, width 8: beam sees all six placements, so it has the best."""
    best = {}
    for strategy in ("beam", "greedy", "gates"):
        folder = tmp_path / strategy
        folder.mkdir()
        best[strategy] = read_json(placed(folder, inputs, place={"strategy": strategy, "steps": 5}) / "placement.json")
    assert best["beam"]["scores"]["score"] <= best["greedy"]["scores"]["score"]
    assert best["beam"]["scores"]["score"] <= best["gates"]["scores"]["score"]
    scored = read_jsonl(tmp_path / "beam" / "run" / "scored.jsonl")
    assert len({tuple(record["placement"]) for record in scored if record["placement"].count("attn") == 2}) == 6


def test_paths_and_windows_reach_the_hybrid(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Candidates learn inside random paths, are placed, one linear layer becomes a window, all is distilled."""
    changes: dict[str, Any] = {
        "paths": {"tokens": 512, "length": 32, "batch": 4, "checkpoint_every": 2},
        "place": {"windows": 1, "window": 16},
        "stages": ["align", "place", "train"],
    }
    folder = placed(tmp_path, inputs, **changes)
    assert {"align", "paths", "train"} <= {record["stage"] for record in read_jsonl(folder / "metrics.jsonl")}
    assert len(list((folder / "candidates-paths" / "jet").glob("*.safetensors"))) == 4
    found = read_json(folder / "placement.json")
    assert sorted(found["placement"]) == ["attn", "attn", "jet", "swa"]
    [chosen] = found["windows"]["chosen"]
    assert found["placement"][chosen["layer"]] == "swa"
    hybrid, _ = load(folder / "model")
    assert hybrid.config.placement == found["placement"]
    assert hybrid.config.blocks["swa"]["window_size"] == 16
    assert read_json(folder / "stages.json")["align"]["tokens"] == 1024


def test_scores_of_aligned_candidates_are_not_those_of_paths(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    plain = read_json(placed(tmp_path, inputs) / "scores.json")
    other = tmp_path / "paths"
    other.mkdir()
    paths = {"tokens": 2048, "length": 32, "batch": 4, "lr": 1e-2, "checkpoint_every": 8}
    learnt = read_json(placed(other, inputs, paths=paths) / "scores.json")
    assert plain["base"] == learnt["base"]
    assert [row["score"] for row in plain["swap"]] != [row["score"] for row in learnt["swap"]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"place": {"strategy": "magic"}}, "place.strategy: 'magic'"),
    ({"place": {"objective": {"poetry": 1.0}}}, "place.objective: 'poetry'"),
    ({"place": {"windows": 3, "window": 16}}, "windows: 3"),
    ({"place": {"window": 1}}, "place.window: 1"),
    ({"paths": {"tokens": 512, "loss": "mse"}}, "paths.loss: 'mse'"),
    ({"paths": {"tokens": 512, "length": 32, "batch": 4, "budgets": [4]}}, "paths.budgets: 4"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        placed(tmp_path, inputs, **changes)
    assert "\n" not in str(raised.value)


class Planted(Scored):
    """Scores of ten layers that need no model."""

    def _measure(self, missing: list[Any], after: Callable[[int], None]) -> None:
        for names in missing:
            worth = sum((layer * 7) % 10 + 1 for layer, name in enumerate(names) if name == "jet")
            self.known[names] = {"kl": [worth + 0.5 * names.count("swa")]}
            after(1)


@pytest.mark.parametrize("budget", [2, 7])
@pytest.mark.parametrize("windows", [0, 2])
@pytest.mark.parametrize("strategy", ["swap", "greedy", "beam", "uniform"])
def test_the_bar_ends_at_its_total(
    strategy: str, windows: int, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`beam` scores a placement once that it reaches in several ways, so it may end before."""
    bars: list[Progress] = []

    def kept(*arguments: Any, **keywords: Any) -> Progress:
        bars.append(Progress(*arguments, **keywords))
        return bars[-1]

    monkeypatch.setattr(placement, "Progress", kept)
    settings = Place(strategy=strategy, budget=budget, windows=windows, objective={"kl": 1.0}, width=3)
    placement.place(Planted(["kl"], tmp_path / "scored.jsonl", "key"), ["attn"] * 10, settings, 0)
    [bar] = bars
    assert bar.done == bar.total or (strategy == "beam" and bar.total / 2 < bar.done < bar.total)

"""Strategies on scores that are known, and the scorer against a direct computation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.__main__ import main
from postnas.files import read_json, read_jsonl
from postnas.models.checkpoint import load_base
from postnas.models.load import load
from postnas.search.strategies import STRATEGIES, Placement

ATTENTION: Placement = ["attn"] * 8


def linear(placement: Placement) -> set[int]:
    return {layer for layer, block in enumerate(placement) if block != "attn"}


def additive(placements: list[Placement]) -> list[float]:
    """Layers hurt by themselves: 5 the most, then 2, then 7."""
    costs = [1.0, 2.0, 8.0, 3.0, 0.5, 9.0, 0.1, 7.0]
    return [sum(costs[layer] for layer in linear(placement)) for placement in placements]


def redundant(placements: list[Placement]) -> list[float]:
    """Layers 0 and 1 do the same: losing one costs nothing, losing both costs all. Others cost a little each."""
    return [10.0 * ({0, 1} <= gone) + 0.1 * len(gone - {0, 1}) for gone in map(linear, placements)]


@pytest.mark.parametrize("name", ["swap", "greedy"])
@pytest.mark.parametrize("budget", [0, 1, 3, 8])
def test_searches_keep_the_layers_that_matter(name: str, budget: int) -> None:
    found = STRATEGIES[name](additive, ATTENTION, "jet", budget, 0)
    kept = set(range(8)) - linear(found)
    assert kept == set([5, 2, 7, 3, 1, 0, 4, 6][:budget])


def test_greedy_sees_what_single_swaps_cannot() -> None:
    """Each of two redundant layers alone looks free; only greedy notices that one must stay."""
    assert redundant([STRATEGIES["swap"](redundant, ATTENTION, "jet", 1, 0)])[0] > 10
    assert redundant([STRATEGIES["greedy"](redundant, ATTENTION, "jet", 1, 0)])[0] < 1


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize("budget", range(9))
def test_every_strategy_keeps_its_budget(name: str, budget: int) -> None:
    found = STRATEGIES[name](additive, ATTENTION, "jet", budget, 3)
    assert (found.count("attn"), len(found)) == (budget, 8)


def test_uniform_spreads_and_random_follows_its_seed() -> None:
    assert linear(STRATEGIES["uniform"](additive, ATTENTION, "jet", 2, 0)) == {0, 1, 3, 4, 5, 7}
    drawn = [STRATEGIES["random"](additive, ATTENTION, "jet", 3, seed) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(placement) for placement in drawn}) > 2


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A recipe that was aligned and placed: its file, its run directory, its values."""
    folder = tmp_path_factory.mktemp("placed")
    base, text = make_base(folder / "base"), make_text(folder / "text.jsonl")
    values = tiny_recipe(folder, base, text)
    recipe = write_recipe(folder / "recipe.yaml", values)
    assert main(["align", str(recipe)]) == 0
    assert main(["place", str(recipe)]) == 0
    return recipe, folder / "run", values


@torch.no_grad()
def test_scores_are_what_a_direct_computation_gives(placed: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    """The scorer's KL of the placement against full logits of base and hybrid, built by themselves."""
    from postnas.data import Tokens
    from postnas.models.supernet import Supernet
    from postnas.recipe import Align
    from postnas.search.objectives import LENGTH
    from postnas.train.align import candidate_keys, load_candidates

    _, run, values = placed
    base = load_base(values["base"]["model"], dtype=torch.float32)
    align = Align(**values["align"])
    stored = read_json(run / "data" / "tokens.json")
    data = hashlib.sha256((run / "data" / "train.bin").read_bytes()).hexdigest()
    heldout = Tokens(run / "data" / "heldout.bin", stored["dtype"], stored["end"]).half(1)
    found = read_json(run / "placement.json")
    keys = candidate_keys(base, align, data, 0, torch.float32)
    candidates = load_candidates(base, align, run, keys)
    hybrid = Supernet(base, candidates).build(found["placement"], torch.float32)
    ids = heldout.sequences(512 // LENGTH, LENGTH)
    student = F.log_softmax(hybrid(ids, use_cache=False).logits, -1)
    teacher = F.log_softmax(base(ids, use_cache=False).logits, -1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert found["scores"]["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_another_budget_solves_from_the_scores_kept(placed: tuple[Path, Path, dict[str, Any]]) -> None:
    recipe, run, _ = placed
    before = read_jsonl(run / "scored.jsonl")
    assert main(["place", str(recipe), "--place.budget", "1"]) == 0
    after = read_jsonl(run / "scored.jsonl")
    assert read_json(run / "placement.json")["placement"].count("attn") == 1
    assert after[: len(before)] == before
    assert len(after) <= len(before) + 1  # the new placement itself; every single swap was known
    assert main(["place", str(recipe)]) == 0


def test_a_trained_run_is_not_placed_again(
    placed: tuple[Path, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run, _ = placed
    assert main(["train", str(recipe)]) == 0
    assert main(["place", str(recipe), "--place.budget", "1"]) == 2
    assert "place.budget was 2 and is 1" in capsys.readouterr().err
    assert load(run / "model")[0].config.placement.count("attn") == 2

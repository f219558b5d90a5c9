"""Beam and gates on planted scores whose optimum is known."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from postnas.errors import UserError
from postnas.search.gates import Gates, gates, project, rounded, solve
from postnas.search.strategies import STRATEGIES, Placement, beam, beam_blocks, beam_over, exchanges, with_linear

LAYERS = 10
ATTENTION: Placement = ["attn"] * LAYERS
BUDGETS = (1, 2, 3, 4, 5, 6, 8)
SEEDS = range(12)
BLOCKS = ["jet", "gated_deltanet"]


class Planted:
    """A score with a term for each layer that is linear and one for each pair of such layers, some of them negative."""

    def __init__(self, seed: int, layers: int = LAYERS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.own = torch.rand(layers, generator=generator, dtype=torch.float64) + 0.5
        self.pair = torch.randn(layers, layers, generator=generator, dtype=torch.float64).triu(1) * 0.3
        self.calls: list[list[Placement]] = []

    def soft(self, linear: Tensor) -> Tensor:
        """The multilinear extension, for the probabilities [layers] of being linear."""
        linear = linear.double()
        return self.own @ linear + linear @ self.pair @ linear

    def relaxed(self, probabilities: Tensor, step: int) -> Tensor:
        return self.soft(probabilities[:, 1])

    def one(self, placement: Placement) -> float:
        return float(self.soft(torch.tensor([float(name != "attn") for name in placement])))

    def __call__(self, placements: list[Placement]) -> list[float]:
        self.calls.append(placements)
        return [self.one(placement) for placement in placements]


@cache
def table(seed: int) -> dict[tuple[int, ...], float]:
    """The planted score of every placement, by its linear layers."""
    score = Planted(seed)
    found = {}
    for bits in product((0.0, 1.0), repeat=LAYERS):
        linear = tuple(layer for layer, bit in enumerate(bits) if bit)
        found[linear] = float(score.soft(torch.tensor(bits)))
    return found


def optimum(seed: int, budget: int) -> float:
    return min(value for linear, value in table(seed).items() if len(linear) == LAYERS - budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_beam_finds_the_best_of_all_placements(budget: int) -> None:
    for seed in SEEDS:
        score = Planted(seed)
        found = beam(score, ATTENTION, "jet", budget, 0)
        assert found.count("attn") == budget
        assert score.one(found) == pytest.approx(optimum(seed, budget), abs=1e-12), seed


def test_beam_finds_what_greedy_misses() -> None:
    """The planted scores are hard enough to tell the two apart, and a beam of one is greedy's like."""
    greedy, narrow = 0, 0
    for seed, budget in product(SEEDS, BUDGETS):
        score, best = Planted(seed), optimum(seed, budget) + 1e-9
        greedy += score.one(STRATEGIES["greedy"](score, ATTENTION, "jet", budget, 0)) > best
        narrow += score.one(beam(score, ATTENTION, "jet", budget, 0, width=1)) > best
    assert greedy >= 5 and narrow >= 5


def test_beam_begins_at_the_side_with_fewer_changes() -> None:
    for budget, levels in ((2, {0, 1, 2}), (8, {9, 8})):
        score = Planted(0)
        beam(score, ATTENTION, "jet", budget, 0)
        assert {placement.count("attn") for call in score.calls for placement in call} == levels


def test_what_can_be_scored_together_is_asked_for_together() -> None:
    """A level of the beam, a round of `greedy`, all single swaps, and a round of exchanges are one call each."""
    score = Planted(1)
    beam_over(score, with_linear(ATTENTION, "jet", set(range(LAYERS))), [["attn"]] * LAYERS, 3, 8)
    assert [len(level) for level in score.calls][:2] == [10, 44]  # 8 of 10 kept, their pairs counted once
    assert len(score.calls) == 3
    for name, calls in (("greedy", [10, 9, 8]), ("swap", [10]), ("uniform", []), ("random", [])):
        score = Planted(1)
        STRATEGIES[name](score, ATTENTION, "jet", 7, 0)
        assert [len(call) for call in score.calls] == calls
    score = Planted(1)
    solve(score, torch.tensor([[0.5, 0.5]] * LAYERS), ATTENTION, ["jet"], 3)
    assert len(score.calls) > 2 and {len(call) for call in score.calls[1:]} == {3 * 7}


def zeros(placements: list[Placement]) -> list[float]:
    return [0.0] * len(placements)


def test_ties_go_by_the_placement() -> None:
    assert beam(zeros, ATTENTION, "jet", 2, 0) == ["attn", "attn"] + ["jet"] * 8


def test_fixed_layers_stay_in_the_beam() -> None:
    """Layers without a choice keep what they start with; changes that cannot be made are refused."""
    choices: list[list[str]] = [[], ["attn"], [], ["attn"]]
    start = ["swa", "jet", "jet", "jet"]

    def second(placements: list[Placement]) -> list[float]:
        return [float(placement[1] == "attn") for placement in placements]

    assert beam_over(second, start, choices, 1, 4) == ["swa", "jet", "jet", "attn"]
    with pytest.raises(ValueError, match="3 changes"):
        beam_over(zeros, start, choices, 3, 4)


@pytest.mark.parametrize("budget", [0, 1, 2, 4, 5, 6])
def test_beam_chooses_among_several_blocks(budget: int) -> None:
    """Each layer has a best block of its own; the optimum is known by enumeration."""
    attention, pair = ["attn"] * 6, Planted(5, 6)
    cost = torch.rand(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def one(placement: Placement) -> float:
        own = sum(float(cost[i, BLOCKS.index(name)]) for i, name in enumerate(placement) if name != "attn")
        return own + pair.one(placement)

    every = [list(p) for p in product(["attn", *BLOCKS], repeat=6) if p.count("attn") == budget]
    found = beam_blocks(lambda placements: [one(p) for p in placements], attention, BLOCKS, budget)
    assert found.count("attn") == budget
    assert one(found) == pytest.approx(min(map(one, every)), abs=1e-12)


def test_exchanges_keep_the_budget() -> None:
    placement = ["attn", "jet", "swa", "jet"]  # the base has a windowed layer of its own
    found = exchanges(placement, ["attn", "attn", "swa", "attn"], ["jet"])
    swapped = [["jet", "attn", "swa", "jet"], ["jet", "jet", "swa", "attn"]]  # layer 0 gives up its attention
    swapped += [["attn", "attn", "jet", "jet"], ["attn", "jet", "jet", "attn"]]  # layer 2 does
    assert found == swapped


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("columns", [2, 3])
def test_projection_holds_the_budget(columns: int, temperature: float) -> None:
    logits = 3 * torch.randn(LAYERS, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for budget in range(LAYERS + 1):
        found = project(logits, budget, temperature)
        assert float(found[:, 0].sum()) == pytest.approx(budget, abs=1e-9)
        assert torch.allclose(found.sum(1), torch.ones(LAYERS, dtype=torch.float64))
        assert bool((found >= 0).all())


def test_projection_has_the_gradient_of_its_equation() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for budget in (0, 2, 5):
        assert torch.autograd.gradcheck(lambda x, budget=budget: project(x, budget, 0.7), logits, atol=1e-7)


@pytest.mark.parametrize("budget", [1, 2, 4, 8])
def test_gates_come_within_two_percent_of_the_optimum(budget: int) -> None:
    for seed in range(5):
        score, best = Planted(seed), optimum(seed, budget)
        made = gates(score.relaxed, ATTENTION, ["jet"], budget, seed, steps=100, lr=0.1)
        found = solve(score, made.probabilities().detach(), ATTENTION, ["jet"], budget)
        assert found.count("attn") == budget
        assert score.one(found) <= best + 0.02 * abs(best), seed


def test_gates_themselves_find_good_placements() -> None:
    """Without the exchanges, so that these cannot hide gates that learn nothing."""
    gaps, drawn = [], []
    for seed in range(5):
        score = Planted(seed)
        made = gates(score.relaxed, ATTENTION, ["jet"], 4, seed, steps=100, lr=0.1)
        values = sorted(value for linear, value in table(seed).items() if len(linear) == LAYERS - 4)
        gaps.append(score.one(rounded(made.probabilities().detach(), ATTENTION, ["jet"], 4)) - values[0])
        drawn.append(sum(values) / len(values) - values[0])
    assert sum(gaps) < 0.2 * sum(drawn)


def test_gates_choose_among_several_blocks() -> None:
    cost = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    cost[:, 0] = 0

    def score(placements: list[Placement]) -> list[float]:
        return [sum(float(cost[i, ["attn", *BLOCKS].index(name)]) for i, name in enumerate(p)) for p in placements]

    made = gates(lambda p, step: (p * cost).sum(), ["attn"] * 6, BLOCKS, 2, 0, steps=100, lr=0.1)
    found = rounded(made.probabilities().detach(), ["attn"] * 6, BLOCKS, 2)
    cheapest = cost[:, 1:].min(dim=1).values
    assert score([found]) == pytest.approx([float(cheapest.sort().values[:4].sum())])
    assert solve(score, made.probabilities().detach(), ["attn"] * 6, BLOCKS, 2) == found


def test_temperature_falls_to_certainty_and_the_budget_holds_throughout() -> None:
    sums, sharp = [], []

    def watch(made: Gates, loss: float) -> None:
        found = made.probabilities().detach()
        sums.append(float(found[:, 0].sum()))
        sharp.append(float((found * found).sum(1).mean()))

    gates(Planted(0).relaxed, ATTENTION, ["jet"], 3, 0, steps=60, lr=0.1, after=watch)
    assert sums == pytest.approx([3.0] * 60, abs=1e-5)
    assert sharp[0] < 0.7 and sharp[-1] > 0.95


def test_stopped_gates_go_on_to_the_same_bits(tmp_path: Path) -> None:
    score = Planted(2)

    def noisy(probabilities: Tensor, step: int) -> Tensor:
        noise = torch.randn(LAYERS, generator=torch.Generator().manual_seed(step))
        return score.relaxed(probabilities, step) + (noise * probabilities[:, 0]).sum()

    settings: dict[str, Any] = {"steps": 40, "lr": 0.1}
    whole = gates(noisy, ATTENTION, ["jet"], 3, 1, **settings)
    stopped = Gates(LAYERS, ["jet"], 3, 1, **settings)
    for _ in range(13):
        stopped.advance(noisy)
    state = stopped.state_dict()
    save_file({name: state.pop(name) for name in ("logits", "exp_avg", "exp_avg_sq")}, tmp_path / "gates.safetensors")
    assert state == {"step": 13}
    state |= load_file(tmp_path / "gates.safetensors")
    resumed = gates(noisy, ATTENTION, ["jet"], 3, 1, state=state, **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(torch.as_tensor(resumed.state_dict()[name]), torch.as_tensor(value)), name
    other = gates(noisy, ATTENTION, ["jet"], 3, 2, **settings)
    assert not torch.equal(other.logits, whole.logits)
    with pytest.raises(ValueError, match="do not fit"):
        gates(noisy, ATTENTION, ["jet", "gated_deltanet"], 3, 1, state=state, **settings)


def test_a_loss_that_is_not_finite_is_a_mistake_in_one_line() -> None:
    with pytest.raises(UserError, match="step 0; lower"):
        gates(lambda p, step: p.sum() * float("nan"), ATTENTION, ["jet"], 3, 0, steps=2, lr=0.1)

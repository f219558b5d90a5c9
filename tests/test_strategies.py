"""Beam and gates on planted scores whose optimum is known; the relaxed model; the scorer's shared layers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import make_base
from torch import Tensor

from postnas.blocks import make_block
from postnas.errors import UserError
from postnas.models.checkpoint import load_base
from postnas.models.supernet import Supernet
from postnas.search.gates import Gates, SoftNet, gates, minibatches, project, rounded, solve
from postnas.search.objectives import Objective, measure
from postnas.search.scores import Scorer
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
        self.calls: list[Placement] = []

    def soft(self, linear: Tensor) -> Tensor:
        """The multilinear extension, for the probabilities [layers] of being linear."""
        linear = linear.double()
        return self.own @ linear + linear @ self.pair @ linear

    def relaxed(self, probabilities: Tensor, step: int) -> Tensor:
        return self.soft(probabilities[:, 1])

    def __call__(self, placement: Placement) -> float:
        self.calls.append(placement)
        return float(self.soft(torch.tensor([float(name != "attn") for name in placement])))


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
        assert score(found) == pytest.approx(optimum(seed, budget), abs=1e-12), seed


def test_beam_finds_what_greedy_misses() -> None:
    """The planted scores are hard enough to tell the two apart, and a beam of one is greedy's like."""
    greedy, narrow = 0, 0
    for seed, budget in product(SEEDS, BUDGETS):
        score, best = Planted(seed), optimum(seed, budget) + 1e-9
        greedy += score(STRATEGIES["greedy"](score, ATTENTION, "jet", budget, 0)) > best
        narrow += score(beam(score, ATTENTION, "jet", budget, 0, width=1)) > best
    assert greedy >= 5 and narrow >= 5


def test_beam_begins_at_the_side_with_fewer_changes() -> None:
    for budget, levels in ((2, {0, 1, 2}), (8, {9, 8})):
        score = Planted(0)
        beam(score, ATTENTION, "jet", budget, 0)
        assert {placement.count("attn") for placement in score.calls} == levels


def test_beam_scores_placements_that_share_early_layers_one_after_the_other() -> None:
    score = Planted(1)
    beam_over(score, with_linear(ATTENTION, "jet", set(range(LAYERS))), [["attn"]] * LAYERS, 3, 8)
    levels: dict[int, list[Placement]] = {}
    for placement in score.calls:
        levels.setdefault(placement.count("attn"), []).append(placement)
    assert [len(level) for level in levels.values()][:2] == [10, 44]  # 8 of 10 kept, their pairs counted once
    for level in levels.values():
        assert level == sorted(level)


def test_ties_go_by_the_placement() -> None:
    assert beam(lambda placement: 0.0, ATTENTION, "jet", 2, 0) == ["attn", "attn"] + ["jet"] * 8


def test_fixed_layers_stay_in_the_beam() -> None:
    """Layers without a choice keep what they start with; changes that cannot be made are refused."""
    choices: list[list[str]] = [[], ["attn"], [], ["attn"]]
    start = ["swa", "jet", "jet", "jet"]
    assert beam_over(lambda p: float(p[1] == "attn"), start, choices, 1, 4) == ["swa", "jet", "jet", "attn"]
    with pytest.raises(ValueError, match="3 changes"):
        beam_over(lambda p: 0.0, start, choices, 3, 4)


@pytest.mark.parametrize("budget", [0, 1, 2, 4, 5, 6])
def test_beam_chooses_among_several_blocks(budget: int) -> None:
    """Each layer has a best block of its own; the optimum is known by enumeration."""
    attention, pair = ["attn"] * 6, Planted(5, 6)
    cost = torch.rand(6, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def score(placement: Placement) -> float:
        own = sum(float(cost[i, BLOCKS.index(name)]) for i, name in enumerate(placement) if name != "attn")
        return own + pair(placement)

    every = [list(p) for p in product(["attn", *BLOCKS], repeat=6) if p.count("attn") == budget]
    found = beam_blocks(score, attention, BLOCKS, budget)
    assert found.count("attn") == budget
    assert score(found) == pytest.approx(min(map(score, every)), abs=1e-12)


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
        assert score(found) <= best + 0.02 * abs(best), seed


def test_gates_themselves_find_good_placements() -> None:
    """Without the exchanges, so that these cannot hide gates that learn nothing."""
    gaps, drawn = [], []
    for seed in range(5):
        score = Planted(seed)
        made = gates(score.relaxed, ATTENTION, ["jet"], 4, seed, steps=100, lr=0.1)
        values = sorted(value for linear, value in table(seed).items() if len(linear) == LAYERS - 4)
        gaps.append(score(rounded(made.probabilities().detach(), ATTENTION, ["jet"], 4)) - values[0])
        drawn.append(sum(values) / len(values) - values[0])
    assert sum(gaps) < 0.2 * sum(drawn)


def test_gates_choose_among_several_blocks() -> None:
    cost = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    cost[:, 0] = 0

    def score(placement: Placement) -> float:
        return sum(float(cost[i, ["attn", *BLOCKS].index(name)]) for i, name in enumerate(placement))

    made = gates(lambda p, step: (p * cost).sum(), ["attn"] * 6, BLOCKS, 2, 0, steps=100, lr=0.1)
    found = rounded(made.probabilities().detach(), ["attn"] * 6, BLOCKS, 2)
    cheapest = cost[:, 1:].min(dim=1).values
    assert score(found) == pytest.approx(float(cheapest.sort().values[:4].sum()))
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


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    """A tiny base with random candidates of two blocks in each of its five layers."""
    base = load_base(str(make_base(tmp_path_factory.mktemp("base"), layers=5)), dtype=torch.float32)
    torch.manual_seed(3)
    candidates: dict[str, dict[int, Any]] = {
        block: {layer: make_block(block, base.config.dims(), None) for layer in range(5)} for block in BLOCKS
    }
    return Supernet(base, candidates)


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


SEQUENCES = {"kl": some_tokens(3, 64), "copy": some_tokens(1, 224).repeat(1, 2)}


def objective(name: str) -> Objective:
    tokens = SEQUENCES[name]
    scored = torch.arange(tokens.shape[1]).expand_as(tokens) > (0 if name == "kl" else 320)
    ids = tuple(map(str, range(len(tokens))))
    return Objective(name, "kl" if name == "kl" else "nll", tokens, scored, None, ids, ())


ALL = {name: objective(name) for name in SEQUENCES}
KL = {"kl": ALL["kl"]}


def spelled(word: str) -> Placement:
    return [{"a": "attn", "j": "jet", "g": "gated_deltanet"}[letter] for letter in word]


PLACED = [
    spelled(word) for word in ("jjjjj", "ajjjj", "aaaaj", "jjjja", "jjjaa", "aaaaa", "gjjja", "gjjjj", "ajaja", "gggag")
]


@torch.no_grad()
def direct(net: Supernet, name: str, placement: Placement) -> float:
    """The scorer's value with every layer run from the embeddings on."""
    tokens = SEQUENCES[name]
    h, step = net.embed(tokens)
    hidden = net.norm(net.run(h, step, placement))
    teacher = net.norm(net.run(h, step, net.attention))
    return statistics.fmean(measure(hidden, ALL[name], net.head, net.softcap, teacher).tolist())


def test_scores_have_the_same_bits_in_any_order(supernet: Supernet, tmp_path: Path) -> None:
    wanted = {tuple(p): {name: direct(supernet, name, p) for name in sorted(SEQUENCES)} for p in PLACED}
    assert len({values["kl"] for values in wanted.values()}) == len(wanted)
    for seed in range(4):
        order = random.Random(seed).sample(PLACED, len(PLACED))
        scorer = Scorer(supernet, ALL, tmp_path / f"{seed}.jsonl", torch.float32, "key")
        assert all(scorer(placement) == wanted[tuple(placement)] for placement in order)


@pytest.fixture
def ran(supernet: Supernet) -> Any:
    """A list that grows by one with each layer of the supernet that runs."""
    found: list[int] = []
    handles = [layer.register_forward_hook(lambda *_: found.append(1)) for layer in supernet.base.model.layers]
    yield found
    for handle in handles:
        handle.remove()


def test_layers_that_two_placements_share_run_once(supernet: Supernet, tmp_path: Path, ran: list[int]) -> None:
    scorer = Scorer(supernet, KL, tmp_path / "scored.jsonl", torch.float32, "key")
    counts = []
    for word in ("aaaaa", "aajjj", "aajja", "ajjjj", "ajjja", "aaaaj", "ajjja", "jjjjj", "jjjgj", "aaaaa", "aaajj"):
        before = len(ran)
        scorer(spelled(word))
        counts.append(len(ran) - before)
    # the base once; then what is new against the base or the placement before; known ones not at all
    assert counts == [5, 3, 1, 4, 1, 1, 0, 5, 2, 0, 2]
    assert len(scorer.trunk["kl", 0]) == len(scorer.last["kl", 0][1]) == 6


def test_a_score_that_was_cut_off_harms_no_later_one(
    supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(supernet, KL, tmp_path / "scored.jsonl", torch.float32, "key")
    scorer(["jet"] * 5)
    run = Supernet.run

    def fails(self: Supernet, h: Tensor, step: Any, placement: Placement, start: int = 0, stop: Any = None) -> Tensor:
        if start == 3:
            raise KeyboardInterrupt
        return run(self, h, step, placement, start, stop)

    cut = spelled("jajjj")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Supernet, "run", fails)
        scorer(cut)
    for placement in (cut, spelled("jajaj")):
        assert scorer(placement)["kl"] == direct(supernet, "kl", placement)


def one_hot(placement: Placement) -> Tensor:
    names = ["attn", *BLOCKS]
    return F.one_hot(torch.tensor([names.index(name) for name in placement]), len(names)).float()


def whole(tokens: Tensor, scored: Tensor | None = None) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    return lambda step: (tokens, scored)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_soft_net_at_a_placement_is_that_placement(supernet: Supernet, tmp_path: Path, compute: torch.dtype) -> None:
    net = SoftNet(supernet, BLOCKS, whole(SEQUENCES["kl"]), "kl", compute)
    scorer = Scorer(supernet, KL, tmp_path / "scored.jsonl", compute, "key")
    for placement in PLACED:
        assert float(net(one_hot(placement), 0)) == pytest.approx(scorer(placement)["kl"], rel=1e-5)


def plain_loss(net: Supernet, probabilities: Tensor, tokens: Tensor, scored: Tensor, objective: str) -> Tensor:
    """The relaxed loss with full logits and nothing run twice."""
    h, step = net.embed(tokens)
    teacher = net.norm(net.run(h, step, net.attention)).detach() @ net.head.T
    for index, layer in enumerate(net.base.model.layers):
        x = layer.input_layernorm(h)
        y = [net.mixer(index, name)(x, step)[0] for name in (net.attention[index], *BLOCKS)]
        h = layer.finish(h, torch.einsum("m,mbtd->btd", probabilities[index], torch.stack(y)))
    log_s = F.log_softmax(net.norm(h) @ net.head.T, -1)[:, :-1]
    log_t = F.log_softmax(teacher, -1)[:, :-1]
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    nll = -log_s.gather(-1, tokens[:, 1:, None])[..., 0]
    return (kl if objective == "kl" else nll)[scored[:, 1:]].mean()


@pytest.mark.parametrize("objective", ["kl", "nll"])
def test_soft_net_has_the_value_and_gradient_of_the_plain_formula(supernet: Supernet, objective: Any) -> None:
    tokens = some_tokens(3, 70, seed=1)
    scored = torch.rand(3, 70, generator=torch.Generator().manual_seed(2)) < 0.4
    scored[:, 0] = False
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
    parameters = [p for block in BLOCKS for mixer in supernet.candidates[block].values() for p in mixer.parameters()]
    before = [p.requires_grad for p in parameters]
    assert any(before)
    net = SoftNet(supernet, BLOCKS, whole(tokens, scored), objective, torch.float32)
    loss = net(project(logits, 2, 1.0), 0)
    (found,) = torch.autograd.grad(loss, logits)
    wanted_loss = plain_loss(supernet, project(logits, 2, 1.0), tokens, scored, objective)
    (wanted,) = torch.autograd.grad(wanted_loss, logits)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert [p.requires_grad for p in parameters] == before
    assert all(p.grad is None for p in parameters)


def test_soft_net_runs_no_mixer_that_has_no_weight(supernet: Supernet) -> None:
    asked: list[int] = []
    handles = [
        mixer.register_forward_hook(lambda *_, layer=layer: asked.append(layer))
        for layer, mixer in supernet.candidates["jet"].items()
    ]
    net = SoftNet(supernet, BLOCKS, whole(some_tokens(1, 8)), "kl", torch.float32)
    net(one_hot(spelled("ajgaj")), 0)
    for handle in handles:
        handle.remove()
    assert asked == [1, 4]


def test_gates_on_a_model_keep_the_layers_that_matter(supernet: Supernet, tmp_path: Path) -> None:
    """From minibatches, against the scores of all placements."""
    tokens = SEQUENCES["kl"]
    scorer = Scorer(supernet, KL, tmp_path / "scored.jsonl", torch.float32, "key")
    relaxed = SoftNet(supernet, ["jet"], minibatches(tokens, None, 2, seed=0), "kl", torch.float32)
    made = gates(relaxed, supernet.attention, ["jet"], 2, 0, steps=12, lr=0.3)
    found = solve(lambda p: scorer(p)["kl"], made.probabilities().detach(), supernet.attention, ["jet"], 2)
    every = [with_linear(supernet.attention, "jet", set(linear)) for linear in combinations(range(5), 3)]
    assert scorer(found)["kl"] == min(scorer(placement)["kl"] for placement in every)


def test_minibatches_follow_from_seed_and_step() -> None:
    tokens, scored = some_tokens(7, 5), torch.rand(7, 5) < 0.5
    batches, again = minibatches(tokens, scored, 3, seed=1), minibatches(tokens, scored, 3, seed=1)
    assert torch.equal(batches(4)[0], again(4)[0])
    assert not torch.equal(batches(4)[0], batches(5)[0])
    rows, kept = batches(2)
    assert kept is not None
    where = (tokens[None] == rows[:, None]).all(-1).nonzero()[:, 1]
    assert len(where) == 3 and torch.equal(scored[where], kept)
    assert torch.equal(minibatches(tokens, scored, 7, seed=1)(0)[0], tokens)

"""The scorer's shared layers and the relaxed model, on a tiny supernet."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_base
from torch import Tensor

from postnas.blocks import make_block
from postnas.errors import UserError
from postnas.files import read_jsonl
from postnas.models.checkpoint import load_base
from postnas.models.supernet import Supernet
from postnas.search.gates import SoftNet, gates, minibatches, project, solve
from postnas.search.objectives import Objective, measure
from postnas.search.scores import Scored, Scorer
from postnas.search.strategies import Placement, with_linear

BLOCKS = ["jet", "gated_deltanet"]


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


def test_what_is_asked_together_is_scored_in_the_order_that_shares_most(
    supernet: Supernet, tmp_path: Path, ran: list[int]
) -> None:
    """The base, then jjajj, jjjaj and jjjja: each runs only from where it parts from the one before."""
    scorer = Scorer(supernet, KL, tmp_path / "scored.jsonl", torch.float32, "key")
    asked, told = [spelled(word) for word in ("jjjja", "jjajj", "jjjaj", "jjjja")], []
    found = scorer.several(asked, told.append)
    assert len(ran) == 5 + 5 + 3 + 2
    assert told == [1, 1, 1, 1]  # asked twice, then as they are scored
    assert [values["kl"] for values in found] == [direct(supernet, "kl", placement) for placement in asked]


def test_a_search_by_other_objectives_measures_only_what_is_not_known(supernet: Supernet, tmp_path: Path) -> None:
    path, asked = tmp_path / "scored.jsonl", spelled("jajja")
    first = Scorer(supernet, KL, path, torch.float32, "key").rows(asked)
    both = Scorer(supernet, ALL, path, torch.float32, "key")
    assert both.lacking(tuple(asked)) == ["copy"]
    assert both.rows(asked)["kl"] == first["kl"]
    assert [set(record["rows"]) for record in read_jsonl(path)] == [{"kl"}, {"copy"}]
    known = Scored(["copy"], path, "key")
    assert known(asked) == {"copy": direct(supernet, "copy", asked)}
    for other in (Scored(["needle"], path, "key"), Scored(["kl"], path, "another key")):
        with pytest.raises(UserError, match=r"^solve: 2 placements are not scored yet on (needle|kl); leave --solve"):
            other.several([asked, spelled("jjjjj"), asked])


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

    def score(placements: list[Placement]) -> list[float]:
        return [values["kl"] for values in scorer.several(placements)]

    found = solve(score, made.probabilities().detach(), supernet.attention, ["jet"], 2)
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

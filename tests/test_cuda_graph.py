"""Functions as CUDA graphs: on a CPU they are run as they are; on a GPU replays give what the function gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny import make_base
from torch import Tensor, nn

from postnas.blocks import make_block
from postnas.blocks.inherit import inherit
from postnas.data import Tokens
from postnas.models.checkpoint import load_base
from postnas.models.supernet import MixedLayer, Supernet
from postnas.ops import fla
from postnas.ops.cuda_graph import Differentiable, Replayed, _difference
from postnas.recipe import Train
from postnas.search.gates import SoftNet, minibatches
from postnas.search.objectives import Objective
from postnas.search.scores import Scorer
from postnas.train.distill import train_mixers
from postnas.train.loop import autocast

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_each_call_runs_the_function() -> None:
    calls: list[Tensor] = []

    def work(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    replayed = Replayed(work, warm_up=0)
    assert [replayed(torch.tensor([float(n)])).item() for n in range(4)] == [1, 2, 3, 4]
    assert len(calls) == 4


def training(weight: nn.Parameter) -> Replayed:
    def work(x: Tensor) -> Tensor:
        loss = (x @ weight).square().mean()
        loss.backward()
        return loss.detach()

    return Replayed(work, [weight])


@pytest.mark.gpu
@GPU
def test_losses_and_gradients_of_replays() -> None:
    torch.manual_seed(0)
    start, batches = torch.randn(8, 8, device="cuda"), torch.randn(9, 4, 8, device="cuda")

    def trained(replays: bool) -> tuple[list[float], Tensor]:
        weight = nn.Parameter(start.clone())
        replayed = training(weight)
        optimizer, losses = torch.optim.AdamW([weight], lr=0.1), []
        for batch in batches:
            losses.append((replayed if replays else replayed.function)(batch).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert (replayed.graph is not None) == replays
        return losses, weight.detach()

    losses, weight = trained(True)
    expected, wanted = trained(False)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weight, wanted)


@pytest.mark.gpu
@GPU
def test_what_cannot_be_captured_is_run_as_it_is() -> None:
    def work(x: Tensor) -> Tensor:
        return x * x.sum().item()

    replayed = Replayed(work, warm_up=1)
    x = torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="CUDA graph: not used"):
        for n in range(1, 5):
            assert replayed(x * n).tolist() == [3.0 * n * n] * 3
    assert replayed.graph is None


@pytest.mark.gpu
@GPU
def test_what_a_graph_gets_wrong_is_run_as_it_is() -> None:
    memory = {"x": torch.ones(3, device="cuda")}

    def work(x: Tensor) -> Tensor:
        memory["x"] = memory["x"] + 1  # another tensor each time, which no replay sees
        return x * memory["x"]

    replayed = Replayed(work, warm_up=1)
    with pytest.warns(UserWarning, match="differ"):
        found = [replayed(torch.ones(3, device="cuda"))[0].item() for _ in range(5)]
    assert found[:2] == [2.0, 3.0] and found[2:] != [3.0, 3.0, 3.0]


@pytest.fixture
def plain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fla, whose trial of a shape takes longer than all these tests."""
    monkeypatch.setattr(fla, "usable", lambda *arguments: False)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replayed, "__call__", lambda self, *inputs: self.function(*inputs))
    monkeypatch.setattr(Differentiable, "__call__", lambda self, *inputs: self.module(*inputs))


def supernet(folder: Path, device: str) -> Supernet:
    base = load_base(str(make_base(folder / "base")), dtype=torch.bfloat16).to(device)
    mixers = {}
    for layer in range(4):
        torch.manual_seed(layer)
        mixers[layer] = make_block("jet", base.config.dims()).to(device)
        inherit(mixers[layer], base.model.layers[layer].self_attn)
    return Supernet(base, {"jet": mixers})


@pytest.mark.gpu
@GPU
def test_scores_of_layers_as_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_rule: None) -> None:
    tokens = torch.randint(2, 300, (6, 64), generator=torch.Generator().manual_seed(1))
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    rows = {"kl": Objective("kl", "kl", tokens, scored, None, tuple("abcdef"), ("made",))}
    net = supernet(tmp_path, "cuda")
    placements = [["jet" if n & 1 << layer else "attn" for layer in range(4)] for n in [*range(16), *range(16)]]
    fast = Scorer(net, rows, tmp_path / "fast.jsonl", torch.bfloat16, "k")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CUDA graph.*")
        found = [fast(placement)["kl"] for placement in placements]
    assert any(layer.graph is not None for layer in fast.layers.values())
    eager(monkeypatch)
    slow = Scorer(net, rows, tmp_path / "slow.jsonl", torch.bfloat16, "k")
    assert found == pytest.approx([slow(placement)["kl"] for placement in placements], rel=2e-2, abs=2e-4)


@pytest.mark.gpu
@GPU
def test_distillation_as_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_rule: None) -> None:
    ids = torch.randint(2, 300, (4096,), generator=torch.Generator().manual_seed(2)).numpy().astype("uint16")
    ids.tofile(tmp_path / "train.bin")
    tokens = Tokens(tmp_path / "train.bin", "uint16", 0)
    settings = Train(tokens=8 * 4 * 32, length=32, batch=4, lr=1e-3)
    placement = ["attn", "jet", "jet", "attn"]

    def trained(name: str) -> Tensor:
        net = supernet(tmp_path, "cuda")
        train_mixers(net, placement, settings, tokens, tmp_path / name, 0, torch.bfloat16, "k")
        return torch.cat([p.detach().flatten() for layer in (1, 2) for p in net.mixer(layer, "jet").parameters()])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CUDA graph.*")
        found = trained("graph")
    eager(monkeypatch)
    expected = trained("plain")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x * self.weight).square() * scale


def test_a_module_with_gradients_on_a_cpu() -> None:
    module, scale = Squares(), torch.tensor(2.0, requires_grad=True)
    x = torch.ones(3, 4, requires_grad=True)
    Differentiable(module)(x, scale).sum().backward()
    assert scale.grad is not None and scale.grad.item() == 3 * 14
    assert x.grad is not None and x.grad[0].tolist() == [0, 4, 16, 36]
    assert module.weight.grad is not None and module.weight.grad.tolist() == [0, 12, 24, 36]


@pytest.mark.gpu
@GPU
def test_a_module_with_gradients_as_graphs() -> None:
    torch.manual_seed(0)
    module = Squares().cuda()
    graphs = Differentiable(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CUDA graph.*")
        for wants in (True, False, True):
            x, scale = torch.randn(3, 4, device="cuda", requires_grad=wants), torch.rand((), device="cuda")
            scale.requires_grad_()
            found = graphs(x, scale)
            expected = module(x, scale)
            torch.testing.assert_close(found, expected)
            learnt = [value for value in (x, scale, module.weight) if value.requires_grad]
            along = torch.randn_like(expected)
            got = torch.autograd.grad(found, learnt, along)
            for one, other in zip(got, torch.autograd.grad(expected, learnt, along), strict=True):
                torch.testing.assert_close(one, other)
    assert len(graphs.made) == 2


@pytest.mark.gpu
@GPU
def test_gates_as_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_rule: None) -> None:
    tokens = torch.randint(2, 300, (6, 64), generator=torch.Generator().manual_seed(1))
    net = supernet(tmp_path, "cuda")
    soft = SoftNet(net, ["jet"], minibatches(tokens, None, 4, 0), "kl", torch.bfloat16)
    given = torch.rand(4, 2, generator=torch.Generator().manual_seed(3)).softmax(-1)

    def gradient(step: int) -> tuple[float, Tensor]:
        leaf = given.clone().requires_grad_()
        loss = soft(leaf, step)
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CUDA graph.*")
        found = [gradient(step) for step in range(3)]
    eager(monkeypatch)
    for (loss, slope), step in zip(found, range(3), strict=True):
        expected, wanted = gradient(step)
        assert loss == pytest.approx(expected, rel=2e-2)
        assert float((slope - wanted).norm() / wanted.norm()) < 5e-2


def test_a_mixed_layer_is_the_sum_of_its_mixers(tmp_path: Path) -> None:
    net = supernet(tmp_path, "cpu")
    with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
        h, step = net.embed(torch.randint(2, 300, (2, 16)))
        decoder = net.base.model.layers[1]
        mixers = [net.mixer(1, "attn"), net.mixer(1, "jet")]
        alone = [MixedLayer(decoder, [mixer], step)(h) for mixer in mixers]
        torch.testing.assert_close(alone[0], net.run(h, step, net.attention, 1, 2))
        both = MixedLayer(decoder, mixers, step)
        torch.testing.assert_close(both(h, torch.tensor([0.0, 1.0])), alone[1], rtol=2e-2, atol=2e-2)
        x = decoder.input_layernorm(h)
        halves = 0.5 * mixers[0](x, step)[0] + 0.5 * mixers[1](x, step)[0]
        torch.testing.assert_close(both(h, torch.tensor([0.5, 0.5])), decoder.finish(h, halves), rtol=2e-2, atol=2e-2)


def test_what_the_comparison_of_a_graph_sees() -> None:
    output, gradients = (
        torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)),
        [torch.ones(1000), torch.ones(2)],
    )
    output[0, 0] *= 1e4  # one token that is larger than all others together
    assert _difference(output, output, gradients, gradients) is None
    assert _difference(output, output, [], []) is None
    other = output.clone()
    other[:, 4:] *= 1.1
    assert _difference(other, output, gradients, gradients) is not None
    for wrong in (torch.full((2,), float("nan")), torch.tensor([1.0, 1.1])):
        assert _difference(output, output, [gradients[0], wrong], gradients) is not None
    assert _difference(output, output, [gradients[0], None], gradients) is not None
    assert _difference(output, output, gradients, [gradients[0], None]) is not None
    tiny = torch.full((2,), 1e-6)  # rounding, beside the others
    assert _difference(output, output, [gradients[0], tiny], [gradients[0], 2 * tiny]) is None
    assert _difference(torch.tensor(float("nan")), torch.tensor(1.0), [], []) is not None

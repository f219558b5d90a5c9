"""Candidates trained inside random paths: the draws, the losses, what is trained and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import make_base
from torch import Tensor

from postnas.data import Tokens
from postnas.errors import UserError
from postnas.files import read_json, read_jsonl
from postnas.models.checkpoint import load_base
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.recipe import Align, Paths
from postnas.train import loop
from postnas.train.align import candidate_keys, fingerprint, new_candidates
from postnas.train.paths import draw_path, load_paths, path_keys, path_loss, train_paths

ALIGN = Align(blocks=["jet", "gated_deltanet"])
SHORT = Paths(tokens=12 * 4 * 32, length=32, batch=4, lr=3e-3, checkpoint_every=2)
"""Twelve steps."""
ATTENTION: Placement = ["attn"] * 6
IDS = torch.randint(0, 300, (3, 48), generator=torch.Generator().manual_seed(1))


def read_base(inputs: Path) -> tuple[HybridForCausalLM, Tokens]:
    return load_base(str(inputs / "base"), dtype=torch.float32), Tokens(inputs / "train.bin", "uint16", 0)


def train(inputs: Path, run: Path, settings: Paths = SHORT) -> tuple[Supernet, Supernet]:
    """The supernet as it starts from the base in `inputs`, and with what was trained in paths in `run`."""
    base, tokens = read_base(inputs)
    supernet = Supernet(base, new_candidates(base, ALIGN, tokens, 0, torch.float32))
    keys = candidate_keys(base, ALIGN, "a hash of the text", 0, torch.float32)
    train_paths(supernet, settings, tokens, run, 0, torch.float32, keys)
    return supernet, load_paths(supernet, run, path_keys(keys, settings, 0, torch.float32))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_base(folder / "base")
    np.random.default_rng(0).integers(2, 300, 6000).astype("uint16").tofile(folder / "train.bin")
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Supernet, Supernet]:
    """One run to its end: its folder, the supernet before, and after."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("unbroken")
    return run, *train(inputs, run)


def test_a_path_follows_from_seed_and_step_alone() -> None:
    def paths(seed: int) -> list[Placement]:
        return [draw_path(ATTENTION, ["jet", "gla"], range(6), seed, step) for step in range(50)]

    torch.manual_seed(1)
    first = paths(3)
    torch.manual_seed(2)
    assert paths(3) == first
    assert paths(4) != first
    assert len({tuple(path) for path in first}) > 30


def test_budgets_layers_and_blocks_are_drawn_evenly() -> None:
    """Within five standard deviations; a budget that is not asked for never comes."""
    draws, budgets = 6000, [0, 1, 4]
    paths = [draw_path(ATTENTION, ["jet", "gla"], budgets, 0, step) for step in range(draws)]

    def even(found: int, trials: int, share: float) -> bool:
        return abs(found - trials * share) < 5 * (trials * share * (1 - share)) ** 0.5

    counts = Counter(path.count("attn") for path in paths)
    assert set(counts) == set(budgets)
    assert all(even(count, draws, 1 / 3) for count in counts.values())
    alone = [path.index("attn") for path in paths if path.count("attn") == 1]
    assert all(even(alone.count(layer), len(alone), 1 / 6) for layer in range(6))
    blocks = Counter(name for path in paths for name in path if name != "attn")
    assert set(blocks) == {"jet", "gla"}
    assert even(blocks["jet"], blocks.total(), 1 / 2)


@pytest.mark.parametrize("kind", ["feature", "kl"])
def test_the_loss_is_what_the_hybrid_by_itself_gives(unbroken: tuple[Path, Supernet, Supernet], kind: str) -> None:
    """Against hidden states and logits of base and hybrid as whole models; before and after the norm of the last."""
    _, net, _ = unbroken
    path: Placement = ["attn", "jet", "gated_deltanet", "attn"]
    with torch.no_grad():
        found = path_loss(net, path, IDS, None, kind)
        models: list[Any] = [net.build(path, torch.float32), net.base]
        outputs = [model(IDS, use_cache=False, output_hidden_states=True) for model in models]
    if kind == "kl":
        student, teacher = (F.log_softmax(output.logits, -1) for output in outputs)
        expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    else:
        errors = [
            (s - t).square().sum(-1) / t.square().sum(-1)
            for s, t in zip(outputs[0].hidden_states[2:4], outputs[1].hidden_states[2:4], strict=True)
        ]
        expected = torch.stack(errors).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found > 0.01


@pytest.mark.parametrize("kind", ["feature", "kl"])
def test_only_candidates_on_the_path_get_gradients(unbroken: tuple[Path, Supernet, Supernet], kind: str) -> None:
    _, _, net = unbroken
    path: Placement = ["jet", "attn", "gated_deltanet", "attn"]
    path_loss(net, path, IDS, None, kind).backward()
    for block, mixers in net.candidates.items():
        for layer, mixer in mixers.items():
            gradients = [p.grad for p in mixer.parameters()]
            assert all((g is not None) == (path[layer] == block) for g in gradients), (block, layer)
            mixer.zero_grad()
    assert all(p.grad is None for p in net.base.parameters())


def test_a_later_feature_reaches_earlier_candidates(unbroken: tuple[Path, Supernet, Supernet]) -> None:
    """Unlike alignment: the gradient of layer 0 is another one where layer 2 is on the path, too."""
    _, net, _ = unbroken

    def gradient(path: Placement) -> Tensor:
        mixer = net.candidates["jet"][0]
        mixer.zero_grad()
        path_loss(net, path, IDS, None, "feature").backward()
        return mixer.o_proj.weight.grad * sum(name != "attn" for name in path)  # the sum over layers, not their mean

    alone, both = gradient(["jet", "attn", "attn", "attn"]), gradient(["jet", "attn", "jet", "attn"])
    assert (both - alone).norm() > 0.05 * alone.norm()


@pytest.mark.parametrize("kind", ["feature", "kl"])
def test_training_helps_and_leaves_base_and_aligned_candidates_alone(inputs: Path, tmp_path: Path, kind: str) -> None:
    """The mean loss of fixed paths on other text; the base's hash; the candidates that training began from."""
    torch.set_num_threads(1)
    base, tokens = read_base(inputs)
    supernet = Supernet(base, new_candidates(base, ALIGN, tokens, 0, torch.float32))
    before, aligned = fingerprint(base), deepcopy(supernet.candidates)
    settings = Paths(tokens=80 * 4 * 32, length=32, batch=4, lr=3e-2, loss=kind, budgets=[0, 1, 2])
    keys = candidate_keys(base, ALIGN, "a hash of the text", 0, torch.float32)
    train_paths(supernet, settings, tokens, tmp_path, 0, torch.float32, keys)
    trained = load_paths(supernet, tmp_path, path_keys(keys, settings, 0, torch.float32))
    assert fingerprint(base) == before

    def loss(net: Supernet) -> float:
        paths = [draw_path(net.attention, ["jet", "gated_deltanet"], [0, 1, 2], 99, step) for step in range(12)]
        with torch.no_grad():
            return float(np.mean([float(path_loss(net, path, IDS, None, kind)) for path in paths]))

    assert loss(trained) < 0.9 * loss(supernet)
    for block, mixers in aligned.items():
        for layer, mixer in mixers.items():
            for name, value in mixer.state_dict().items():
                assert torch.equal(supernet.candidates[block][layer].state_dict()[name], value)
    logged = read_jsonl(tmp_path / "metrics.jsonl")
    assert {record["stage"] for record in logged} == {"paths"}
    assert [record["path"].count("attn") for record in logged] == [
        draw_path(supernet.attention, ["gated_deltanet", "jet"], [0, 1, 2], 0, step).count("attn") for step in range(80)
    ]


def weights(net: Supernet) -> Iterator[Tensor]:
    return (p for mixers in net.candidates.values() for mixer in mixers.values() for p in mixer.parameters())


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "candidates-paths").rglob("*.safetensors"))}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_s")}
        for record in read_jsonl(run / "metrics.jsonl")
    ]


def test_resume_is_exact(
    inputs: Path, unbroken: tuple[Path, Supernet, Supernet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 0, and in steps 3 and 9, past checkpoints whose candidates were not all on a path yet."""
    append, stop = loop.append_jsonl, {"step": 0}

    def dying(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if record["step"] == stop["step"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "append_jsonl", dying)
    for stop["step"] in (0, 3, 9):  # begins at step 0, at 0 again, and at 2
        with pytest.raises(KeyboardInterrupt):
            train(inputs, tmp_path)
        if stop["step"] == 3:
            state = read_json(tmp_path / "checkpoints" / "paths" / "state.json")
            assert state["step"] == 2
            assert 0 < len(state["optimizer_steps"]) < sum(1 for _ in weights(unbroken[1]))
    stop["step"] = -1
    assert files(tmp_path) == {}
    train(inputs, tmp_path)
    assert files(tmp_path) == files(unbroken[0])
    assert metrics(tmp_path) == metrics(unbroken[0])
    assert len(metrics(tmp_path)) == 12


def test_what_fits_is_not_made_again_and_what_does_not_is(
    inputs: Path, unbroken: tuple[Path, Supernet, Supernet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _, _ = unbroken
    assert sorted(files(run)) == [
        f"candidates-paths/{block}/0{layer}.safetensors" for block in ("gated_deltanet", "jet") for layer in range(4)
    ]
    with monkeypatch.context() as patch:
        patch.setattr("postnas.train.paths.fit", None)  # asked for, it would raise
        train(inputs, run)
        with pytest.raises(TypeError):
            train(inputs, run, Paths(tokens=SHORT.tokens, length=32, batch=4, lr=1e-3))
    supernet = Supernet(read_base(inputs)[0], unbroken[1].candidates)
    keys = candidate_keys(supernet.base, ALIGN, "another text", 0, torch.float32)
    with pytest.raises(UserError, match=r"00\.safetensors: is not there, or not made as the recipe says; train"):
        load_paths(supernet, run, path_keys(keys, SHORT, 0, torch.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mse"}, "paths.loss: 'mse' is not possible; choose one of feature, kl"),
        ({"budgets": [1, -1]}, "paths.budgets: -1 is not possible; give 0 or more layers"),
        ({"budgets": [1, 4]}, "paths.budgets: 4 leaves none of the 4 layers to train; give fewer"),
        ({"lr": 0.0}, "paths.lr"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    inputs: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        train(inputs, tmp_path, Paths(**fields))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from postnas.train import parallel
from test_paths import train
torch.set_num_threads(1)
parallel.start(torch.device("cpu"))
try:
    train(Path(sys.argv[2]), Path(sys.argv[3]))
finally:
    parallel.stop()
"""


def test_two_ranks_give_what_one_gives(inputs: Path, unbroken: tuple[Path, Supernet, Supernet], tmp_path: Path) -> None:
    """To rounding: averages of the halves' gradients are the whole's."""
    script, run = tmp_path / "rank.py", tmp_path / "run"
    script.write_text(RANK, encoding="utf-8")
    run.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parent), str(inputs), str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = metrics(unbroken[0]), metrics(run)
    assert [record["path"] for record in two] == [record["path"] for record in one]
    losses = [torch.tensor([record["loss"] for record in records]) for records in (two, one)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-5)
    apart = moved = 0.0
    for name in files(run):
        block, layer = Path(name).parent.name, int(Path(name).stem)
        start = unbroken[1].candidates[block][layer].state_dict()
        found, expected = load_file(run / name), load_file(unbroken[0] / name)
        apart += sum(float((found[weight] - expected[weight]).square().sum()) for weight in start)
        moved += sum(float((expected[weight] - start[weight]).square().sum()) for weight in start)
    assert moved > 0 and apart < 1e-6 * moved  # rounding: a thousandth of what was learnt

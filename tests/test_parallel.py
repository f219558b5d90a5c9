"""Two processes at one run, as torchrun starts them, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.files import read_json, read_jsonl


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same recipe with one process and with two."""
    folder = tmp_path_factory.mktemp("parallel")
    base, text = make_base(folder / "base"), make_text(folder / "text.jsonl")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = {}
    for ranks in (1, 2):
        place = folder / str(ranks)
        place.mkdir()
        recipe = write_recipe(place / "recipe.yaml", tiny_recipe(place, base, text))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "postnas", "run", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found[ranks] = place / "run"
    return found


def test_candidates_are_the_same_bits_on_two_ranks(runs: dict[int, Path]) -> None:
    files = sorted(path.relative_to(runs[1]) for path in (runs[1] / "candidates").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, two = load_file(runs[1] / file), load_file(runs[2] / file)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_distillation_on_two_ranks_agrees(runs: dict[int, Path]) -> None:
    """Averages of halves are the whole's average, to rounding; and both ranks' data were used."""
    losses = {
        n: [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["stage"] != "align"] for n, run in runs.items()
    }
    assert len(losses[1]) == 6
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)
    one, two = (load_file(run / "model" / "model.safetensors") for run in (runs[1], runs[2]))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


def test_records_are_written_once(runs: dict[int, Path]) -> None:
    for run in runs.values():
        steps = [(r["stage"], r["step"]) for r in read_jsonl(run / "metrics.jsonl")]
        assert len(steps) == len(set(steps)) == 4 + 4 + 2
    assert read_json(runs[1] / "placement.json") == read_json(runs[2] / "placement.json")

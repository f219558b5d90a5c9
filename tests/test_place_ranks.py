"""Two ranks that share a search, against one process: the same bits in scores, logits and placements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.__main__ import main
from postnas.files import read_json, read_jsonl

SEARCH = '''
"""Every search in a copy of the aligned run; each rank writes what it measured, and rank 0 what the stage does."""
import dataclasses, sys
from pathlib import Path
from postnas.__main__ import read_recipe
from postnas.files import write_json
from postnas.pipeline import STAGE_FUNCTIONS, Run
from postnas.search.scores import Scorer
from postnas.train import parallel
import torch

measured, losses = [], Scorer._losses

def counted(self, name, placement):
    measured.append([name, placement])
    return losses(self, name, placement)

Scorer._losses = counted
recipe, folder = read_recipe("place", [sys.argv[1]]), Path(sys.argv[2])
torch.set_num_threads(recipe.threads)
parallel.start(torch.device("cpu"))
for search in sys.argv[3:]:
    strategy, windows = search.split("+")
    measured.clear()
    place = dataclasses.replace(recipe.place, strategy=strategy, windows=int(windows))
    state = Run(dataclasses.replace(recipe, place=place, out=str(folder / search)))
    STAGE_FUNCTIONS["place"](state)
    write_json(folder / f"{search}.{parallel.rank()}.json", {"measured": measured, "found": state.placed})
    parallel.barrier()
parallel.stop()
'''
SEARCHES = ("swap+0", "greedy+0", "beam+2", "gates+0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The searches by one process and by two, from the same aligned candidates."""
    folder = tmp_path_factory.mktemp("ranks")
    base, text = make_base(folder / "base", layers=6), make_text(folder / "text.jsonl")
    place = {"budget": 2, "steps": 7, "width": 3, "window": 16}
    recipe = write_recipe(folder / "recipe.yaml", tiny_recipe(folder, base, text, place=place))
    assert main(["align", str(recipe)]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = {}
    for ranks in (1, 2):
        found[ranks] = folder / str(ranks)
        for search in SEARCHES:
            copytree(folder / "run", found[ranks] / search)
        (found[ranks] / "search.py").write_text(SEARCH, encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks > 1 else []
        command = [sys.executable, *launcher, str(found[ranks] / "search.py"), str(recipe), str(found[ranks])]
        done = subprocess.run([*command, *SEARCHES], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return found


def report(folder: Path, search: str, rank: int = 0) -> dict[str, Any]:
    return read_json(folder / f"{search}.{rank}.json")


@pytest.mark.parametrize("search", SEARCHES)
def test_two_ranks_find_what_one_does(folders: dict[int, Path], search: str) -> None:
    for name in ("placement.json", "scores.json"):
        assert read_json(folders[2] / search / name) == read_json(folders[1] / search / name)
    assert report(folders[2], search, 0)["found"] == report(folders[2], search, 1)["found"]


@pytest.mark.parametrize("search", SEARCHES)
def test_scores_have_the_same_bits_and_are_written_once(folders: dict[int, Path], search: str) -> None:
    lines = {n: sorted((folder / search / "scored.jsonl").read_text().splitlines()) for n, folder in folders.items()}
    assert lines[1] == lines[2]
    placements = [tuple(record["placement"]) for record in read_jsonl(folders[2] / search / "scored.jsonl")]
    assert len(placements) == len(set(placements)) > 6


@pytest.mark.parametrize("search", SEARCHES)
def test_ranks_measure_a_half_each_and_nothing_twice(folders: dict[int, Path], search: str) -> None:
    whole = report(folders[1], search)["measured"]
    halves = [report(folders[2], search, rank)["measured"] for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert min(map(len, halves)) >= 0.3 * len(whole)


def test_logits_of_gates_have_the_same_bits(folders: dict[int, Path]) -> None:
    one, two = (
        load_file(folder / "gates+0" / "checkpoints" / "gates" / "gates.safetensors") for folder in folders.values()
    )
    assert set(one) == {"logits", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert bool(one["exp_avg"].any())

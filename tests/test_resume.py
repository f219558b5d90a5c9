"""A run that is killed goes on, and ends as if it had never been: same placement, weights and metrics, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.files import read_json, read_jsonl

RUNNER = '''
"""Runs a recipe and kills its own process, as SIGKILL would from outside, at the n-th of the moments named."""
import os, signal, sys

moment, count = sys.argv[1], int(sys.argv[2])
import postnas.files as files
import postnas.pipeline as pipeline
import postnas.search.scores as scores
import postnas.train.align as align
import postnas.train.checkpoint as checkpoint
import postnas.train.loop as loop

left = count

def dying(function, before=True):
    def wrapped(*arguments, **keywords):
        global left
        left -= 1
        if left == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        value = function(*arguments, **keywords)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    return wrapped

if moment == "logged":            # inside a step, after its record and before anything else
    loop.append_jsonl = dying(loop.append_jsonl, before=False)
elif moment == "saving":          # in the middle of writing a checkpoint
    checkpoint.write_json = dying(checkpoint.write_json)
elif moment == "saved":           # just after a checkpoint
    checkpoint.save = dying(checkpoint.save, before=False)
elif moment == "candidate":       # between two candidates' files
    align.write_candidate = dying(align.write_candidate)
elif moment == "score":           # between two scores
    scores.append_jsonl = dying(scores.append_jsonl, before=False)
elif moment == "stage":           # at a stage's end, before it counts as done
    pipeline.write_json = dying(pipeline.write_json)
from postnas.__main__ import main
sys.exit(main(["run", sys.argv[3]]))
'''


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {"base": make_base(folder / "base"), "text": make_text(folder / "text.jsonl")}


def outcome(run: Path) -> dict[str, Any]:
    """Everything a run made that is not a time: hashes of weights, and the figures."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("tokens_per_s", "seconds", "peak_bytes")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    weights = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*.safetensors"))
    }
    return {
        "weights": weights,
        "metrics": timeless(read_jsonl(run / "metrics.jsonl")),
        "placement": read_json(run / "placement.json"),
        "scores": read_json(run / "scores.json"),
        "eval": read_json(run / "eval.json"),
    }


def start(recipe: Path, moment: str = "never", count: int = 0) -> int:
    """One process that runs the recipe; its exit code, -9 where it was killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, moment, str(count), str(recipe)], env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def unbroken(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = tiny_recipe(folder, inputs["base"], inputs["text"])
    assert start(write_recipe(folder / "recipe.yaml", recipe)) == 0
    return outcome(folder / "run")


def test_resume_is_exact(inputs: dict[str, Path], unbroken: dict[str, Any], tmp_path: Path) -> None:
    """One run, killed again and again: inside every stage, while it writes, and at every stage's end."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, inputs["base"], inputs["text"]))
    deaths = [
        ("logged", 1),  # in alignment, before any checkpoint
        ("saving", 1),  # while the first checkpoint is written
        ("logged", 3),  # in alignment, past a checkpoint
        ("candidate", 2),
        ("stage", 1),  # alignment is done, but nobody wrote so
        ("score", 3),
        ("stage", 2),
        ("saved", 1),  # in stage 1
        ("logged", 1),
        ("saving", 2),  # in stage 1 or 2
        ("logged", 2),
        ("stage", 1),
        ("stage", 1),
        ("stage", 1),
    ]
    killed = sum(start(recipe, moment, count) == -signal.SIGKILL for moment, count in deaths)
    assert killed >= 10
    assert start(recipe) == 0
    assert outcome(tmp_path / "run") == unbroken


def test_killed_at_random_moments_ends_the_same(
    inputs: dict[str, Path], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL from outside, at moments that nothing in the code has chosen."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, inputs["base"], inputs["text"]))
    draw = random.Random(11)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "postnas", "run", str(recipe)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(2.5, 6.0))
        process.kill()
        process.wait()
    assert start(recipe) == 0
    assert outcome(tmp_path / "run") == unbroken


def test_finished_run_does_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path, inputs["base"], inputs["text"]))
    assert start(recipe) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert start(recipe) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_base_is_untouched(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Stage 1 changes no weight of the base, and the hybrid carries those it shares as they were."""
    from safetensors.torch import load_file

    base = load_file(inputs["base"] / "model.safetensors")
    stages = ["align", "place", "train"]
    recipe = tiny_recipe(tmp_path, inputs["base"], inputs["text"], stage2={"tokens": 0}, stages=stages)
    assert start(write_recipe(tmp_path / "recipe.yaml", recipe)) == 0
    hybrid = load_file(tmp_path / "run" / "model" / "model.safetensors")
    placement = json.loads((tmp_path / "run" / "placement.json").read_text())["placement"]
    shared = [name for name in base if "self_attn" not in name or placement[int(name.split(".")[2])] == "attn"]
    assert len(shared) > 20
    assert all((hybrid[name] == base[name]).all() for name in shared)

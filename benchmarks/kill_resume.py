"""Kills a run of SmolLM2-135M ten times at random moments and compares its end with an unbroken run's, bit by bit.

    python benchmarks/kill_resume.py [SEED]

The recipe is the demo's with fewer tokens, so that two runs and ten deaths fit in a quarter of an hour. Writes
benchmarks/results/kill-resume.json: when each death came, in which stage, and whether everything is equal.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from postnas.files import read_json, read_jsonl, write_json

DEATHS = ("align", "align", "place", "place", "train", "train", "train", "evaluate", "evaluate", "bench")
"""The stage that each death waits for; it comes a random while after the stage has begun."""
RUNS = {"unbroken": Path("runs/kill-unbroken"), "killed": Path("runs/kill-killed")}
SMALL = {
    "align.tokens": "10240",
    "align.checkpoint_every": "2",
    "place.tokens": "512",
    "train.tokens": "10240",
    "train.checkpoint_every": "2",
    "stage2.tokens": "2048",
    "stage2.checkpoint_every": "1",
    "evaluate.limit": "40",
    "evaluate.perplexity_tokens": "4096",
    "evaluate.copy_passages": "4",
    "bench.contexts": "[256]",
}


def command(out: Path) -> list[str]:
    changes = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "postnas", "run", "recipes/smollm2-cpu.yaml", *changes, "--out", str(out)]


def main() -> None:
    draw = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    shutil.rmtree(RUNS["killed"], ignore_errors=True)
    subprocess.run(command(RUNS["unbroken"]), check=True)  # at once, where it is there already
    rows = []
    for target in DEATHS:
        process = subprocess.Popen(command(RUNS["killed"]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begin = time.monotonic()
        while process.poll() is None and _stage(RUNS["killed"]) != target:
            time.sleep(0.2)
        started = 8.0 if time.monotonic() - begin < 1.0 else 0.0  # a new process needs some seconds to get there
        time.sleep(started + draw.uniform(0.0, 8.0))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            row = {"death": len(rows) + 1, "seconds": time.monotonic() - begin, "stage": _stage(RUNS["killed"])}
            rows.append(row)
            print(row, flush=True)
    subprocess.run(command(RUNS["killed"]), check=True)
    ends = {name: outcome(folder) for name, folder in RUNS.items()}
    equal = {part: ends["killed"][part] == ends["unbroken"][part] for part in ends["killed"]}
    print(equal)
    write_json(
        Path("benchmarks/results/kill-resume.json"),
        {
            "command": "python benchmarks/kill_resume.py",
            "device": "cpu, 2 threads",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "rows": [*rows, *({"part": part, "equal": same} for part, same in equal.items())],
        },
    )


def _stage(run: Path) -> str:
    """The stage that a killed run was in."""
    done = read_json(run / "stages.json") if (run / "stages.json").exists() else {}
    return next((s for s in ("align", "place", "train", "evaluate", "bench", "report") if s not in done), "the end")


def outcome(run: Path) -> dict[str, Any]:
    """Hashes of all weights, and every figure that is not a time."""
    metrics = [
        {k: v for k, v in r.items() if k not in ("tokens_per_s", "seconds")} for r in read_jsonl(run / "metrics.jsonl")
    ]
    return {
        "weights": {
            str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.rglob("*.safetensors"))
        },
        "placement": read_json(run / "placement.json"),
        "metrics": metrics,
        "evaluation": read_json(run / "eval.json"),
    }


if __name__ == "__main__":
    main()

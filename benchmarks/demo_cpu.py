"""Runs the demo and a uniform placement beside it, and writes benchmarks/results/demo-cpu.json.

    python benchmarks/demo_cpu.py [--keep]

The first run is `postnas run recipes/smollm2-cpu.yaml` as a user starts it, in a process of its own whose wall
clock and memory are measured. The second has the same candidates, tokens and number of linear layers, but places
attention at even distances; its time is not part of the first's. --keep goes on with directories that are there.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from postnas.files import read_json, write_json

RECIPE = "recipes/smollm2-cpu.yaml"
RUN = Path("runs/smollm2-cpu")
UNIFORM = Path("runs/smollm2-cpu-uniform")
RESULT = Path("benchmarks/results/demo-cpu.json")


def main() -> None:
    if "--keep" not in sys.argv:
        for folder in (RUN, UNIFORM):
            shutil.rmtree(folder, ignore_errors=True)
    # Downloads are not part of the time that is promised.
    subprocess.run([sys.executable, "-c", FETCH], check=True)
    seconds = postnas("run", RECIPE)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if not UNIFORM.exists():
        for part in ("candidates", "data"):
            shutil.copytree(RUN / part, UNIFORM / part)
    postnas("run", RECIPE, "--place.strategy", "uniform", "--out", str(UNIFORM))
    rows = rows_of(RUN, "base") + rows_of(RUN, "hybrid") + rows_of(UNIFORM, "hybrid", "hybrid-uniform")
    rows += [
        {"model": "hybrid", "metric": "seconds", "value": seconds},
        {"model": "hybrid", "metric": "peak_bytes", "value": peak},
    ]
    bench = read_json(RUN / "bench.json")
    write_json(
        RESULT,
        {
            "command": "python benchmarks/demo_cpu.py",
            "device": f"{bench['device']}, {bench['threads']} threads",
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "rows": rows,
        },
    )
    print(f"wrote {RESULT}")


FETCH = f"""
from postnas import sources
from postnas.evaluate.task import load_task
from postnas.models.checkpoint import base_folder
import yaml
recipe = yaml.safe_load(open({RECIPE!r}))
base_folder(recipe["base"]["model"], recipe["base"]["sha256"])
for text in recipe["data"]["text"]:
    sources.resolve(text["source"], text["sha256"])
for name in recipe["evaluate"]["tasks"]:
    task = load_task(name)
    sources.resolve(task.source, task.sha256)
"""


def postnas(*arguments: str) -> float:
    """Run one command and return its wall-clock seconds."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "postnas", *arguments], check=True)
    return time.monotonic() - begin


def rows_of(run: Path, model: str, name: str | None = None) -> list[dict[str, Any]]:
    """Flat records of one model of one run."""
    name = name or model
    placement = read_json(run / "placement.json")["placement"]
    linear = sum(block != "attn" for block in placement) if model == "hybrid" else 0
    rows: list[dict[str, Any]] = [{"model": name, "metric": "linear_layers", "value": linear, "n": len(placement)}]
    evaluation = read_json(run / "eval.json")
    for row in evaluation["rows"]:
        if row["model"] == model:
            metric = row["metric"] if row["task"] in ("perplexity", "copy") else f"{row['task']}_{row['metric']}"
            rows.append({"model": name, "metric": metric} | {k: row[k] for k in ("value", "stderr", "n", "seed")})
    if model == "hybrid":
        for pair in evaluation["paired"]:
            metric = pair["metric"] if pair["task"] in ("perplexity", "copy") else f"{pair['task']}_{pair['metric']}"
            rows.append(
                {
                    "model": name,
                    "metric": f"{metric}_difference",
                    "value": pair["difference"],
                    "stderr": pair["stderr"],
                    "n": pair["n"],
                    "kept": pair["kept"],
                }
            )
    for row in read_json(run / "bench.json")["rows"]:
        if row["model"] == model:
            at = f"@{row['context']}"
            rows.append({"model": name, "metric": f"{row['phase']}_tokens_per_s{at}", "value": row["tokens_per_s"]})
            if row["phase"] == "decode":
                rows.append({"model": name, "metric": f"cache_bytes{at}", "value": row["cache_bytes"]})
    return rows


if __name__ == "__main__":
    main()

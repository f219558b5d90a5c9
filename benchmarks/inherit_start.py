"""How well a JetBlock stands in for each layer's attention at its start and after alignment, by way to start.

    python benchmarks/inherit_start.py [TOKENS]

SmolLM2-135M, value dim twice the head dim. `random` starts the extra value channels small, `plus_minus` as the
first ones with the opposite sign; each with the output gate opened by regression on a sample (`sample`) or left
random (`blind`). Writes benchmarks/results/inherit-start.json and docs/inherit-start.svg; goes on where it stopped.
"""

from __future__ import annotations

import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from postnas.blocks.inherit import relative_error
from postnas.data import Tokens, load_tokenizer, prepare
from postnas.files import read_json, read_jsonl, write_json
from postnas.models.checkpoint import base_folder, load_base
from postnas.models.supernet import Supernet
from postnas.recipe import Align, Data, Text
from postnas.train import align as align_stage
from postnas.train.loop import autocast

RESULT = Path("benchmarks/results/inherit-start.json")
PLOT = Path("docs/inherit-start.svg")
RUN = Path("runs/inherit-start")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = [("random", "sample"), ("plus_minus", "sample"), ("random", "blind"), ("plus_minus", "blind")]


def main() -> None:
    tokens = int(float(sys.argv[1])) if len(sys.argv) > 1 else 50_000
    torch.set_num_threads(2)
    recipe = yaml.safe_load(Path("recipes/smollm2-cpu.yaml").read_text())
    folder = base_folder(recipe["base"]["model"], recipe["base"]["sha256"])
    data = Data(text=[Text(**text) for text in recipe["data"]["text"]], tokens=1_200_000)
    train, heldout = prepare(data, load_tokenizer(folder), RUN / "data")
    base: Any = load_base(str(folder))
    base.to(DEVICE)
    rows = read_json(RESULT)["rows"] if RESULT.exists() else []
    for start, gate in WAYS:
        if any((row["start"], row["gate"], row["tokens"]) == (start, gate, tokens) for row in rows):
            continue
        rows += measure(base, train, heldout, start, gate, tokens)
        write_json(
            RESULT,
            {
                "command": "python benchmarks/inherit_start.py",
                "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu, 2 threads",
                "torch": torch.__version__,
                "date": date.today().isoformat(),
                "rows": rows,
            },
        )
    draw(rows, tokens)


def measure(base: Any, train: Tokens, heldout: Tokens, start: str, gate: str, tokens: int) -> list[dict[str, Any]]:
    """Held-out relative error of each layer's mixer before and after alignment."""
    settings = Align(options={"jet": {"expand_v": 2.0}}, start=start, tokens=tokens, checkpoint_every=10**9)
    run = RUN / f"{start}-{gate}"
    shutil.rmtree(run, ignore_errors=True)
    sampled = align_stage.inherit
    if gate == "blind":
        align_stage.inherit = lambda mixer, attention, sample, start, seed: sampled(mixer, attention, None, start, seed)
    try:
        before = align_stage.new_candidates(base, settings, train, 0, torch.bfloat16)
        at_start = errors(base, before, heldout)
        del before
        keys = align_stage.candidate_keys(base, settings, "inherit-start", 0)
        after = align_stage.align_candidates(base, settings, train, run, keys, 0, torch.bfloat16)
    finally:
        align_stage.inherit = sampled
    assert len(read_jsonl(run / "metrics.jsonl")) > 0
    shared = {"start": start, "gate": gate}
    return [
        {**shared, "layer": layer, "tokens": seen, "error": error}
        for seen, found in ((0, at_start), (tokens, errors(base, after, heldout)))
        for layer, error in enumerate(found)
    ]


@torch.no_grad()
def errors(base: Any, candidates: dict[str, dict[int, Any]], heldout: Tokens) -> list[float]:
    """Relative squared error of each layer's mixer on 8 held-out sequences of 256 tokens."""
    net = Supernet(base, candidates)
    with autocast(DEVICE, torch.bfloat16):
        h, step = net.embed(heldout.sequences(8, 256).to(DEVICE))
        return [float(relative_error(candidates["jet"][layer](x, step)[0], y)) for layer, x, y in net.walk(h, step)]


def draw(rows: list[dict[str, Any]], tokens: int) -> None:
    """Error by layer, a line a way to start: before alignment on the left, after it on the right."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, seen, title in zip(axes, (0, tokens), ("at the start", f"after {tokens:,} tokens"), strict=True):
        for start, gate in WAYS:
            chosen = [row for row in rows if (row["start"], row["gate"], row["tokens"]) == (start, gate, seen)]
            style = "-" if gate == "sample" else ":"
            label = f"{start}, gate {'opened on a sample' if gate == 'sample' else 'random'}"
            axis.plot(
                [row["layer"] for row in chosen], [row["error"] for row in chosen], style, marker=".", label=label
            )
        axis.set(title=title, xlabel="layer", ylim=(0, None))
    axes[0].set_ylabel("relative squared error")
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(PLOT)


if __name__ == "__main__":
    main()

"""PostNAS as one pipeline, and what each of its steps is worth: SmolLM2-135M with four layers on full attention.

    python benchmarks/pipeline_h100.py warm run rows table --seconds 550     # the same command goes on
    python benchmarks/pipeline_h100.py rows --only uniform jet               # several processes may share the rows

`run` takes one recipe, recipes/smollm2-135m.yaml with the settings below, through align, place, select, design, size,
train, evaluate and report by `postnas.pipeline`, resumed wherever it was left. Select and design weigh no speed, since
other processes may share the GPU. `rows` then trains five hybrids on equal terms (`postnas.search.variants`), each
with one more of its choices, as figure 3 of arXiv 2508.15884:

    uniform    gated_deltanet in the linear layers, attention at even distances
    placement  the placement that was searched
    block      the best block of `select` that is not the JetBlock
    jet        the JetBlock, with the options that `design` chose where `select` chose it
    sizes      what `size` chose

They are trained and measured with every one of --seeds. Text, needles and the order of the batches are others than
those that the steps were chosen by; a task's rows are those of the search. `table` writes pipeline-h100.json to
benchmarks/results (or $OUT): a row for each step, task and seed, with the gain on the step before and its paired
standard error; then the stages with their times, and the evaluation of the pipeline's own hybrid. What is done is kept
in runs/pipeline (or $KEPT); --seconds stops between two stages or rows. `warm` asks for fla's kernels beforehand.
--recipe: another one, to try every line at a tiny size. --tokens, --align-tokens, --lr-tokens: of the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import time
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from blocks_h100 import DESIGNS, EXPAND, TERMS, freed, with_scores, without
from placement_h100 import claimed

from postnas import pipeline
from postnas.__main__ import read_recipe
from postnas.blocks import make_block
from postnas.errors import UserError
from postnas.files import append_jsonl, read_json, read_jsonl, write_json
from postnas.ops import fla
from postnas.recipe import Recipe
from postnas.run import Run
from postnas.search import blocks, sizes
from postnas.search.speed import device_name
from postnas.search.strategies import STRATEGIES
from postnas.search.variants import Comparison, Terms, Variant
from postnas.train.align import digest
from postnas.trials import TRIALS, Design, Select, Size
from postnas.warm import reading, training

KEPT = Path(os.environ.get("KEPT", "runs/pipeline"))
RECIPE = "recipes/smollm2-135m.yaml"
STAGES = ["align", "place", "select", "design", "size", "train", "evaluate", "report"]
STEPS = ("uniform", "placement", "block", "jet", "sizes")
START = "gated_deltanet"
"""The block that layers are placed with, and that the first two steps have."""
SELECTED = [START, "retnet", "mamba2", "gla", "delta_net", "kda", "jet"]
DESIGNED = ("static on v", "static on q, k; dynamic on v", "generator half as wide")
"""Designs of the JetBlock that `design` compares with it; see blocks_h100.py."""
OTHERWISE = {"values half as wide": {"expand_v": 1.0}}
"""What it compares where `select` chose another block."""
SIZES: dict[str, Any] = {"heads": [6, 9], "key_dims": [64, 96]}
SEARCH: dict[str, Any] = TERMS | {"tokens": 1_000_000, "align_tokens": 500_000, "lrs": [7e-4, 1.4e-3]}
SEARCH |= {"lr_tokens": 100_000, "weights": {"kl": 1.0, "tasks": 1.0}}
"""Of the pipeline's own comparisons."""
TRAINED = 3_000_000
"""Tokens that the pipeline's hybrid is distilled on."""
OWN_SEED = 1000
"""Added to the seed of a row, so that its needles and batches are not the search's."""
LESS = (*blocks.LOSSES, "perplexity", "copy_nll")
"""Metrics of which less is better."""


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.until, self.given, self.tiny = time.monotonic() + given.seconds, given, given.recipe != RECIPE
        self.folder = KEPT / "run"

    def over(self) -> bool:
        return time.monotonic() > self.until

    # ---- the pipeline

    @property
    def recipe(self) -> Recipe:
        """The one recipe. What `design` compares depends on the block that `select` chose."""
        found = read_recipe("run", [self.given.recipe])
        search, size = SEARCH, SIZES
        if self.tiny:
            search = SEARCH | {"tokens": found.train.tokens, "align_tokens": found.align.tokens, "lr_tokens": 256}
            search |= {"limit": 4, "context": 64}
            size = {"heads": [2, 4], "key_dims": [4, 8]}
        chosen = self.chosen("select")
        jet = chosen is None or chosen["block"] == "jet"
        return dataclasses.replace(
            found,
            align=dataclasses.replace(found.align, blocks=[START], options={START: EXPAND}),
            place=dataclasses.replace(found.place, block=START, blocks=[], windows=0),
            select=Select(**search, blocks=SELECTED, options={name: EXPAND for name in SELECTED}),
            design=Design(**search, variants={name: DESIGNS[name] for name in DESIGNED} if jet else OTHERWISE),
            size=Size(**search, **size),
            train=found.train if self.tiny else dataclasses.replace(found.train, tokens=TRAINED),
            stages=STAGES,
            threads=found.threads if self.tiny else 8,
            out=str(self.folder),
        )

    def chosen(self, stage: str) -> dict[str, Any] | None:
        path = self.folder / TRIALS[stage]
        chosen: dict[str, Any] | None = read_json(path)["chosen"] if path.exists() else None
        return chosen

    def warm(self) -> None:
        """Each block, design and size as one layer that learns and reads, so that fla's trials are on record."""
        recipe = self.recipe
        state = Run(recipe)
        device, dims = state.device, state.base.config.dims()
        wanted = [(name, EXPAND) for name in SELECTED]
        sized, dtype = (self.chosen("select") or {"block": "jet"})["block"], state.base.lm_head.weight.dtype
        with torch.device("meta"):
            own = make_block(sized, dims, EXPAND)
        wanted += [(sized, options) for options in sizes.asked_grid(recipe.size, sized, own, EXPAND, dtype)[1]]
        for name, options in wanted:
            with torch.device(device):
                block = make_block(name, dims, options)
            seconds = training(block, state.compute, recipe.data.borders)
            seconds += reading(block.to(getattr(torch, recipe.base.dtype)))
            print(f"{name} {options}: {seconds:.1f} s", flush=True)
        for shape, kernel in fla.asked.items():
            print(f"{shape}: {kernel or 'the plain form'}", flush=True)

    def run(self) -> None:
        """One stage after the other, each as `postnas run` would do it; what is done is not done again."""
        path = self.folder / "stages.json"
        append_jsonl(KEPT / "starts.jsonl", {"done": list(read_json(path)) if path.exists() else []})
        for number, stage in enumerate(STAGES, start=1):
            if self.over():
                return
            begin = time.monotonic()
            pipeline.run(dataclasses.replace(self.recipe, stages=STAGES[:number]))
            freed()
            print(f"{stage}: {time.monotonic() - begin:.1f} s", flush=True)

    # ---- the rows

    @cached_property
    def terms(self) -> Terms:
        """On the half of the held-out text that nothing was chosen by."""
        state = Run(self.recipe)
        if state.device.type == "cuda":
            torch.set_num_threads(8)
        terms = state.terms("select")
        return dataclasses.replace(
            terms, heldout=state.tokens[1].half(0), evaluated=True, key=digest(terms.key, "evaluated")
        )

    def variants(self) -> dict[str, tuple[list[str], Variant]]:
        """Placement and variant of each step. Raises UserError before the pipeline has chosen them."""
        chosen = {stage: self.chosen(stage) for stage in TRIALS}
        missing = [stage for stage, one in chosen.items() if one is None]
        if missing:
            raise UserError(f"rows: {missing[0]} is not done in {self.folder}; name `run` before it")
        select, placed = read_json(self.folder / TRIALS["select"]), self.terms.placement
        made = {row["name"]: row for row in select["rows"]}
        best = next(made[one["name"]] for one in select["ranking"] if made[one["name"]]["block"] != "jet")
        jet = chosen["design"] if chosen["design"] and chosen["design"]["block"] == "jet" else made["jet"]
        attention, budget = list(self.terms.base.config.placement or []), self.recipe.place.budget
        uniform = STRATEGIES["uniform"](lambda asked: [0.0] * len(asked), attention, START, budget, 0)
        found = {"uniform": (uniform, Variant("uniform", START, EXPAND))}
        found["placement"] = placed, Variant("placement", START, EXPAND)
        for step, one in (("block", best), ("jet", jet), ("sizes", chosen["size"])):
            assert one is not None
            found[step] = placed, Variant(step, one["block"], one["options"])
        return found

    def rows(self) -> None:
        """Train and measure what is missing and no other process is at."""
        terms_of_all = {"tokens": self.recipe.train.tokens, "align_tokens": self.recipe.align.tokens}
        asked = TERMS | (terms_of_all | {"lr_tokens": 256, "limit": 4, "context": 64} if self.tiny else {})
        for name in ("tokens", "align_tokens", "lr_tokens"):
            asked |= {name: getattr(self.given, name)} if getattr(self.given, name) else {}
        settings = Select(**asked)
        for seed in self.given.seeds:
            for step, (placement, variant) in self.variants().items():
                if self.over():
                    return
                if self.given.only and step not in self.given.only:
                    continue
                terms = dataclasses.replace(self.terms, placement=placement, seed=OWN_SEED + seed)
                with claimed(KEPT / f"seed-{seed}" / step) as mine:
                    if mine:
                        self.row(step, variant, settings, terms, KEPT / f"seed-{seed}")

    def row(self, step: str, variant: Variant, settings: Select, terms: Terms, folder: Path) -> None:
        begin, placement = time.monotonic(), terms.placed(variant.block)
        row: dict[str, Any] = {"step": step, "block": variant.block, "options": variant.options}
        row |= {"placement": placement, "cache_bytes_a_layer": terms.meta(variant).state_bytes(1, terms.dtype)}
        # steps that choose the same share a training, and wait for each other
        own = folder / "trained" / digest(placement, variant.block, variant.options)[:16]
        own.mkdir(parents=True, exist_ok=True)
        try:
            with open(own / "lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                comparison = Comparison("rows", settings, dataclasses.replace(terms, folder=own))
                row |= without(comparison.trained(variant), "key", "train_tokens_per_s")
        except (UserError, RuntimeError) as error:  # whatever it is, the other steps can be measured
            print(f"{step}: {type(error).__name__}: {error}", flush=True)
            return
        finally:
            freed()
        stamp = {"device": device_name(comparison.device), "torch": torch.__version__}
        write_json(folder / f"{step}.json", stamp | {"date": date.today().isoformat()} | row)
        print(f"{step}: {time.monotonic() - begin:.1f} s", flush=True)

    # ---- the table

    def table(self) -> None:
        stamp: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        for folder in sorted(KEPT.glob("seed-*")):
            found = [read_json(folder / f"{step}.json") for step in STEPS if (folder / f"{step}.json").exists()]
            for number, made in enumerate(found):
                stamp = {name: made[name] for name in ("device", "torch", "date")}
                before = found[max(number - 1, 0)]
                scores = blocks.paired_scores(before["outputs"], made["outputs"], number == 0)
                for score in scores:
                    changed, error = score.pop("difference"), score.pop("difference_stderr")
                    score |= {"before": before["step"] if number else None, "gain_stderr": error}
                    score["gain"] = 0.0 - changed if changed is not None and score["metric"] in LESS else changed
                own = without(made, "outputs", "device", "torch", "date") | {"seed": int(folder.name.split("-")[1])}
                rows += with_scores(own, scores)
        if not rows:
            print("table: no row is there yet")
            return
        done = self.folder / "stages.json"
        for stage, facts in (read_json(done) if done.exists() else {}).items():
            rows.append({"step": "stage", "stage": stage} | facts)
        if (self.folder / "eval.json").exists():
            for score in read_json(self.folder / "eval.json")["rows"]:
                rows.append({"step": "evaluation"} | {("score" if k == "value" else k): v for k, v in score.items()})
        starts = len(read_jsonl(KEPT / "starts.jsonl"))
        path = Path(os.environ.get("OUT", "benchmarks/results")) / "pipeline-h100.json"
        command = {"command": "python benchmarks/pipeline_h100.py warm run rows table", "starts": starts}
        write_json(path, command | stamp | {"rows": rows})
        print(f"wrote {path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["warm", "run", "rows", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--only", nargs="+", choices=STEPS)
    for name in ("--tokens", "--align-tokens", "--lr-tokens"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    bench = Bench(given)
    for step in given.steps:
        if step == "table" or not bench.over():
            getattr(bench, step)()


if __name__ == "__main__":
    main()

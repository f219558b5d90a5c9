"""A few steps of every stage of the recipes at their bases' true shapes, with random weights: how fast, in what memory.

    python benchmarks/dry_run_h100.py [RECIPE ...] [--configs tests/shapes] [--seconds 550]
    OUT=$(mktemp -d) python benchmarks/dry_run_h100.py --tiny     # every line on a CPU, models of six narrow layers

Needs one GPU and no hub: the base of recipes/NAME.yaml is built from NAME.json of the configs. Stages go through the
library's own functions, at the recipe's batch and length. Where memory does not suffice the batch is halved, and
`asked_batch` is the recipe's. `align` is a forward of the base with all candidates' forward and backward; `place`
scores layers alone on their candidates, which run half of the layers on average; `train` is the mixers by KL; `stage2`
all weights. Steps in which kernels are compiled and CUDA graphs made are `warm_up_seconds`. mfu: operations by
search/cost.py over the data sheet's peak. A stage that fails is a row with its error. Rows are added to
$OUT/dry-run-h100.json (else benchmarks/results); a row that is there is not measured again, and the same command goes
on. `postnas plan RECIPE.yaml --measured FILE` prices a recipe by them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postnas.__main__ import read_recipe
from postnas.data import Batch, Tokens
from postnas.files import read_json, read_jsonl, write_json
from postnas.models.checkpoint import base_config, model_from_weights
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.recipe import Recipe
from postnas.search import objectives
from postnas.search.cost import GPUS, Decoder, align_stage, mixers_stage, weights_stage
from postnas.search.scores import Scorer
from postnas.search.strategies import uniform, with_linear
from postnas.train.align import align_candidates, candidate_keys, new_candidates
from postnas.train.distill import train_all, train_mixers

RECIPES = ("qwen2.5-1.5b", "qwen3-1.7b", "llama-3.2-1b", "gemma-3-1b")
STAGES = ("align", "place", "train", "stage2")
WARM_UP, STEPS = 5, 8
"""Steps that are not counted (two as they are, one that makes the graph, two of it), and those that are."""
PASSES = 2
"""Passes over the placements before the one that counts: each layer is run once, then captured."""
EVERY = 4
"""Every fourth layer, from the third on, is scored alone: half of the layers then run on average."""
ANSWER = 8
"""Tokens that are scored of a row of recall or knowledge."""


class Enough(Exception):
    """All steps are done, or the time is up."""


class Sample(Tokens):
    """Random ids below `vocab`, which end training after its steps: no checkpoint is written."""

    def __init__(self, path: Path, vocab: int, count: int, until: float) -> None:
        np.random.default_rng(0).integers(0, vocab, count, dtype=np.uint32).tofile(path)
        super().__init__(path, "uint32", 0)
        self.until = until

    def batch(self, step: int, *args: Any, **kwargs: Any) -> Batch:
        if step == WARM_UP + STEPS or (step > 0 and time.monotonic() > self.until):
            raise Enough
        return super().batch(step, *args, **kwargs)


@dataclass
class Measured:
    """What a stage gave: tokens and seconds of the steps that count."""

    steps: int
    tokens: int
    seconds: float
    warm_up_seconds: float
    flops: float
    """Of these tokens."""


class DryRun:
    """One recipe at its base's shapes."""

    def __init__(self, recipe: Recipe, config: HybridConfig, scratch: Path, until: float) -> None:
        self.recipe, self.config, self.scratch, self.until = recipe, config, scratch, until
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compute = getattr(torch, recipe.compute)
        self.base = random_base(config, getattr(torch, recipe.base.dtype), self.device)
        sized = deepcopy(config)
        sized.blocks = (sized.blocks or {}) | recipe.align.options
        self.attention, block = list(config.placement or []), recipe.place.block
        self.placement = uniform(lambda p: [0.0] * len(p), self.attention, block, recipe.place.budget, 0)
        everywhere = with_linear(self.attention, block, set(range(len(self.attention))))
        self.sizes = Decoder(sized), Decoder(sized, self.placement), Decoder(sized, everywhere)
        longest = max(part.batch * part.length for part in (recipe.align, recipe.train, recipe.stage2))
        self.tokens = Sample(scratch / "tokens.bin", config.vocab_size, max(longest, 2**14), until)
        self.net: Supernet | None = None

    def supernet(self) -> Supernet:
        """The base with candidates that start from its attention."""
        if self.net is None:
            recipe = replace(self.recipe.align, blocks=[self.recipe.place.block])
            self.net = Supernet(self.base, new_candidates(self.base, recipe, self.tokens, 0, self.compute))
        for mixer in self.net.candidates[self.recipe.place.block].values():
            mixer.zero_grad()  # of an attempt that memory cut off
        return self.net

    def stage(self, name: str, batch: int) -> Measured:
        """Run a stage at a batch. Raises Enough where the time is up before a step that counts."""
        folder = self.scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        if name == "place":
            return self._place(folder)
        settings = replace(getattr(self.recipe, name), batch=batch, tokens=10**12, checkpoint_every=10**9)
        with suppress(Enough):
            getattr(self, f"_{name}")(settings, folder)
        records = read_jsonl(folder / "metrics.jsonl")
        counted = records[WARM_UP:]
        if not counted:
            raise Enough
        base, hybrid, linear = self.sizes
        length, tokens = settings.length, len(counted) * batch * settings.length
        one = {
            "align": lambda: align_stage(base, linear, length, length),
            "train": lambda: mixers_stage(base, hybrid, linear, length, length),
            "stage2": lambda: weights_stage(base, hybrid, linear, length, length),
        }[name]()
        seconds, warm = (sum(r["seconds"] for r in part) for part in (counted, records[:WARM_UP]))
        return Measured(len(counted), tokens, seconds, warm, one.flops / length * tokens)

    def _align(self, settings: Any, folder: Path) -> None:
        keys = candidate_keys(self.base, settings, "random tokens", 0, self.compute)
        align_candidates(self.base, settings, self.tokens, folder, keys, 0, self.compute, self.recipe.data.borders)

    def _train(self, settings: Any, folder: Path) -> None:
        borders = self.recipe.data.borders
        train_mixers(self.supernet(), self.placement, settings, self.tokens, folder, 0, self.compute, "dry", borders)

    def _stage2(self, settings: Any, folder: Path) -> None:
        student: Any = self.supernet().build(self.placement, torch.float32)
        borders = self.recipe.data.borders
        train_all(student, self.base, settings, self.tokens, folder, 0, self.compute, "dry", borders)

    def _place(self, folder: Path) -> Measured:
        net, block, begin = self.supernet(), self.recipe.place.block, time.monotonic()
        rows = {name: self._rows(name) for name in objectives.members(self.recipe.place.objectives)}
        scorer = Scorer(net, rows, folder / "scored.jsonl", self.compute, "dry")
        layers = range(2, net.layers, EVERY)
        alone = [with_linear(self.attention, block, {layer}) for layer in layers]
        scorer(self.attention)
        for _ in range(PASSES):
            scorer.several(alone)
            scorer.known.clear()  # what is known is not measured again, and what was run last is shared
            scorer.last.clear()
            if time.monotonic() > self.until:
                raise Enough
        warm, begin = time.monotonic() - begin, time.monotonic()
        scorer.several(alone)  # its losses are read on the CPU, so all is done when it returns
        seconds = time.monotonic() - begin
        base, _, linear = self.sizes
        flops = 0.0
        for one in rows.values():
            count, length = one.tokens.shape
            for layer in layers:
                mixers = [linear.mixers[layer], *base.mixers[layer + 1 :]]
                body = sum(mixer.flops(length) for mixer in mixers) + len(mixers) * base.mlp_flops(length)
                scored = int(one.scored.sum()) * (2 if one.kind == "kl" else 1)
                flops += count * body + base.head_flops(scored)
        tokens = len(alone) * sum(one.tokens.numel() for one in rows.values())
        return Measured(len(alone), tokens, seconds, warm, flops)

    def _rows(self, name: str) -> objectives.Objective:
        """Random rows of an objective's shape; those of knowledge are as long as those of recall here."""
        passage, filler = objectives.COPY
        width = {"kl": objectives.LENGTH, "copy": 2 * passage + filler}.get(name, objectives.LONG)
        last = {"kl": objectives.LENGTH - 1, "copy": passage - 1}.get(name, ANSWER)
        count = max(1, self.recipe.place.tokens // width)
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.config.vocab_size, (count, width), generator=draw)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        scored[:, -last:] = True
        ids = tuple(f"{name}-{row}" for row in range(count))
        return objectives.Objective(name, "kl" if name == "kl" else "nll", tokens, scored, None, ids, ("random",))


def random_base(config: HybridConfig, dtype: torch.dtype, device: torch.device) -> HybridForCausalLM:
    """A base of random weights, frozen, in evaluation mode."""
    with torch.device("meta"):
        shapes = HybridForCausalLM(config).state_dict()
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, value in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights[name] = torch.zeros(value.shape, dtype=dtype, device=device)
        if "norm" in name:
            weights[name] += 1.0 - config.norm_offset
        elif value.ndim == 2:
            weights[name].normal_(0.0, 0.02)
    base: Any = model_from_weights(config, weights, dtype).requires_grad_(False)
    return base.to(device)


def small(recipe: Recipe, config: HybridConfig) -> tuple[Recipe, HybridConfig]:
    """The same at a size that a CPU runs in seconds. Six layers hold both kinds of Gemma's."""
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    kv = min(2, config.num_key_value_heads or 1)
    fields |= {"num_hidden_layers": 6, "placement": (config.placement or [])[:6], "vocab_size": 512}
    fields |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": kv}
    fields |= {"num_attention_heads": 2 * kv, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    parts = {name: replace(getattr(recipe, name), length=32, batch=2) for name in ("align", "train", "stage2")}
    place = replace(recipe.place, tokens=512, budget=min(2, recipe.place.budget))
    return dataclasses.replace(recipe, place=place, **parts), HybridConfig(**fields)


def measure(dry: DryRun, name: str) -> dict[str, Any]:
    """A row of a stage, at the largest batch of the recipe's halves that memory takes."""
    asked = 0 if name == "place" else getattr(dry.recipe, name).batch
    length = objectives.LONG if name == "place" else getattr(dry.recipe, name).length
    row: dict[str, Any] = {"stage": name, "block": dry.recipe.place.block, "length": length, "asked_batch": asked}
    batch = asked
    while True:
        free()
        if dry.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", UserWarning)
                found = dry.stage(name, batch)
        except torch.OutOfMemoryError as error:
            problem = f"{error}".splitlines()[0]
        else:
            break
        print(f"{name} at batch {batch}: {problem}", flush=True)
        batch //= 2
        if batch == 0:
            return row | {"batch": min(asked, 1), "error": problem}
    peak = next((GPUS[key].flops for key in ("h100", "h200") if key.upper() in device_name(dry.device)), None)
    row |= {
        "batch": batch,  # of place 0: its batch is all rows of an objective
        "tokens_per_s": found.tokens / found.seconds,
        "mfu": None if peak is None else found.flops / found.seconds / peak,
        "peak_bytes": peak_bytes(dry.device),
        "steps": found.steps,
        "seconds": found.seconds,
        "warm_up_seconds": found.warm_up_seconds,
    }
    notes = sorted({str(one.message).splitlines()[0] for one in told if issubclass(one.category, UserWarning)})
    return row | ({"warnings": notes} if notes else {})


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """The most that the stage held on the GPU; on a CPU the most that this process ever did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Rows:
    """The file of results, written anew with every row."""

    def __init__(self, path: Path, tiny: bool) -> None:
        self.path = path
        self.stamp = {"command": f"python benchmarks/dry_run_h100.py{' --tiny' if tiny else ''}"}
        self.stamp |= {"device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
        self.stamp |= {"torch": torch.__version__, "date": date.today().isoformat()}
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = read_json(path)
            if (found["device"], found["command"]) != (self.stamp["device"], self.stamp["command"]):
                sys.exit(f"{path}: is of {found['device']}, {found['command']}; set OUT to another folder")
            self.rows = found["rows"]

    def has(self, model: str, stage: str) -> bool:
        return any((row["model"], row["stage"]) == (model, stage) for row in self.rows)

    def __call__(self, **row: Any) -> None:
        print(row, flush=True)
        self.rows.append(row)
        write_json(self.path, self.stamp | {"rows": self.rows})


def work(names: list[str], stages: list[str], configs: Path, until: float, tiny: bool, add: Rows) -> None:
    """Measure what `add` has not got yet, until the time is up."""
    for name in names:
        recipe, config = read_recipe("run", [f"recipes/{name}.yaml"]), base_config(str(configs / f"{name}.json"))
        own = {"recipe": name, "model": recipe.base.model}
        left = [stage for stage in stages if stage == "place" or getattr(recipe, stage).tokens]
        left = [stage for stage in left if not add.has(own["model"], stage)]
        if tiny:
            recipe, config = small(recipe, config)
        if not left:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            dry = DryRun(recipe, config, Path(scratch), until)
            for stage in left:
                try:
                    row = measure(dry, stage)
                except Enough:
                    print(f"{name} {stage}: the time is up; the same command goes on", flush=True)
                    return
                except Exception as error:  # a case that fails must not cost the others
                    row = {"stage": stage, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
                add(**own, **row)
            del dry
        free()
        if time.monotonic() > until:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="A few steps of every stage of the recipes at true shapes.")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="names of recipes/NAME.yaml")
    parser.add_argument(
        "--configs", type=Path, default=Path("tests/shapes"), help="a folder with NAME.json of the bases"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=550.0, help="no stage is begun after them")
    parser.add_argument("--tiny", action="store_true", help="six narrow layers, short sequences: tries every line")
    given = parser.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        sys.exit("there is no GPU here; --tiny tries every line on a CPU")
    if given.tiny and "OUT" not in os.environ:
        sys.exit("OUT: is not set; what --tiny measures is no result, so give it a folder of its own")
    path = Path(os.environ.get("OUT", "benchmarks/results")) / "dry-run-h100.json"
    names = [Path(name).stem if name.endswith(".yaml") else name for name in given.recipes]
    work(names, given.stages, given.configs, time.monotonic() + given.seconds, given.tiny, Rows(path, given.tiny))


if __name__ == "__main__":
    main()

"""Blocks, designs of the JetBlock and sizes on equal terms: SmolLM2-135M with four layers on full attention.

    python benchmarks/blocks_h100.py speeds                            # alone on the GPU
    python benchmarks/blocks_h100.py blocks --seed 0 --seconds 550     # then --seed 1; so for ablation and sizes
    python benchmarks/blocks_h100.py blocks --only jet gla             # several processes may share the work
    python benchmarks/blocks_h100.py sizes_2b                          # decode speed alone, at the 2B shape
    python benchmarks/blocks_h100.py table

What is done is kept in runs/blocks (or $KEPT), and the same command goes on; --seconds stops it in time, between two
variants. Every variant is aligned, tries each learning rate, is distilled and measured by `postnas.search.variants`,
with the same tokens, order and rows for all of a seed, in a folder of its own, which one process at a time holds.
Blocks have the same value dim, twice the key dim, so that states weigh alike. A block without a kernel that fla's trial
has found right is trained through its plain form on fewer tokens, and its row says so.

`speeds` times a few steps of the distillation, and decode, of every block and design; no other step's times count.
Of sizes it times decode first, by which `sizes` chooses what it trains; asked again after `sizes`, their training too.
`table` writes blocks-h100.json, ablation-h100.json and sizes-h100.json to
benchmarks/results (or $OUT): a row for each variant, task and metric, with its speeds and the paired difference from
the first variant. --recipe, --placement: others, to try every line at a tiny size. --tokens, --align-tokens,
--lr-tokens: other lengths of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from placement_h100 import claimed

from postnas.__main__ import read_recipe
from postnas.blocks import linear_blocks, make_block
from postnas.errors import UserError
from postnas.files import read_json, read_jsonl, write_json
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.ops import fla
from postnas.run import Run
from postnas.search import blocks, sizes
from postnas.search.speed import decode_speed, device_name
from postnas.search.variants import Comparison, Terms, Variant
from postnas.train.align import new_candidates
from postnas.train.distill import train_mixers
from postnas.trials import Select, Size
from postnas.warm import training

KEPT = Path(os.environ.get("KEPT", "runs/blocks"))
RECIPE = "recipes/smollm2-135m.yaml"
PLACEMENT = (7, 17, 18, 23)
"""Layers on full attention: what `beam` found at a budget of four (benchmarks/results/placement-h100.json)."""
EXPAND = {"expand_v": 2.0}
TERMS: dict[str, Any] = {
    "tokens": 3_000_000,
    "align_tokens": 1_000_000,
    "lrs": [3.5e-4, 7e-4, 1.4e-3],
    "lr_tokens": 200_000,
    "context": 8192,
    "limit": 300,
}
PLAIN_TOKENS = 1_000_000
"""Tokens of the distillation where only the plain form is there."""
SKIPPED, TIMED = 6, 16
"""Training steps that are not timed, in which kernels are compiled and the step is captured, and those that are."""
DESIGNS: dict[str, dict[str, Any]] = {
    "jet": {},
    "static on v": {"conv_v": "static"},
    "none on v": {"conv_v": "none"},
    "static on q, k; dynamic on v": {"conv_q": "static", "conv_k": "static"},
    "static on q, k, v": {"conv_q": "static", "conv_k": "static", "conv_v": "static"},
    "dynamic on q, k, v": {"conv_q": "dynamic", "conv_k": "dynamic"},
    "kernels from v": {"generator_input": "v"},
    "generator half as wide": {"dconv_generator_reduction": 16},
    "SiLU before the convolution": {"silu_first": True},
}
SIZES = {"heads": [3, 6, 9, 12], "key_dims": [32, 64, 96], "trained": 6}
PAPER = [(256, 288, 4), (192, 384, 4), (128, 576, 4), (256, 144, 8), (192, 192, 8), (128, 288, 8), (128, 192, 12)]
PAPER += [(96, 256, 12), (64, 384, 12)]
"""Key dim, value dim and heads of the paper's table of sizes."""
LAYERS_2B = ["attn" if n in (14, 19) else "swa" if n in (20, 21) else "gated_deltanet" for n in range(28)]
SHAPE_2B = "tests/shapes/qwen2.5-1.5b.json"
CONTEXT_2B, BATCH_2B = 65_536, 128


class Bench:
    """One seed's comparisons."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.until, self.given, self.tiny = time.monotonic() + given.seconds, given, given.recipe != RECIPE
        recipe = read_recipe("run", [given.recipe, "--seed", str(given.seed)])
        self.run = Run(dataclasses.replace(recipe, out=str(KEPT / f"seed-{given.seed}")))
        torch.set_num_threads(recipe.threads if self.run.device.type == "cpu" else 8)
        kept = PLACEMENT if given.placement is None else given.placement
        layers = self.run.base.config.num_hidden_layers
        placement = ["attn" if layer in kept else recipe.place.block for layer in range(layers)]
        write_json(self.run.folder / "placement.json", {"placement": placement})
        self.terms: Terms = self.run.terms("select")
        self.kernels: dict[str, bool] = {}

    def settings(self, kind: type, **more: Any) -> Any:
        recipe = self.run.recipe
        asked: dict[str, Any] = {}
        if self.tiny:
            asked |= {"tokens": recipe.train.tokens, "align_tokens": recipe.align.tokens, "lr_tokens": 256}
            asked |= {"limit": 4, "context": 64}
        for name in ("tokens", "align_tokens", "lr_tokens"):
            asked |= {name: getattr(self.given, name)} if getattr(self.given, name) else {}
        return kind(**TERMS | asked | more)

    def blocks(self) -> None:
        self.train_all("blocks", BLOCKS)

    def ablation(self) -> None:
        self.train_all("ablation", ABLATION)

    def wanted(self, variants: list[Variant]) -> Iterator[Variant]:
        """Those that --only names, all without it, while there is time."""
        for variant in variants:
            if time.monotonic() > self.until:
                return
            if not self.given.only or variant.name in self.given.only:
                yield variant

    def train_all(self, stage: str, variants: list[Variant]) -> None:
        """Train and measure what is missing and no other process is at."""
        for variant in self.wanted(variants):
            folder = variant_folder(self.run.folder, variant)
            with claimed(folder) as mine:
                if mine:
                    self.train(stage, variant, folder)

    def train(self, stage: str, variant: Variant, folder: Path) -> None:
        """Both stages have the JetBlock; on the same terms it is trained once."""
        settings, begin = self.settings(Select), time.monotonic()
        row: dict[str, Any] = {"variant": variant.name, "block": variant.block}
        try:
            row["kernel"] = self.has_kernel(variant)
            if row["kernel"] is False:
                settings = dataclasses.replace(settings, tokens=min(settings.tokens, PLAIN_TOKENS))
            made = Comparison(stage, settings, dataclasses.replace(self.terms, folder=folder)).trained(variant)
        except (UserError, RuntimeError) as error:  # whatever it is, the other variants can be compared
            row["error"] = f"{type(error).__name__}: {error}"
            self.keep(folder / f"{stage}-error.json", row)
            print(f"{variant.name}: {row['error']}", flush=True)
            return
        finally:
            freed()
        # a speed that was taken beside other processes is none
        self.keep(folder / f"{stage}.json", row | without(made, "key", "train_tokens_per_s"))
        print(f"{variant.name}: {time.monotonic() - begin:.1f} s", flush=True)

    def has_kernel(self, variant: Variant) -> bool | None:
        """Does a layer of the block learn through kernels that were found right? None without a GPU."""
        if self.run.device.type != "cuda":
            return None
        asked = f"{variant.block} {variant.options}"  # another size has another kernel
        if asked not in self.kernels:
            before = dict(fla.asked)
            fla.asked.clear()  # another block may have asked for the same shape
            with torch.device(self.run.device):
                block = make_block(variant.block, self.terms.base.config.dims(), variant.options)
            training(block, self.terms.compute, borders=False)
            self.kernels[asked] = bool(fla.asked) and None not in fla.asked.values()
            fla.asked.update(before)
        return self.kernels[asked]

    # ---- sizes

    def size_settings(self) -> Size:
        chosen = SIZES | ({"heads": [2, 4], "key_dims": [4, 8], "trained": 2} if self.tiny else {})
        settings: Size = self.settings(Size, **chosen)
        return settings

    @property
    def size_terms(self) -> Terms:
        return dataclasses.replace(self.terms, folder=self.run.folder / "sizes")

    def sizes(self) -> None:
        with claimed(self.run.folder / "sizes") as mine:
            if mine:
                found = sizes.size(self.size_settings(), self.size_terms, "jet", dict(EXPAND))
                self.keep(self.run.folder / "sizes.json", {"rows": found["rows"], "grid": found["grid"]})

    # ---- speeds

    def speeds(self) -> None:
        """Training and decode of every variant, one after the other."""
        if not self.given.only:
            self.grid_speeds()
        path = KEPT / "speeds.json"
        found = read_json(path)["rows"] if path.exists() else []
        device = device_name(self.run.device)
        for variant in self.wanted(unique([*BLOCKS, *ABLATION, *trained_sizes()])):
            if any((row["variant"], row["device"]) == (variant.name, device) and "error" not in row for row in found):
                continue
            row: dict[str, Any] = {"variant": variant.name, "block": variant.block, "options": variant.options}
            row |= {"device": device, "torch": torch.__version__}
            try:
                row |= {"kernel": self.has_kernel(variant)} | self.speed(variant)
            except (UserError, RuntimeError) as error:
                row["error"] = f"{type(error).__name__}: {error}"
            freed()
            print(row, flush=True)
            found = [old for old in found if old["variant"] != variant.name] + [row]
            write_json(path, {"date": date.today().isoformat(), "rows": found})

    def speed(self, variant: Variant) -> dict[str, Any]:
        """Tokens/s of a few steps of the distillation, and of decode; both from random or just inherited weights."""
        folder, terms = self.run.folder / "speed", self.terms
        shutil.rmtree(folder, ignore_errors=True)
        align = dataclasses.replace(terms.align, blocks=[variant.block], options={variant.block: variant.options})
        mixers = new_candidates(terms.base, align, terms.tokens, terms.seed, terms.compute, terms.linear)
        net, placement = terms.supernet(variant.block, mixers[variant.block]), terms.placed(variant.block)
        tokens = (SKIPPED + TIMED) * terms.train.batch * terms.train.length
        train = dataclasses.replace(terms.train, tokens=tokens)
        how = terms.seed, terms.compute, variant.name, terms.borders
        train_mixers(net, placement, train, terms.tokens, folder, *how)
        rates = [line["tokens_per_s"] for line in read_jsonl(folder / "metrics.jsonl")][SKIPPED:]
        row: dict[str, Any] = {"train_tokens_per_s": statistics.median(rates), "train_n": len(rates)}
        row |= {"train_stderr": statistics.stdev(rates) / len(rates) ** 0.5}
        row |= {"train_batch": train.batch, "train_length": train.length}
        del net, mixers
        freed()
        settings = self.settings(Select)
        found = Comparison("speeds", settings, dataclasses.replace(terms, folder=folder)).speed(variant)
        shutil.rmtree(folder)
        row |= {"context": settings.context, "batch": settings.batch}
        return row | without(found, "key")

    def grid_speeds(self) -> None:
        """Decode of every size, kept where `sizes` looks for it."""
        settings, terms = self.size_settings(), self.size_terms
        base = Variant("", "jet", dict(EXPAND))
        _, found, _ = sizes.asked_grid(settings, "jet", terms.meta(base), base.options, terms.dtype)
        comparison = Comparison("size", settings, terms)
        for options in [base.options, *found]:
            comparison.speed(Variant("", "jet", options))

    def keep(self, path: Path, value: dict[str, Any]) -> None:
        stamp = {"device": device_name(self.run.device), "torch": torch.__version__, "date": date.today().isoformat()}
        write_json(path, stamp | {"seed": self.given.seed} | value)


BLOCKS = [Variant(name, name, dict(EXPAND)) for name in linear_blocks()]
ABLATION = [Variant(name, "jet", EXPAND | changed) for name, changed in DESIGNS.items()]
"""The first of each is what the others are compared with. A variant of the same name is the same one."""


def unique(variants: list[Variant]) -> list[Variant]:
    return list({variant.name: variant for variant in variants}.values())


def trained_sizes() -> list[Variant]:
    """The sizes that some seed has trained."""
    rows = [row for path in sorted(KEPT.glob("seed-*/sizes.json")) for row in read_json(path)["rows"]]
    return unique([Variant(row["name"], row["block"], row["options"]) for row in rows])


def variant_folder(seed_folder: Path, variant: Variant) -> Path:
    return seed_folder / "variants" / re.sub("[^a-z0-9]+", "-", variant.name.lower())


def freed() -> None:
    """Graphs refer to themselves, and hold what they need on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sizes_2b(given: argparse.Namespace) -> None:
    """Decode speed of the paper's nine sizes in a model of 28 layers, at 64K tokens and its batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = {k: v for k, v in read_json(Path(SHAPE_2B)).items() if k not in ("model_type", "architectures")}
    tiny = device.type == "cpu"
    rows = []
    for key_dim, value_dim, heads in PAPER:
        options = {"num_heads": heads, "head_dim": key_dim, "expand_v": sizes.expansion(key_dim, value_dim)}
        options["qkv_bias"] = False
        fields = plain | {"placement": LAYERS_2B, "blocks": {"gated_deltanet": options, "swa": {"window_size": 1152}}}
        fields |= {"qkv_bias": True, "dtype": torch.bfloat16}
        if tiny:
            fields |= {"hidden_size": 96, "intermediate_size": 64, "vocab_size": 256, "num_attention_heads": 12}
            fields |= {"num_key_value_heads": 2, "head_dim": 8}
        row: dict[str, Any] = {"key_dim": key_dim, "value_dim": value_dim, "heads": heads}
        try:
            with torch.device(device):
                model: Any = HybridForCausalLM(HybridConfig(**fields)).to(torch.bfloat16).eval()
            found = decode_speed(model, 64 if tiny else CONTEXT_2B, 2 if tiny else BATCH_2B)
            row |= found | {"params": sum(p.numel() for p in model.parameters())}
            del model
        except (UserError, RuntimeError) as error:
            row |= {"error": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache() if device.type == "cuda" else None
        print(row, flush=True)
        rows.append(row)
        stamp = {"device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
        write_json(KEPT / "sizes_2b.json", stamp | {"context": CONTEXT_2B, "batch": BATCH_2B, "rows": rows})


def table(given: argparse.Namespace) -> None:
    """The published files, over all seeds that are there."""
    path = KEPT / "speeds.json"
    speeds = {row["variant"]: row for row in read_json(path)["rows"]} if path.exists() else {}
    for stage, variants in (("blocks", BLOCKS), ("ablation", ABLATION)):
        stamps, rows = [], []
        for seed_folder in sorted(KEPT.glob("seed-*")):
            folders = {variant.name: variant_folder(seed_folder, variant) for variant in variants}
            paths = {name: folder / f"{stage}.json" for name, folder in folders.items()}
            done = {name: read_json(path) for name, path in paths.items() if path.exists()}
            failed = [folder / f"{stage}-error.json" for name, folder in folders.items() if name not in done]
            rows += [read_json(path) for path in failed if path.exists()]
            first = done.get(variants[0].name)
            for name, made in done.items():
                alone = first is None or made is first
                base = made if first is None else first
                scores = blocks.paired_scores(base["outputs"], made["outputs"], alone)
                stamps.append({key: made[key] for key in ("device", "torch", "date")})
                own = without(made, "outputs", "device", "torch", "date")
                rows += with_scores(own | speed_of(speeds, name), scores)
        publish(stage, stamps, rows)
    stamps, rows = [], []
    for path in sorted(KEPT.glob("seed-*/sizes.json")):
        found = read_json(path)
        stamps.append({key: found[key] for key in ("device", "torch", "date")})
        for row in found["rows"]:
            own = {"variant": row["name"], "seed": found["seed"]} | without(row, "name", "scores", "train_tokens_per_s")
            rows += with_scores(own | speed_of(speeds, row["name"]), row["scores"])
        rows += [{"shape": "135M", "seed": found["seed"]} | row for row in found["grid"]]
    for path in KEPT.glob("sizes_2b.json"):
        found = read_json(path)
        stamps.append({key: found[key] for key in ("device", "torch", "date")})
        rows += [{"shape": "2B", "context": found["context"], "batch": found["batch"]} | row for row in found["rows"]]
    publish("sizes", stamps, rows)


def speed_of(speeds: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What `speeds` found, with the card that it was measured on."""
    row = speeds.get(name, {})
    found = without(row, "variant", "block", "options", "kernel", "torch", "device", "error")
    return found | ({"speed_device": row["device"]} if found else {})


def with_scores(row: dict[str, Any], scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each score."""
    own = without(row, "rates")
    return [own | {("score" if key == "value" else key): value for key, value in score.items()} for score in scores]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def publish(stage: str, stamps: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    path = Path(os.environ.get("OUT", "benchmarks/results")) / f"{stage}-h100.json"
    if rows:
        command = {"command": f"python benchmarks/blocks_h100.py speeds {stage} table"}
        write_json(path, command | (stamps[-1] if stamps else {}) | {"rows": rows})
        print(f"wrote {path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["speeds", "blocks", "ablation", "sizes", "sizes_2b", "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--placement", type=int, nargs="+")
    known = [variant.name for variant in unique([*BLOCKS, *ABLATION, *trained_sizes()])]
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME")
    for name in ("--tokens", "--align-tokens", "--lr-tokens"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    bench = None
    for step in given.steps:
        if step in ("sizes_2b", "table"):
            (sizes_2b if step == "sizes_2b" else table)(given)
        else:
            bench = bench or Bench(given)
            getattr(bench, step)()


if __name__ == "__main__":
    main()

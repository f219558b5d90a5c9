"""Blocks, designs of the JetBlock and sizes on equal terms: SmolLM2-135M with four layers on full attention.

    python benchmarks/blocks_h100.py blocks --seed 0 --seconds 550     # then --seed 1; so for ablation and sizes
    python benchmarks/blocks_h100.py sizes_2b                          # decode speed alone, at the 2B shape
    python benchmarks/blocks_h100.py table

What is done is kept in runs/blocks (or $KEPT), and the same command goes on; --seconds stops it in time, between two
variants. Every variant is aligned, tries each learning rate, is distilled and measured by `postnas.search.blocks`,
with the same tokens, order and rows for all of a seed. Blocks have the same value dim, twice the key dim, so that
states weigh alike. A block without a kernel that fla's trial has found right is trained through its plain form on
fewer tokens, and its row says so. `table` writes blocks-h100.json, ablation-h100.json and sizes-h100.json to
benchmarks/results (or $OUT): a row for each variant, task and metric, with the paired difference from the first
variant. --recipe, --placement: others, to try every line at a tiny size.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from postnas.__main__ import read_recipe
from postnas.blocks import linear_blocks, make_block
from postnas.errors import UserError
from postnas.files import read_json, write_json
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.ops import fla
from postnas.run import Run
from postnas.search import blocks, sizes
from postnas.search.speed import decode_speed, device_name
from postnas.search.variants import Comparison, Terms, Variant
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
PAPER = ((256, 288, 4), (192, 384, 4), (128, 576, 4), (256, 144, 8), (192, 192, 8), (128, 288, 8), (128, 192, 12))
PAPER += ((96, 256, 12), (64, 384, 12))
"""Key dim, value dim and heads of the paper's table of sizes."""
LAYERS_2B = ["attn" if n in (14, 19) else "swa" if n in (20, 21) else "gated_deltanet" for n in range(28)]
SHAPE_2B = "tests/shapes/qwen2.5-1.5b.json"
CONTEXT_2B, BATCH_2B = 65_536, 128


class Bench:
    """One seed's comparisons."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.until, self.given = time.monotonic() + given.seconds, given
        recipe = read_recipe("run", [given.recipe, "--seed", str(given.seed)])
        self.run = Run(dataclasses.replace(recipe, out=str(KEPT / f"seed-{given.seed}")))
        torch.set_num_threads(recipe.threads if self.run.device.type == "cpu" else 8)
        kept = given.placement or PLACEMENT
        layers = self.run.base.config.num_hidden_layers
        placement = ["attn" if layer in kept else recipe.place.block for layer in range(layers)]
        write_json(self.run.folder / "placement.json", {"placement": placement})
        self.terms: Terms = self.run.terms("select")
        self.kernels: dict[str, bool] = {}
        self.short = {"tokens": recipe.train.tokens, "align_tokens": recipe.align.tokens, "lr_tokens": 256, "limit": 4}
        self.short |= {"context": 64}

    def settings(self, kind: type, **more: Any) -> Any:
        tiny = self.given.recipe != RECIPE
        return kind(**TERMS | (self.short if tiny else {}) | more)

    def blocks(self) -> None:
        self.all("blocks", [Variant(name, name, dict(EXPAND)) for name in linear_blocks()])

    def ablation(self) -> None:
        self.all("ablation", [Variant(name, "jet", EXPAND | changed) for name, changed in DESIGNS.items()])

    def all(self, stage: str, variants: list[Variant]) -> None:
        """Train what is missing while there is time; then keep the rows of what is there."""
        settings, done = {}, []
        for variant in variants:
            plain = self.run.device.type == "cuda" and not self.has_kernel(variant)
            settings[variant.name] = self.settings(Select, **({"tokens": PLAIN_TOKENS} if plain else {}))
            comparison = Comparison(stage, settings[variant.name], self.terms)
            if time.monotonic() > self.until:
                break
            begin = time.monotonic()
            try:
                comparison.trained(variant)
                comparison.speed(variant)
            except (UserError, RuntimeError) as error:  # whatever it is, the other variants can be compared
                print(f"{variant.name}: {type(error).__name__}: {error}", flush=True)
                continue
            done.append(variant)
            print(f"{variant.name}: {time.monotonic() - begin:.1f} s", flush=True)
        rows = []
        for variant in done:
            # all rows are on the same texts, so each may be compared with the first, whatever it was trained on
            made = Comparison(stage, settings[variant.name], self.terms)
            first = Comparison(stage, settings[done[0].name], self.terms).trained(done[0])["outputs"]
            scores = blocks.paired_scores(first, made.trained(variant)["outputs"], variant is done[0])
            own = {
                k: v for k, v in (made.trained(variant) | made.speed(variant)).items() if k not in ("key", "outputs")
            }
            kernel = self.run.device.type != "cuda" or self.has_kernel(variant)
            rows.append({"variant": variant.name, "block": variant.block, "kernel": kernel} | own | {"scores": scores})
        self.keep(stage, rows)

    def has_kernel(self, variant: Variant) -> bool:
        """Does a layer of the block learn through kernels that were found right? Compiles them."""
        if variant.block not in self.kernels:
            before = set(fla.asked)
            with torch.device(self.run.device):
                block = make_block(variant.block, self.terms.base.config.dims(), variant.options)
            training(block, self.terms.compute, borders=False)
            found = [kernel for shape, kernel in fla.asked.items() if shape not in before]
            self.kernels[variant.block] = None not in found
        return self.kernels[variant.block]

    def sizes(self) -> None:
        tiny = self.given.recipe != RECIPE
        chosen = SIZES | ({"heads": [2, 4], "key_dims": [4, 8], "trained": 2} if tiny else {})
        found = sizes.size(self.settings(Size, **chosen), self.terms, "jet", dict(EXPAND))
        self.keep("sizes", found["rows"])
        self.keep("grid", found["grid"])

    def keep(self, stage: str, rows: list[dict[str, Any]]) -> None:
        stamp = {"device": device_name(self.run.device), "torch": torch.__version__, "date": date.today().isoformat()}
        stamp |= {"seed": self.given.seed}
        write_json(self.run.folder / f"{stage}.json", stamp | {"rows": rows})


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
    results = Path(os.environ.get("OUT", "benchmarks/results"))
    for stage, name in (("blocks", "blocks-h100"), ("ablation", "ablation-h100"), ("sizes", "sizes-h100")):
        rows: list[dict[str, Any]] = []
        stamp: dict[str, Any] = {}
        for path in sorted(KEPT.glob(f"seed-*/{stage}.json")):
            found = read_json(path)
            stamp = {key: found[key] for key in ("device", "torch", "date")}
            for one in found["rows"]:
                plain = {key: value for key, value in one.items() if key not in ("scores", "rates", "name")}
                plain |= {"variant": one.get("variant", one.get("name")), "seed": found["seed"]}
                rows += [plain | {("score" if k == "value" else k): v for k, v in s.items()} for s in one["scores"]]
        if stage == "sizes":
            for path in [*sorted(KEPT.glob("seed-*/grid.json")), *KEPT.glob("sizes_2b.json")]:
                found = read_json(path)
                stamp = {key: found[key] for key in ("device", "torch", "date")}
                extra = {key: found[key] for key in ("seed", "context", "batch") if key in found}
                rows += [{"shape": "2B" if path.stem == "sizes_2b" else "135M"} | extra | row for row in found["rows"]]
        if rows:
            command = f"python benchmarks/blocks_h100.py {stage}"
            write_json(results / f"{name}.json", {"command": command} | stamp | {"rows": rows})
            print(f"wrote {results / name}.json: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["blocks", "ablation", "sizes", "sizes_2b", "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--placement", type=int, nargs="+")
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

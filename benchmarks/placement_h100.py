"""Every search strategy on equal terms: placements of SmolLM2-135M, each distilled on the same tokens and evaluated.

    python benchmarks/placement_h100.py align search score distil [--seed 0] [--seconds 550]
    python benchmarks/placement_table.py

Works through the steps that are named, in this order, and stops in time; what is done is kept in runs/placement (or
$KEPT), and the same command goes on. `align` makes three sets of candidates: aligned ones, and copies that then learnt
inside random paths by feature distillation (the paper's, `feature`) or by KL (`kl`, the remedy). `search` runs the
strategies, and scores every layer alone for the heat maps; seeds other than 0 search what EVERY_SEED names. `score`
gives each placement that was found, and those beyond that fill up what the rank correlation needs, its search score by
every set. `distil` trains each of them from the aligned candidates, on the same tokens in the same order, and keeps
what the hybrid gives to every row; several processes may do so side by side, each takes the next placement that nobody
has. A record of another recipe, or of candidates of other bits, is made again. The table writes
benchmarks/results/placement-h100.json (or $OUT).
--recipe: another one, to try every line at a tiny size.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from placement_rows import Rows

from postnas.__main__ import read_recipe
from postnas.errors import UserError
from postnas.files import read_json, read_jsonl, replacing, write_json
from postnas.models.supernet import Placement, Supernet
from postnas.pipeline import STAGE_FUNCTIONS, Run
from postnas.recipe import Paths, Place
from postnas.search import objectives, placement
from postnas.search.scores import Scorer
from postnas.search.strategies import STRATEGIES, with_linear
from postnas.search.strategies import random as drawn
from postnas.search.windows import window_candidates, windows
from postnas.sources import file_sha256
from postnas.train.align import digest
from postnas.train.distill import train_mixers

RECIPE = "recipes/smollm2-135m.yaml"
KEPT = Path(os.environ.get("KEPT", "runs/placement"))
SETS = ("aligned", "feature", "kl")
"""Sets of candidates."""
PATHS = Paths(tokens=1_000_000, length=1024, batch=8, lr=5e-4, budgets=[1, 2, 4, 8], checkpoint_every=10_000)
BUDGETS = (1, 2, 4, 8)
MAIN = 4
"""The budget whose placements are distilled with every seed."""
SEARCHED = ("swap", "greedy", "beam", "gates")
SECOND = 2
"""The budget whose placements are distilled with the first seed alone."""
SEARCHES: dict[tuple[str, str], tuple[int, ...]] = {("aligned", strategy): BUDGETS for strategy in SEARCHED}
SEARCHES |= {("feature", "beam"): (MAIN, SECOND), ("kl", "beam"): (MAIN, SECOND)}
SEARCHES |= {("feature", strategy): (MAIN,) for strategy in SEARCHED if strategy != "beam"}
"""Budgets by set of candidates and strategy."""
EVERY_SEED = [*(("aligned", strategy) for strategy in SEARCHED), ("feature", "beam")]
"""What seeds other than 0 search."""
RANKED = 24
"""Placements of budget 4 that the rank correlation is taken over, at least."""
RANDOM = 3
HEAT = ("kl", "copy", "needle", "key_value", "phone_book", "squad", "arc", "mmlu", "gsm8k")
HEATED = ("aligned",)
"""Sets of candidates of which every layer is scored alone."""


class Bench:
    """One seed's work: sets of candidates, searches, distilled placements."""

    def __init__(
        self, seed: int, seconds: float, recipe: str, sets: Sequence[str] = SETS, budgets: Sequence[int] = BUDGETS
    ) -> None:
        self.sets, self.budgets = sets, budgets
        self.seed, self.until = seed, time.monotonic() + seconds
        self.folder = KEPT / f"seed-{seed}"
        self.recipe = read_recipe("run", [recipe, "--seed", str(seed)])
        self.paths = self.recipe.paths if self.recipe.paths.tokens else PATHS
        self.supernets: dict[str, Supernet] = {}
        self.scorer: Scorer | None = None
        self.hashes: dict[str, str] = {}
        self.longest = 0.0

    def run(self, kind: str) -> Run:
        """The run that a set of candidates is made in; all share base, tokenizer and text."""
        paths = Paths() if kind == "aligned" else dataclasses.replace(self.paths, loss=kind)
        state = Run(dataclasses.replace(self.recipe, paths=paths, out=str(self.folder / kind)))
        if kind != "aligned":
            state.base, state.tokenizer, state.tokens = self.first.base, self.first.tokenizer, self.first.tokens  # type: ignore[misc]
            state.keys = self.first.keys  # type: ignore[misc]
        return state

    @cached_property
    def first(self) -> Run:
        state = self.run("aligned")
        torch.set_num_threads(state.recipe.threads if state.device.type == "cpu" else 8)
        return state

    def over(self, needed: float = 0.0) -> bool:
        """Is less than this much time left?"""
        return time.monotonic() + needed > self.until

    # ---- records: of this recipe and these candidates, or made again

    @cached_property
    def terms(self) -> str:
        """Everything of the recipe that a result depends on."""
        parts = dataclasses.asdict(dataclasses.replace(self.recipe, out="", paths=self.paths))
        return digest({name: part for name, part in parts.items() if name not in ("bench", "threads", "device")})

    def made(self, kind: str) -> str:
        """The same with the bits of a set of candidates."""
        if kind not in self.hashes:
            self.hashes[kind] = digest([self.terms, *(file_sha256(path) for path in self._files(kind))])
        return self.hashes[kind]

    def _files(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("candidates*/**/*.safetensors"))

    def kept(self, name: str, key: str) -> Any:
        """The record of this name where it has this key; else None."""
        path = self.folder / f"{name}.json"
        found = read_json(path) if path.exists() else {}
        return found if found.get("key") == key else None

    def keep(self, name: str, key: str, record: dict[str, Any]) -> None:
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key} | record)

    # ---- align

    def align(self) -> None:
        for kind in self.sets:
            if self.kept(f"{kind}/aligned", self.terms) and self._files(kind):
                continue
            if self.over():
                return
            state = self.first if kind == "aligned" else self.run(kind)
            if kind != "aligned" and not (state.folder / "candidates").exists():
                with replacing(state.folder / "candidates") as temporary:
                    shutil.copytree(self.first.folder / "candidates", temporary, copy_function=os.link)
            if kind == "aligned":
                self._warm(state)
            STAGE_FUNCTIONS["align"](state)
            recipe = state.recipe
            tokens = recipe.align.tokens if kind == "aligned" else recipe.paths.tokens
            seconds = sum(record["seconds"] for record in read_jsonl(state.folder / "metrics.jsonl"))
            self.keep(f"{kind}/aligned", self.terms, {"seconds": seconds, "tokens": tokens, "set": kind})
            shutil.rmtree(state.folder / "checkpoints", ignore_errors=True)
            print(f"{kind}: {tokens:,} tokens, {seconds:.1f} s", flush=True)

    def _warm(self, state: Run) -> None:
        """Two steps of each kind of training that are thrown away: kernels are compiled and tuned here."""
        begin, recipe = time.monotonic(), state.recipe
        short = dataclasses.replace(recipe.align, tokens=2 * recipe.align.batch * recipe.align.length)
        shutil.rmtree(self.folder / "warm", ignore_errors=True)
        scratch = Run(dataclasses.replace(recipe, align=short, out=str(self.folder / "warm")))
        scratch.base, scratch.tokenizer, scratch.tokens = state.base, state.tokenizer, state.tokens  # type: ignore[misc]
        STAGE_FUNCTIONS["align"](scratch)
        net = scratch.aligned()
        few = dataclasses.replace(recipe.train, tokens=2 * recipe.train.batch * recipe.train.length)
        everywhere = with_linear(net.attention, recipe.place.block, set(range(net.layers)))
        train_mixers(net, everywhere, few, state.tokens[0], scratch.folder, 0, state.compute, "warm")
        shutil.rmtree(scratch.folder)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        stamp = {"device": device, "torch": torch.__version__}
        write_json(self.folder / "warm.json", {"seconds": time.monotonic() - begin} | stamp)
        print(f"warm-up: {time.monotonic() - begin:.1f} s", flush=True)

    def supernet(self, kind: str) -> Supernet:
        if kind not in self.supernets:
            self.supernets[kind] = self.first.supernet if kind == "aligned" else self.run(kind).supernet
        return self.supernets[kind]

    # ---- search

    def search(self) -> None:
        settings = self.first.recipe.place
        heldout, tokenizer = self.first.tokens[1].half(1), self.first.tokenizer
        rows = objectives.make(settings.objectives, heldout, tokenizer, settings.tokens, self.seed)
        for kind, strategy in SEARCHES if self.seed == 0 else EVERY_SEED:
            for budget in SEARCHES[kind, strategy] if kind in self.sets else ():
                if self.over():
                    return
                if budget in self.budgets:
                    self._search(kind, strategy, budget, settings, rows)
        if self.seed != 0:
            return
        heat = objectives.make(HEAT, heldout, tokenizer, settings.tokens, self.seed)
        for kind in HEATED:
            if kind in self.sets and not self.over():
                self._heat(kind, heat)
        if not self.over():
            self._windows("aligned", settings, heldout, tokenizer)

    def _scorer(self, kind: str, rows: dict[str, Any], file: str) -> Scorer:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"scored-{kind}-{file}.jsonl"
        if self.scorer is None or self.scorer.path != path:  # which has its layers as graphs
            self.scorer = None
            self.scorer = Scorer(self.supernet(kind), rows, path, self.first.compute, self.made(kind))
        return self.scorer

    def _search(self, kind: str, strategy: str, budget: int, settings: Place, rows: dict[str, Any]) -> None:
        name, key = f"{kind}-{strategy}-{budget}", self.made(kind)
        if self.kept(f"search-{name}", key):
            return
        scorer, begin = self._scorer(kind, rows, strategy), time.monotonic()
        begun = self.kept(f"begun-{name}", key)
        if not begun:
            self.keep(f"begun-{name}", key, {"known": len(scorer.known)})
        known = begun["known"] if begun else len(scorer.known)
        wanted = dataclasses.replace(settings, strategy=strategy, budget=budget)
        _, found = placement.place(scorer, scorer.supernet.attention, wanted, self.seed)
        seconds, scored = time.monotonic() - begin, len(scorer.known) - known
        tokens = sum(int(one.tokens.numel()) for one in rows.values())
        relaxed = wanted.steps * sum(placement.ROWS * one.tokens.shape[1] for one in rows.values())
        record = found | {"candidates": kind, "seconds": seconds, "scored": scored, "score_tokens": tokens}
        record |= {"tokens": scored * tokens + (relaxed if strategy == "gates" else 0)}
        # of one that was killed and went on, the seconds are those of the last sitting alone
        self.keep(f"search-{name}", key, record | {"resumed": bool(begun)})
        kept = [layer for layer, name in enumerate(found["placement"]) if name == "attn"]
        print(
            f"{kind} {strategy} {budget}: {kept} {found['scores']['score']:.3f}, {scored} scored, {seconds:.1f} s",
            flush=True,
        )

    def _heat(self, kind: str, rows: dict[str, Any]) -> None:
        """Each layer alone on its candidate, and each alone on attention, by every objective."""
        if self.kept(f"heat-{kind}", self.made(kind)):
            return
        scorer, begin = self._scorer(kind, rows, "heat"), time.monotonic()
        net, block = scorer.supernet, self.first.recipe.place.block
        layers = set(range(net.layers))
        named = {"base": net.attention, "none": with_linear(net.attention, block, layers)}
        named |= {
            f"without {layer}": with_linear(net.attention, block, {layer}) for layer in reversed(range(net.layers))
        }
        named |= {
            f"only {layer}": with_linear(net.attention, block, layers - {layer})
            for layer in reversed(range(net.layers))
        }
        found = {name: scorer.rows(one) for name, one in named.items()}
        self.keep(f"heat-{kind}", self.made(kind), {"rows": found, "seconds": time.monotonic() - begin})
        print(f"heat {kind}: {time.monotonic() - begin:.1f} s", flush=True)

    def _windows(self, kind: str, settings: Place, heldout: Any, tokenizer: Any) -> None:
        key = self.made(kind)
        first = self.kept(f"search-{kind}-beam-{MAIN}", key)
        if self.kept(f"windows-{kind}", key) or not first:
            return
        begin, net = time.monotonic(), self.supernet(kind)
        net.candidates["swa"] = window_candidates(self.first.base, settings.window)
        rows = objectives.make(["knowledge"], heldout, tokenizer, settings.tokens, self.seed)
        scorer = self._scorer(kind, rows, "windows")
        base = scorer(net.attention)
        shares = objectives.weights({"knowledge": 1.0})
        chosen, steps = windows(
            lambda several: [placement.combine(one, base, shares) for one in scorer.several(several)],
            first["placement"],
            2,
        )
        record = {"placement": chosen, "chosen": steps, "seconds": time.monotonic() - begin, "candidates": kind}
        self.keep(f"windows-{kind}", key, record)
        print(f"windows {kind}: {steps}, {time.monotonic() - begin:.1f} s", flush=True)

    # ---- distil

    def wanted(self) -> list[Placement]:
        """Placements in the order in which they are distilled, each once."""
        attention, block = self.first.supernet.attention, self.first.recipe.place.block
        found: list[Placement] = []
        for budget in (MAIN, SECOND) if self.seed == 0 else (MAIN,):
            found.append(STRATEGIES["uniform"](lambda asked: [0.0] * len(asked), attention, block, budget, 0))
            for strategy in SEARCHED:
                names = {kind: f"search-{kind}-{strategy}-{budget}" for kind in SETS}
                records = [self.kept(name, self.made(kind)) for kind, name in names.items()]
                found += [record["placement"] for record in records if record]
            found += [
                drawn(lambda asked: [0.0] * len(asked), attention, block, budget, number) for number in range(RANDOM)
            ]
            if budget == MAIN:
                windowed, best = (
                    self.kept(name, self.made("aligned")) for name in ("windows-aligned", f"search-aligned-beam-{MAIN}")
                )
                found += [windowed["placement"]] if windowed else []
                if self.seed == 0 and best:
                    found += self._fillers(attention, block, best["placement"], found)
        unique = {tuple(one): one for one in found}
        return list(unique.values())

    def _fillers(self, attention: Placement, block: str, best: Placement, had: list[Placement]) -> list[Placement]:
        """More placements for the rank correlation: 0 to 3 layers of a good one, the others drawn, so that they differ
        in worth."""
        draw, layers = random.Random(0), range(len(attention))
        own = [layer for layer in layers if best[layer] == attention[layer]]
        count = len(
            {tuple(one) for one in had if sum(a == b for a, b in zip(one, attention)) == MAIN and "swa" not in one}
        )
        found = []
        for number in range(max(0, RANKED - count)):
            kept = set(draw.sample(own, number % MAIN))
            kept |= set(draw.sample([layer for layer in layers if layer not in own], MAIN - len(kept)))
            found.append(with_linear(attention, block, set(layers) - kept))
        return found

    def distil(self) -> None:
        self.scorer = None  # its graphs hold memory
        excluded = {
            task: objectives.excluded_rows(task, HEAT) for task in self.recipe.evaluate.tasks if "@" not in task
        }
        heldout = self.first.tokens[1].half(0)
        rows = Rows(self.first.base, self.first.tokenizer, heldout, self.recipe.evaluate, excluded)
        with claimed(self.folder / "distilled" / "base.json") as mine:
            if mine and not self.kept("distilled/base", self.terms):
                self.keep("distilled/base", self.terms, {"outputs": rows.outputs(self.first.base)})
        for one in self.wanted():
            if self.over(self.longest):
                return
            with claimed(self._path(one)) as mine:
                if mine and not self.kept(f"distilled/{self._path(one).stem}", self.made("aligned")):
                    try:
                        self._distil(one, rows)
                    except (RuntimeError, UserError) as error:  # memory that another process holds, say
                        print(f"distil: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)

    def score(self) -> None:
        """Scores of all that is to be distilled, for the rank correlation."""
        for kind in self.sets:
            if self._files(kind) and not self.over():
                self._score_all(kind)

    def _path(self, one: Placement) -> Path:
        return self.folder / "distilled" / f"{hashlib.sha256(' '.join(one).encode()).hexdigest()[:16]}.json"

    def _distil(self, one: Placement, rows: Rows) -> None:
        recipe, begin = self.first.recipe, time.monotonic()
        net = Supernet(self.first.base, deepcopy(self.first.supernet.candidates))
        if "swa" in one:
            net.candidates["swa"] = window_candidates(self.first.base, recipe.place.window)
        scratch = self.folder / "training" / self._path(one).stem
        shutil.rmtree(scratch, ignore_errors=True)
        train_mixers(net, one, recipe.train, self.first.tokens[0], scratch, self.seed, self.first.compute, "distil")
        shutil.rmtree(scratch, ignore_errors=True)
        trained = time.monotonic() - begin
        hybrid = net.build(one, getattr(torch, recipe.base.dtype))
        made = {"placement": one, "seconds": trained, "tokens": recipe.train.tokens, "outputs": rows.outputs(hybrid)}
        self.keep(f"distilled/{self._path(one).stem}", self.made("aligned"), made)
        self.longest = max(self.longest, time.monotonic() - begin)
        kept = [layer for layer, name in enumerate(one) if name == "attn"]
        print(f"distilled {kept}: {trained:.1f} s, measured in {time.monotonic() - begin - trained:.1f} s", flush=True)

    def _score_all(self, kind: str) -> None:
        """Search scores of every placement that is to be distilled, by a set of candidates."""
        asked = [self.first.supernet.attention, *(one for one in self.wanted() if "swa" not in one)]
        key = digest([self.made(kind), asked])
        settings = self.first.recipe.place
        wanted = list(dict.fromkeys([*settings.objectives, "kl"]))
        with claimed(self.folder / f"scores-{kind}.json") as mine:
            if not mine or self.kept(f"scores-{kind}", key):
                return
            heldout = self.first.tokens[1].half(1)
            rows = objectives.make(wanted, heldout, self.first.tokenizer, settings.tokens, self.seed)
            begin, scores = time.monotonic(), self._scorer(kind, rows, "all").several(asked)
            found = [{"placement": one, "scores": score} for one, score in zip(asked, scores, strict=True)]
            self.keep(f"scores-{kind}", key, {"scores": found, "seconds": time.monotonic() - begin})


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Is what will stand in this file ours to make? No other process is then told so; the claim dies with its owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".claim"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["align", "search", "score", "distil"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    given = parser.parse_args()
    bench = Bench(given.seed, given.seconds, given.recipe, given.sets, given.budgets)
    for step in given.steps:
        if not bench.over():
            getattr(bench, step)()


if __name__ == "__main__":
    main()

"""Runs a recipe's stages in order. Every stage resumes by itself; what is done is never done again."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from postnas.blocks import linear_blocks, make_block
from postnas.claim import AGAIN, claim, differing
from postnas.data import Tokens, load_tokenizer, prepare
from postnas.errors import UserError
from postnas.evaluate import suite
from postnas.evaluate.verdict import check_text, evaluate
from postnas.files import locked, read_json, read_jsonl, replacing, write_json, write_text
from postnas.generate.throughput import measure
from postnas.models.checkpoint import base_folder, load_base
from postnas.models.load import load
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.recipe import STAGES, Recipe
from postnas.report.card import model_card
from postnas.report.html import write_report
from postnas.search import objectives
from postnas.search.placement import place
from postnas.search.scores import Scored, Scorer
from postnas.search.strategies import STRATEGIES
from postnas.search.windows import window_candidates
from postnas.train import parallel
from postnas.train.align import Keys, align_candidates, candidate_keys, digest, load_candidates, stored_key_fits
from postnas.train.distill import train_all, train_mixers
from postnas.train.paths import load_paths, path_keys, train_paths

MADE = "made.json"
GATES = "checkpoints/gates"
"""Files and folders of a run directory that more than one function names."""


@dataclass
class Run:
    """One run directory and what its stages share, loaded when first asked for."""

    recipe: Recipe
    solve: bool = False
    """Placements are found from the scores that are there, without a model."""

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)

    @cached_property
    def device(self) -> torch.device:
        if self.recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: 'cuda' is not there on this machine; choose cpu or auto")
        if self.recipe.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @cached_property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.recipe.compute)

    @cached_property
    def base_path(self) -> Path:
        return base_folder(self.recipe.base.model, self.recipe.base.sha256)

    @cached_property
    def base(self) -> HybridForCausalLM:
        base: Any = load_base(str(self.base_path), dtype=getattr(torch, self.recipe.base.dtype))
        return base.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base_path)

    @cached_property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Training and held-out tokens. The first half of those held out is measured on, the second searched on."""
        return prepare(self.recipe.data, self.tokenizer, self.folder / "data")

    @cached_property
    def keys(self) -> Keys:
        """What each candidate is made from."""
        recipe, data = self.recipe, hashlib.sha256(self.tokens[0].ids.tobytes()).hexdigest()
        if recipe.data.repeat:
            data = digest(data, recipe.data.repeat)
        return candidate_keys(self.base, recipe.align, data, recipe.seed, self.compute, recipe.data.borders)

    @cached_property
    def supernet(self) -> Supernet:
        """The base with its candidates: the aligned ones, or where there are such, those that learnt inside paths."""
        net = load_paths(self.aligned(), self.folder, self.made) if self.recipe.paths.tokens else self.aligned()
        if self.recipe.place.windows:
            net.candidates["swa"] = window_candidates(self.base, self.recipe.place.window)
        return net

    def aligned(self) -> Supernet:
        """The base with its aligned candidates."""
        return Supernet(self.base, load_candidates(self.base, self.recipe.align, self.folder, self.keys))

    @cached_property
    def made(self) -> Keys:
        """What the candidates that are placed are made from."""
        recipe = self.recipe
        if not recipe.paths.tokens:
            return self.keys
        return path_keys(self.keys, recipe.paths, recipe.seed, self.compute, recipe.data.borders)

    @cached_property
    def described(self) -> dict[str, Any]:
        """What made.json holds: by this scores are told apart, also where no model is loaded."""
        return {"attention": self.base.config.placement, "candidates": self.made}

    def describe(self) -> None:
        """Keep what the candidates are made from."""
        path = self.folder / MADE
        if parallel.rank() == 0 and not (path.exists() and read_json(path) == self.described):
            write_json(path, self.described)

    @cached_property
    def placed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `place` finds: the contents of scores.json and placement.json."""
        recipe, settings, path = self.recipe, self.recipe.place, self.folder / MADE
        if self.solve and not path.exists():
            raise UserError(f"{path}: is not there; leave --solve out once")
        made = read_json(path) if self.solve else self.described
        key = digest(made["candidates"], settings.tokens, recipe.seed, *([settings.window] if settings.windows else []))
        scores = self.folder / "scored.jsonl"
        if self.solve:
            scorer = Scored(objectives.members(settings.objectives), scores, key)
        else:
            scorer = Scorer(self.supernet, self.scored_on, scores, self.compute, key)
        return place(scorer, made["attention"], settings, recipe.seed, self.folder / GATES)

    @cached_property
    def scored_on(self) -> dict[str, objectives.Objective]:
        """The rows of each objective; those of text are from the held-out half that nothing else is measured on."""
        place = self.recipe.place
        return objectives.make(place.objectives, self.tokens[1].half(1), self.tokenizer, place.tokens, self.recipe.seed)

    def placement(self) -> list[str]:
        return read_json(self.folder / "placement.json")["placement"]


def run(recipe: Recipe, only: str | None = None, solve: bool = False) -> Path:
    """Run a recipe to its end, from wherever it was left, and return the run directory.

    only: one stage that runs by itself, again where it is done already; those before it must be done.
    solve: `place` takes the scores that are there and measures nothing; no model is loaded for it.
    Raises UserError for bad input, and where the directory holds a run of another recipe.
    """
    check(recipe)
    torch.set_num_threads(recipe.threads)
    state = Run(recipe, solve)
    parallel.start(state.device)
    try:
        with locked(state.folder) if parallel.rank() == 0 else nullcontext():
            _run(state, only)
    finally:
        parallel.stop()
    return state.folder


def _run(state: Run, only: str | None) -> None:
    recipe, lead = state.recipe, parallel.rank() == 0
    done_file = state.folder / "stages.json"
    done: dict[str, Any] = read_json(done_file) if done_file.exists() else {}
    wanted = _wanted(recipe, done, only)
    if state.solve:  # what is refused is so before anything is written
        differing(recipe, done, only)
        _ = state.placed
    if lead:
        claim(recipe, done, only)
        if only in AGAIN and done.pop(only, None) is not None:
            write_json(done_file, done)  # a stage that is asked for again counts as open until it has ended
        if "align" in wanted:
            check_base(state)
        elif "place" in wanted and not state.solve:
            _ = state.scored_on
    parallel.barrier()  # what is fetched and tokenised into shared folders is so once, by one rank
    for stage in wanted:
        begin = time.monotonic()
        if lead or stage in SPREAD:
            STAGE_FUNCTIONS[stage](state)
        parallel.barrier()
        if lead:
            seconds = max(time.monotonic() - begin, _logged_seconds(state.folder, stage))
            done[stage] = {"seconds": seconds, "peak_bytes": _peak_bytes(state.device)} | _tokens(recipe, stage)
            write_json(done_file, done)


def _wanted(recipe: Recipe, done: dict[str, Any], only: str | None) -> list[str]:
    if only is None:
        return [stage for stage in STAGES if stage in recipe.stages and stage not in done]
    missing = [stage for stage in NEEDS[only] if stage not in done]
    if missing:
        raise UserError(
            f"{only}: needs {missing[0]}, which is not done in {recipe.out}; run `postnas {missing[0]}` first"
        )
    return [only]


def check(recipe: Recipe) -> None:
    """Everything about a recipe that can be wrong and seen before anything is loaded. Raises UserError."""
    for name in recipe.align.blocks:
        if name not in linear_blocks():
            raise UserError(f"align.blocks: {name!r} is not a linear block; choose from {', '.join(linear_blocks())}")
    if recipe.place.strategy not in (*STRATEGIES, "gates"):
        known = ", ".join([*STRATEGIES, "gates"])
        raise UserError(f"place.strategy: {recipe.place.strategy!r} is unknown; choose from {known}")
    suite.check(recipe.evaluate.tasks, recipe.evaluate.allow_code)


def check_base(state: Run) -> None:
    """What about a recipe does not fit its base or its text, told before an hour of training. Raises UserError."""
    recipe, config = state.recipe, state.base.config
    layers, heldout = config.num_hidden_layers, state.tokens[1].half(0).stream()
    if "place" in recipe.stages and recipe.place.budget > layers:
        raise UserError(f"place.budget: {recipe.place.budget} is more than the base's {layers} layers; give fewer")
    with torch.device("meta"):
        for block in recipe.align.blocks:
            make_block(block, config.dims(), recipe.align.options.get(block))
    state.tokens[0].batch(0, recipe.align.batch, recipe.align.length, recipe.seed)
    for train, stage in ((recipe.paths, "align"), (recipe.train, "train"), (recipe.stage2, "train")):
        if train.tokens and stage in recipe.stages:
            state.tokens[0].batch(0, train.batch, train.length, recipe.seed, world=parallel.world())
    if "place" in recipe.stages:
        _ = state.scored_on
    if "evaluate" in recipe.stages:
        settings = recipe.evaluate
        check_text(
            heldout,
            settings.perplexity_tokens,
            settings.length,
            settings.copy_passages,
            settings.copy_tokens,
            settings.copy_filler,
            recipe.seed,
        )


def _align(state: Run) -> None:
    recipe, borders = state.recipe, state.recipe.data.borders
    for wanted in state.keys.values():
        _ = [stored_key_fits(state.folder, key) for key in wanted]  # refuses another base's before it is described
    state.describe()
    align_candidates(
        state.base, recipe.align, state.tokens[0], state.folder, state.keys, recipe.seed, state.compute, borders
    )
    if recipe.paths.tokens:
        args = (recipe.paths, state.tokens[0], state.folder, recipe.seed, state.compute, state.keys, borders)
        train_paths(state.aligned(), *args)


def _place(state: Run) -> None:
    scores, found = state.placed
    if not state.solve:
        state.describe()  # a run that was aligned before this was kept has it from here on
    if parallel.rank() == 0:
        write_json(state.folder / "scores.json", scores)
        write_json(state.folder / "placement.json", found)


def _train(state: Run) -> None:
    recipe, supernet, placement = state.recipe, state.supernet, state.placement()
    low, borders = getattr(torch, recipe.base.dtype), recipe.data.borders
    windows = [recipe.place.window] if recipe.place.windows else []
    tokens, key = state.tokens[0], digest(state.made, placement, asdict(recipe.train), *windows)
    if recipe.train.tokens:
        train_mixers(supernet, placement, recipe.train, tokens, state.folder, recipe.seed, state.compute, key, borders)
    if recipe.stage2.tokens:
        student: Any = supernet.build(placement, torch.float32)
        key = digest(key, asdict(recipe.stage2))
        train_all(student, state.base, recipe.stage2, tokens, state.folder, recipe.seed, state.compute, key, borders)
        hybrid: Any = student.to(low)
    else:
        hybrid = supernet.build(placement, low)
    if parallel.rank() == 0:
        with replacing(state.folder / "model") as temporary:
            hybrid.save_pretrained(temporary)
            state.tokenizer.save_pretrained(temporary)


def _evaluate(state: Run) -> None:
    recipe, settings = state.recipe, state.recipe.evaluate
    hybrid, tokenizer = load(state.folder / "model", device=state.device)
    partial = state.folder / "eval.partial.json"
    result = evaluate(
        {"base": state.base, "hybrid": hybrid},
        tokenizer,
        state.tokens[1].half(0).stream(),
        tasks=settings.tasks,
        limit=settings.limit,
        perplexity_tokens=settings.perplexity_tokens,
        length=settings.length,
        copy_passages=settings.copy_passages,
        copy_tokens=settings.copy_tokens,
        copy_filler=settings.copy_filler,
        seed=recipe.seed,
        allow_code=settings.allow_code,
        excluded=lambda task: objectives.excluded_rows(task, recipe.place.objectives),
        done=read_json(partial) if partial.exists() else None,
        save=lambda value: write_json(partial, value),
    )
    write_json(state.folder / "eval.json", result)
    partial.unlink(missing_ok=True)


def _bench(state: Run) -> None:
    recipe, settings = state.recipe, state.recipe.bench
    hybrid, _ = load(state.folder / "model", device=state.device)
    rows = [
        {"model": name} | row
        for context in settings.contexts
        for name, model in (("base", state.base), ("hybrid", hybrid))
        for row in measure(model, context, settings.batch, settings.decode_tokens, seed=recipe.seed)
    ]
    write_json(
        state.folder / "bench.json",
        {"device": _device_name(state.device), "torch": torch.__version__, "threads": recipe.threads, "rows": rows},
    )


def _report(state: Run) -> None:
    if (state.folder / "model").exists():
        write_text(state.folder / "model" / "README.md", model_card(state.folder))
    write_report(state.folder)


STAGE_FUNCTIONS: dict[str, Callable[[Run], None]] = {
    "align": _align,
    "place": _place,
    "train": _train,
    "evaluate": _evaluate,
    "bench": _bench,
    "report": _report,
}

SPREAD = ("align", "place", "train")
"""The stages that several ranks share; the others run on rank 0."""

NEEDS: dict[str, tuple[str, ...]] = {
    "align": (),
    "place": ("align",),
    "train": ("align", "place"),
    "evaluate": ("train",),
    "bench": ("train",),
    "report": (),
}
"""The stages that must be done before one can run by itself."""


def _tokens(recipe: Recipe, stage: str) -> dict[str, int]:
    trained = {"align": recipe.align.tokens + recipe.paths.tokens, "train": recipe.train.tokens + recipe.stage2.tokens}
    return {"tokens": trained[stage]} if stage in trained else {}


def _logged_seconds(run: Path, stage: str) -> float:
    """Seconds of a training stage's steps by its own log, which a stopped run's go on to count in."""
    stages = {"align": ("align", "paths"), "train": ("train", "stage2")}.get(stage, ())
    records = [r for r in read_jsonl(run / "metrics.jsonl") if r["stage"] in stages] if stages else []
    return sum(r["seconds"] for r in records)


def _peak_bytes(device: torch.device) -> int:
    """The process's largest resident size so far; on CUDA, the allocator's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

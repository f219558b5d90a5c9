"""Runs a recipe's stages in order. Every stage resumes by itself; what is done is never done again."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from postnas.blocks import linear_blocks, make_block
from postnas.data import Tokens, load_tokenizer, prepare
from postnas.errors import UserError
from postnas.evaluate.suite import load_task
from postnas.evaluate.verdict import evaluate
from postnas.files import read_json, replacing, write_json, write_text
from postnas.generate.throughput import measure
from postnas.models.checkpoint import base_folder, load_base
from postnas.models.load import load
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.recipe import STAGES, Recipe, differences
from postnas.report.card import model_card
from postnas.report.html import write_report
from postnas.search.placement import place
from postnas.search.scores import Scorer
from postnas.search.strategies import STRATEGIES
from postnas.train import parallel
from postnas.train.align import align_candidates, candidate_keys, load_candidates
from postnas.train.distill import train_all, train_mixers


@dataclass
class Run:
    """One run directory and what its stages share, loaded when first asked for."""

    recipe: Recipe
    supernet_: Supernet | None = field(default=None, init=False)

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
    def candidate_keys(self) -> dict[str, list[dict[str, Any]]]:
        data = hashlib.sha256(self.tokens[0].ids.tobytes()).hexdigest()
        return candidate_keys(self.base, self.recipe.align, data, self.recipe.seed)

    def supernet(self) -> Supernet:
        """The base with the aligned candidates."""
        if self.supernet_ is None:
            candidates = load_candidates(self.base, self.recipe.align, self.folder, self.device)
            self.supernet_ = Supernet(self.base, candidates)
        return self.supernet_

    def placement(self) -> list[str]:
        return read_json(self.folder / "placement.json")["placement"]


def run(recipe: Recipe, only: str | None = None) -> Path:
    """Run a recipe to its end, from wherever it was left, and return the run directory.

    only: one stage that runs by itself, again where it is done already; those before it must be done.
    Raises UserError for bad input, and where the directory holds a run of another recipe.
    """
    check(recipe)
    torch.set_num_threads(recipe.threads)
    state = Run(recipe)
    parallel.start(state.device)
    lead = parallel.rank() == 0
    if lead:
        claim(recipe, only)
    if parallel.world() > 1 and lead:
        _ = state.tokens  # what is fetched and tokenised into shared folders is so once, by one rank
    parallel.barrier()
    done_file = state.folder / "stages.json"
    done: dict[str, Any] = read_json(done_file) if done_file.exists() else {}
    for stage in _wanted(recipe, done, only):
        begin = time.monotonic()
        if lead or stage in SPREAD:
            STAGE_FUNCTIONS[stage](state)
        parallel.barrier()
        if not lead:
            continue
        done[stage] = {"seconds": time.monotonic() - begin, "peak_bytes": _peak_bytes()} | _tokens(recipe, stage)
        write_json(done_file, done)
    return state.folder


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
    if recipe.place.strategy not in STRATEGIES:
        raise UserError(f"place.strategy: {recipe.place.strategy!r} is unknown; choose from {', '.join(STRATEGIES)}")
    for task in recipe.evaluate.tasks:
        load_task(task)


def claim(recipe: Recipe, only: str | None = None) -> None:
    """Write the resolved recipe, or refuse where the directory holds the run of another one.

    Until training has begun, `place` by itself may be asked again with other settings.
    """
    path = Path(recipe.out) / "recipe.yaml"
    trained = (path.parent / "checkpoints" / "train").exists() or (path.parent / "model").exists()
    resolved = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    if path.exists():
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{path}: is no recipe; choose another `out`, or remove the file")
        changed = differences(stored, resolved)
        if only == "place" and not trained:
            changed = [field for field in changed if not field.startswith("place.")]
        if changed:
            raise UserError(
                f"{path}: holds a run of another recipe ({changed[0]}); choose another `out`, or remove the folder"
            )
        if stored == resolved:
            return
    write_text(path, yaml.safe_dump(resolved, sort_keys=False))


def _align(state: Run) -> None:
    recipe, config = state.recipe, state.base.config
    # What does not fit the base is told now, not after an hour of tokenising and training.
    layers = config.num_hidden_layers
    if "place" in recipe.stages and recipe.place.budget > layers:
        raise UserError(f"place.budget: {recipe.place.budget} is more than the base's {layers} layers; give fewer")
    with torch.device("meta"):
        for block in recipe.align.blocks:
            make_block(block, config.dims(), recipe.align.options.get(block))
    align_candidates(
        state.base,
        recipe.align,
        state.tokens[0],
        state.folder,
        state.candidate_keys,
        recipe.seed,
        state.compute,
        recipe.data.borders,
    )


def _place(state: Run) -> None:
    recipe, supernet = state.recipe, state.supernet()
    objectives = sorted(recipe.place.objective)
    scorer = Scorer(
        supernet,
        state.tokens[1].half(1),
        recipe.place.tokens,
        objectives,
        recipe.seed,
        state.folder / "scored.jsonl",
        state.compute,
    )
    scores, found = place(scorer, supernet.attention, recipe.place, recipe.seed)
    write_json(state.folder / "scores.json", scores)
    write_json(state.folder / "placement.json", found)


def _train(state: Run) -> None:
    recipe, supernet, placement = state.recipe, state.supernet(), state.placement()
    low = getattr(torch, recipe.base.dtype)
    if recipe.train.tokens:
        train_mixers(
            supernet,
            placement,
            recipe.train,
            state.tokens[0],
            state.folder,
            recipe.seed,
            state.compute,
            recipe.data.borders,
        )
    if recipe.stage2.tokens:
        built: Any = supernet.build(placement, torch.float32)
        student = built.to(state.device)
        train_all(
            student,
            state.base,
            recipe.stage2,
            state.tokens[0],
            state.folder,
            recipe.seed,
            state.compute,
            recipe.data.borders,
        )
        hybrid: Any = student.to(low)
    else:
        hybrid = supernet.build(placement, low)
    if parallel.rank() > 0:
        return
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
    name = torch.cuda.get_device_name() if state.device.type == "cuda" else platform.processor() or platform.machine()
    write_json(
        state.folder / "bench.json",
        {"device": name, "torch": torch.__version__, "threads": recipe.threads, "rows": rows},
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

SPREAD = ("align", "train")
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
    trained = {"align": recipe.align.tokens, "train": recipe.train.tokens + recipe.stage2.tokens}
    return {"tokens": trained[stage]} if stage in trained else {}


def _peak_bytes() -> int:
    """The process's largest resident size so far; on CUDA, the allocator's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

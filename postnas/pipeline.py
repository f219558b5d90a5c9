"""Runs a recipe's stages in order. Every stage resumes by itself; what is done is never done again."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from postnas.check import check, check_base
from postnas.claim import AGAIN, claim, differing
from postnas.errors import UserError
from postnas.evaluate.verdict import evaluate
from postnas.files import locked, read_json, read_jsonl, replacing, write_json, write_text
from postnas.generate.throughput import measure
from postnas.models.load import load
from postnas.recipe import STAGES, Recipe
from postnas.report.card import model_card
from postnas.report.html import write_report
from postnas.run import Run
from postnas.search import blocks, objectives, sizes
from postnas.search.speed import device_name
from postnas.search.variants import Row, searched_rows
from postnas.train import parallel
from postnas.train.align import align_candidates, digest, stored_key_fits
from postnas.train.distill import train_all, train_mixers
from postnas.train.paths import train_paths
from postnas.trials import TRIALS


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
        if [stage for stage in _reopened(only) if done.pop(stage, None) is not None]:
            write_json(done_file, done)  # a stage that is asked for again counts as open until it has ended
        if "align" in wanted:
            check_base(recipe, state.base.config, state.tokens, state.tokenizer)
        if ("align" in wanted and "place" in recipe.stages) or ("place" in wanted and not state.solve):
            _ = state.scored_on
    parallel.barrier()  # what is fetched and tokenised into shared folders is so once, by one rank
    for stage in wanted:
        begin = time.monotonic()
        if lead or stage in SPREAD:
            STAGE_FUNCTIONS[stage](state)
        parallel.barrier()
        if lead:
            seconds = max(time.monotonic() - begin, _logged_seconds(recipe, stage))
            done[stage] = {"seconds": seconds, "peak_bytes": _peak_bytes(state.device)} | _tokens(recipe, stage)
            write_json(done_file, done)


def _wanted(recipe: Recipe, done: dict[str, Any], only: str | None) -> list[str]:
    if only is None:
        return [stage for stage in STAGES if recipe.has(stage) and stage not in done]
    if only in TRIALS and not recipe.has(only):
        raise UserError(f"{only}: is left out by the recipe; name it in stages, and what it compares in {NAMED[only]}")
    compared = [stage for stage in TRIALS if recipe.has(stage) and STAGES.index(stage) < STAGES.index(only)]
    missing = [stage for stage in (*NEEDS[only], *(compared if "place" in NEEDS[only] else ())) if stage not in done]
    if missing:
        raise UserError(
            f"{only}: needs {missing[0]}, which is not done in {recipe.out}; run `postnas {missing[0]}` first"
        )
    return [only]


def _reopened(only: str | None) -> list[str]:
    """The stages that are open again when this one is asked by itself: it, and the comparisons that it goes before."""
    if only not in AGAIN:
        return []
    later = [stage for stage in TRIALS if STAGES.index(stage) > STAGES.index(only)]
    return [only, *later]


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


def _select(state: Run) -> None:
    _write(state, "select", blocks.select(state.recipe.select, state.terms("select")))


def _design(state: Run) -> None:
    _write(state, "design", blocks.design(state.recipe.design, state.terms("design"), *state.linear_block("design")))


def _size(state: Run) -> None:
    _write(state, "size", sizes.size(state.recipe.size, state.terms("size"), *state.linear_block("size")))


def _write(state: Run, stage: str, found: Row) -> None:
    if parallel.rank() == 0:
        write_json(state.folder / TRIALS[stage], found)


def _train(state: Run) -> None:
    recipe, final, (placement, _) = state.recipe, state.final(), state.choice()
    if final is not state:
        _align(final)
    supernet = final.supernet
    low, borders = getattr(torch, recipe.base.dtype), recipe.data.borders
    windows = [recipe.place.window] if recipe.place.windows else []
    tokens, key = state.tokens[0], digest(final.made, placement, asdict(recipe.train), *windows)
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
    partial, compared = state.folder / "eval.partial.json", any(map(recipe.has, TRIALS))

    def excluded(task: str) -> set[str]:
        """Rows that placements or variants were chosen by."""
        rows = objectives.excluded_rows(task, recipe.place.objectives)
        return rows | searched_rows(task) if compared else rows

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
        excluded=excluded,
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
        {"device": device_name(state.device), "torch": torch.__version__, "threads": recipe.threads, "rows": rows},
    )


def _report(state: Run) -> None:
    if (state.folder / "model").exists():
        write_text(state.folder / "model" / "README.md", model_card(state.folder))
    write_report(state.folder)


STAGE_FUNCTIONS: dict[str, Callable[[Run], None]] = {
    "align": _align,
    "place": _place,
    "select": _select,
    "design": _design,
    "size": _size,
    "train": _train,
    "evaluate": _evaluate,
    "bench": _bench,
    "report": _report,
}

SPREAD = ("align", "place", *TRIALS, "train")
"""The stages that several ranks share; the others run on rank 0."""

NEEDS: dict[str, tuple[str, ...]] = {
    "align": (),
    "place": ("align",),
    "select": ("align", "place"),
    "design": ("align", "place"),
    "size": ("align", "place"),
    "train": ("align", "place"),
    "evaluate": ("train",),
    "bench": ("train",),
    "report": (),
}
"""The stages that must be done before one can run by itself; after `place`, comparisons of the recipe as well."""

NAMED = {"select": "select.blocks", "design": "design.variants", "size": "size.heads or size.key_dims"}
"""The fields that say what a comparison compares."""


def _tokens(recipe: Recipe, stage: str) -> dict[str, int]:
    """The tokens that a stage has trained on; nothing for one that trains nothing."""
    if stage in TRIALS:
        return {"tokens": sum(row["tokens"] for row in _trained_rows(recipe, stage))}
    trained = {"align": recipe.align.tokens + recipe.paths.tokens, "train": recipe.train.tokens + recipe.stage2.tokens}
    return {"tokens": trained[stage]} if stage in trained else {}


def _trained_rows(recipe: Recipe, stage: str) -> list[Row]:
    """Rows of a comparison, one a training: what a comparison before it, or a row before it, has trained is theirs."""
    names = list(TRIALS)
    before = [name for name in names[: names.index(stage)] if recipe.has(name)]
    known, found = [], []
    for name in (*before, stage):
        for row in read_json(Path(recipe.out) / TRIALS[name])["rows"]:
            # Rows do not hold the key of their training, but its measured speed tells trainings apart.
            training = [row[field] for field in ("block", "lr", "rates", "tokens", "train_tokens_per_s")]
            if training not in known:
                known.append(training)
                found += [row] if name == stage else []
    return found


def _logged_seconds(recipe: Recipe, stage: str) -> float:
    """Seconds of a stage's training by its own log, which a stopped run's go on to count in.

    Of a comparison's trainings the log keeps the speed of the distillation alone: what they take at least.
    """
    if stage in TRIALS:
        aligned = getattr(recipe, stage).align_tokens
        rows = _trained_rows(recipe, stage)
        return sum((row["tokens"] - aligned) / row["train_tokens_per_s"] for row in rows)
    stages = {"align": ("align", "paths"), "train": ("train", "stage2")}.get(stage, ())
    records = [r for r in read_jsonl(Path(recipe.out) / "metrics.jsonl") if r["stage"] in stages] if stages else []
    return sum(r["seconds"] for r in records)


def _peak_bytes(device: torch.device) -> int:
    """The process's largest resident size so far; on CUDA, the allocator's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

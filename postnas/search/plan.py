"""What a hybrid will win and cost, and what a recipe will, as text, from nothing but the base's config.

A recipe's stages are priced by tokens/s that were measured (benchmarks/dry_run_h100.py), where there are such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from postnas.blocks import linear_blocks
from postnas.errors import UserError
from postnas.files import read_json
from postnas.models.checkpoint import base_config
from postnas.recipe import Place, Recipe
from postnas.search.cost import (
    GIB,
    GPUS,
    LOW,
    Decoder,
    Gpu,
    Stage,
    align_stage,
    break_even,
    decode_seconds,
    largest_batch,
    mixers_stage,
    prefill_seconds,
    search_stage,
    weights_stage,
)
from postnas.search.objectives import LENGTH, members
from postnas.search.placement import evaluations
from postnas.search.strategies import uniform

KEPT = (0, 1, 2, 4, 8)
"""Layers that keep attention, as far as the base has more."""
UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach."""
LONGEST = 2**20
"""Tokens up to which a break-even is sought."""
CONTEXT_UNITS = {"": 1, "k": 2**10, "m": 2**20}
TOKEN_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

PAPER = {"place": (50 * 10**9, 808), "train": (50 * 10**9, 624), "stage2": (350 * 10**9, 7_536)}
"""Tokens and H100 hours of the paper's stages, from Qwen2.5-1.5B to Jet-Nemotron-2B."""
PAPER_ELSE = 3_120 + 624 + 5_616
"""H100 hours of its searches for block, design and sizes, which no recipe has."""

Row = tuple[str, ...]


def plan(
    model: str,
    context: str = "64k",
    gpu: str = "h100",
    block: str = "jet",
    batch: int = 1,
    align_tokens: str = "6M",
    train_tokens: str = "1B",
    tokens_per_s: float | None = None,
    length: str = "2k",
) -> str:
    """Two tables: what a hybrid wins for each number of kept layers, and what making it costs.

    model: a config.json, a folder with one, or a hub id. context, and length (of a training sequence):
    `64k` is 65,536. align_tokens, train_tokens: `6M` is 6,000,000; `1B` and `1e9` are the same. batch:
    sequences prefilled and decoded together. tokens_per_s: what every stage is taken to run at; 40% of
    the GPU's peak where None. Raises UserError for a value that cannot be.
    """
    tokens, sequence = count("context", context, CONTEXT_UNITS), count("length", length, CONTEXT_UNITS)
    aligned, trained = (
        count("align_tokens", align_tokens, TOKEN_UNITS),
        count("train_tokens", train_tokens, TOKEN_UNITS),
    )
    device = _gpu(gpu)
    if block not in linear_blocks():
        raise UserError(f"block: {block!r} is not a linear block; choose from {', '.join(linear_blocks())}")
    if batch < 1:
        raise UserError(f"batch: {batch} is not possible; give 1 or more sequences")
    if tokens_per_s is not None and not 0 < tokens_per_s < float("inf"):
        raise UserError(f"tokens_per_s: {tokens_per_s} is not possible; give a number above 0")
    base = Decoder(base_config(model))
    hybrids = {kept: _hybrid(base, block, kept) for kept in KEPT if kept < base.layers}
    linear = hybrids[0]
    align = align_stage(base, linear, aligned, sequence)
    search = search_stage(base, linear, Place().tokens, len(Place().objective), LENGTH)
    mixers = {kept: mixers_stage(base, hybrid, linear, trained, sequence) for kept, hybrid in hybrids.items()}
    weights = {kept: weights_stage(base, hybrid, linear, trained, sequence) for kept, hybrid in hybrids.items()}
    stages = [("any", align), ("any", search), *_named(mixers), *_named(weights)]
    pace = (
        f"{UTILISATION:.0%} of the peak, which takes fused kernels; measure, and give --tokens_per_s"
        if tokens_per_s is None
        else "the tokens/s given"
    )
    return "\n".join(
        [
            f"{model}: {base.layers} layers, {parameters(base)} weights, {block} in place of attention",
            f"{tokens:,} tokens of context, batch {batch:,}, {device.name}",
            "",
            *table(2, _speed_rows(base, hybrids, tokens, batch, device)),
            "",
            f"Rooflines at the data sheet's {device.bandwidth / 1e9:,.0f} GB/s and {device.flops / 1e12:.4g} TFLOP/s; "
            "real kernels stay below them.",
            "Weights, keys and values in bf16, states in float32. KV caches are allocated 256 tokens at a time.",
            "The largest batch fills the memory beside the weights; its tokens/s are of all sequences together.",
            "Decode wins from: the smallest context at which a step is faster than the base's. Where memory sets",
            "the pace, each layer pays for itself, so that it is the same in every row.",
            "",
            *table(1, _stage_rows(stages, device, tokens_per_s)),
            "",
            f"Hours on one GPU at {pace}.",
            f"Sequences of {sequence:,} tokens; search is `swap` at {Place().tokens:,} tokens each for "
            f"{' and '.join(Place().objective)}, {LENGTH} a sequence.",
            "Memory: base bf16; mixers float32, 16 bytes a weight that learns; activations left out.",
            f"* more than the {device.memory / GIB:.0f} GiB of the GPU",
        ]
    )


@dataclass(frozen=True)
class Pace:
    """How fast a stage was measured to run."""

    tokens_per_s: float
    batch: int
    length: int


def plan_recipe(recipe: Recipe, measured: Path | None = None, gpu: str = "h100", config: str | None = None) -> str:
    """A table of what each stage of `recipe` costs: tokens, operations, memory and hours, beside the paper's.

    measured: a file of benchmarks/dry_run_h100.py, whose rows of the same base, stage and block give the pace; any
    other stage is taken to reach 40% of the peak of `gpu`. Of the base only its config is read (a GGUF file is read
    whole), from its own name or, without a hub, from `config`. Raises UserError for a config, a file or a name that
    does not fit.
    """
    device, sizes = _gpu(gpu), base_config(config or recipe.base.model, None if config else recipe.base.sha256)
    sizes.blocks = (sizes.blocks or {}) | recipe.align.options
    base, block = Decoder(sizes), recipe.place.block
    if recipe.place.budget > base.layers:
        raise UserError(f"place.budget: {recipe.place.budget} is more than the base's {base.layers} layers; give fewer")
    stages = recipe_stages(recipe, base)
    paces, stamp = ({}, "") if measured is None else _measured(measured, recipe.base.model, block)
    rows, notes = list(_priced(recipe, stages, paces, device)), []
    if any(stage in paces for stage, *_ in stages):
        notes.append(f"measured: {stamp}; * at another batch or length than the recipe's.")
    if any(stage not in paces for stage, *_ in stages):
        notes.append(f"assumed: {UTILISATION:.0%} of the peak of {device.name}, which takes fused kernels; measure.")
    if recipe.place.strategy == "gates":
        notes.append("place: the exchanges of `gates`; what its logits take is left out.")
    return "\n".join(
        [
            f"{recipe.base.model}: {base.layers} layers, {parameters(base)} weights; "
            f"{recipe.place.budget} keep attention, {block} in the others",
            "",
            *table(1, iter(rows)),
            "",
            *notes,
            "Hours on one GPU. place: every placement that the strategy asks for, each by all objectives.",
            "Memory: base bf16; mixers float32, 16 bytes a weight that learns; activations left out.",
            *([f"! more than the {device.memory / GIB:.0f} GiB of {device.name}"] if "!" in str(rows) else []),
            "The paper's: H100 hours from Qwen2.5-1.5B to Jet-Nemotron-2B; place with the training of its supernet.",
            f"Its searches for block, design and sizes took {PAPER_ELSE:,} more. Yours, evaluation, bench: left out.",
        ]
    )


def recipe_stages(recipe: Recipe, base: Decoder) -> list[tuple[str, Stage, int, int]]:
    """Each stage that a recipe trains or scores in: its name, what it takes, its batch and its length.

    A hybrid's layers on attention are taken to lie at even distances. The batch of `place` is 0: it follows from the
    rows. `paths` is priced as if all layers were linear.
    """
    block, budget, asked = recipe.place.block, recipe.place.budget, recipe.stages
    hybrid, linear = _hybrid(base, block, budget), _hybrid(base, block, 0)
    align, paths, place, train, all_weights = recipe.align, recipe.paths, recipe.place, recipe.train, recipe.stage2
    found: list[tuple[str, Stage, int, int]] = []
    if "align" in asked:
        each = [align_stage(base, _hybrid(base, name, 0), align.tokens, align.length) for name in align.blocks]
        more = len(each) - 1  # the base runs once for the candidates of all blocks
        once = base.body_flops(align.length) * align.tokens // align.length
        flops = sum(stage.flops for stage in each) - more * once
        memory = sum(stage.memory for stage in each) - more * LOW * base.parameters
        found.append(("align", replace(each[0], flops=flops, memory=memory), align.batch, align.length))
        if paths.tokens:
            stage = mixers_stage(base, linear, linear, paths.tokens, paths.length)
            found.append(("paths", stage, paths.batch, paths.length))
    if "place" in asked:
        names, placements = len(members(place.objectives)), 2 + evaluations(place, base.layers)
        stage = search_stage(base, linear, place.tokens, names, LENGTH)  # of one placement a layer
        flops = stage.flops * placements // base.layers
        found.append(("place", replace(stage, tokens=placements * place.tokens * names, flops=flops), 0, LENGTH))
    if "train" in asked and train.tokens:
        stage = mixers_stage(base, hybrid, linear, train.tokens, train.length)
        found.append(("train", stage, train.batch, train.length))
    if "train" in asked and all_weights.tokens:
        stage = weights_stage(base, hybrid, linear, all_weights.tokens, all_weights.length)
        found.append(("stage2", stage, all_weights.batch, all_weights.length))
    return found


def _priced(
    recipe: Recipe, stages: Sequence[tuple[str, Stage, int, int]], paces: dict[str, Pace], gpu: Gpu
) -> Iterator[Row]:
    yield "stage", "tokens", "length", "GFLOP a token", "memory ", "tokens/s", "", "hours", "paper's", "hours"
    total = 0.0
    for name, stage, batch, length in stages:
        pace = paces.get(name)
        rate = pace.tokens_per_s if pace else UTILISATION * gpu.flops * stage.tokens / stage.flops
        other = pace is not None and (batch, length) != (pace.batch, pace.length) and name != "place"
        total += stage.tokens / rate / 3600
        tokens, hours = PAPER.get(name, (0, 0))
        yield (
            name,
            f"{stage.tokens / 1e6:,.0f} M",
            f"{length:,}",
            number(stage.flops / stage.tokens / 1e9),
            size(stage.memory) + ("!" if stage.memory > gpu.memory else " "),
            number(rate),
            "assumed" if pace is None else "measured*" if other else "measured",
            _hours(stage.tokens / rate / 3600),
            f"{tokens / 1e9:,.0f} B" if tokens else "",
            f"{hours:,}" if hours else "",
        )
    tokens, own = sum(stage.tokens for _, stage, *_ in stages), [PAPER[name] for name, *_ in stages if name in PAPER]
    yield (
        *("in all", f"{tokens / 1e6:,.0f} M", "", "", "", "", "", _hours(total)),
        *(f"{sum(tokens for tokens, _ in own) / 1e9:,.0f} B", f"{sum(hours for _, hours in own):,}"),
    )


def _measured(path: Path, model: str, block: str) -> tuple[dict[str, Pace], str]:
    """The pace of each stage of a base that the file has, and where that was. Raises UserError for another file."""
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "stage" in row for row in rows):
        raise UserError(f"{path}: holds no rows of stages; give what benchmarks/dry_run_h100.py wrote")
    paces: dict[str, Pace] = {}
    for row in rows:
        if row.get("model") == model and row.get("block") == block and "tokens_per_s" in row:
            rate: Any = row["tokens_per_s"]
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
                raise UserError(f"{path}: tokens_per_s of {row['stage']} is {rate!r}; give a number above 0")
            paces[str(row["stage"])] = Pace(rate, row.get("batch", 0), row.get("length", 0))
    return paces, f"{path}, {found.get('device', 'an unknown device')}"


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"gpu: {name!r} is unknown; choose from {', '.join(GPUS)}")
    return GPUS[name]


def count(name: str, text: str, units: dict[str, int]) -> int:
    """A number with a unit, `64k` or `1.5e9`, as a whole number. Raises UserError where `text` is none, or below 1."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)([a-z]?)", text.strip().lower(), re.ASCII)
    value = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if value < 1:
        examples = ", ".join(f"8{unit.upper()}" for unit in units)
        raise UserError(f"{name}: {text!r} is no number of tokens; give one such as {examples}")
    return value


def _hybrid(base: Decoder, block: str, kept: int) -> Decoder:
    return Decoder(base.config, uniform(lambda placements: [0.0] * len(placements), base.placement, block, kept, 0))


def _named(stages: dict[int, Stage]) -> list[tuple[str, Stage]]:
    return [(str(kept), stage) for kept, stage in stages.items()]


def _speed_rows(base: Decoder, hybrids: dict[int, Decoder], context: int, batch: int, gpu: Gpu) -> Iterator[Row]:
    yield "", "", "cache a", "decode ", "", "prefill", "", "decode", "largest", "its decode"
    yield "kept", "weights", "sequence", "tokens/s ", "gain", "tokens/s", "gain", "wins from", "batch", "tokens/s"
    base_decode, base_prefill = (f(base, context, batch, gpu) for f in (decode_seconds, prefill_seconds))
    for name, model in {
        f"{base.layers} (base)": base,
        **{str(kept): hybrid for kept, hybrid in hybrids.items()},
    }.items():
        decode, prefill = (f(model, context, batch, gpu) for f in (decode_seconds, prefill_seconds))
        most = largest_batch(model, context, gpu)
        yield (
            name,
            parameters(model),
            size(model.cache_bytes(context)),
            number(batch / decode) + ("*" if batch > most else " "),
            times(base_decode / decode),
            number(batch * context / prefill),
            times(base_prefill / prefill),
            "" if model is base else crossing(break_even(base, model, batch, gpu, LONGEST)),
            f"{most:,}",
            number(most / decode_seconds(model, context, most, gpu)),
        )


def _stage_rows(stages: list[tuple[str, Stage]], gpu: Gpu, tokens_per_s: float | None) -> Iterator[Row]:
    yield "stage", "kept", "tokens", "GFLOP a token", "FLOP", "memory ", "tokens/s", "hours"
    for kept, stage in stages:
        rate = tokens_per_s or UTILISATION * gpu.flops * stage.tokens / stage.flops
        hours = stage.tokens / rate / 3600
        yield (
            stage.name,
            kept,
            f"{stage.tokens:,}",
            number(stage.flops / stage.tokens / 1e9),
            f"{stage.flops:.1e}".replace("+", ""),
            size(stage.memory) + ("*" if stage.memory > gpu.memory else " "),
            number(rate),
            _hours(hours),
        )


def table(heads: int, rows: Iterator[Row]) -> list[str]:
    """Lines of columns as wide as they need be, the first to the left; a rule stands below the first `heads` rows."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in cells
    ]
    lines.insert(heads, "-" * len(lines[0]))
    return lines


def parameters(model: Decoder) -> str:
    return f"{model.parameters / 1e9:.2f} B" if model.parameters >= 1e9 else f"{model.parameters / 1e6:.0f} M"


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves 1 or more: `1.75 GiB`."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:,.2f} GiB"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _hours(value: float) -> str:
    return number(value) if value >= 0.01 else "<0.01"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:,.1f}x"


def crossing(context: int | None) -> str:
    if context is None:
        return f"never to {LONGEST // 2**20}M"
    return "first token" if context == 1 else f"{context:,}"

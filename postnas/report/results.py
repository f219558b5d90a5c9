"""A run directory as values: its files as they stand, the comparisons they allow, and how a number is written."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postnas.errors import UserError
from postnas.files import read_json, read_jsonl
from postnas.report.measures import Kept, kept_rows, percent, times
from postnas.search.strategies import with_linear
from postnas.trials import TRIALS

ATTENTION = ("attn", "swa")
"""Mixers that are not linear: full and windowed attention."""

WON_HEAD = [
    "phase",
    "context",
    "batch",
    "base, tokens/s",
    "hybrid, tokens/s",
    "faster",
    "base, cache",
    "hybrid, cache",
    "smaller",
]


@dataclass(frozen=True)
class Won:
    """Speed (tokens a second, all sequences together) and cache (bytes, one sequence) of base and hybrid."""

    phase: str
    context: int
    batch: int
    base: float
    hybrid: float
    base_stderr: float | None
    hybrid_stderr: float | None
    base_bytes: int
    hybrid_bytes: int

    @property
    def speedup(self) -> float:
        return self.hybrid / self.base

    @property
    def cache_ratio(self) -> float:
        """How many times smaller the hybrid's cache is."""
        return self.base_bytes / self.hybrid_bytes

    def cells(self) -> list[str]:
        """A row of a table, under WON_HEAD."""
        return [
            self.phase,
            context_name(self.context),
            str(self.batch),
            rate(self.base, self.base_stderr),
            rate(self.hybrid, self.hybrid_stderr),
            times(self.speedup),
            byte_text(self.base_bytes),
            byte_text(self.hybrid_bytes),
            times(self.cache_ratio),
        ]


@dataclass(frozen=True)
class Results:
    """The files of a run directory; None, or empty, where the stage that writes the file has not run."""

    recipe_text: str
    recipe: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    scores: dict[str, Any] | None
    placement: dict[str, Any] | None
    eval_: dict[str, Any] | None
    bench: dict[str, Any] | None
    compared: dict[str, dict[str, Any]]
    """What the stages that compare variants of the linear layers wrote, {stage: its file}, in their order."""

    @property
    def kept(self) -> list[Kept]:
        return kept_rows(self.eval_) if self.eval_ else []

    @property
    def won(self) -> list[Won]:
        return won_rows(self.bench) if self.bench else []

    @property
    def command(self) -> str:
        """The shell command that makes the run again, beside the old one."""
        out = self.recipe["out"].rstrip("/")
        return f"postnas run {shlex.quote(out + '/recipe.yaml')} --out {shlex.quote(out + '-again')}"

    def remake(self, *commands: str) -> str:
        """The shell commands that make these stages' numbers anew in the run's own directory, a line each."""
        path = shlex.quote(self.recipe["out"].rstrip("/") + "/recipe.yaml")
        return "\n".join(f"postnas {command} {path}" for command in commands)


def read_results(run: Path) -> Results:
    """Read a run directory. Raises UserError where recipe.yaml is missing, or a file is not what it should be."""
    path = run / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the directory of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({error}); start the run again") from error
    for name in ("base", "data", "out"):
        if not isinstance(recipe, dict) or name not in recipe:
            raise UserError(f"{path}: has no field {name}; give the directory of a run, with its resolved recipe")
    if not isinstance(recipe["base"], dict) or "model" not in recipe["base"]:
        raise UserError(f"{path}: has no field base.model; give the directory of a run, with its resolved recipe")

    results = Results(
        recipe_text=text,
        recipe=recipe,
        stages=_optional(run, "stages.json") or {},
        metrics=read_jsonl(run / "metrics.jsonl"),
        scored=read_jsonl(run / "scored.jsonl"),
        scores=_optional(run, "scores.json"),
        placement=_optional(run, "placement.json"),
        eval_=_optional(run, "eval.json"),
        bench=_optional(run, "bench.json"),
        compared={stage: found for stage, name in TRIALS.items() if (found := _optional(run, name))},
    )
    if results.placement and results.compared:
        results.placement["settled"] = _settled(run, results.compared)
    for name, command, rows in (("eval.json", "eval", "kept"), ("bench.json", "bench", "won")):
        try:
            getattr(results, rows)
        except (KeyError, TypeError) as error:
            raise UserError(f"{run / name}: lacks {error}; make it anew with `postnas {command}`") from error
    return results


def _settled(run: Path, compared: dict[str, dict[str, Any]]) -> str:
    """The block that the last comparison chose. Raises UserError for a file of another shape."""
    stage = list(compared)[-1]
    try:
        return compared[stage]["chosen"]["block"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / TRIALS[stage]}: lacks {error}; make it anew with `postnas {stage}`") from error


def _optional(run: Path, name: str) -> dict[str, Any] | None:
    path = run / name
    value = read_json(path) if path.exists() else None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; remove it, and run its stage again")
    return value


@dataclass(frozen=True)
class Alone:
    """What each layer does alone, before distillation; a map is empty where not every layer was scored for it."""

    one_linear: dict[str, list[float]]
    """{objective: one value a layer}: the loss that is added where this layer alone is linear, nats a token."""
    one_full: dict[str, list[float]]
    """The same: the loss where this layer alone has the base's attention, and all others are linear."""


def alone(scored: list[dict[str, Any]], placement: dict[str, Any]) -> Alone:
    """From scored.jsonl, where placement.json's own placement stands with its own scores.

    Other records are of other candidates or rows; they are left out.
    """
    by_key: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for record in scored:
        means = {name: statistics.fmean(losses) for name, losses in record.get("rows", {}).items()}
        by_key.setdefault(record.get("key", ""), {}).setdefault(tuple(record["placement"]), {}).update(means)
    for known in by_key.values():
        own = known.get(tuple(placement["placement"]), {})
        if own and all(placement["scores"].get(name, value) == value for name, value in own.items()):
            return _alone(known, placement["block"])
    return Alone({}, {})


def _alone(known: dict[tuple[str, ...], dict[str, float]], block: str) -> Alone:
    base = next((list(one) for one in known if not linear_layers(list(one))), None)
    if base is None:
        return Alone({}, {})
    layers = set(range(len(base)))

    def values(linear: Callable[[int], set[int]]) -> dict[str, list[float]]:
        """{objective: one value a layer}, of the objectives that each of these placements has."""
        found = [known.get(tuple(with_linear(base, block, linear(layer))), {}) for layer in sorted(layers)]
        return {name: [one[name] for one in found] for name in found[0] if all(name in one for one in found)}

    before = known[tuple(base)]
    added = values(lambda layer: {layer})
    return Alone(
        {name: [loss - before[name] for loss in losses] for name, losses in added.items() if name in before},
        values(lambda layer: layers - {layer}),
    )


def chosen(placement: dict[str, Any]) -> dict[str, list[str]]:
    """What placement.json's table chose at budgets that double, and at its own: {budget: one mixer a layer}.

    Empty where there are not two that differ, so that there is nothing to compare.
    """
    budgets = {2**power for power in range(10)} | {placement["budget"]}
    table = sorted(placement.get("table", []), key=lambda row: row["budget"])
    found = {str(row["budget"]): row["placement"] for row in table if row["budget"] in budgets}
    return found if len({tuple(mixers) for mixers in found.values()}) > 1 else {}


def won_rows(bench: dict[str, Any]) -> list[Won]:
    """Every phase and context that bench.json has for both models: prefill before decode, contexts upwards."""
    value = {(row["model"], row["phase"], row["context"]): row for row in bench["rows"]}
    rows = []
    for (model, phase, context), base in sorted(value.items(), key=lambda item: (item[0][1] == "decode", item[0][2])):
        hybrid = value.get(("hybrid", phase, context))
        if model == "base" and hybrid is not None:
            speeds = base["tokens_per_s"], hybrid["tokens_per_s"], base.get("stderr"), hybrid.get("stderr")
            rows.append(Won(phase, context, base["batch"], *speeds, base["cache_bytes"], hybrid["cache_bytes"]))
    return rows


def headline(results: Results) -> list[tuple[str, str]]:
    """The few numbers that say what came out, as (number, words); those not measured are left out."""
    tiles = []
    if results.placement:
        mixers = results.placement["placement"]
        tiles.append((f"{linear_layers(mixers)} of {len(mixers)}", "layers are linear"))
    for row in results.kept:
        if row.task == row.metric == "perplexity":
            tiles.append((times(row.hybrid / row.base), "the base's perplexity"))
        if row.metric == "copy_accuracy" and row.share is not None:
            tiles.append((percent(row.share), "of the base's copy accuracy kept"))
    decode = [row for row in results.won if row.phase == "decode"]
    if decode:
        at = f"at {context_name(decode[-1].context)} tokens of context"
        tiles.append((times(decode[-1].speedup), f"decode speed {at}"))
        tiles.append((times(decode[-1].cache_ratio), f"smaller cache {at}"))
    return tiles


def linear_layers(placement: list[str]) -> int:
    return sum(mixer not in ATTENTION for mixer in placement)


def rate(value: float, stderr: float | None = None) -> str:
    """Tokens a second, to three figures or whole ones, with the standard error where there is one."""
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return number if stderr is None else f"{number} ± {stderr:,.0f}" if stderr >= 100 else f"{number} ± {stderr:.2g}"


def byte_text(count: float) -> str:
    """Bytes in the largest binary unit that leaves 1 or more: `22.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def context_name(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"


def base_name(model: str) -> str:
    """The last part of a base's name: `Qwen2.5-1.5B` of a hub id, the file of a GGUF."""
    return model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")

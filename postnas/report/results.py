"""A run directory as values: its files as they stand, the comparisons they allow, and how a number is written."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postnas.errors import UserError
from postnas.files import read_json, read_jsonl

ATTENTION = ("attn", "swa")
"""Mixers that are not linear: full and windowed attention."""


@dataclass(frozen=True)
class Metric:
    """How one metric of eval.json is named and read."""

    words: str
    """What people read; `{task}` stands for the name of the task."""
    share: bool
    """True for a share between 0 and 1, shown in percent; its differences are in points."""
    higher: bool
    """True where more is better."""

    def value(self, value: float) -> str:
        return percent(value) if self.share else f"{value:.2f}"

    def error(self, stderr: float | None) -> str:
        """` ± e` in the unit of the value, or nothing where no standard error was measured."""
        return "" if stderr is None else f" ± {100 * stderr:.1f}" if self.share else f" ± {stderr:.2g}"

    def difference(self, value: float, stderr: float | None) -> str:
        number = f"{100 * value:+.1f}" if self.share else f"{value:+.2f}"
        return number + self.error(stderr)


METRICS = {
    "perplexity": Metric("perplexity", share=False, higher=False),
    "copy_accuracy": Metric("copy accuracy", share=True, higher=True),
    "copy_nll": Metric("copy, nats a token", share=False, higher=False),
    "accuracy": Metric("{task}", share=True, higher=True),
    "accuracy_norm": Metric("{task}, by length", share=True, higher=True),
}


KEPT_HEAD = ["measure", "base", "hybrid", "difference", "kept", "n"]
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
class Kept:
    """One measure of quality, on base and hybrid.

    difference: hybrid minus base; paired row by row where it has a standard error. share: the part of
    the base's quality that the hybrid has (1 = all), for a share of right answers what stands above
    chance; None where the base is too near chance, and for losses in nats, which have no ratio.
    """

    task: str
    metric: str
    base: float
    hybrid: float
    base_stderr: float | None
    hybrid_stderr: float | None
    n: int
    difference: float
    difference_stderr: float | None
    share: float | None

    @property
    def name(self) -> str:
        return METRICS[self.metric].words.format(task=self.task)

    def cells(self) -> list[str]:
        """A row of a table, under KEPT_HEAD."""
        metric = METRICS[self.metric]
        return [
            self.name,
            metric.value(self.base) + metric.error(self.base_stderr),
            metric.value(self.hybrid) + metric.error(self.hybrid_stderr),
            metric.difference(self.difference, self.difference_stderr),
            self._kept(),
            f"{self.n:,}",
        ]

    def _kept(self) -> str:
        if self.metric == "perplexity":
            return times(self.hybrid / self.base)
        if self.share is None:
            return "too near chance" if METRICS[self.metric].share else ""
        return percent(self.share)


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
    scores: dict[str, Any] | None
    placement: dict[str, Any] | None
    eval_: dict[str, Any] | None
    bench: dict[str, Any] | None

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

    def optional(name: str) -> Any:
        return read_json(run / name) if (run / name).exists() else None

    return Results(
        recipe_text=text,
        recipe=recipe,
        stages=optional("stages.json") or {},
        metrics=read_jsonl(run / "metrics.jsonl"),
        scores=optional("scores.json"),
        placement=optional("placement.json"),
        eval_=optional("eval.json"),
        bench=optional("bench.json"),
    )


def kept_rows(eval_: dict[str, Any]) -> list[Kept]:
    """Every measure that eval.json has for both models, in its order."""
    value = {(row["model"], row["task"], row["metric"]): row for row in eval_["rows"]}
    rows = []
    for pair in eval_["paired"]:
        key = (pair["task"], pair["metric"])
        base, hybrid = value["base", *key], value["hybrid", *key]
        share = base["value"] / hybrid["value"] if pair["metric"] == "perplexity" else pair["kept"]
        values = base["value"], hybrid["value"], base["stderr"], hybrid["stderr"]
        rows.append(Kept(*key, *values, hybrid["n"], pair["difference"], pair["stderr"], share))
    return rows


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
        if row.metric == "perplexity":
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


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


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

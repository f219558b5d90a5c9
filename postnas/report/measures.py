"""The measures of eval.json: how each is named, grouped and written, and what base and hybrid have of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from postnas.errors import UserError


@dataclass(frozen=True)
class Metric:
    """How one metric of eval.json is named and read."""

    words: str
    """What people read; `{task}` stands for the name of the task."""
    group: str
    """The measures that it is shown with."""
    axis: str = "score, percent"
    """Name and unit of its axis in a plot."""
    share: bool = True
    """True for a share between 0 and 1, shown in percent, more is better; its differences are in points.
    False for a loss, less is better."""
    written: bool = False
    """True where it scores what the model writes, not given text."""

    @property
    def scale(self) -> int:
        return 100 if self.share else 1

    def number(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.share else f"{value:.2f}"

    def value(self, value: float) -> str:
        return self.number(value) + ("%" if self.share else "")

    def error(self, stderr: float | None) -> str:
        """` ± e` in the unit of the value, or nothing where no standard error was measured."""
        return "" if stderr is None else f" ± {100 * stderr:.1f}" if self.share else f" ± {stderr:.2g}"

    def difference(self, value: float, stderr: float | None) -> str:
        number = f"{100 * value:+.1f}" if self.share else f"{value:+.2f}"
        return number + self.error(stderr)


CHOICE, LAST_WORD, ANSWER = "multiple choice", "last words", "generated answers"
RECALL, CODE, LOSS = "recall", "programs", "losses"
GROUPS = (CHOICE, LAST_WORD, ANSWER, RECALL, CODE, "other scores", LOSS)
"""In the order of the page."""

METRICS = {
    "accuracy": Metric("{task}", CHOICE),
    "accuracy_norm": Metric("{task}, by length", CHOICE),
    "exact": Metric("{task}, exact", ANSWER, written=True),
    "f1": Metric("{task}, F1", ANSWER, written=True),
    "recall": Metric("{task}, recall", RECALL, written=True),
    "contains": Metric("{task}, contained", RECALL, written=True),
    "copy_accuracy": Metric("{task} accuracy", RECALL),
    "passed": Metric("{task}, passed", CODE, written=True),
    "perplexity": Metric("{task}, perplexity", LOSS, "perplexity, no unit", share=False),
    "nll": Metric("{task}, nats a token", LOSS, "loss, nats a token", share=False),
    "copy_nll": Metric("{task}, nats a token", LOSS, "loss, nats a token", share=False),
}


METRICS_OF = {
    ("last_word", "accuracy"): Metric("{task}", LAST_WORD),
    ("last_word", "nll"): Metric("{task}, nats a word", LOSS, "loss, nats a word", share=False),
    ("long", "exact"): Metric("{task}, exact", RECALL, written=True),
}
"""{(kind of task, metric): how it is read}, where a kind means something else by it than METRICS says."""


@functools.cache
def _kind(task: str) -> str:
    """The kind of a task as evaluation has it; empty for one that it does not know, as perplexity and copy."""
    from postnas.evaluate.task import load_task

    try:
        return load_task(task).kind
    except UserError:
        return ""


def metric_of(name: str, task: str = "") -> Metric:
    """How to read a metric of a task; without a task, as most tasks mean it.

    One that is in no table is a loss by the end of its name, else a share.
    """
    if (_kind(task), name) in METRICS_OF:
        return METRICS_OF[_kind(task), name]
    if name in METRICS:
        return METRICS[name]
    words = name.replace("_", " ")
    if name.endswith("nll"):
        return Metric(f"{{task}}, {words}", LOSS, "loss, nats a token", share=False)
    if name.endswith("perplexity"):
        return Metric(f"{{task}}, {words}", LOSS, "perplexity, no unit", share=False)
    return Metric(f"{{task}}, {words}", "other scores")


KEPT_HEAD = ["measure", "base", "hybrid", "difference", "kept", "n"]


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
    def read(self) -> Metric:
        return metric_of(self.metric, self.task)

    @property
    def name(self) -> str:
        return self.task if self.task == self.metric else self.read.words.replace("{task}", self.task)

    @property
    def able(self) -> bool:
        """False where the base is too near chance for the measure to say what was kept."""
        return self.share is not None or not self.read.share

    def cells(self) -> list[str]:
        """A row of a table, under KEPT_HEAD."""
        metric = self.read
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
            return "too near chance" if self.read.share else ""
        return percent(self.share)


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


def grouped(rows: list[Kept]) -> dict[str, list[Kept]]:
    """{group: its measures}, in the order of GROUPS; within one, those that the base cannot do come last."""
    ordered = sorted(rows, key=lambda row: not row.able)
    groups = {group: [row for row in ordered if row.read.group == group] for group in GROUPS}
    return {group: found for group, found in groups.items() if found}


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"

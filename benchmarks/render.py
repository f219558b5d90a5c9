"""Write the tables of the documents from benchmarks/results; nothing but what stands between a table's markers changes.

    python benchmarks/render.py

A table NAME stands between the lines `<!-- NAME -->` and `<!-- /NAME -->` of the document that TABLES names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postnas.errors import UserError
from postnas.evaluate.verdict import KEPT_NEEDS
from postnas.files import read_json, write_text
from postnas.report.measures import metric_of
from postnas.report.results import byte_text, context_name, percent, rate

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("base", "hybrid", "hybrid-uniform")
ABSENT = "–"

Format = Callable[[float, float | None], str]


def _plain(value: float, stderr: float | None) -> str:
    return f"{value:.2f}" + ("" if stderr is None else f" ± {stderr:.2g}")


def _share(value: float, stderr: float | None) -> str:
    return percent(value) + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def _points(value: float, stderr: float | None) -> str:
    return f"{100 * value:+.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def _count(value: float, stderr: float | None) -> str:
    return f"{value:,.0f}"


def _bytes(value: float, stderr: float | None) -> str:
    return byte_text(value)


METRICS: dict[str, tuple[str, Format]] = {
    "linear_layers": ("linear layers", _count),
    "perplexity": ("perplexity", _plain),
    "copy_accuracy": ("copy accuracy", _share),
    "arc_easy_accuracy": ("ARC-Easy, 400 rows", _share),
    "arc_easy_accuracy_difference": ("ARC-Easy, points against the base", _points),
    "piqa_accuracy": ("PIQA, 400 rows", _share),
    "piqa_accuracy_difference": ("PIQA, points against the base", _points),
    "decode_tokens_per_s": ("decode tokens/s", rate),
    "cache_bytes": ("cache a sequence", _bytes),
    "seconds": ("seconds, all stages", _count),
    "peak_bytes": ("peak memory", _bytes),
}
"""What a metric is called and how its values are written; `METRIC@CONTEXT` adds the context to the name."""


def demo(result: dict[str, Any]) -> str:
    """A line a metric and a column a model, from what the rows hold; then the command that made them.

    Metrics stand in the order of METRICS; others stay in the file alone.
    """
    rows = {(row["metric"], row["model"]): row for row in result["rows"]}
    models = [model for model in MODELS if any(model == found for _, found in rows)]
    lines = ["| | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for metric in sorted({metric for metric, _ in rows if metric.partition("@")[0] in METRICS}, key=_order):
        words, text = _words(metric)
        cells = [rows.get((metric, model)) for model in models]
        written = [ABSENT if row is None else text(row["value"], row.get("stderr")) for row in cells]
        lines.append(f"| {words} | " + " | ".join(written) + " |")
    return "\n".join([*lines, "", f"{_about(result)}; ± is one standard error."])


def _about(result: dict[str, Any]) -> str:
    return f"`{result['command']}`; {result['device']}, torch {result['torch']}, {result['date']}"


def _order(metric: str) -> tuple[int, int, str]:
    name, _, context = metric.partition("@")
    return list(METRICS).index(name), int(context or 0), name


def _words(metric: str) -> tuple[str, Format]:
    name, _, context = metric.partition("@")
    words, text = METRICS[name]
    return words + (f" at {context_name(int(context))}" if context else ""), text


def offline(result: dict[str, Any]) -> str:
    """A line a task and metric, in the file's order; the hybrid's columns where the file has a hybrid."""
    rows = {(row["task"], row["metric"], row["model"]): row for row in result["rows"]}
    hybrids = any(model == "hybrid" for _, _, model in rows)
    head = ["task", "prompt", "n", "metric", "chance", "base", "can the base do it"]
    head += ["hybrid", "difference", "kept"] if hybrids else []
    lines = [_line(head), _line(["---"] * 2 + ["---:"] + ["---"] + ["---:"] * (len(head) - 4))]
    above = None
    for task, metric in dict.fromkeys((task, metric) for task, metric, _ in rows):
        base, hybrid = rows.get((task, metric, "base")), rows.get((task, metric, "hybrid"))
        some = base or hybrid
        assert some is not None
        chance = some.get("chance")
        cells = [f"`{task}`", some["form"] or "no examples", f"{some['n']:,}"] if task != above else ["", "", ""]
        cells += [metric, ABSENT if chance is None else percent(chance), _score(base), _can(base)]
        if hybrids:
            cells += [_score(hybrid), _difference(hybrid), _kept(hybrid)]
        lines.append(_line(cells))
        above = task
    return "\n".join([*lines, "", f"{_about(result)}; ± is one standard error."])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return ABSENT
    read = metric_of(row["metric"])
    return read.value(row["score"]) + read.error(row["stderr"])


def _can(row: dict[str, Any] | None) -> str:
    """As the verdict has it: KEPT_NEEDS standard errors above chance."""
    if row is None or row.get("chance") is None or row["stderr"] is None:
        return ABSENT
    above = row["score"] - row["chance"]
    return "yes" if above > 0 and above >= KEPT_NEEDS * row["stderr"] else "no"


def _difference(row: dict[str, Any] | None) -> str:
    if row is None or "difference" not in row:
        return ABSENT
    return metric_of(row["metric"]).difference(row["difference"], row["difference_stderr"])


def _kept(row: dict[str, Any] | None) -> str:
    return ABSENT if row is None or row.get("kept") is None else percent(row["kept"])


def jet_cuda(result: dict[str, Any]) -> str:
    """Speed and memory, a column a batch; then how far bfloat16 is from float32."""
    rows = {(row["phase"], row["batch"]): row for row in result["rows"]}
    batches = sorted(batch for phase, batch in rows if phase == "decode")
    prefill, decode = ([rows[phase, batch] for batch in batches] for phase in ("prefill", "decode"))
    speeds = [[rate(row["tokens_per_s"]) for row in phase] for phase in (prefill, decode)]
    sizes = [[byte_text(row[name]) for row in decode] for name in ("cache_bytes", "peak_bytes")]
    lines = [
        _line([result["device"], *(f"batch {batch}" for batch in batches)]),
        _line(["---"] + ["---:"] * len(batches)),
        _line([f"prefill of {prefill[0]['tokens']:,} tokens, tokens/s", *speeds[0]]),
        _line([f"decode of {decode[0]['tokens']:,} steps behind them, tokens/s", *speeds[1]]),
        _line(["cache", *sizes[0]]),
        _line(["peak memory, weights included", *sizes[1]]),
    ]
    logits = rows["logits", 1]
    error = (
        f"Logits of {logits['tokens']:,} tokens in bfloat16 there against float32 on the CPU: relative error "
        f"{logits['relative_error']:.3f}, the same likeliest token at {percent(logits['same_argmax'])} of the places."
    )
    return "\n".join([*lines, "", error, "", f"{_about(result)}."])


def jet_cpu(result: dict[str, Any]) -> str:
    """Memory of loading and speed, in one column."""
    [row] = result["rows"]
    lines = [
        _line([result["device"], "batch 1"]),
        _line(["---", "---:"]),
        _line(["weights", byte_text(row["weight_bytes"])]),
        _line(["peak memory of loading and use, over the weights' size", f"{row['peak_over_weights']:.2f}×"]),
        _line(["loading, seconds (files are mapped)", f"{row['load_seconds']:.1f}"]),
        _line(["decode, tokens/s", rate(row["decode_tokens_per_s"])]),
    ]
    return "\n".join([*lines, "", f"{_about(result)}."])


@dataclass(frozen=True)
class Table:
    """What stands between a table's markers."""

    document: str
    """Path from the root of the repository."""
    parts: dict[str, Callable[[dict[str, Any]], str]]
    """By the name of the file of results, without its ending: how its part is written. They stand in this order."""


TABLES = {
    "demo-cpu": Table("README.md", {"demo-cpu": demo}),
    "offline-suite": Table("docs/evaluation.md", {"offline-suite": offline}),
    "jet-nemotron-2b": Table(
        "docs/jet_nemotron.md", {"jet-nemotron-2b-cuda": jet_cuda, "jet-nemotron-2b-cpu": jet_cpu}
    ),
}
"""By the name of the markers."""


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=^<!-- {name} -->\n).*?(?=\n<!-- /{name} -->$)", re.MULTILINE | re.DOTALL)


def block(text: str, name: str) -> str:
    """What stands between a table's markers. Raises UserError where the markers are missing."""
    found = _between(name).search(text)
    if found is None:
        raise UserError(f"{name}: the markers <!-- {name} --> and <!-- /{name} --> are missing; put each on its line")
    return found.group()


def replaced(text: str, name: str, table: str) -> str:
    """`text` with another table between the markers. Raises UserError where they are missing."""
    block(text, name)
    return _between(name).sub(lambda _: table, text, count=1)


def rendered(text: str, name: str, results: Path) -> str:
    """`text` with the table of that name in its place. A file of results that is not there yet leaves a note."""
    parts = []
    for file, write in TABLES[name].parts.items():
        path = results / f"{file}.json"
        parts.append(write(read_json(path)) if path.exists() else f"No figures yet: there is no `{file}.json`.")
    return replaced(text, name, "\n\n".join(parts))


def main() -> int:
    try:
        for name, table in TABLES.items():
            path = ROOT / table.document
            text = path.read_text(encoding="utf-8")
            write_text(path, rendered(text, name, ROOT / "benchmarks" / "results"))
    except UserError as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

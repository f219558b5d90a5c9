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


def _nats(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.2g}")


PLACED_BUDGET = 4
PLACED = {
    ("retrieval", "nll"): ("retrieval, nats", _nats),
    ("kl", "kl"): ("KL, nats", _nats),
    ("perplexity", "perplexity"): ("perplexity", _plain),
    ("copy", "copy_accuracy"): ("copy accuracy", _share),
    ("needle@1024", "recall"): ("needle", _share),
    ("arc_easy", "accuracy"): ("ARC-Easy", _share),
    ("lambada", "accuracy"): ("LAMBADA", _share),
}
"""{(task, metric): its column and how it is written}."""
PLACED_LIKE = (("retrieval", "kl"), ("retrieval", "knowledge"), ("knowledge", "kl"), ("retrieval", "gsm8k"))
"""Objectives whose rankings of the layers are shown beside each other."""


def placed(result: dict[str, Any]) -> str:
    """Distilled hybrids of the main budget: their scores, then their differences from uniform and from random ones."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result["rows"]:  # means over the seeds stand last, and in the place of a single seed's
        if row["kind"] == "base" or (row["kind"] in ("hybrid", "mean") and row["budget"] == PLACED_BUDGET):
            for name in row["strategy"].split(", "):
                if row["kind"] == "mean" or (name, row["task"], row["metric"]) not in found:
                    found[name, row["task"], row["metric"]] = row
    names = dict.fromkeys(name for name, _, _ in found if name != "filler" and not name.startswith("random-"))
    names = dict.fromkeys(sorted(names, key=_placed_order))
    parts = []
    for title, field in (("", ""), ("Against uniform", "minus_uniform"), ("Against random", "minus_random")):
        lines = [_line(["strategy", *(words for words, _ in PLACED.values()), "seeds"]), _line(["---"] + ["---:"] * 8)]
        for name in names:
            rows = [found.get((name, *key)) for key in PLACED]
            shown = [row for row in rows if row is not None and (field or "score") in row]
            cells = [_placed(row, text, field) for row, (_, text) in zip(rows, PLACED.values())]
            count = max((row["n"] if row["kind"] == "mean" else 1 for row in shown), default=0)
            lines += [_line([name, *cells, str(count)])] if shown else []
        if len(lines) > 2:
            parts.append((f"{title}:\n\n" if title else "") + "\n".join(lines))
    parts = parts or ["No figures yet: no placement was distilled."]
    if any(row["kind"] == "search" for row in result["rows"]):
        parts.append("![Loss by budget, a line a strategy](placement-budgets.svg)")
        parts.append("![Layers that each strategy keeps on attention](placement-layers.svg)")
    errors = "± is one standard error: over seeds from three on, over rows of a single one"
    return "\n\n".join(
        [*parts, f"{_about(result)}. {errors}; differences are paired row by row, those of shares in points."]
    )


def _placed_order(name: str) -> tuple[int, str, str]:
    """The base, the baselines, then the searches by their candidates."""
    strategy, _, candidates = name.partition("/")
    return {"base": 0, "uniform": 1, "random": 2}.get(name, 3), candidates, strategy


def _placed(row: dict[str, Any] | None, text: Format, field: str) -> str:
    if row is None or (field or "score") not in row:
        return ABSENT
    if not field:
        return text(row["score"], row["stderr"])
    value, stderr = row[field], row[f"{field}_stderr"]
    return _points(value, stderr) if text is _share else ("+" if value >= 0 else "") + text(value, stderr)


def placed_ranks(result: dict[str, Any]) -> str:
    """Each score against the distilled result on the same objective, of the seed with the most placements."""
    rows = [row for row in result["rows"] if row["kind"] == "rank"]
    most = max((row["n"] for row in rows), default=0)
    seed = next((row["seed"] for row in rows if row["n"] == most), None)
    found = {
        (row["candidates"], row["objective"], row["among"]): row
        for row in rows
        if row["seed"] == seed and row["objective"] == row["task"]
    }
    head = [
        "candidates",
        "score",
        "all placements",
        "n",
        "not chosen by a score",
        "n",
        "tokens a score",
        "of the paths",
    ]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * 6)]
    for kind, objective in dict.fromkeys((kind, objective) for kind, objective, _ in found):
        both = [found.get((kind, objective, among)) for among in ("all", "not chosen")]
        cells = [cell for row in both for cell in (_interval(row), ABSENT if row is None else str(row["n"]))]
        some = next(row for row in both if row is not None)
        costs = [ABSENT if some[name] is None else f"{some[name]:,}" for name in ("score_tokens", "trained_tokens")]
        lines.append(_line([kind, objective, *cells, *costs]))
    about = f"{_about(result)}; seed {seed}. In brackets the 95% interval over resampled placements."
    return "\n".join([*lines, "", about]) if found else "No figures yet: no placement was scored and distilled."


def _interval(row: dict[str, Any] | None) -> str:
    return ABSENT if row is None else f"{row['score']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


def placed_cost(result: dict[str, Any]) -> str:
    """A mean over the seeds a line: the making of candidates, and each strategy at all its budgets together."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        if row["kind"] in ("cost", "search"):
            key = row["step"] if row["kind"] == "cost" else row["strategy"], row.get("candidates", "")
            one = found.setdefault(key, {"seeds": set(), "budgets": set(), "scored": 0, "seconds": 0.0, "tokens": 0})
            one["seeds"].add(row["seed"])
            one["budgets"] |= {row["budget"]} if row["kind"] == "search" else set()
            for name in ("scored", "seconds", "tokens"):
                one[name] += row.get(name) or 0
    lines = [_line(["step", "candidates", "budgets", "placements scored", "tokens", "seconds"])]
    lines.append(_line(["---"] * 3 + ["---:"] * 3))
    for (step, kind), one in found.items():
        seeds, budgets = len(one["seeds"]), ", ".join(map(str, sorted(one["budgets"])))
        counts = [f"{one[name] / seeds:,.0f}" if one[name] else ABSENT for name in ("scored", "tokens")]
        lines.append(_line([step, kind or ABSENT, budgets or ABSENT, *counts, f"{one['seconds'] / seeds:,.1f}"]))
    return "\n".join([*lines, "", f"{_about(result)}; means over the seeds."])


def placed_layers(result: dict[str, Any]) -> str:
    """What the heat maps of the aligned candidates say, a line an objective; of the first seed that has them."""
    rows = [row for row in result["rows"] if row.get("candidates") == "aligned" and row["kind"] in ("half", "likeness")]
    rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
    half = {(row["objective"], row["effect"]): row for row in rows if row["kind"] == "half"}
    like = {(row["objective"], row["other"], row["effect"]): row for row in rows if row["kind"] == "likeness"}
    effects = {"one_linear": "one layer linear", "one_full": "one layer on attention"}
    lines = [_line(["layers that carry half of the effect", *effects.values()]), _line(["---"] * 3)]
    for name in dict.fromkeys(name for name, _ in half):
        cells = [half.get((name, effect)) for effect in effects]
        lines.append(_line([name, *(ABSENT if row is None else _layers(row["layers"]) for row in cells)]))
    lines += ["", _line(["rankings of the layers alike, common layers of the top four", *effects.values()])]
    lines.append(_line(["---"] * 3))
    for pair in PLACED_LIKE:
        found = [like.get((*pair, effect)) or like.get((*pair[::-1], effect)) for effect in effects]
        lines.append(_line([" and ".join(pair), *map(_likeness, found)]))
    if not rows:
        return "No figures yet: no layer was scored alone."
    return "\n".join([*lines, "", "![What each layer does alone](placement-heat.svg)", "", f"{_about(result)}."])


def _layers(layers: list[int]) -> str:
    return f"{len(layers)}: {', '.join(map(str, layers))}"


def _likeness(row: dict[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return ABSENT
    return f"{row['score']:+.2f}; {', '.join(map(str, row['common'])) or 'none'}"


def placed_windows(result: dict[str, Any]) -> str:
    """What two windows took off each loss, a line a set of candidates, a seed and a task."""
    lines = [_line(["candidates", "seed", "windows", "task", "distilled", "loss taken off, nats", "n"])]
    lines.append(_line(["---"] * 5 + ["---:"] * 2))
    for row in result["rows"]:
        if row["kind"] == "window":
            cells = [row["candidates"], str(row["seed"]), ", ".join(map(str, row["swa"])), row["task"]]
            cells += [
                "yes" if row["distilled"] else "no",
                ("+" if row["score"] >= 0 else "") + _nats(row["score"], row["stderr"]),
            ]
            lines.append(_line([*cells, f"{row['n']:,}"]))
    return "\n".join([*lines, "", f"{_about(result)}."]) if len(lines) > 2 else "No figures yet: no window was placed."


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
    "placement-strategies": Table("docs/placement.md", {"placement-h100": placed}),
    "placement-ranks": Table("docs/placement.md", {"placement-h100": placed_ranks}),
    "placement-layers": Table("docs/placement.md", {"placement-h100": placed_layers}),
    "placement-windows": Table("docs/placement.md", {"placement-h100": placed_windows}),
    "placement-cost": Table("docs/placement.md", {"placement-h100": placed_cost}),
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

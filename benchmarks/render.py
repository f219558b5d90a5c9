"""Write the tables of README.md from benchmarks/results; nothing but what stands between a table's markers changes.

    python benchmarks/render.py

A table NAME stands between the lines `<!-- NAME -->` and `<!-- /NAME -->` and comes from results/NAME.json.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from postnas.errors import UserError
from postnas.files import read_json, write_text
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
    about = f"`{result['command']}`; {result['device']}, torch {result['torch']}, {result['date']}"
    return "\n".join([*lines, "", f"{about}; ± is one standard error."])


def _order(metric: str) -> tuple[int, int, str]:
    name, _, context = metric.partition("@")
    return list(METRICS).index(name), int(context or 0), name


def _words(metric: str) -> tuple[str, Format]:
    name, _, context = metric.partition("@")
    words, text = METRICS[name]
    return words + (f" at {context_name(int(context))}" if context else ""), text


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo-cpu": demo}
"""How each table is made, by the name of its markers and of its file."""


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
    """`text` with the table of results/NAME.json in its place."""
    return replaced(text, name, TABLES[name](read_json(results / f"{name}.json")))


def main() -> int:
    path = ROOT / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
        for name in TABLES:
            text = rendered(text, name, ROOT / "benchmarks" / "results")
        write_text(path, text)
    except UserError as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

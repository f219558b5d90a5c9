"""The table that stands in the terminal at the end of a run."""

from __future__ import annotations

from pathlib import Path

from postnas.report.measures import times
from postnas.report.results import Results, byte_text, context_name, linear_layers, rate, read_results

Line = tuple[str, str, str, str]


def demo_table(run: Path) -> str:
    """Base, hybrid and their difference, a line a measure, then the path of the report; plain text.

    A stage that has not run has a sentence in the place of its lines. Raises UserError as `read_results` does.
    """
    results = read_results(run)
    lines: list[Line] = [("", "base", "hybrid", "difference"), *_kept(results), *_won(results), *_layers(results)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [
        line[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join([*text, *_missing(results), f"report: {run / 'report.html'}"]) + "\n"


def _kept(results: Results) -> list[Line]:
    lines = []
    for row in results.kept:
        name, base, hybrid, difference, *_ = row.cells()
        if row.metric == "perplexity":
            difference += f" ({times(row.hybrid / row.base)})"
        lines.append((name, base.partition(" ±")[0], hybrid.partition(" ±")[0], difference))
    return lines


def _won(results: Results) -> list[Line]:
    """Decode speed at each context, then the cache of one sequence at each context."""
    decode = [row for row in results.won if row.phase == "decode"]
    speeds = [
        (f"decode tokens/s at {context_name(row.context)}", rate(row.base), rate(row.hybrid), times(row.speedup))
        for row in decode
    ]
    caches = []
    for row in decode:
        sizes = byte_text(row.base_bytes), byte_text(row.hybrid_bytes)
        caches.append((f"cache a sequence at {context_name(row.context)}", *sizes, f"{times(row.cache_ratio)} smaller"))
    return [*speeds, *caches]


def _layers(results: Results) -> list[Line]:
    if not results.placement:
        return []
    mixers = results.placement["placement"]
    linear = linear_layers(mixers)
    return [("linear layers", f"0 of {len(mixers)}", f"{linear} of {len(mixers)}", f"{linear:+d}")]


def _missing(results: Results) -> list[str]:
    ran = {"evaluate": results.kept, "bench": results.won, "place": results.placement}
    return [f"The stage {stage} has not run." for stage, found in ran.items() if not found]

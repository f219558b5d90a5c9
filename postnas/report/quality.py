"""The plots of how good a model is: bars of every measure, and quality against what it costs to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from postnas.report.figure import (
    GREY,
    INK,
    MARKERS,
    MODEL_COLOURS,
    WARM,
    WHEEL,
    byte_unit,
    figure,
    style,
    svg,
    wrapped,
)
from postnas.report.measures import Kept, Metric, grouped, kept_rows
from postnas.report.results import Won, context_name, won_rows


@dataclass(frozen=True)
class Bars:
    """One measure of several models."""

    name: str
    metric: Metric
    able: bool
    """False where the base is too near chance; its bars are grey."""
    values: Mapping[str, tuple[float, float | None]]
    """{model: (value, standard error or None)}; a model that was not measured is left out."""


def kept(eval_: dict[str, Any]) -> dict[str, str]:
    """{group: bars of base and hybrid with one standard error}, in the order of the page."""
    return {
        group: bars([_pair(row) for row in rows], MODEL_COLOURS, group)
        for group, rows in grouped(kept_rows(eval_)).items()
    }


def _pair(row: Kept) -> Bars:
    values = {"base": (row.base, row.base_stderr), "hybrid": (row.hybrid, row.hybrid_stderr)}
    return Bars(row.name, row.read, row.able, values)


def bars(rows: Sequence[Bars], colours: Mapping[str, str], title: str) -> str:
    """Horizontal bars, a block a measure, a bar a model. Shares stand on one axis, each loss on its own.

    colours: {model: colour}, from the top bar down.
    """
    shares = [row for row in rows if row.metric.share]
    panels = [*([shares] if shares else []), *([row] for row in rows if not row.metric.share)]
    inches = 0.12 + 0.2 * len(colours)
    heights = [inches * len(panel) + 0.55 for panel in panels]
    with style():
        drawn = figure(0.45 + sum(heights))
        places = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(places, panels):
            _bar_panel(axes, panel, colours)
        marks = [places[0].barh([0], [0], color=colour) for colour in colours.values()]
        drawn.legend(marks, list(colours), loc="outside upper right", ncols=4, handlelength=1.2, columnspacing=1.2)
        return svg(drawn, f"Scores of {', '.join(colours)}: {title}")


def _bar_panel(axes: Axes, rows: Sequence[Bars], colours: Mapping[str, str]) -> None:
    metric, thick = rows[0].metric, 0.8 / len(colours)
    for order, (model, colour) in enumerate(colours.items()):
        for place, row in enumerate(rows):
            if model not in row.values:
                continue
            value, stderr = row.values[model]
            value, error = metric.scale * value, metric.scale * (stderr or 0)
            height = place - 0.4 + thick * (order + 0.5)
            look = {"color": colour} if row.able else {"color": GREY, "alpha": 0.55 if order else 0.35}
            axes.barh([height], [value], 0.9 * thick, **look)
            axes.errorbar([value], [height], xerr=[error], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            text, after = row.metric.number(row.values[model][0]), max(0.0, value + error)
            axes.annotate(text, (after, height), (4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_yticks(range(len(rows)), [wrapped(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{metric.axis} ({'higher' if metric.share else 'lower'} is better)")
    axes.set_ylabel("measure" if len(rows) == 1 else "measures")
    for label, row in zip(axes.get_yticklabels(), rows):
        label.set_color(INK if row.able else GREY)


def against_cost(eval_: dict[str, Any], bench: dict[str, Any]) -> str:
    """What is left of the base's quality against bytes of cache a sequence and, where decoding was timed, its speed.

    Both at the longest context. A large mark is the mean of a group of measures, a small dot one measure.
    """
    longest = longest_context(won_rows(bench))
    unit, size = byte_unit(longest.base_bytes)
    at = f"at {context_name(longest.context)} tokens"
    costs = [(f"cache of a sequence {at}, {unit}", longest.base_bytes / size, longest.hybrid_bytes / size)]
    if longest.phase == "decode":
        costs.append((f"decode speed {at}, tokens/s", longest.base, longest.hybrid))
    groups = {
        group: [100 * row.share for row in rows if row.share is not None]
        for group, rows in grouped(kept_rows(eval_)).items()
    }
    groups = {group: shares for group, shares in groups.items() if shares}
    with style():
        drawn = figure(0.5 + 2.4 * len(costs))
        places = drawn.subplots(len(costs), 1, squeeze=False)[:, 0]
        for axes, (words, base, hybrid) in zip(places, costs):
            for place, (group, shares) in enumerate(groups.items()):
                look: dict[str, Any] = {"c": WHEEL[place % len(WHEEL)], "linewidths": 0}
                axes.scatter([hybrid] * len(shares), shares, s=9, alpha=0.6, **look)
                mean, marker = sum(shares) / len(shares), MARKERS[place % len(MARKERS)]
                label = f"{group}: {len(shares)}"
                axes.plot([base, hybrid], [100, mean], color=look["c"], linewidth=0.8, alpha=0.5)
                axes.scatter([hybrid], [mean], s=46, marker=marker, label=label, zorder=3, **look)
            axes.scatter([base], [100], s=80, c=WARM, marker="*", zorder=4, label="base")
            quality_axes(axes, words, [share for shares in groups.values() for share in shares], [base, hybrid])
        handles = places[0].get_legend_handles_labels()
        drawn.legend(*handles, loc="outside lower center", ncols=2)
        return svg(drawn, "Share of the base's quality against the size of the cache and the speed of decoding")


def longest_context(rows: Sequence[Won]) -> Won:
    """The decode row of the longest context; where decoding was not timed, its other row."""
    return max(rows, key=lambda row: (row.phase == "decode", row.context))


def quality_axes(axes: Axes, words: str, shares: Sequence[float], costs: Sequence[float]) -> None:
    """Axes of quality against cost that begin at no cost. shares: percent."""
    axes.axhline(100, color=INK, linewidth=0.5, linestyle=":")
    axes.set_xlim(0, 1.1 * max(costs))
    axes.set_ylim(min(97, *shares) - 3, max(103, *shares) + 3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(words)
    axes.set_ylabel("kept, percent of the base")

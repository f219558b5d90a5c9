"""Plots of placements: what each layer does alone, what strategies reach at a budget, and which layers they chose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from postnas.report.figure import GREY, MARKERS, WHEEL, figure, log_axis, style, svg, wrapped
from postnas.report.plots import log_shades, mixer_strips, strip_axes

BASELINES = ("uniform", "random")
"""Strategies that measure nothing: their lines are grey and broken."""

Point = tuple[int, float, float | None]
"""Budget, score, and its standard error or None."""


def alone(one_linear: Mapping[str, Sequence[float]], one_full: Mapping[str, Sequence[float]]) -> str:
    """Heat maps, layers by objective: one layer linear, and one layer on full attention. One of them may be empty.

    one_linear: {objective: a value a layer}, what the loss grows by where this layer alone is linear; logarithmic
    colours from a row's largest value down to a hundredth of it. one_full: the loss where this layer alone has
    attention; even colours from a row's largest value, dark, to its smallest. All in nats a token.
    """
    maps: list[tuple[str, Mapping[str, Sequence[float]], Callable[[Sequence[float]], list[float]], str]] = []
    if one_linear:
        words = "one layer linear: loss added, nats a token;\ndark little, yellow much"
        maps.append((words, one_linear, log_shades, "≤ {high:.2g}"))
    if one_full:
        words = "one layer on attention: loss left, nats a token;\ndark most, yellow least"
        maps.append((words, one_full, _low_shades, "{low:.2f}–{high:.2f}"))
    heights = [1.2 + 0.34 * len(rows) for _, rows, _, _ in maps]
    with style():
        drawn = figure(sum(heights))
        places = drawn.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (words, rows, shades, text) in zip(places, maps):
            _heat(axes, rows, shades, text)
            axes.set_title(words)
        return svg(drawn, "What each layer does alone, by objective")


def _low_shades(values: Sequence[float]) -> list[float]:
    """0 to 1 from the largest value to the smallest; all 0 where they are equal."""
    low, high = min(values), max(values)
    return [(high - value) / (high - low) if high > low else 0.0 for value in values]


def _heat(
    axes: Axes, rows: Mapping[str, Sequence[float]], shades: Callable[[Sequence[float]], list[float]], text: str
) -> None:
    """A row an objective, a square a layer; `text` is a format of the row's `low` and `high`, at its end."""
    layers = max(len(values) for values in rows.values())
    for y, values in enumerate(rows.values()):
        for x, shade in enumerate(shades(values)):
            colour = matplotlib.colormaps["viridis"](shade)
            axes.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=colour, linewidth=0))
        axes.text(layers - 0.2, y, text.format(low=min(values), high=max(values)), va="center", fontsize=10)
    strip_axes(axes, [wrapped(name) for name in rows], layers)
    axes.set_ylabel("objective")


def by_budget(panels: Mapping[str, Mapping[str, Sequence[Point]]]) -> str:
    """Score against the number of attention layers: a panel a title, a line a strategy {title: {strategy: its points}}.

    Less is better, in nats a token, with one standard error. Budgets stand on a logarithmic axis where they are more
    than two and above 0; so do the scores of a panel that are above 0 and span more than a power of ten.
    """
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    inks = dict(zip((name for name in names if name not in BASELINES), itertools.cycle(WHEEL)))
    marks = dict(zip(names, itertools.cycle(MARKERS)))
    with style():
        drawn = figure(0.4 + 0.22 * -(-len(names) // 3) + 2.3 * len(panels))
        places = drawn.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (title, lines) in zip(places, panels.items()):
            for place, (name, points) in enumerate(lines.items()):
                aside = 1 + 0.02 * (place - (len(lines) - 1) / 2)  # so that error bars do not hide each other
                axes.errorbar(
                    [budget * aside for budget, _, _ in points],
                    [score for _, score, _ in points],
                    [error or 0.0 for _, _, error in points],
                    color=inks.get(name, GREY),
                    marker=marks[name],
                    linestyle="-" if name in inks else ":" if name == "random" else "--",
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=name,
                )
            _budget_axes(axes, [point for points in lines.values() for point in points])
            axes.set_title(title)
        marked = {
            label: mark
            for axes in places
            for mark, label in zip(*axes.get_legend_handles_labels())  # a strategy may be missing in some panels
        }
        drawn.legend(list(marked.values()), list(marked), loc="outside lower center", ncols=3, columnspacing=1.2)
        return svg(drawn, f"Score by number of attention layers: {', '.join(names)}")


def _budget_axes(axes: Axes, points: Sequence[Point]) -> None:
    budgets = sorted({budget for budget, _, _ in points})
    scores = [score for _, score, _ in points]
    if len(budgets) > 2 and budgets[0] > 0:
        axes.set_xscale("log")
    if min(scores) > 0 and max(scores) > 10 * min(scores):
        log_axis(axes)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("full attention, layers")
    axes.set_ylabel("loss, nats a token")


def choices(placements: Mapping[str, Sequence[str]], rows: str) -> str:
    """The mixers of each placement's layers, a row a placement: {its name: one mixer a layer}. rows: what a row is."""
    with style():
        drawn = figure(1.0 + 0.3 * len(placements))
        axes = drawn.subplots()
        mixer_strips(axes, [list(mixers) for mixers in placements.values()])
        strip_axes(axes, list(placements), max(map(len, placements.values())))
        axes.set_ylabel(rows)
        drawn.legend(loc="outside lower right", ncols=3, handletextpad=0.1)
        return svg(drawn, f"Mixers of the layers, by {rows.partition(',')[0]}")

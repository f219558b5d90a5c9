"""Plots as SVG text, a pure function of the run's values: equal values give equal bytes.

Every plot is 360 points wide, so that its text can be read on a phone. Text and axes are drawn in
`currentColor`: inside a page they take the colour of the page's text, light or dark; alone they are grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from postnas.report.results import ATTENTION, METRICS, Kept, context_name, kept_rows, won_rows

# Colours of Okabe and Ito, told apart by colour-blind eyes, the blue lightened for dark pages.
WARM, COOL, GREEN, PINK, GOLD = "#d55e00", "#2a85c7", "#009e73", "#cc79a7", "#c58a00"
MODEL_COLOURS = {"base": WARM, "hybrid": COOL}
MARKERS = "osD^v<>P"
# Stands for `currentColor`, which matplotlib does not know.
INK = "#010203"
GREY = "#7a7a7a"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "postnas",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def _style() -> Iterator[None]:
    """Our style alone: a user's own matplotlibrc must not change the bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure(height: float) -> Figure:
    """height: inches (72 points). The width is 360 points."""
    return Figure(figsize=(5, height), layout="constrained")


def _svg(figure: Figure, label: str) -> str:
    """label: what a screen reader says."""
    # The layout's solver goes by the addresses of its variables: positions differ in the last bits from
    # call to call, and the names of clip paths are hashes of positions.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(edge, 5) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    text = StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(label)} color="{GREY}" ', 1)


def sensitivity(scores: dict[str, Any] | None, placement: dict[str, Any] | None) -> str:
    """Heat map, layers by objective: what one layer costs when it alone is made linear; below it the mixers chosen.

    scores: scores.json; without `swap` in it only the mixers are drawn. placement: placement.json; without it only
    the heat map. A row is an objective (its increase over the base, nats a token) or the weighted score, and has
    its own logarithmic colours, from its largest value down to a hundredth of that.
    """
    swap = (scores or {}).get("swap", [])
    block = placement["block"] if placement else swap[0]["block"]
    swap = sorted((row for row in swap if row["block"] == block), key=lambda row: row["layer"])
    rows: dict[str, list[float]] = {}
    if scores and swap:
        rows = {name: [row[name] - value for row in swap] for name, value in scores["base"].items()}
        rows["score"] = [row["score"] for row in swap]
    mixers = placement["placement"] if placement else []
    layers = len(mixers) or len(swap)
    names = [*rows, *(["mixer"] if mixers else [])]
    with _style():
        figure = _figure(1.1 + 0.34 * len(names))
        axes = figure.subplots()
        for y, values in enumerate(rows.values()):
            shades = _log_shades(values)
            for x, shade in enumerate(shades):
                colour = matplotlib.colormaps["viridis"](shade)
                axes.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=colour, linewidth=0))
            axes.text(layers - 0.2, y, f"≤ {max(values):.2g}", va="center", fontsize=10)
        if mixers:
            _mixer_strip(axes, mixers, len(rows))
            figure.legend(loc="outside lower right", ncols=3, handletextpad=0.1)
        axes.set_xlim(-0.7, layers - 0.3)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("layer")
        if rows:
            axes.set_title("cost of one linear layer: dark little, yellow much")
        return _svg(figure, f"Cost of making one layer linear, and the mixers of {layers} layers")


def _log_shades(values: Sequence[float]) -> list[float]:
    """0 to 1 for a hundredth of the largest value, and less, to the largest, on a logarithmic scale."""
    top = max(values)
    if top <= 0:
        return [0.0] * len(values)
    return [1 + math.log10(max(value / top, 0.01)) / 2 for value in values]


def _mixer_strip(axes: Axes, mixers: list[str], y: int) -> None:
    """Full squares are attention, small dots the linear blocks, so that shape alone tells them apart."""
    colours = iter((COOL, GREEN, PINK, GOLD))
    looks: dict[str, tuple[str, str, float]] = {"attn": (WARM, "s", 58), "swa": (GOLD, "D", 36)}
    for mixer in dict.fromkeys([*ATTENTION, *mixers]):
        where = [layer for layer, name in enumerate(mixers) if name == mixer]
        if not where:
            continue
        colour, marker, size = looks.get(mixer) or (next(colours), "o", 14)
        name = {"attn": "full attention", "swa": "windowed attention"}.get(mixer, mixer)
        axes.scatter(where, [y] * len(where), s=size, c=colour, marker=marker, linewidths=0, label=name)


def losses(metrics: list[dict[str, Any]]) -> str:
    """Alignment error (mean, and the band of all layers) and KL to the base, each against the tokens seen.

    Stage 2 counts its tokens anew; its curve follows that of stage 1.
    """
    align = [line for line in metrics if line["stage"] == "align"]
    distilled = {stage: [line for line in metrics if line["stage"] == stage] for stage in ("train", "stage2")}
    distilled = {stage: lines for stage, lines in distilled.items() if lines}
    panels = bool(align) + bool(distilled)
    with _style():
        figure = _figure(0.3 + 2.1 * panels)
        places = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        if align:
            _alignment_panel(places.pop(0), align)
        if distilled:
            axes = places.pop(0)
            before = 0
            for (stage, lines), colour in zip(distilled.items(), (COOL, PINK)):
                tokens, values = [before + line["tokens"] for line in lines], [line["loss"] for line in lines]
                before = tokens[-1]
                axes.plot(tokens, values, color=colour, alpha=0.35, linewidth=0.8)
                words = {"train": "mixers only", "stage2": "all weights"}[stage]
                axes.plot(tokens, _running_mean(values), color=colour, linewidth=1.8, label=words)
            axes.set_title("distillation: KL to the base, nats a token")
            _token_axes(axes)
        return _svg(figure, "Losses against tokens")


def _alignment_panel(axes: Axes, align: list[dict[str, Any]]) -> None:
    by_block = _by_block(align)
    for (block, lines), colour in zip(by_block.items(), (COOL, GREEN, PINK, GOLD)):
        tokens = [tokens for tokens, _ in lines]
        axes.fill_between(
            tokens,
            [min(values) for _, values in lines],
            [max(values) for _, values in lines],
            color=colour,
            alpha=0.22,
            linewidth=0,
        )
        mean = [sum(values) / len(values) for _, values in lines]
        axes.plot(tokens, mean, color=colour, linewidth=1.8, label=f"{block}: mean, and band of all layers")
    if not by_block:
        tokens, values = [line["tokens"] for line in align], [line["loss"] for line in align]
        axes.plot(tokens, values, color=COOL, linewidth=1.5, label="mean of all layers")
    axes.set_title("alignment: relative error of a mixer's output")
    _token_axes(axes)


def _by_block(align: list[dict[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """{block: [(tokens, one error a layer)]} of the lines that have errors by layer."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for line in align:
        for block, values in line.get("losses", {}).items():
            found.setdefault(block, []).append((line["tokens"], values))
    return found


def _token_axes(axes: Axes) -> None:
    _log_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.set_xlabel("tokens")
    axes.legend(loc="upper right")


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, also where it spans less than a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _running_mean(values: list[float]) -> list[float]:
    """Mean of a tenth of all values around each value; of fewer at the ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def final_errors(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{block: one relative error a layer} at the end of the alignment: the mean of its last tenth of steps."""
    ends = {}
    for block, lines in _by_block([line for line in metrics if line["stage"] == "align"]).items():
        last = [values for _, values in lines[-max(1, len(lines) // 10) :]]
        ends[block] = [sum(layer) / len(last) for layer in zip(*last)]
    return ends


def alignment_by_layer(metrics: list[dict[str, Any]]) -> str:
    """Bars: the relative error that alignment left in each layer (0 perfect, 1 as bad as zero)."""
    ends = final_errors(metrics)
    with _style():
        figure = _figure(2.1)
        axes = figure.subplots()
        width = 0.8 / len(ends)
        for place, (block, values) in enumerate(ends.items()):
            left = [layer - 0.4 + width * place for layer in range(len(values))]
            axes.bar(left, values, width, align="edge", color=(COOL, GREEN, PINK, GOLD)[place % 4], label=block)
        axes.set_title("relative error after alignment")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        if len(ends) > 1:
            figure.legend(loc="outside upper right", ncols=len(ends))
        return _svg(figure, "Relative error after alignment, by layer")


def kept(eval_: dict[str, Any]) -> str:
    """Bars of base and hybrid with one standard error; shares in percent, then each other metric on its own axis."""
    rows = kept_rows(eval_)
    groups = [[row for row in rows if METRICS[row.metric].share]]
    groups += [[row] for row in rows if not METRICS[row.metric].share]
    groups = [group for group in groups if group]
    heights = [len(group) + 0.6 for group in groups]
    with _style():
        figure = _figure(0.5 + 0.52 * sum(heights))
        places = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, group in zip(places, groups):
            _bars(axes, group)
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return _svg(figure, "Quality of base and hybrid")


def _bars(axes: Axes, group: list[Kept]) -> None:
    metric = METRICS[group[0].metric]
    scale = 100 if metric.share else 1
    for model, shift in (("base", -0.2), ("hybrid", 0.2)):
        places = [place + shift for place in range(len(group))]
        values = [scale * getattr(row, model) for row in group]
        errors = [scale * (getattr(row, f"{model}_stderr") or 0) for row in group]
        axes.barh(places, values, 0.36, color=MODEL_COLOURS[model], label=model)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for place, value, error in zip(places, values, errors):
            axes.annotate(
                f"{value:.1f}" if metric.share else f"{value:.2f}",
                (value + error, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
    axes.set_yticks(range(len(group)), [row.name for row in group])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("percent, higher is better" if metric.share else "lower is better")


def quality_against_cache(eval_: dict[str, Any], bench: dict[str, Any], placement: dict[str, Any] | None) -> str:
    """Share of the base's quality against bytes of cache a sequence, at the longest context; one mark a measure.

    placement: placement.json, for the number of attention layers in the title; None leaves it out.
    """
    longest = max(won_rows(bench), key=lambda row: row.context)
    unit, size = ("GiB", 1 << 30) if longest.base_bytes >= 1 << 30 else ("MiB", 1 << 20)
    base, hybrid = (count / size for count in (longest.base_bytes, longest.hybrid_bytes))
    rows = [(row.name, 100 * row.share) for row in kept_rows(eval_) if row.share is not None]
    with _style():
        figure = _figure(3.1)
        axes = figure.subplots()
        axes.axhline(100, color=INK, linewidth=0.5, linestyle=":")
        for place, (name, share) in enumerate(rows):
            colour = (COOL, GREEN, PINK, GOLD)[place % 4]
            axes.plot([base, hybrid], [100, share], color=colour, linewidth=0.8, alpha=0.5)
            axes.scatter([hybrid], [share], s=34, c=colour, marker=MARKERS[place % 8], label=name)
        axes.scatter([base], [100], s=60, c=WARM, marker="*", zorder=3)
        axes.annotate("base", (base, 100), (0, 7), textcoords="offset points", ha="center", fontsize=10.5)
        axes.set_xlim(0, 1.08 * max(base, hybrid))
        shares = [share for _, share in rows]
        axes.set_ylim(min(98, *shares) - 3, max(102, *shares) + 3)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"cache of a sequence of {context_name(longest.context)} tokens, {unit}")
        layers = f", {placement['budget']} attention layers of {len(placement['placement'])}" if placement else ""
        axes.set_title(f"percent of the base's quality{layers}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return _svg(figure, "Share of the base's quality against the size of the cache")


def speed(bench: dict[str, Any]) -> str:
    """Tokens a second by context, a panel for prefill and one for decode; both axes are logarithmic."""
    rows = won_rows(bench)
    phases = list(dict.fromkeys(row.phase for row in rows))
    with _style():
        figure = _figure(2.6)
        places = figure.subplots(1, len(phases), squeeze=False)[0]
        for axes, phase in zip(places, phases):
            points = [row for row in rows if row.phase == phase]
            contexts = [row.context for row in points]
            for model, marker in (("base", "*"), ("hybrid", "o")):
                speeds = [getattr(row, model) for row in points]
                axes.plot(contexts, speeds, color=MODEL_COLOURS[model], marker=marker, label=model, linewidth=1.8)
            axes.set_xscale("log", base=2)
            _log_axis(axes)
            ticks = contexts[:: 1 + (len(contexts) - 1) // 4]
            axes.set_xticks(ticks, [context_name(context) for context in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.15, y=0.15)
            axes.set_title(f"{phase}, tokens/s")
            axes.set_xlabel("context, tokens")
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return _svg(figure, "Speed of base and hybrid by context")


def budget_table(placement: dict[str, Any]) -> str:
    """Predicted score (nats a token, by the weights of the objective) against the number of attention layers."""
    table = sorted(placement["table"], key=lambda row: row["budget"])
    budgets, scores = [row["budget"] for row in table], [row["predicted"] for row in table]
    with _style():
        figure = _figure(2.2)
        axes = figure.subplots()
        axes.plot(budgets, scores, color=COOL, marker="o", markersize=3, linewidth=1.5)
        chosen = [row for row in table if row["budget"] == placement["budget"]]
        for row in chosen:
            axes.scatter([row["budget"]], [row["predicted"]], s=70, c=WARM, marker="s", zorder=3)
            axes.annotate("chosen", (row["budget"], row["predicted"]), (6, 6), textcoords="offset points")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_title("predicted loss before distillation, nats a token")
        axes.set_xlabel("layers that keep full attention")
        return _svg(figure, "Predicted score against the number of attention layers")

"""The plots of one run as SVG text, a pure function of the run's values. How good it is stands in `quality`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from postnas.report.figure import (
    COOL,
    GOLD,
    MODEL_COLOURS,
    PINK,
    WARM,
    WHEEL,
    figure,
    layer_axis,
    log_axis,
    running_mean,
    style,
    svg,
    token_axis,
)
from postnas.report.results import ATTENTION, context_name, won_rows


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
    names = [*rows, *(["placement"] if mixers else [])]
    with style():
        drawn = figure(1.35 + 0.34 * len(names))
        axes = drawn.subplots()
        for y, values in enumerate(rows.values()):
            shades = log_shades(values)
            for x, shade in enumerate(shades):
                colour = matplotlib.colormaps["viridis"](shade)
                axes.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, facecolor=colour, linewidth=0))
            axes.text(layers - 0.2, y, f"≤ {max(values):.2g}", va="center", fontsize=10)
        if mixers:
            mixer_strips(axes, [mixers], len(rows))
            drawn.legend(loc="outside lower right", ncols=3, handletextpad=0.1)
        strip_axes(axes, names, layers)
        axes.set_ylabel("objective")
        if rows:
            axes.set_title("cost of one linear layer, nats a token:\ndark little, yellow much")
        return svg(drawn, f"Cost of making one layer linear, and the mixers of {layers} layers")


def log_shades(values: Sequence[float]) -> list[float]:
    """0 to 1 for a hundredth of the largest value, and less, to the largest, on a logarithmic scale."""
    top = max(values)
    if top <= 0:
        return [0.0] * len(values)
    return [1 + math.log10(max(value / top, 0.01)) / 2 for value in values]


def mixer_strips(axes: Axes, placements: Sequence[list[str]], first: int = 0) -> None:
    """A placement a row, from row `first` down.

    Full squares are attention, small dots the linear blocks, so that shape alone tells them apart.
    """
    colours = iter(2 * WHEEL)
    looks: dict[str, tuple[str, str, float]] = {"attn": (WARM, "s", 58), "swa": (GOLD, "D", 36)}
    smaller = min(1.0, 32 / max(len(mixers) for mixers in placements)) ** 2
    for mixer in dict.fromkeys([*ATTENTION, *(name for mixers in placements for name in mixers)]):
        where = [
            (layer, first + row)
            for row, mixers in enumerate(placements)
            for layer, name in enumerate(mixers)
            if name == mixer
        ]
        if not where:
            continue
        colour, marker, size = looks.get(mixer) or (next(colours), "o", 14)
        name = {"attn": "full attention", "swa": "windowed attention"}.get(mixer, mixer)
        xs, ys = [layer for layer, _ in where], [row for _, row in where]
        axes.scatter(xs, ys, s=size * smaller, c=colour, marker=marker, linewidths=0, label=name)


def strip_axes(axes: Axes, names: Sequence[str], layers: int) -> None:
    """Rows of these names from the top down, a column a layer."""
    axes.set_xlim(-0.7, layers - 0.3)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    layer_axis(axes)


def losses(metrics: list[dict[str, Any]]) -> str:
    """Alignment error (mean, and the band of all layers) and KL to the base, each against the tokens seen.

    Stage 2 counts its tokens anew; its curve follows that of stage 1.
    """
    align = [line for line in metrics if line["stage"] == "align"]
    distilled = {stage: [line for line in metrics if line["stage"] == stage] for stage in ("train", "stage2")}
    distilled = {stage: lines for stage, lines in distilled.items() if lines}
    panels = bool(align) + bool(distilled)
    with style():
        drawn = figure(0.3 + 2.2 * panels)
        places = list(drawn.subplots(panels, 1, squeeze=False)[:, 0])
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
                axes.plot(tokens, running_mean(values), color=colour, linewidth=1.8, label=words)
            axes.set_title("distillation")
            axes.set_ylabel("KL to the base, nats a token")
            _loss_axes(axes)
        return svg(drawn, "Losses against tokens")


def _alignment_panel(axes: Axes, align: list[dict[str, Any]]) -> None:
    by_block = _by_block(align)
    for (block, lines), colour in zip(by_block.items(), 2 * WHEEL):
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
    axes.set_title("alignment of each layer's mixer")
    axes.set_ylabel("relative error, share")
    _loss_axes(axes)


def _loss_axes(axes: Axes) -> None:
    log_axis(axes)
    token_axis(axes)
    axes.legend(loc="upper right")


def _by_block(align: list[dict[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """{block: [(tokens, one error a layer)]} of the lines that have errors by layer."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for line in align:
        for block, values in line.get("losses", {}).items():
            found.setdefault(block, []).append((line["tokens"], values))
    return found


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
    with style():
        drawn = figure(2.1)
        axes = drawn.subplots()
        width = 0.8 / len(ends)
        for place, (block, values) in enumerate(ends.items()):
            left = [layer - 0.4 + width * place for layer in range(len(values))]
            axes.bar(left, values, width, align="edge", color=WHEEL[place % len(WHEEL)], label=block)
        axes.set_title("what alignment left")
        axes.set_ylabel("relative error, share")
        layer_axis(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.01)
        if len(ends) > 1:
            drawn.legend(loc="outside upper right", ncols=len(ends))
        return svg(drawn, "Relative error after alignment, by layer")


def speed(bench: dict[str, Any]) -> str:
    """Tokens a second by context, a panel for prefill and one for decode; both axes are logarithmic."""
    rows = won_rows(bench)
    phases = list(dict.fromkeys(row.phase for row in rows))
    with style():
        drawn = figure(2.6)
        places = drawn.subplots(1, len(phases), squeeze=False)[0]
        for axes, phase in zip(places, phases):
            points = [row for row in rows if row.phase == phase]
            contexts = [row.context for row in points]
            for model, marker in (("base", "*"), ("hybrid", "o")):
                speeds = [getattr(row, model) for row in points]
                axes.plot(contexts, speeds, color=MODEL_COLOURS[model], marker=marker, label=model, linewidth=1.8)
            axes.set_xscale("log", base=2)
            log_axis(axes)
            ticks = contexts[:: 1 + (len(contexts) - 1) // 4]
            axes.set_xticks(ticks, [context_name(context) for context in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.15, y=0.15)
            axes.set_title(phase)
            axes.set_xlabel("context, tokens")
            axes.set_ylabel("speed, tokens/s")
        drawn.legend(*places[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return svg(drawn, "Speed of base and hybrid by context")


def budget_table(placement: dict[str, Any]) -> str:
    """Predicted score (nats a token, by the weights of the objective) against the number of attention layers."""
    table = sorted(placement["table"], key=lambda row: row["budget"])
    budgets, scores = [row["budget"] for row in table], [row["predicted"] for row in table]
    with style():
        drawn = figure(2.2)
        axes = drawn.subplots()
        axes.plot(budgets, scores, color=COOL, marker="o", markersize=3, linewidth=1.5)
        chosen = [row for row in table if row["budget"] == placement["budget"]]
        for row in chosen:
            axes.scatter([row["budget"]], [row["predicted"]], s=70, c=WARM, marker="s", zorder=3)
            axes.annotate("chosen", (row["budget"], row["predicted"]), (6, 6), textcoords="offset points")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_title("predicted before distillation")
        axes.set_ylabel("loss, nats a token")
        axes.set_xlabel("full attention, layers")
        return svg(drawn, "Predicted score against the number of attention layers")

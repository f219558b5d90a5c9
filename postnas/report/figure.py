"""What all plots share: one style, a figure as SVG text whose equal values give equal bytes, and axes with plain ticks.

Every plot is 360 points wide, so that its text can be read on a phone. Text and axes are drawn in
`currentColor`: inside a page they take the colour of the page's text, light or dark; alone they are grey.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Colours of Okabe and Ito, told apart by colour-blind eyes, the blue lightened for dark pages.
WARM, COOL, GREEN, PINK, GOLD, VIOLET, OLIVE = (
    "#d55e00",
    "#2a85c7",
    "#009e73",
    "#cc79a7",
    "#c58a00",
    "#8a6fd1",
    "#7d8a2e",
)
WHEEL = (COOL, GREEN, PINK, GOLD, VIOLET, OLIVE)
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
def style() -> Iterator[None]:
    """Our style alone: a user's own matplotlibrc must not change the bytes."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(height: float) -> Figure:
    """height: inches (72 points). The width is 360 points."""
    return Figure(figsize=(5, height), layout="constrained")


def svg(drawn: Figure, label: str) -> str:
    """label: what a screen reader says."""
    # The layout's solver goes by the addresses of its variables: positions differ in the last bits from
    # call to call, and the names of clip paths are hashes of positions.
    drawn.draw_without_rendering()
    drawn.set_layout_engine("none")
    for axes in drawn.axes:
        left, bottom, width, height = (round(edge, 5) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    text = StringIO()
    drawn.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    whole = text.getvalue()
    whole = whole[whole.index("<svg ") :].replace(INK, "currentColor")
    return whole.replace("<svg ", f'<svg role="img" aria-label={quoteattr(label)} color="{GREY}" ', 1)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, also where what is drawn spans less than a power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def token_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("text seen, tokens")


def layer_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("layer, counted from 0")


def short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def running_mean(values: list[float]) -> list[float]:
    """Mean of a tenth of all values around each value; of fewer at the ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def wrapped(name: str, width: int = 19) -> str:
    """A long name in lines of about `width` letters, broken after spaces and underscores."""
    lines = [""]
    for piece in re.split(r"(?<=[ _])", name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def byte_unit(count: int) -> tuple[str, int]:
    """(name, bytes) of the unit of an axis that reaches up to `count` bytes."""
    return ("GiB", 1 << 30) if count >= 1 << 30 else ("MiB", 1 << 20) if count >= 1 << 20 else ("KiB", 1 << 10)

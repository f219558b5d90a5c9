"""The plots of several runs. A run keeps its letter and its colour in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from postnas.report.figure import (
    MARKERS,
    WARM,
    WHEEL,
    byte_unit,
    figure,
    log_axis,
    running_mean,
    style,
    svg,
    token_axis,
)
from postnas.report.html import device_name
from postnas.report.plots import mixer_strips, strip_axes
from postnas.report.quality import Bars, bars, longest_context, quality_axes
from postnas.report.results import Won, context_name
from postnas.report.runs import Key, Member, bases

BASE_COLOURS = (WARM, "#a34700", "#ff8a3d", "#7a3500", "#ffb37a", "#c04000")
"""A base a colour, where the runs have several."""


def colour(members: Sequence[Member], member: Member) -> str:
    return WHEEL[members.index(member)]


def scores(members: Sequence[Member], keys: Sequence[Key], group: str) -> str:
    """Bars of each base and of each run's hybrid, with one standard error. keys: measures of one group."""
    colours = {label: BASE_COLOURS[place] for place, label in enumerate(bases(members))}
    colours |= {member.letter: colour(members, member) for member in members}
    rows = []
    for key in keys:
        values: dict[str, tuple[float, float | None]] = {}
        for label, group_members in bases(members).items():
            for member in reversed(group_members):
                if key in member.kept:
                    values[label] = (member.kept[key].base, member.kept[key].base_stderr)
        found = {member.letter: member.kept[key] for member in members if key in member.kept}
        values |= {letter: (row.hybrid, row.hybrid_stderr) for letter, row in found.items()}
        one = next(iter(found.values()))
        rows.append(Bars(one.name, one.read, any(row.able for row in found.values()), values))
    return bars(sorted(rows, key=lambda row: not row.able), colours, group)


@dataclass(frozen=True)
class Point:
    """A run in the plane of quality (percent of its base's, a mean) and cost."""

    member: Member
    kept: float
    at: Won


def comparable(members: Sequence[Member]) -> list[Point]:
    """A point a run, on the measures and at the context that all runs share that have both scores and speed.

    Empty where they share none.
    """
    ready = [member for member in members if member.won and any(row.share is not None for row in member.kept.values())]
    if not ready:
        return []
    keys = [key for key in ready[0].kept if all(_share(member, key) is not None for member in ready)]
    spots = [{(row.phase, row.context) for row in member.won} for member in ready]
    common = set.intersection(*spots)
    if not keys or not common:
        return []
    spot = longest_context([row for row in ready[0].won if (row.phase, row.context) in common])
    return [
        Point(
            member,
            100 * sum(_share(member, key) or 0.0 for key in keys) / len(keys),
            next(row for row in member.won if (row.phase, row.context) == (spot.phase, spot.context)),
        )
        for member in ready
    ]


def _share(member: Member, key: Key) -> float | None:
    return member.kept[key].share if key in member.kept else None


def against_cost(members: Sequence[Member]) -> str:
    """Mean share of the base's quality against bytes of cache and, where decoding was timed, its speed.

    A full mark is a run that no other one beats on both axes, a hollow one is beaten. Speeds of different devices
    stand as multiples of the speed of each run's own base.
    """
    points = comparable(members)
    at = f"at {context_name(points[0].at.context)} tokens"
    unit, size = byte_unit(max(point.at.base_bytes for point in points))
    one_device = len({device_name(point.member.results) for point in points}) == 1
    costs: list[tuple[str, list[float], list[float], int]] = [
        (
            f"cache of a sequence {at}, {unit}",
            [point.at.base_bytes / size for point in points],
            [point.at.hybrid_bytes / size for point in points],
            -1,
        )
    ]
    if points[0].at.phase == "decode" and one_device:
        hybrids = [point.at.hybrid for point in points]
        costs.append((f"decode speed {at}, tokens/s", [point.at.base for point in points], hybrids, 1))
    elif points[0].at.phase == "decode":
        ratios = [point.at.speedup for point in points]
        costs.append((f"decode speed {at}, times its own base's", [1.0] * len(points), ratios, 1))
    shares = [point.kept for point in points]
    with style():
        drawn = figure(0.5 + 2.4 * len(costs))
        for axes, (words, base, hybrid, sign) in zip(drawn.subplots(len(costs), 1, squeeze=False)[:, 0], costs):
            axes.scatter(base, [100] * len(base), s=80, c=WARM, marker="*", linewidths=0, zorder=3)
            axes.annotate("base", (base[0], 100), (0, 7), textcoords="offset points", ha="center", fontsize=10)
            full = front([(share, sign * value) for share, value in zip(shares, hybrid)])
            for point, value, best in zip(points, hybrid, full):
                ink = colour(members, point.member)
                marker = MARKERS[members.index(point.member)]
                face = ink if best else "none"
                axes.scatter([value], [point.kept], s=50, marker=marker, facecolors=face, edgecolors=ink, zorder=4)
                axes.annotate(point.member.letter, (value, point.kept), (7, -4), textcoords="offset points")
            quality_axes(axes, words, shares, [*base, *hybrid])
        return svg(drawn, "Share of the base's quality against cache and decode speed, a mark a run")


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point whether no other is at least as good in both values and better in one; more is better."""
    return [
        not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)  # equal points do not beat each other
        for x, y in points
    ]


def placements(members: Sequence[Member]) -> str:
    """The mixers of each run's layers, a row a run."""
    strips = {one.letter: one.results.placement["placement"] for one in members if one.results.placement}
    with style():
        drawn = figure(1.0 + 0.34 * len(strips))
        axes = drawn.subplots()
        mixer_strips(axes, list(strips.values()))
        strip_axes(axes, list(strips), max(map(len, strips.values())))
        axes.set_ylabel("run")
        drawn.legend(loc="outside lower right", ncols=3, handletextpad=0.1)
        return svg(drawn, f"Placements of the runs {', '.join(strips)}")


def distilled(member: Member) -> list[tuple[int, float]]:
    """(tokens seen, KL to the base) of each step of distillation; stage 2 goes on counting from stage 1."""
    points: list[tuple[int, float]] = []
    for stage in ("train", "stage2"):
        before = points[-1][0] if points else 0
        lines = [line for line in member.results.metrics if line["stage"] == stage]
        points += [(before + line["tokens"], line["loss"]) for line in lines]
    return points


def losses(members: Sequence[Member]) -> str:
    """KL to the base against the tokens seen: each run's running mean."""
    with style():
        drawn = figure(2.6)
        axes = drawn.subplots()
        for member in members:
            points = distilled(member)
            if points:
                tokens, values = zip(*points)
                ink = colour(members, member)
                axes.plot(tokens, running_mean(list(values)), color=ink, linewidth=1.8, label=member.letter)
        axes.set_title("distillation, running mean")
        axes.set_ylabel("KL to the base, nats a token")
        log_axis(axes)
        token_axis(axes)
        axes.legend(loc="upper right", ncols=3)
        return svg(drawn, "Distillation losses of the runs against tokens")

"""Several runs on one page: scores with paired differences, placements, speed, cost, and how the recipes differ."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from postnas.errors import UserError
from postnas.files import write_text
from postnas.report.figure import WHEEL
from postnas.report.html import device_name, render
from postnas.report.measures import GROUPS, Kept
from postnas.report.results import (
    Won,
    base_name,
    byte_text,
    context_name,
    linear_layers,
    rate,
)
from postnas.report.runs import NOTHING, Key, Member, bases, difference, read_member, recipe_changes
from postnas.trials import TRIALS

STAGES = ("align", "place", *TRIALS, "train", "evaluate", "bench")
"""The stages whose cost has a column; those that compare variants have one where a run has made them."""


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page about several run directories to the file `out`; returns its path.

    Differences are against the first run. A run shows what its stages have left. Equal files give equal bytes.
    Raises UserError for fewer than two runs, more than can be told apart, the same directory twice, a directory
    that is no run, and where `out` cannot be written.
    """
    if not 2 <= len(folders) <= len(WHEEL):
        raise UserError(f"runs: {len(folders)} cannot be compared; give 2 to {len(WHEEL)} run directories")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("runs: the same directory is given twice; give each run once")
    members = [read_member(letter, folder) for letter, folder in zip(ascii_uppercase, folders)]
    write_text(out, render("compare.html.j2", _page(members)))
    return out


def _page(members: list[Member]) -> dict[str, Any]:
    letters = [member.letter for member in members]
    first, stages = letters[0], _stages(members)
    return {
        "title": f"{len(members)} runs compared",
        "runs": [_described(member) for member in members],
        "bases_differ": len({member.base for member in members}) > 1,
        "devices": sorted({device_name(member.results) for member in members if member.won}),
        "score_head": ["measure", *bases(members), *letters, *(f"{letter} − {first}" for letter in letters[1:]), "n"],
        "scores": _scores(members),
        "speed_head": ["run", *("phase", "context", "tokens/s", "of its base's", "cache", "smaller")],
        "speeds": [_speed_cells(member, row) for member in members for row in member.won],
        "cost_head": ["run", *(f"{stage}, s" for stage in stages), "all, s", "text, tokens", "peak memory"],
        "costs": [_cost_cells(member, stages) for member in members if member.results.stages],
        "letters": letters,
        "command": f"postnas report {shlex.join(str(member.folder) for member in members)}",
        "changes": recipe_changes(members),
        "plots": _plots(members),
    }


def _described(member: Member) -> dict[str, Any]:
    placement, results = member.results.placement, member.results
    layers = "no placement yet"
    if placement:
        mixers = placement["placement"]
        layers = f"{linear_layers(mixers)} of {len(mixers)} layers are linear ({placement['block']})"
        layers += f", strategy {placement['strategy']}"
    return {
        "letter": member.letter,
        "folder": str(member.folder),
        "base": results.recipe["base"]["model"],
        "short": base_name(results.recipe["base"]["model"]),
        "layers": layers,
        "device": device_name(results),
        "missing": member.missing,
        "command": results.command,
        "measured": results.remake("eval", "bench"),
        "recipe": results.recipe_text,
    }


def _keys(members: list[Member]) -> list[Key]:
    """Every measure that a run has, by group, in the order of the runs."""
    rows = {key: row for member in members for key, row in member.kept.items()}
    return sorted(rows, key=lambda key: GROUPS.index(rows[key].read.group))


def _first(members: list[Member], key: Key) -> Kept:
    return next(member.kept[key] for member in members if key in member.kept)


def _able(members: list[Member], key: Key) -> bool:
    """True where a base that was asked can do the task."""
    return any(member.kept[key].able for member in members if key in member.kept)


def _scores(members: list[Member]) -> list[dict[str, Any]]:
    """The groups of the table of scores."""
    groups: dict[str, dict[str, Any]] = {}
    for key in _keys(members):
        name = _first(members, key).read.group
        group = groups.setdefault(name, {"name": name, "able": [], "unable": []})
        group["able" if _able(members, key) else "unable"].append(_score_cells(members, key))
    return list(groups.values())


def _score_cells(members: list[Member], key: Key) -> list[str]:
    row = _first(members, key)
    read, found = row.read, [member.kept.get(key) for member in members]
    base_cells = []
    for group in bases(members).values():
        rows = [member.kept[key] for member in group if key in member.kept]
        values = dict.fromkeys(read.value(one.base) + read.error(one.base_stderr) for one in rows)
        base_cells.append(" / ".join(values) or NOTHING)
    scores = [read.value(one.hybrid) + read.error(one.hybrid_stderr) if one else NOTHING for one in found]
    gaps = [difference(members[0], member, key) for member in members[1:]]
    differences = [
        read.difference(gap.value, gap.stderr) + ("" if gap.paired else ", unpaired") if gap else NOTHING
        for gap in gaps
    ]
    counts = dict.fromkeys(f"{one.n:,}" for one in found if one)
    return [row.name, *base_cells, *scores, *differences, " / ".join(counts)]


def _speed_cells(member: Member, row: Won) -> list[str]:
    speed = rate(row.hybrid, row.hybrid_stderr)
    ratio, smaller = f"{row.speedup:.2f}×", f"{row.cache_ratio:.2f}×"
    return [member.letter, row.phase, context_name(row.context), speed, ratio, byte_text(row.hybrid_bytes), smaller]


def _stages(members: list[Member]) -> list[str]:
    made = {stage for member in members for stage in member.results.stages}
    return [stage for stage in STAGES if stage not in TRIALS or stage in made]


def _cost_cells(member: Member, columns: list[str]) -> list[str]:
    """A row of the table of costs; tokens are those of all stages that train."""
    stages = member.results.stages
    seconds = [f"{stages[stage]['seconds']:,.1f}" if stage in stages else NOTHING for stage in columns]
    tokens = sum(stages[stage].get("tokens") or 0 for stage in ("align", *TRIALS, "train") if stage in stages)
    peak = max(cost.get("peak_bytes") or 0 for cost in stages.values())
    total = f"{sum(cost['seconds'] for cost in stages.values()):,.1f}"
    words = f"{tokens:,}" if tokens else NOTHING, byte_text(peak) if peak else NOTHING
    return [member.letter, *seconds, total, *words]


def _plots(members: list[Member]) -> dict[str, str]:
    """The SVG of every plot that at least one run has something for."""
    from postnas.report import comparison

    found: dict[str, str] = {}
    for group in GROUPS:
        keys = [key for key in _keys(members) if _first(members, key).read.group == group]
        if keys:
            found[f"kept-{len(found) + 1}"] = comparison.scores(members, keys, group)
    if comparison.comparable(members):
        found["quality"] = comparison.against_cost(members)
    if any(member.results.placement for member in members):
        found["placements"] = comparison.placements(members)
    if any(comparison.distilled(member) for member in members):
        found["losses"] = comparison.losses(members)
    return found

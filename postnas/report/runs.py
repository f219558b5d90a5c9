"""Several runs as values: each under its letter, how their hybrids differ row by row, and how their recipes do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postnas.report.measures import Kept
from postnas.report.results import Results, Won, read_results

Key = tuple[str, str]
"""A measure: task and metric."""
NOTHING = "–"
"""Stands where a run has no value."""


@dataclass(frozen=True)
class Member:
    """One run of a comparison, under its letter."""

    letter: str
    folder: Path
    results: Results
    kept: dict[Key, Kept]
    won: list[Won]

    @property
    def base(self) -> tuple[Any, ...]:
        """What says which base it is: name, checksum and type."""
        base = self.results.recipe["base"]
        return base["model"], base.get("sha256"), base.get("dtype")

    @property
    def missing(self) -> list[str]:
        """The stages that have left nothing."""
        found = {"place": self.results.placement, "evaluate": self.kept, "bench": self.won}
        return [stage for stage, value in found.items() if not value]


def read_member(letter: str, folder: Path) -> Member:
    results = read_results(folder)
    return Member(letter, folder, results, {(row.task, row.metric): row for row in results.kept}, results.won)


def bases(members: Sequence[Member]) -> dict[str, list[Member]]:
    """{label: the runs that have this base}; one base is called `base`, several by the letter of their first run."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(member.base, []).append(member)
    if len(groups) == 1:
        return {"base": list(members)}
    return {f"base of {', '.join(one.letter for one in group)}": group for group in groups.values()}


@dataclass(frozen=True)
class Difference:
    """A later run's hybrid minus the first run's. stderr: None where it was not measured."""

    value: float
    stderr: float | None
    paired: bool
    """True where both answered the same rows, so that the error is that of the rows' differences."""


def difference(first: Member, other: Member, key: Key) -> Difference | None:
    """How the hybrids of two runs differ in a measure; None where one of them does not have it."""
    from postnas.evaluate.perplexity import mean_stderr

    if key not in first.kept or key not in other.kept:
        return None
    a, b = first.kept[key], other.kept[key]
    value = b.hybrid - a.hybrid
    old, new = _row_values(first, key), _row_values(other, key)
    if _same_rows(first, other, key) and old and new:
        if a.metric == "perplexity":  # to first order, P moves as P times the mean NLL
            old, new = [a.hybrid * nll for nll in old], [b.hybrid * nll for nll in new]
        return Difference(value, mean_stderr([y - x for x, y in zip(old, new)])[1], True)
    errors = a.hybrid_stderr, b.hybrid_stderr
    stderr = math.hypot(*(error for error in errors if error is not None)) if None not in errors else None
    return Difference(value, stderr, False)


def _records(member: Member, task: str) -> list[dict[str, Any]]:
    outputs = (member.results.eval_ or {}).get("outputs", {})
    return outputs.get("hybrid", {}).get(task, [])


def _same_rows(first: Member, other: Member, key: Key) -> bool:
    """Rows of a data file are the same by their ids; those that we cut or make, if they are made alike too.

    Perplexity and the copy test cut the run's text. A long context (NAME@TOKENS) is made by the seed, as long as the
    base's tokenizer counts. All other tasks have a file of their own, whatever the run is trained on.
    """
    ids = [[row.get("id") for row in _records(member, key[0])] for member in (first, other)]
    if not ids[0] or ids[0] != ids[1]:
        return False
    return _made_by(first, key[0]) == _made_by(other, key[0])


def _made_by(member: Member, task: str) -> list[Any]:
    """What rows of these ids depend on besides; nothing where they stand in a file."""
    recipe = member.results.recipe
    if "@" in task:
        return [member.base, recipe.get("seed")]
    if task not in ("perplexity", "copy"):
        return []
    elsewhere = ("tasks", "limit", "allow_code")
    settings = {name: value for name, value in recipe.get("evaluate", {}).items() if name not in elsewhere}
    return [member.base, recipe.get("data"), recipe.get("seed"), settings]


def _row_values(member: Member, key: Key) -> list[float] | None:
    """The value of each row of the hybrid; None unless they give the score that eval.json says."""
    metric, records = key[1], _records(member, key[0])
    choice = {"accuracy": "choice", "accuracy_norm": "choice_norm"}.get(metric, "")
    name = {"perplexity": "nll", "copy_nll": "nll", "copy_accuracy": "accuracy"}.get(metric, metric)
    try:
        values = [float(row[choice] == row["gold"]) if choice in row else float(row[name]) for row in records]
    except (KeyError, TypeError, ValueError):
        return None
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    score = math.exp(mean) if metric == "perplexity" else mean
    return values if math.isclose(score, member.kept[key].hybrid, rel_tol=1e-6, abs_tol=1e-9) else None


def recipe_changes(members: list[Member]) -> list[list[str]]:
    """Rows of the fields in which the recipes differ: the field's dotted name, then a value a run."""
    flat = [_flat(member.results.recipe) for member in members]
    names = sorted({name for fields in flat for name in fields} - {"out"})
    rows = [[name, *(str(fields.get(name, NOTHING)) for fields in flat)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in recipe.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields

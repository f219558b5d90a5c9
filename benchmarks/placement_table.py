"""What benchmarks/placement_h100.py has kept, as the published table and figures.

    python benchmarks/placement_table.py [KEPT]

Writes benchmarks/results/placement-h100.json, and docs/placement-heat.svg, placement-budgets.svg and
placement-layers.svg; all of them into the folder $OUT where that is set. KEPT is
runs/placement unless given. What is not there yet is left out.

The rows, by their `kind`. A loss or score is in nats a token and less is better, unless its metric says otherwise.

- `search`: a placement that a strategy found, with its score before distillation, and the `tokens` that it scored.
- `hybrid`: a distilled placement in one metric of one task. `minus_uniform` and `minus_random` are paired row by row,
  the latter against the mean of the three random placements, which is a line of its own, `random`. Errors are those
  of the rows: how far random placements lie apart is not in them.
- `mean`: a strategy at the main budget over the seeds; n counts seeds, and errors, from three on, are those over them.
- `base`: the base on the same rows.
- `rank`: Spearman's correlation of a search score (`objective`) with what distilled hybrids reach (`task`).
- `heat`: each layer alone on its candidate (`one_linear`, the loss added), and on attention (`one_full`, the loss).
- `half`: the layers that carry half of the summed effect of an objective. With `one_full` an effect is what the layer
  takes off the loss of a model that is linear everywhere. `likeness`: two objectives' rankings of the layers.
- `window`: what the second pass takes off a loss, on the rows that it searched by and, distilled, on others.
- `cost`: seconds and tokens of making a set of candidates, and of the warm-up.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from placement_h100 import KEPT, MAIN, RANDOM, SETS
from placement_numbers import Part, contrast, correlations, findings, metrics, over_seeds, searched

from postnas.errors import UserError
from postnas.files import read_json, read_jsonl, write_text
from postnas.report import placements
from postnas.search import objectives
from postnas.search.scores import combine
from postnas.search.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
COMMAND = "python benchmarks/placement_h100.py align search score distil && python benchmarks/placement_table.py"
Row = dict[str, Any]


class Seed:
    """What one seed has kept, as rows; a search at least."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, int(folder.name.removeprefix("seed-"))
        self.searches = [read_json(path) for path in sorted(folder.glob("search-*.json"))]
        self.block = self.searches[0]["block"]
        self.attention = ["attn"] * len(self.searches[0]["placement"])
        self.windows = {kind: found["placement"] for kind in SETS if (found := self.read(f"windows-{kind}"))}
        self.trained = {kind: found for kind in SETS if (found := self.read(f"{kind}/aligned"))}
        records = [read_json(path) for path in sorted((folder / "distilled").glob("*.json"))]
        self.distilled = {tuple(one["placement"]): one for one in records if "placement" in one}
        if len({one.get("key") for one in self.distilled.values()}) > 1:
            raise UserError(f"{folder}: what was distilled is of several recipes or sets of candidates; distil again")

    def read(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else None

    @cached_property
    def measured(self) -> dict[tuple[str, ...], dict[tuple[str, str], list[Part]]]:
        return {one: metrics(record["outputs"]) for one, record in self.distilled.items()}

    def budget(self, one: Sequence[str]) -> int:
        return sum(name == "attn" for name in one)

    def baselines(self, budget: int) -> dict[str, tuple[str, ...]]:
        """`uniform` and each `random-N` of a budget."""

        def drawn(strategy: str, seed: int) -> tuple[str, ...]:
            return tuple(STRATEGIES[strategy](lambda _: 0.0, self.attention, self.block, budget, seed))

        return {"uniform": drawn("uniform", 0)} | {f"random-{n}": drawn("random", n) for n in range(RANDOM)}

    def names(self, one: Sequence[str]) -> list[str]:
        """Every strategy that found a placement; `filler` where none did."""
        found = [f"{each['strategy']}/{each['candidates']}" for each in self.searches if each["placement"] == list(one)]
        found += [f"windows/{kind}" for kind, placement in self.windows.items() if placement == list(one)]
        found += [name for name, placement in self.baselines(self.budget(one)).items() if placement == tuple(one)]
        return found or ["filler"]

    def paths(self, kind: str) -> int:
        """Tokens that a set's candidates learnt from inside random paths, after alignment."""
        return 0 if kind == "aligned" else self.trained[kind]["tokens"]

    def scored(self, file: str) -> dict[tuple[str, ...], dict[str, list[Part]]]:
        """The parts of every placement in a scorer's file, whose records may add to each other."""
        found: dict[tuple[str, ...], dict[str, list[float]]] = {}
        for one in read_jsonl(self.folder / f"scored-{file}.jsonl"):
            found.setdefault(tuple(one["placement"]), {}).update(one["rows"])
        return {one: searched(rows) for one, rows in found.items()}

    def rows(self) -> Iterator[Row]:
        for rows in (self.cost(), self.search(), self.base(), self.hybrids(), self.rank(), self.heat(), self.window()):
            yield from (row | {"seed": self.number} for row in rows)

    def cost(self) -> Iterator[Row]:
        if warm := self.read("warm"):
            yield {"kind": "cost", "step": "warm-up", "seconds": warm["seconds"], "tokens": None}
        for kind, one in self.trained.items():
            step = "align" if kind == "aligned" else "paths"
            yield {"kind": "cost", "step": step, "candidates": kind, "seconds": one["seconds"], "tokens": one["tokens"]}

    def search(self) -> Iterator[Row]:
        known = {
            name: self.scored(name) for name in {f"{one['candidates']}-{one['strategy']}" for one in self.searches}
        }
        kept = (
            "strategy",
            "candidates",
            "budget",
            "placement",
            "seconds",
            "resumed",
            "scored",
            "tokens",
            "score_tokens",
        )
        for one in self.searches:
            scores = known[f"{one['candidates']}-{one['strategy']}"]
            own, base = scores[tuple(one["placement"])], scores[tuple(self.attention)]
            shares = objectives.weights(one["objective"])
            both = [[replace(each[name][0], weight=share) for name, share in shares.items()] for each in (own, base)]
            row = {"kind": "search", "objective": _objective(one["objective"])} | {name: one[name] for name in kept}
            row |= {"score": one["scores"]["score"], "stderr": contrast(both, [1, -1])[1], "distilled": False}
            yield row | ({} if one["candidates"] == "aligned" else {"trained_tokens": self.paths(one["candidates"])})

    def base(self) -> Iterator[Row]:
        if found := self.read("distilled/base"):
            for (task, metric), parts in metrics(found["outputs"]).items():
                yield {"kind": "base", "strategy": "base", "distilled": False} | _score(task, metric, [parts], [1])

    def hybrids(self) -> Iterator[Row]:
        for budget in sorted({self.budget(one) for one in self.distilled}, reverse=True):
            uniform, *random = self.baselines(budget).values()
            for one, record in self.distilled.items():
                if self.budget(one) == budget:
                    yield from self._hybrid(self.names(one), budget, [one], record, uniform, random)
            if self.measured.keys() >= set(random):
                yield from self._hybrid(["random"], budget, random, {}, uniform, random)

    def _hybrid(
        self,
        names: list[str],
        budget: int,
        found: Sequence[tuple[str, ...]],
        record: Row,
        uniform: tuple[str, ...],
        random: Sequence[tuple[str, ...]],
    ) -> Iterator[Row]:
        """The rows of a placement, or of the mean of several, against the baselines that were distilled."""
        row = {"kind": "hybrid", "strategy": ", ".join(names), "objective": None, "budget": budget}
        for each in self.searches:
            if f"{each['strategy']}/{each['candidates']}" in names:
                row["objective"] = _objective(each["objective"])
        if len(found) == 1:
            row["attn"] = [layer for layer, name in enumerate(found[0]) if name == "attn"]
            row |= {"swa": [layer for layer, name in enumerate(found[0]) if name == "swa"]} if "swa" in found[0] else {}
        row |= {"tokens": record.get("tokens"), "seconds": record.get("seconds"), "distilled": True}
        others = {"minus_uniform": [uniform]} if names != ["uniform"] else {}
        others |= {"minus_random": list(random)} if not all(name.startswith("random") for name in names) else {}
        shares = [1 / len(found)] * len(found)
        for task, metric in self.measured[found[0]]:

            def parts(ones: Sequence[tuple[str, ...]], key: tuple[str, str] = (task, metric)) -> list[list[Part]]:
                return [self.measured[one][key] for one in ones]

            made = row | _score(task, metric, parts(found), shares)
            for name, against in others.items():
                if self.measured.keys() >= set(against):
                    weights = [*shares, *[-1 / len(against)] * len(against)]
                    made[name], made[f"{name}_stderr"] = contrast(parts([*found, *against]), weights)
            yield made

    def rank(self) -> Iterator[Row]:
        """Over the main budget without windows: among all, and among those that no strategy chose by a score."""
        reached = {"retrieval": ("retrieval", "nll"), "kl": ("kl", "kl")}
        shares = {name: objectives.weights({name: 1.0}) for name in reached}
        for kind in SETS:
            if not (kept := self.read(f"scores-{kind}")):
                continue
            base, *known = [one["scores"] for one in kept["scores"]]
            of = {tuple(one["placement"]): values for one, values in zip(kept["scores"][1:], known)}
            main = [one for one in of if self.budget(one) == MAIN and one in self.measured]
            cost = self._score_tokens(kind)
            for among in ("all", "not chosen"):
                ones = [one for one in main if among == "all" or not self._chosen(one)]
                if len(ones) < 3:
                    continue
                scores = {n: np.array([combine(of[one], base, shares[n]) for one in ones]) for n in reached}
                losses = {
                    n: np.array([contrast([self.measured[one][key]], [1])[0] for one in ones])
                    for n, key in reached.items()
                }
                about = {"kind": "rank", "candidates": kind, "budget": MAIN, "among": among, "n": len(ones)}
                for row in correlations(_summed(scores), _summed(losses)):
                    tokens = {"score_tokens": cost.get(row["objective"]), "trained_tokens": self.paths(kind)}
                    yield about | row | tokens | {"distilled": True}

    def _chosen(self, one: Sequence[str]) -> bool:
        """Did a search or the hand choose it, and not chance?"""
        return not all(name == "filler" or name.startswith("random") for name in self.names(one))

    def _score_tokens(self, kind: str) -> dict[str, int]:
        """Tokens that one score costs, by objective."""
        found = {
            _objective(one["objective"]): one["score_tokens"] for one in self.searches if one["candidates"] == kind
        }
        for one in read_jsonl(self.folder / f"scored-{kind}-all.jsonl")[:1]:
            found["kl"] = len(one["rows"]["kl"]) * objectives.LENGTH
        return _summed(found) if found.keys() >= {"retrieval", "kl"} else found

    def heat(self) -> Iterator[Row]:
        for kind in SETS:
            if not (kept := self.read(f"heat-{kind}")):
                continue
            parts = {name: searched(rows) for name, rows in kept["rows"].items()}
            layers = range(len(self.attention))
            effects: dict[str, dict[str, np.ndarray]] = {"one_linear": {}, "one_full": {}}
            for name in parts["base"]:
                base, none = parts["base"][name], parts["none"][name]
                added = [contrast([parts[f"without {layer}"][name], base], [1, -1]) for layer in layers]
                left = [contrast([parts[f"only {layer}"][name]], [1]) for layer in layers]
                row = {"kind": "heat", "candidates": kind, "objective": name, "distilled": False}
                for field_, found in (("one_linear", added), ("one_full", left)):
                    row |= {field_: [value for value, _ in found], f"{field_}_stderr": [error for _, error in found]}
                ends = {"base": contrast([base], [1])[0], "none": contrast([none], [1])[0]}
                yield row | ends | {"n": sum(len(part.ids) for part in base)}
                effects["one_linear"][name] = np.array(row["one_linear"])
                effects["one_full"][name] = ends["none"] - np.array(row["one_full"])
            for effect, found in effects.items():
                for row in findings(found):
                    yield row | {"candidates": kind, "effect": effect}

    def window(self) -> Iterator[Row]:
        for kind, after in self.windows.items():
            before = tuple(self.block if name == "swa" else name for name in after)
            row = {"kind": "window", "strategy": f"windows/{kind}", "candidates": kind, "budget": self.budget(after)}
            row["swa"] = [layer for layer, name in enumerate(after) if name == "swa"]
            known = self.scored(f"{kind}-windows")
            if known.keys() >= {before, tuple(after)}:
                both = [known[before]["knowledge"], known[tuple(after)]["knowledge"]]
                yield row | {"distilled": False} | _score("knowledge", "nll", both, [1, -1])
            if self.measured.keys() >= {before, tuple(after)}:
                for task, metric in (("knowledge", "nll"), ("retrieval", "nll"), ("kl", "kl")):
                    if (task, metric) not in self.measured[before]:
                        continue
                    both = [self.measured[one][task, metric] for one in (before, tuple(after))]
                    yield row | {"distilled": True} | _score(task, metric, both, [1, -1])


def _objective(wanted: Mapping[str, float]) -> str:
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in wanted.items())


def _score(task: str, metric: str, models: Sequence[Sequence[Part]], shares: Sequence[float]) -> Row:
    value, error = contrast(models, shares)
    return {"task": task, "metric": metric, "score": value, "stderr": error, "n": sum(len(p.ids) for p in models[0])}


def _summed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "retrieval + kl": values["retrieval"] + values["kl"]}


# ---- all seeds --------------------------------------------------------------------------------


def means(rows: Sequence[Row]) -> Iterator[Row]:
    """Each strategy of the main budget over the seeds that have it, from two on."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "hybrid" and row["budget"] == MAIN and row["strategy"] != "filler":
            for name in row["strategy"].split(", "):
                found.setdefault((name, row["task"], row["metric"]), []).append(row)
    for (name, task, metric), ones in found.items():
        if len(ones) < 2:
            continue
        made = {"kind": "mean", "strategy": name, "budget": MAIN, "task": task, "metric": metric, "n": len(ones)}
        made |= {"seeds": [one["seed"] for one in ones], "distilled": True}
        for value, error in (
            ("score", "stderr"),
            *((f"minus_{n}", f"minus_{n}_stderr") for n in ("uniform", "random")),
        ):
            if all(value in one for one in ones):
                made[value], made[error] = over_seeds([one[value] for one in ones])
        yield made


def table(kept: Path) -> Row:
    """The file of results. Raises UserError where nothing is kept, or a seed does not say what it was measured on."""
    folders = {path.parent for path in kept.glob("seed-*/search-*.json")}
    if not folders:
        raise UserError(f"{kept}: holds no search of any seed; run benchmarks/placement_h100.py, or name what it kept")
    about: dict[str, list[str]] = {"device": [], "torch": []}
    for name, found in about.items():
        for folder in sorted(folders):
            path = folder / "warm.json"
            value = read_json(path).get(name) if path.exists() else None
            if value is None:
                raise UserError(f"{path}: has no field {name}; write down there what the seed was measured on")
            found += [value] if value not in found else []
    seeds = sorted(map(Seed, folders), key=lambda seed: seed.number)
    rows = [row for seed in seeds for row in seed.rows()]
    made = {"command": COMMAND} | {name: ", ".join(found) for name, found in about.items()}
    return made | {"date": date.today().isoformat(), "rows": [*rows, *means(rows)]}


def text(result: Row) -> str:
    """The file with a row a line, numbers to six figures."""
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(_short(row), allow_nan=False) for row in result["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(one) for one in value]
    return {name: _short(one) for name, one in value.items()} if isinstance(value, dict) else value


def figures(rows: Sequence[Row]) -> dict[str, str]:
    """{file: SVG} of what there is: means over the seeds; chosen layers are those of the first seed."""
    found = {}
    heat = [row for row in rows if row["kind"] == "heat" and row["candidates"] == "aligned"]
    if heat:
        found["placement-heat.svg"] = placements.alone(_mean(heat, "one_linear"), _mean(heat, "one_full"))
    panels = {title: lines for title, lines in _panels(rows) if lines}
    if panels:
        found["placement-budgets.svg"] = placements.by_budget(panels)
    if chosen := _layers(rows):
        found["placement-layers.svg"] = placements.choices(chosen, "strategy")
    return found


def _layers(rows: Sequence[Row]) -> dict[str, list[str]]:
    """{strategy: what it chose at the main budget} of the first seed: the searches, the uniform one, the windows."""
    main = [row for row in rows if row["kind"] in ("search", "hybrid") and row["budget"] == MAIN]
    main = [row for row in main if row["seed"] == main[0]["seed"]]
    searches = [row for row in main if row["kind"] == "search"]
    found = {f"{row['strategy']}/{row['candidates']}": row["placement"] for row in searches}
    for row in main:
        for name in row["strategy"].split(", "):
            if row["kind"] == "hybrid" and name.startswith(("uniform", "windows")) and searches:
                block = next(mixer for mixer in searches[0]["placement"] if mixer != "attn")
                held = dict.fromkeys(row["attn"], "attn") | dict.fromkeys(row.get("swa", []), "swa")
                found[name] = [held.get(layer, block) for layer in range(len(searches[0]["placement"]))]
    return found


def _mean(heat: Sequence[Row], effect: str) -> dict[str, list[float]]:
    """{objective: one value a layer}, over the seeds."""
    by_name: dict[str, list[list[float]]] = {}
    for row in heat:
        by_name.setdefault(row["objective"], []).append(row[effect])
    return {name: np.mean(values, axis=0).tolist() for name, values in by_name.items()}


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, list[placements.Point]]]]:
    for kind in SETS[:2]:  # the third set is searched at one budget only
        searches = [row for row in rows if row["kind"] == "search" and row["candidates"] == kind]
        yield (
            f"{kind} candidates: score before distillation",
            _lines(searches, {row["strategy"]: row["strategy"] for row in searches}),
        )
        hybrids = [row for row in rows if row["kind"] == "hybrid" and row["task"] == "retrieval"]
        names = {f"{row['strategy']}/{kind}": row["strategy"] for row in searches} | {
            n: n for n in placements.BASELINES
        }
        yield f"{kind} candidates: retrieval, distilled", _lines(hybrids, names)


def _lines(rows: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[placements.Point]]:
    """{strategy: its points}, over the seeds. names: {a strategy of the rows: what it is called}."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        for name in row["strategy"].split(", "):
            if name in names:
                found.setdefault(names[name], {}).setdefault(row["budget"], []).append(row)
    lines: dict[str, list[placements.Point]] = {}
    for name, budgets in found.items():
        for budget, ones in sorted(budgets.items()):
            mean, error = over_seeds([one["score"] for one in ones])
            lines.setdefault(name, []).append((budget, mean, ones[0]["stderr"] if len(ones) == 1 else error))
    return lines


def main() -> int:
    results, docs = (Path(os.environ.get("OUT", folder)) for folder in (RESULTS, DOCS))
    try:
        result = table(Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT)
        write_text(results / "placement-h100.json", text(result))
        for name, svg in figures(result["rows"]).items():
            write_text(docs / name, svg)
    except UserError as error:
        print(f"placement_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

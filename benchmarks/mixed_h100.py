"""A placement that mixes linear blocks against those of one block: found alike, distilled on equal tokens.

    python benchmarks/mixed_h100.py align search distil [--blocks jet gated_deltanet] [--seed 0] [--seconds 550]
    python benchmarks/mixed_h100.py table

`align` makes candidates of every block in every layer, each from the recipe's align tokens. `search` asks `gates` for
four attention layers by the recipe's objective: over all blocks (`mixed`), and with each block alone (its name).
`same BLOCK` has the attention layers of `mixed` and one block in all others, so that only the mixing differs. `distil`
trains each from the same candidates, on the same tokens in the same order. All blocks go by the recipe's learning
rates. What is done is kept in runs/mixed (or $KEPT), and the same command goes on; several processes may share a seed's
work, and what fails is told and left to the next call. --recipe: another one, to try every line at a tiny size.

`table` writes benchmarks/results/mixed-h100.json (or into $OUT), from all seeds. Its rows, by their `kind`: `search`,
what was found, its score in nats before distillation and its cost. `hybrid`, a distilled placement in one metric;
`searched` is the objective of the search on rows that no search saw, and the single placement of the lowest such loss
is its seed's `best_single`. These rows also choose it, so it looks a little better than it is. `minus_best_single` and,
of `mixed`, `minus_same_BLOCK` are paired row by row. `mean`, the same over seeds; its errors, from three on, are those
over seeds. `base`, the base on the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from placement_h100 import MAIN, RECIPE, Bench, claimed
from placement_numbers import Part, contrast, metrics, over_seeds
from placement_rows import MEASURED, Rows
from placement_table import text

from postnas.blocks import linear_blocks
from postnas.errors import UserError
from postnas.files import read_json, write_text
from postnas.models.supernet import Placement, Supernet
from postnas.recipe import Paths
from postnas.search import objectives
from postnas.train.align import digest

KEPT = Path(os.environ.get("KEPT", "runs/mixed"))
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


class Mixed(Bench):
    """One seed's work: candidates of several blocks, a search over all and over each, distilled placements."""

    def __init__(self, seed: int, seconds: float, recipe: str, blocks: Sequence[str]) -> None:
        """Raises UserError for fewer than two blocks, and an objective that hybrids are not measured on."""
        super().__init__(seed, seconds, recipe, sets=("aligned",))
        if len(blocks) < 2:
            raise UserError(f"blocks: {blocks[0]} alone cannot be mixed; name two or more")
        given = self.recipe
        for name in objectives.weights(given.place.objective):
            if name not in MEASURED:
                raise UserError(f"place.objective: {name} is not measured here; choose from {', '.join(MEASURED)}")
        options = {name: own for name, own in given.align.options.items() if name in blocks}
        align = dataclasses.replace(given.align, blocks=list(blocks), options=options)
        changes: Row = {"strategy": "gates", "budget": MAIN, "windows": 0}
        place = dataclasses.replace(given.place, block=blocks[0], blocks=list(blocks), **changes)
        self.recipe = dataclasses.replace(given, align=align, place=place, paths=Paths())
        self.paths, self.folder, self.blocks = self.recipe.paths, KEPT / f"seed-{seed}", list(blocks)

    def made(self, kind: str) -> str:
        return super().made("aligned")  # all searches are of the one set of candidates

    def supernet(self, kind: str) -> Supernet:
        return self.first.supernet

    def align(self) -> None:
        self._share({"aligned/aligned": (self.terms, super().align)})

    def search(self) -> None:
        settings, key, first = self.recipe.place, self.made("aligned"), self.first
        heldout = first.tokens[1].half(1)
        alike = digest(dataclasses.asdict(dataclasses.replace(first.recipe, seed=0, out="")))
        about = {"made": key, "alike": alike, "blocks": self.blocks, "objective": settings.objective}
        self.keep("about", self.terms, about)
        rows = objectives.make(settings.objectives, heldout, first.tokenizer, settings.tokens, self.seed)

        def job(name: str, blocks: list[str]) -> tuple[str, Callable[[], None]]:
            wanted = dataclasses.replace(settings, block=blocks[0], blocks=blocks if len(blocks) > 1 else [])
            return key, lambda: self._search(name, "gates", MAIN, wanted, rows)

        over = {"mixed": self.blocks} | {block: [block] for block in self.blocks}
        self._share({_record(name): job(name, blocks) for name, blocks in over.items()})

    def wanted(self) -> list[Placement]:
        found = placements(searches(self.folder, self.made("aligned"), self.blocks), self.blocks)
        return list({tuple(one): one for one in found.values()}.values())

    def _distil(self, one: Placement, rows: Rows) -> None:
        try:
            super()._distil(one, rows)
        except Exception as error:  # a kernel's compiler has errors of its own; the others must go on
            raise RuntimeError(f"{_layers(one)}: {type(error).__name__}: {error}") from error

    def _share(self, jobs: Mapping[str, tuple[str, Callable[[], None]]]) -> None:
        """Do jobs {record: (its key, the work)} beside other processes, until each is done or has failed here."""
        failed: set[str] = set()
        while left := [name for name, (key, _) in jobs.items() if not (name in failed or self.kept(name, key))]:
            for name in left:
                if self.over():
                    return
                with claimed(self.folder / f"{name}.json") as mine:
                    key, work = jobs[name]
                    if mine and not self.kept(name, key):
                        try:
                            work()
                        except Exception as error:  # as above
                            print(f"{name}: {type(error).__name__}: {f'{error} '.splitlines()[0]}", flush=True)
                            failed.add(name)
            time.sleep(0.5)  # what is left is in another process's hands


def _record(name: str) -> str:
    return f"search-{name}-gates-{MAIN}"


def searches(folder: Path, key: str, blocks: Sequence[str]) -> dict[str, Row]:
    """{`mixed` or a block: the record of its search}, of those that are done with this key."""
    paths = {name: folder / f"{_record(name)}.json" for name in ("mixed", *blocks)}
    found = {name: read_json(path) for name, path in paths.items() if path.exists()}
    return {name: record for name, record in found.items() if record["key"] == key}


def placements(found: Mapping[str, Row], blocks: Sequence[str]) -> dict[str, Placement]:
    """Every placement that is compared, by name; two names may have the same one."""
    named = {name: record["placement"] for name, record in found.items()}
    for block in blocks if "mixed" in named else ():
        named[f"same {block}"] = [block if name in blocks else name for name in named["mixed"]]
    return named


def _layers(placement: Placement) -> dict[str, list[int]]:
    """{mixer: its layers}."""
    return {one: [i for i, name in enumerate(placement) if name == one] for one in dict.fromkeys(placement)}


def seed_rows(folder: Path, about: Row) -> Iterator[Row]:
    """What one seed has kept; what is not there yet is left out."""
    blocks, found = about["blocks"], searches(folder, about["made"], about["blocks"])
    for name, one in found.items():
        cost = {field: one[field] for field in ("scored", "tokens", "seconds", "resumed")}
        row: Row = {"kind": "search", "placement": name, "layers": _layers(one["placement"])}
        yield row | {"score": one["scores"]["score"], **cost}
    records = [read_json(path) for path in sorted((folder / "distilled").glob("*.json"))]
    for base in (one for one in records if one["key"] == about["key"]):
        for metric, parts in _measured(base, about).items():
            yield {"kind": "base", "placement": "base"} | _score(metric, parts)
    done = {tuple(one["placement"]): one for one in records if one["key"] == about["made"]}
    named = {name: done[tuple(one)] for name, one in placements(found, blocks).items() if tuple(one) in done}
    measured = {name: _measured(one, about) for name, one in named.items()}
    losses = {block: contrast([measured[block]["searched", "nll"]], [1])[0] for block in blocks if block in measured}
    best = min(losses, key=losses.__getitem__) if len(losses) == len(blocks) else ""
    for name, one in named.items():
        others = {"minus_best_single": best}
        others |= {f"minus_same_{block}": f"same {block}" for block in blocks if name == "mixed"}
        row = {
            "kind": "hybrid",
            "placement": name,
            "layers": _layers(one["placement"]),
            "best_single": best or None,
        }
        for metric, parts in measured[name].items():
            made = row | _score(metric, parts) | {"tokens": one["tokens"]}
            for field, other in others.items():
                if other in measured:
                    made[field], made[f"{field}_stderr"] = contrast([parts, measured[other][metric]], [1, -1])
            yield made


def _measured(record: Row, about: Row) -> dict[tuple[str, str], list[Part]]:
    """The metrics of what was given to every row, and the objective of the search."""
    found, own = metrics(record["outputs"]), []
    for name, share in objectives.weights(about["objective"]).items():
        key = ("kl", "kl") if name == "kl" else (f"objective {name}", "nll")
        own.append(dataclasses.replace(found[key][0], weight=share))
    return {("searched", "nll"): own} | found


def _score(metric: tuple[str, str], parts: Sequence[Part]) -> Row:
    value, error = contrast([parts], [1])
    return {"task": metric[0], "metric": metric[1], "score": value, "stderr": error}


def means(rows: Sequence[Row]) -> Iterator[Row]:
    """Each placement in each metric over the seeds, from two on."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in (one for one in rows if one["kind"] == "hybrid"):
        found.setdefault((row["placement"], row["task"], row["metric"]), []).append(row)
    for ones in (ones for ones in found.values() if len(ones) > 1):
        made = {"kind": "mean"} | {field: ones[0][field] for field in ("placement", "task", "metric", "tokens")}
        made |= {f"{field}s": [one[field] for one in ones] for field in ("seed", "best_single")}
        for field in ("score", *(f for f in ones[0] if f"{f}_stderr" in ones[0])):
            if all(field in one for one in ones):
                values = made[f"{field}_by_seed"] = [one[field] for one in ones]
                made[field], made[f"{field}_stderr" if field != "score" else "stderr"] = over_seeds(values)
        yield made


def table() -> Row:
    """The file of results. Raises UserError where nothing is kept, or the seeds are of several recipes."""
    kept = {path.parent: read_json(path) for path in sorted(KEPT.glob("seed-*/about.json"))}
    if not kept:
        raise UserError(f"{KEPT}: holds no search of any seed; run the steps align, search and distil first")
    if len({about["alike"] for about in kept.values()}) > 1:
        raise UserError(f"{KEPT}: its seeds are of several recipes or blocks; run all with the same, or move one away")
    numbers = {folder: {"seed": int(folder.name.removeprefix("seed-"))} for folder in kept}
    rows = [row | numbers[folder] for folder, about in kept.items() for row in seed_rows(folder, about)]
    made: Row = {"command": "python benchmarks/mixed_h100.py align search distil table", "budget": MAIN}
    for field in ("device", "torch"):
        made[field] = ", ".join(dict.fromkeys(read_json(folder / "warm.json")[field] for folder in kept))
    made |= {field: next(iter(kept.values()))[field] for field in ("blocks", "objective")}
    return made | {"date": date.today().isoformat(), "rows": [*rows, *means(rows)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["align", "search", "distil", "table"])
    parser.add_argument("--blocks", nargs="+", choices=linear_blocks(), default=["jet", "gated_deltanet"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--recipe", default=RECIPE)
    given = parser.parse_args()
    try:
        bench = None if given.steps == ["table"] else Mixed(given.seed, given.seconds, given.recipe, given.blocks)
        for step in given.steps:
            if step == "table":
                write_text(Path(os.environ.get("OUT", RESULTS)) / "mixed-h100.json", text(table()))
            elif bench and not bench.over():
                getattr(bench, step)()
    except UserError as error:
        print(f"mixed_h100: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

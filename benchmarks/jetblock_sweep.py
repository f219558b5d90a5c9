"""The tiles of `jetblock_h100.py --decode-only`, and what puts its rows into the published file (no GPU, no triton).

    python benchmarks/jetblock_sweep.py FILE

FILE is the jetblock-h100.json of such a run. All rows of an operation, shape, batch and state's type come from FILE
where it has any; the ceilings and all other rows of benchmarks/results/jetblock-h100.json stay as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from postnas.files import read_json, write_json

SWEEP: dict[str, list[tuple[Any, ...]]] = {
    "float32": [(64, 4), (64, 4, True), (32, 2), (128, 8)],
    "bfloat16": [(64, 2), (64, 2, True), (32, 1, True), (32, 2), (64, 4, True), (128, 4, True)],
}
"""By the state's type: columns of a tile, warps, and are both sums one reduction (`Tile` in `jet_decode_triton`)?"""


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Rows of `new` in the place of those of `old`. Rows of two cards do not mix."""
    if old["device"] != new["device"]:
        raise SystemExit(f"device: the new rows are of {new['device']}, the old ones of {old['device']}")

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("op", "shape", "batch", "state_dtype"))

    fresh: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in new["rows"]:
        if "shape" in row:
            fresh.setdefault(key(row), []).append(row)
    replaced, rows = set(fresh), []
    for row in old["rows"]:
        rows += fresh.pop(key(row), []) if key(row) in replaced else [row]
    rows += [row for group in fresh.values() for row in group]
    commands = dict.fromkeys([*old["command"].split("; "), new["command"]])
    return old | {"command": "; ".join(commands), "date": new["date"], "rows": rows}


if __name__ == "__main__":
    PUBLISHED = Path("benchmarks/results/jetblock-h100.json")
    write_json(PUBLISHED, merge(read_json(PUBLISHED), read_json(Path(sys.argv[1]))))

"""What a placement is worth: nats lost against the base on each objective.

Scores are kept in a file as they are made. A killed search goes on, and another budget, weight or
strategy solves from what is there.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.models.supernet import Placement, Supernet
from postnas.search.objectives import Objective, batches, measure
from postnas.search.strategies import with_linear
from postnas.train.loop import autocast

BATCH = 16_384
"""Tokens that are scored at a time."""

Values = dict[str, float]
Rows = dict[str, list[float]]
Part = tuple[str, int]
"""An objective's name, and the number of a part of its rows."""


class Scorer:
    """Scores placements of one supernet on fixed rows: each objective's mean over its rows, in nats a token.

    The hidden states before every layer are kept of two placements, the base and the one scored
    last, so a placement costs only the layers after those that it shares with one of them.
    """

    def __init__(
        self, supernet: Supernet, objectives: dict[str, Objective], path: Path, compute: torch.dtype, key: str
    ) -> None:
        """objectives: as `objectives.make` gives them. key: says what the candidates and rows are made from;
        scores in `path` of another key are kept and not used."""
        self.supernet, self.path, self.compute, self.key = supernet, path, compute, key
        self.objectives, device = objectives, supernet.head.device
        self.parts = {name: [part.to(device) for part in batches(one, BATCH)] for name, one in objectives.items()}
        self.known: dict[tuple[str, ...], Rows] = {}
        records = read_jsonl(path)
        if path.exists():
            write_jsonl(path, records)  # drops a line that a killed run left unfinished
        for record in records:
            if record["key"] == key and record.get("rows", {}).keys() == objectives.keys():
                self.known[tuple(record["placement"])] = record["rows"]
        self.trunk: dict[Part, list[Tensor]] = {}
        self.last: dict[Part, tuple[Placement, list[Tensor]]] = {}

    def __call__(self, placement: Placement) -> Values:
        """The values of a placement, from the file where they are there already."""
        return {name: statistics.fmean(losses) for name, losses in self.rows(placement).items()}

    def rows(self, placement: Placement) -> Rows:
        """The loss of every row, in the objectives' order, so that two placements can be compared row by row."""
        known = tuple(placement)
        if known not in self.known:
            rows = {name: self._measure(name, placement) for name in sorted(self.parts)}
            if not all(math.isfinite(loss) for losses in rows.values() for loss in losses):
                means = {name: statistics.fmean(losses) for name, losses in rows.items()}
                raise UserError(f"place: a placement scores {means}; the candidates are unsound, lower align.lr")
            self.known[known] = rows
            append_jsonl(self.path, {"key": self.key, "placement": placement, "rows": rows})
        return self.known[known]

    @torch.no_grad()
    def _measure(self, name: str, placement: Placement) -> list[float]:
        net, losses = self.supernet, []
        for number, part in enumerate(self.parts[name]):
            at = (name, number)
            # Padding stands on the right, where no real token of a causal model sees it.
            with autocast(part.tokens.device, self.compute):
                h, step = net.embed(part.tokens)
                if at not in self.trunk:
                    self.trunk[at] = self._run([h], step, net.attention)
                hidden = net.norm(self._run(self._shared(at, placement), step, placement)[-1])
                teacher = net.norm(self.trunk[at][-1]) if part.kind == "kl" else None
                losses += measure(hidden, part, net.head, net.softcap, teacher).tolist()
        return losses

    def _shared(self, at: Part, placement: Placement) -> list[Tensor]:
        """Hidden states [count, T, hidden] before the layers up to the first that is new to this placement.

        The list is remembered as this placement's own and grows when the rest is run: of the states that
        the placement before had, what is not shared is let go first, and a run that is cut off harms nothing.
        """
        trunk = self.trunk[at]
        last, states = self.last.get(at, (self.supernet.attention, trunk))
        fresh = self.supernet.first_change(placement)
        again = next((i for i, pair in enumerate(zip(placement, last)) if pair[0] != pair[1]), len(last))
        shared = states[: again + 1] if again > fresh else trunk[: fresh + 1]
        self.last[at] = (list(placement), shared)
        return shared

    def _run(self, states: list[Tensor], step: Step, placement: Placement) -> list[Tensor]:
        """The states that are there, and those after each of the remaining layers, in the same list."""
        for layer in range(len(states) - 1, self.supernet.layers):
            states.append(self.supernet.run(states[-1], step, placement, start=layer, stop=layer + 1))
        return states


def combine(values: Values, base: Values, weights: dict[str, float]) -> float:
    """The weighted sum of what each objective lost against the base; 0 is the base itself, lower is better."""
    return sum(weight * (values[name] - base[name]) for name, weight in weights.items() if weight > 0)


def swaps(scorer: Scorer, attention: Placement, block: str, weights: dict[str, float]) -> list[dict[str, Any]]:
    """For each layer, the values with that one layer on its candidate and all others on attention."""
    base = scorer(attention)
    found = []
    for layer in range(len(attention)):
        values = scorer(with_linear(attention, block, {layer}))
        found.append({"layer": layer, "block": block, **values, "score": combine(values, base, weights)})
    return found

"""What a placement is worth: nats lost against the base on each objective.

Scores are kept in a file as they are made, by objective. A killed search goes on, another budget, weight or
strategy solves from what is there, and of a new objective only that one is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.models.supernet import Placement, Supernet
from postnas.ops.cuda_graph import Replayed, Shared
from postnas.search.objectives import Objective, batches, measure
from postnas.search.strategies import with_linear
from postnas.train import parallel
from postnas.train.loop import autocast

BATCH = 16_384
"""Tokens that are scored at a time."""
TOGETHER = 4
"""Placements that each of several ranks measures before all tell the others; a kill loses no more."""
NOTHING = -0.0
"""A sum with it is every number as it was, a zero's sign too."""

Names = tuple[str, ...]
"""A placement as a key."""
Values = dict[str, float]
Rows = dict[str, list[float]]
Part = tuple[str, int]
"""An objective's name, and the number of a part of its rows."""


class Scored:
    """Scores that a file holds, of fixed rows: each objective's mean over its rows, in nats a token.

    By itself it measures nothing, so it needs no model.
    """

    def __init__(self, names: Iterable[str], path: Path, key: str, window: int | None = None) -> None:
        """names: the objectives that are asked. key: says what the candidates and rows are made from; lines of
        `path` with another key are kept and not used. Of one placement there may be several lines, each with the
        objectives that were measured together. window: of the layers that a second pass turns to `swa`; only scores of
        placements that hold such depend on it."""
        self.names, self.path, self.key, self.window = sorted(names), path, key, window
        self.known: dict[Names, Rows] = {}
        for record in read_jsonl(path):
            if not isinstance(record, dict) or not record.keys() >= {"key", "placement", "rows"}:
                raise UserError(f"{path}: holds a line that is no score; remove the line, or the file")
            if record["key"] == key and record.get("window") == self._window(record["placement"]):
                self.known.setdefault(tuple(record["placement"]), {}).update(record["rows"])

    def __call__(self, placement: Placement) -> Values:
        """The values of one placement, as `several` gives them."""
        return self.several([placement])[0]

    def several(
        self, placements: Sequence[Placement], after: Callable[[int], None] = lambda count: None
    ) -> list[Values]:
        """The values of placements, in their order; what is not known is measured.

        after(count): told of so many of them as soon as they are known. Raises UserError where nothing can be
        measured, and for losses that are not finite.
        """
        missing = sorted({tuple(placement) for placement in placements if self.lacking(tuple(placement))})
        after(len(placements) - len(missing))
        if missing:
            self._measure(missing, after)
        return [{name: statistics.fmean(losses) for name, losses in self._known(one).items()} for one in placements]

    def rows(self, placement: Placement) -> Rows:
        """The loss of every row by objective, so that two placements can be compared row by row."""
        self.several([placement])
        return self._known(placement)

    def lacking(self, placement: Names) -> list[str]:
        """The objectives that are asked and not known of a placement."""
        known = self.known.get(placement, {})
        return [name for name in self.names if name not in known]

    def _window(self, placement: Sequence[str]) -> int | None:
        return self.window if "swa" in placement else None

    def _known(self, placement: Placement) -> Rows:
        rows = self.known[tuple(placement)]
        return {name: rows[name] for name in self.names}

    def _measure(self, missing: list[Names], after: Callable[[int], None]) -> None:
        """Make `missing` known; they are sorted, so that those which share early layers follow one another."""
        names = ", ".join(sorted({name for placement in missing for name in self.lacking(placement)}))
        count = f"{len(missing)} placement{'s are' if len(missing) > 1 else ' is'}"
        raise UserError(f"solve: {count} not scored yet on {names}; leave --solve out to score what is missing")


class Scorer(Scored):
    """Scores that are measured where the file does not hold them, by one supernet on fixed rows.

    The hidden states before every layer are kept of two placements, the base and the one scored
    last, so a placement costs only the layers after those that it shares with one of them. On several
    ranks each measures a piece of what is asked together, all know all, and rank 0 writes.
    """

    def __init__(
        self,
        supernet: Supernet,
        objectives: dict[str, Objective],
        path: Path,
        compute: torch.dtype,
        key: str,
        window: int | None = None,
    ) -> None:
        """objectives: as `objectives.make` gives them. path, key, window: as in Scored."""
        super().__init__(objectives, path, key, window)
        if parallel.rank() == 0 and path.exists():
            write_jsonl(path, read_jsonl(path))  # drops a line that a killed run left unfinished
        parallel.barrier()  # nobody adds a line before everybody has read
        self.supernet, self.compute, self.objectives = supernet, compute, objectives
        device = supernet.head.device
        self.parts = {name: [part.to(device) for part in batches(one, BATCH)] for name, one in objectives.items()}
        self.trunk: dict[Part, list[Tensor]] = {}
        self.steps: dict[Part, Step] = {}
        self.layers: dict[tuple[Part, int, str], Replayed] = {}
        self.memory: dict[Part, Shared] = {}
        self.last: dict[Part, tuple[Placement, list[Tensor]]] = {}

    def _measure(self, missing: list[Names], after: Callable[[int], None]) -> None:
        ranks = parallel.world()
        bounds = [rank * len(missing) // ranks for rank in range(ranks + 1)]
        pieces = [missing[begin:end] for begin, end in pairwise(bounds)]
        together = TOGETHER if ranks > 1 else 1
        for begin in range(0, max(map(len, pieces)), together):
            turn = [piece[begin : begin + together] for piece in pieces]
            self._take_turn(turn)
            after(sum(map(len, turn)))

    def _take_turn(self, turn: list[list[Names]]) -> None:
        """Each rank measures the placements of its part of `turn`; then all know all of them."""
        wanted = [
            (rank, placement, name)
            for rank, placements in enumerate(turn)
            for placement in placements
            for name in self.lacking(placement)
        ]
        sizes = [len(self.objectives[name].ids) for _, _, name in wanted]
        losses = torch.full((sum(sizes),), NOTHING, dtype=torch.float64)
        for own, (rank, placement, name) in zip(losses.split(sizes), wanted):
            if rank == parallel.rank():
                own.copy_(self._losses(name, list(placement)))
        made: dict[Names, Rows] = {}
        for own, (_, placement, name) in zip(shared(losses, self.supernet).split(sizes), wanted):
            made.setdefault(placement, {})[name] = own.tolist()
        for placement, rows in made.items():
            if not all(math.isfinite(loss) for row in rows.values() for loss in row):
                means = {name: statistics.fmean(row) for name, row in rows.items()}
                raise UserError(f"place: a placement scores {means}; the candidates are unsound, lower align.lr")
            self.known.setdefault(placement, {}).update(rows)
            if parallel.rank() == 0:
                record = {"key": self.key, "placement": list(placement), "rows": rows}
                window = self._window(placement)
                append_jsonl(self.path, record | ({"window": window} if window else {}))

    @torch.no_grad()
    def _losses(self, name: str, placement: Placement) -> Tensor:
        """The loss of each of an objective's rows, [N] float64 on the CPU."""
        net, losses = self.supernet, []
        for number, part in enumerate(self.parts[name]):
            at = (name, number)
            # Padding stands on the right, where no real token of a causal model sees it.
            with autocast(part.tokens.device, self.compute):
                if at not in self.trunk:
                    h, self.steps[at] = net.embed(part.tokens)
                    if h.is_cuda:
                        self.memory[at] = Shared(h)
                    self.trunk[at] = self._run(at, [h], net.attention)
                hidden = net.norm(self._run(at, self._shared(at, placement), placement)[-1])
                teacher = net.norm(self.trunk[at][-1]) if part.kind == "kl" else None
                losses.append(measure(hidden, part, net.head, net.softcap, teacher).cpu())
        return torch.cat(losses)

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

    def _run(self, at: Part, states: list[Tensor], placement: Placement) -> list[Tensor]:
        """The states that are there, and those after each of the remaining layers, in the same list."""
        for layer in range(len(states) - 1, self.supernet.layers):
            states.append(self._layer(at, layer, placement[layer])(states[-1]))
        return states

    def _layer(self, at: Part, layer: int, name: str) -> Replayed:
        """One layer with one mixer on one part, which is run for every placement that has it: on a GPU a graph."""
        if (at, layer, name) not in self.layers:
            net, step = self.supernet, self.steps[at]  # not self: in a circle, all states would stay in memory
            row = ["" if index != layer else name for index in range(self.supernet.layers)]

            def work(h: Tensor) -> Tensor:
                return net.run(h, step, row, start=layer, stop=layer + 1)

            self.layers[at, layer, name] = Replayed(work, warm_up=1, shared=self.memory.get(at))
        return self.layers[at, layer, name]


def shared(values: Tensor, supernet: Supernet) -> Tensor:
    """float64 `values` on the CPU, of which each rank has put in its own and NOTHING elsewhere, whole on all ranks."""
    return parallel.total(values.to(supernet.head.device)).cpu()


def combine(values: Values, base: Values, weights: dict[str, float]) -> float:
    """The weighted sum of what each objective lost against the base; 0 is the base itself, lower is better."""
    return sum(weight * (values[name] - base[name]) for name, weight in weights.items() if weight > 0)


def swaps(scorer: Scored, attention: Placement, block: str, weights: dict[str, float]) -> list[dict[str, Any]]:
    """For each layer, the values with that one layer on its candidate and all others on attention."""
    base, *swapped = scorer.several([attention, *(with_linear(attention, block, {i}) for i in range(len(attention)))])
    return [
        {"layer": layer, "block": block, **values, "score": combine(values, base, weights)}
        for layer, values in enumerate(swapped)
    ]

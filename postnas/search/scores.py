"""What a placement is worth: nats lost against the base on text, and on passages that stand twice.

Scores are kept in a file as they are made. A killed search goes on, and another budget, weight or
strategy solves from what is there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.data import Tokens
from postnas.errors import UserError
from postnas.evaluate.recall import copy_batch
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.models.supernet import Placement, Supernet
from postnas.ops.chunked_loss import chunked_kl, chunked_nll
from postnas.search.strategies import with_linear
from postnas.train.loop import autocast

LENGTH = 256
"""Tokens of a sequence that KL is scored on."""
COPY = (128, 192)
"""Tokens of a passage that stands twice, and tokens between."""

Values = dict[str, float]


def score_sequences(heldout: Tokens, tokens: int, objectives: list[str], seed: int) -> dict[str, Tensor]:
    """What each objective is scored on, [count, length] int64, of about `tokens` tokens.

    Raises UserError where there is too little held-out text.
    """
    length, filler = COPY
    found = {}
    if "kl" in objectives:
        found["kl"] = heldout.sequences(max(1, tokens // LENGTH), LENGTH)
    if "copy" in objectives:
        found["copy"] = copy_batch(heldout.stream(), max(1, tokens // (2 * length + filler)), length, filler, seed)
    return found


class Scorer:
    """Scores placements of one supernet on fixed held-out sequences: `kl` and `copy`, in nats a token.

    kl: mean forward KL from the base. copy: mean negative log-likelihood of the second copy of a
    passage. The base's hidden states at every layer are kept, so a placement costs only the layers
    from its first change on.
    """

    def __init__(
        self, supernet: Supernet, sequences: dict[str, Tensor], path: Path, compute: torch.dtype, key: str
    ) -> None:
        """sequences: as `score_sequences` gives them. key: says what the candidates and sequences are made from;
        scores in `path` of another key are kept and not used."""
        self.supernet, self.path, self.compute, self.key = supernet, path, compute, key
        self.sequences = {name: tokens.to(supernet.head.device) for name, tokens in sequences.items()}
        self.known: dict[tuple[str, ...], Values] = {}
        records = read_jsonl(path)
        if path.exists():
            write_jsonl(path, records)  # drops a line that a killed run left unfinished
        for record in records:
            if record["key"] == key and record["values"].keys() == sequences.keys():
                self.known[tuple(record["placement"])] = record["values"]
        self.trunk: dict[str, list[Tensor]] = {}

    def __call__(self, placement: Placement) -> Values:
        """The values of a placement, from the file where they are there already."""
        known = tuple(placement)
        if known not in self.known:
            values = {name: self._measure(name, placement) for name in sorted(self.sequences)}
            if not all(math.isfinite(value) for value in values.values()):
                raise UserError(f"place: a placement scores {values}; the candidates are unsound, lower align.lr")
            self.known[known] = values
            append_jsonl(self.path, {"key": self.key, "placement": placement, "values": values})
        return self.known[known]

    @torch.no_grad()
    def _measure(self, name: str, placement: Placement) -> float:
        net, tokens = self.supernet, self.sequences[name]
        with autocast(tokens.device, self.compute):
            h, step = net.embed(tokens)
            if name not in self.trunk:
                states = [h]
                for layer in range(net.layers):
                    states.append(net.run(states[-1], step, net.attention, start=layer, stop=layer + 1))
                self.trunk[name] = states
            first = net.first_change(placement)
            hidden = net.norm(net.run(self.trunk[name][first], step, placement, start=first))
            if name == "kl":
                teacher = net.norm(self.trunk[name][-1])
                return float(chunked_kl(hidden.flatten(0, 1), net.head, teacher.flatten(0, 1), net.head, net.softcap))
            length = COPY[0]
            hidden, targets = hidden[:, -length:-1], tokens[:, -length + 1 :]
            return float(chunked_nll(hidden.flatten(0, 1), net.head, targets.flatten(), net.softcap).mean())


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

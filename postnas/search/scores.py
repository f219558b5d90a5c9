"""What a placement is worth: nats lost against the base on text, and on passages that stand twice.

Scores are kept in a file as they are made. A killed search goes on, and another budget, weight or
strategy solves from what is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.data import Tokens
from postnas.evaluate.recall import copy_batch
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.models.supernet import Placement, Supernet
from postnas.ops.chunked_loss import chunked_kl, chunked_nll

LENGTH = 256
"""Tokens of a sequence that KL is scored on."""
COPY = (80, 96)
"""Tokens of a passage that stands twice, and tokens between."""

Values = dict[str, float]


class Scorer:
    """Scores placements of one supernet on fixed held-out sequences: `kl` and `copy`, in nats a token.

    kl: mean forward KL from the base. copy: mean negative log-likelihood of the second copy of a
    passage. The base's hidden states at every layer are kept, so a placement costs only the layers
    from its first change on.
    """

    def __init__(
        self,
        supernet: Supernet,
        heldout: Tokens,
        tokens: int,
        objectives: list[str],
        seed: int,
        path: Path,
        compute: torch.dtype,
    ) -> None:
        self.supernet, self.path, self.compute = supernet, path, compute
        self.known: dict[tuple[str, ...], Values] = {}
        self.tokens = tokens
        records = read_jsonl(path)
        if path.exists():
            write_jsonl(path, records)  # drops a line that a killed run left unfinished
        for record in records:
            if (record["tokens"], sorted(record["values"])) == (tokens, objectives):
                self.known[tuple(record["placement"])] = record["values"]
        device = supernet.head.device
        self.sequences: dict[str, Tensor] = {}
        if "kl" in objectives:
            self.sequences["kl"] = heldout.sequences(max(1, tokens // LENGTH), LENGTH).to(device)
        if "copy" in objectives:
            length, filler = COPY
            count = max(1, tokens // (2 * length + filler))
            self.sequences["copy"] = copy_batch(heldout.stream(), count, length, filler, seed).to(device)
        self.trunk: dict[str, list[Tensor]] = {}

    def __call__(self, placement: Placement) -> Values:
        """The values of a placement, from the file where they are there already."""
        key = tuple(placement)
        if key not in self.known:
            self.known[key] = {name: self._measure(name, placement) for name in sorted(self.sequences)}
            append_jsonl(self.path, {"tokens": self.tokens, "placement": placement, "values": self.known[key]})
        return self.known[key]

    @torch.no_grad()
    def _measure(self, name: str, placement: Placement) -> float:
        net, tokens = self.supernet, self.sequences[name]
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.compute == torch.bfloat16):
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
                return float(chunked_kl(hidden.flatten(0, 1), net.head, teacher.flatten(0, 1), net.head))
            length = COPY[0]
            hidden, targets = hidden[:, -length:-1], tokens[:, -length + 1 :]
            return float(chunked_nll(hidden.flatten(0, 1), net.head, targets.flatten()).mean())


def combine(values: Values, base: Values, weights: dict[str, float]) -> float:
    """The weighted sum of what each objective lost against the base; 0 is the base itself, lower is better."""
    return sum(weight * (values[name] - base[name]) for name, weight in weights.items() if weight > 0)


def swaps(scorer: Scorer, attention: Placement, block: str, weights: dict[str, float]) -> list[dict[str, Any]]:
    """For each layer, the values with that one layer on its candidate and all others on attention."""
    base = scorer(attention)
    found = []
    for layer in range(len(attention)):
        values = scorer([block if i == layer else name for i, name in enumerate(attention)])
        found.append({"layer": layer, "block": block, **values, "score": combine(values, base, weights)})
    return found

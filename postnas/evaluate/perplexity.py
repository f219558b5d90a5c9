"""Perplexity on held-out text, and the negative log-likelihood that the other measures share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from postnas.progress import Progress

CHUNK = 256  # positions whose logits stand in float32 at once: 156 MB at a vocabulary of 152k


class CausalLM(Protocol):
    """A Hugging Face style language model: the call's result has `logits` [B, T, V]."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any: ...


def token_nll(logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Negative log-likelihood, in nats, of the tokens that stand where `positions` is true.

    logits: [B, T, V], any floating type; logits[:, t] predict tokens[:, t + 1].
    tokens: [B, T] int64. positions: [B, T] bool; its first column must be false.
    Returns [n] float32, row by row. Only CHUNK positions are held in float32 at a time.
    """
    row, column = positions.nonzero(as_tuple=True)
    parts = [
        functional.cross_entropy(logits[r, c - 1].float(), tokens[r, c], reduction="none")
        for r, c in zip(row.split(CHUNK), column.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; the error is None for a single value, which has no spread."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def from_nll(nll: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity and its standard error from the mean NLL, in nats, of each of equally long sequences.

    The error is that of the mean over sequences, carried through exp to first order (delta method).
    """
    mean, stderr = mean_stderr(nll)
    value = math.exp(mean)
    return value, None if stderr is None else value * stderr


@torch.inference_mode()
def perplexity(model: CausalLM, tokens: Tensor, batch: int = 8) -> dict[str, Any]:
    """Perplexity of `model` on `tokens` [N, T] int64, each row a sequence of its own.

    Returns value, stderr (None for one sequence), n (predicted tokens, N * (T - 1)), sequences (N),
    and nll, the mean NLL in nats of each sequence. T must be 2 or more.
    """
    sequences, length = tokens.shape
    nll: list[float] = []
    with Progress("perplexity", total=tokens.numel()) as bar:
        for part in tokens.split(batch):
            part = part.to(model.device)
            logits = model(input_ids=part, attention_mask=None, use_cache=False).logits
            positions = torch.ones_like(part, dtype=torch.bool)
            positions[:, 0] = False
            losses = token_nll(logits, part, positions).view(len(part), length - 1)
            nll += losses.double().mean(dim=1).tolist()
            bar.advance(part.numel())
    value, stderr = from_nll(nll)
    return {"value": value, "stderr": stderr, "n": sequences * (length - 1), "sequences": sequences, "nll": nll}

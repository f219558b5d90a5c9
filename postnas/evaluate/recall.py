"""Recall: does the model find again what stood earlier? The copy test repeats a passage after a filler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate.perplexity import CausalLM, mean_stderr, token_nll
from postnas.progress import Progress


def copy_batch(tokens: Tensor, passages: int, length: int, filler: int, seed: int) -> Tensor:
    """Sequences of the copy test: `length` tokens of text, `filler` tokens of other text, the first again.

    tokens: [M] int64, a stream of text. Passages do not overlap one another, so that they are
    independent samples; a filler does not overlap its own passage. Positions depend on `seed` alone.
    Returns [passages, 2 * length + filler] int64. Raises UserError where the stream is too short, or a
    passage so short that nothing of its second copy could be predicted.
    """
    if length < 2:
        raise UserError(f"copy test: passages of {length} tokens leave nothing to predict; give 2 or more")
    need = max(passages * length, length + 2 * filler)  # the second: a passage in the middle leaves room beside it
    if len(tokens) < need:
        raise UserError(
            f"copy test: {len(tokens)} held-out tokens are too few for {passages} passages of {length} tokens "
            f"and fillers of {filler}; give {need} tokens, or fewer or shorter passages"
        )
    generator = torch.Generator().manual_seed(seed)
    slack = len(tokens) - passages * length
    gaps = torch.randint(slack + 1, (passages,), generator=generator).sort().values
    starts = (gaps + length * torch.arange(passages)).tolist()
    rows = []
    for start in starts:
        before = max(0, start - filler + 1)  # places for the filler on either side of the passage
        behind = max(0, len(tokens) - filler - start - length + 1)
        place = int(torch.randint(before + behind, (), generator=generator))
        if place >= before:
            place += start + length - before
        passage = tokens[start : start + length]
        rows.append(torch.cat((passage, tokens[place : place + filler], passage)))
    return torch.stack(rows)


@torch.inference_mode()
def copy(
    model: CausalLM, tokens: Tensor, passages: int, length: int, filler: int, seed: int, batch: int = 8
) -> dict[str, Any]:
    """NLL (nats a token) and top-1 accuracy on the second copy of a passage, all its tokens but the first.

    The first token of the second copy cannot be known from what stands before it. Arguments as in
    `copy_batch`. Returns nll, nll_stderr, accuracy, accuracy_stderr
    (over passages; None for one passage), n (passages), seed, and passages: a list of
    {id, nll, accuracy}. Raises UserError where the stream is too short.
    """
    sequences = copy_batch(tokens, passages, length, filler, seed)
    first = length + filler + 1
    values: list[dict[str, Any]] = []
    with Progress("copy", total=sequences.numel()) as bar:
        for part in sequences.split(batch):
            part = part.to(model.device)
            logits = model(input_ids=part, attention_mask=None, use_cache=False).logits
            positions = torch.zeros_like(part, dtype=torch.bool)
            positions[:, first:] = True
            nll = token_nll(logits, part, positions).view(len(part), length - 1).double().mean(dim=1)
            right = logits[:, first - 1 : -1].argmax(dim=-1) == part[:, first:]
            accuracy = right.double().mean(dim=1)
            for loss, share in zip(nll.tolist(), accuracy.tolist(), strict=True):
                values.append({"id": len(values), "nll": loss, "accuracy": share})
            bar.advance(part.numel())
    nll_mean, nll_stderr = mean_stderr([value["nll"] for value in values])
    accuracy_mean, accuracy_stderr = mean_stderr([value["accuracy"] for value in values])
    return {
        "nll": nll_mean,
        "nll_stderr": nll_stderr,
        "accuracy": accuracy_mean,
        "accuracy_stderr": accuracy_stderr,
        "n": passages,
        "seed": seed,
        "passages": values,
    }

"""Prefill and decode speed of a model, and the bytes of its cache, at given contexts."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from postnas.models.outputs import CACHE, named


@torch.inference_mode()
def measure(
    model: Any, context: int, batch: int, decode_tokens: int, chunk: int = 512, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for prefill and decode: tokens/s of all sequences together and cache bytes a sequence.

    The prompt is random tokens, read in chunks, so that no [context, context] mask is made. Decode speed
    is the median over `decode_tokens` steps after two that are not counted; `stderr` is that of the mean.
    """
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
    cache = None
    model(tokens[:, :chunk], use_cache=True, logits_to_keep=1)  # the first call of a shape pays for its set-up
    begin = _now(device)
    for start in range(0, context, chunk):
        output = model(tokens[:, start : start + chunk], use_cache=True, logits_to_keep=1, **named(cache))
        cache = output[CACHE]
    prefill = _now(device) - begin
    cache_bytes = cache_size(cache) // batch
    seconds = []
    token = output.logits[:, -1:].argmax(-1)
    for step in range(decode_tokens + 2):
        begin = _now(device)
        output = model(token, use_cache=True, **named(cache))
        cache = output[CACHE]
        token = output.logits[:, -1:].argmax(-1)
        if step >= 2:
            seconds.append(_now(device) - begin)
    typical = statistics.median(seconds)
    spread = statistics.stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0
    shared = {"context": context, "batch": batch, "cache_bytes": cache_bytes}
    return [
        {**shared, "phase": "prefill", "tokens_per_s": batch * context / prefill, "n": 1},
        {
            **shared,
            "phase": "decode",
            "tokens_per_s": batch / typical,
            "stderr": batch / typical * spread / typical,
            "n": len(seconds),
        },
    ]


def cache_size(cache: Any) -> int:
    """Bytes of a cache: ours, or one of transformers'."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

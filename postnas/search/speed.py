"""How fast a hybrid decodes and what its cache takes, on the device at hand, by which variants are compared."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from postnas.errors import UserError
from postnas.generate.step import Decoder
from postnas.generate.throughput import measure
from postnas.models.model import HybridForCausalLM

ROUNDS, STEPS = 10, 8
"""Times that are taken on a GPU, and decode steps of each: single steps are too short for the clock."""
PLAIN_STEPS = 16
"""Decode steps that are timed one by one on a CPU."""


def decode_speed(model: HybridForCausalLM, context: int, batch: int) -> dict[str, Any]:
    """Decode speed with `context` tokens in the caches, and the bytes of one sequence's cache as allocated.

    Returns decode_tokens_per_s (all sequences together, the median), decode_stderr, decode_n and cache_bytes. On a GPU
    the step is one CUDA graph; on a CPU the model is called as it is after it has read a prompt. Weights may be random.
    Raises UserError where the caches do not fit into the device's memory.
    """
    try:
        return graphed(model, context, batch) if model.device.type == "cuda" else _plain(model, context, batch)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"batch: {batch} sequences of {context} tokens do not fit into the memory of {device_name(model.device)}; "
            "give fewer of either"
        ) from error


def graphed(model: HybridForCausalLM, context: int, batch: int) -> dict[str, Any]:
    """The same by `generate.step`, whose states are full and stay where they are; without a GPU it has no graph."""
    decoder = Decoder(model, batch, context, fixed=True)
    decoder.fill_random()
    tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)
    seconds = []
    for _ in range(ROUNDS + 1):
        begin = _now(model.device)
        for _ in range(STEPS):
            decoder.step(tokens)
        seconds.append((_now(model.device) - begin) / STEPS)
    held = [tensor for state in decoder.states for tensor in _tensors(state)]
    return _speed(seconds[1:], batch, sum(x.numel() * x.element_size() for x in held) // batch)


def _plain(model: HybridForCausalLM, context: int, batch: int) -> dict[str, Any]:
    decode = measure(model, context, batch, PLAIN_STEPS)[-1]
    names = {"tokens_per_s": "decode_tokens_per_s", "stderr": "decode_stderr", "n": "decode_n"}
    return {new: decode[old] for old, new in names.items()} | {"cache_bytes": decode["cache_bytes"]}


def _tensors(state: Any) -> list[torch.Tensor]:
    return list(state.tensors().values()) if hasattr(state, "tensors") else [state.k, state.v]


def _speed(seconds: list[float], batch: int, cache_bytes: int) -> dict[str, Any]:
    """From the seconds of steps; the error is that of their mean, as a share of the speed."""
    rate = batch / statistics.median(seconds)
    share = statistics.stdev(seconds) / len(seconds) ** 0.5 / statistics.fmean(seconds)
    return {
        "decode_tokens_per_s": rate,
        "decode_stderr": rate * share,
        "decode_n": len(seconds),
        "cache_bytes": cache_bytes,
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""What a placement costs, from a config alone: weights, cache, operations, rooflines, and the price of making it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from postnas.blocks import linear_blocks, make_block
from postnas.models.config import HybridConfig

GIB = 2**30
LOW, WIDE = torch.bfloat16.itemsize, torch.float32.itemsize
"""Bytes of a weight as it is served, and as it is trained."""
TRAINED = 4 * WIDE
"""Bytes of a weight in training: itself, its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class Gpu:
    """The figures of a data sheet that a roofline needs."""

    name: str
    bandwidth: float
    """Bytes/s."""
    flops: float
    """Dense bf16 FLOP/s with float32 sums."""
    memory: int
    """Bytes; for DRAM a data sheet's GB is 2^30 bytes."""


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 SXM 80 GB", 3.35e12, 989e12, 80 * GIB),
    "h200": Gpu("H200 SXM 141 GB", 4.8e12, 989e12, 141 * GIB),
    "a100": Gpu("A100 SXM 80 GB", 2.039e12, 312e12, 80 * GIB),
    "l4": Gpu("L4 24 GB", 300e9, 121e12, 24 * GIB),
    "rtx4090": Gpu("GeForce RTX 4090 24 GB", 1.008e12, 165.2e12, 24 * GIB),
    "rtx3090": Gpu("GeForce RTX 3090 24 GB", 936e9, 71e12, 24 * GIB),
    "orin": Gpu("Jetson AGX Orin 64 GB", 204.8e9, 42.5e12, 64 * GIB),
}
"""Peaks from NVIDIA's data sheets and architecture white papers, without sparsity. Orin's is a quarter of the
170 sparse INT8 TOPS that its technical brief gives for the GPU. What can be had is lower: on an H100 we
measured 3.02 TB/s in a copy and 750 TFLOP/s in a large matrix product."""


class Decoder:
    """A model with a given placement as numbers. Its mixers are made without storage, so it costs nothing."""

    def __init__(self, config: HybridConfig, placement: list[str] | None = None) -> None:
        """placement: the config's own where None."""
        assert config.placement is not None and config.blocks is not None
        self.config = config
        self.placement = config.placement if placement is None else placement
        with torch.device("meta"):
            made = {name: make_block(name, config.dims(), config.blocks.get(name)) for name in set(self.placement)}
        self.mixers: list[Any] = [made[name] for name in self.placement]

    @property
    def layers(self) -> int:
        return len(self.mixers)

    @property
    def mixer_parameters(self) -> int:
        return sum(numel(mixer) for mixer in self.mixers)

    @property
    def parameters(self) -> int:
        """All weights; a head that is tied to the embeddings counts once."""
        embeddings = 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size
        return self.read_parameters + embeddings

    @property
    def read_parameters(self) -> int:
        """Weights that every token reads: all but the embeddings, of which it takes one row."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        mlp = 3 * hidden * inner + (2 * inner + hidden if config.mlp_bias else 0)
        norms = 4 if config.sandwich_norm else 2
        return self.mixer_parameters + self.layers * (mlp + norms * hidden) + hidden + config.vocab_size * hidden

    def cache_bytes(self, context: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one sequence's cache after `context` tokens. A KV cache is allocated in blocks of 256 tokens."""
        return sum(mixer.state_bytes(context, dtype) for mixer in self.mixers)

    def step_bytes(self, context: int, batch: int) -> int:
        """Bytes that a decode step moves: weights and keys and values are read, recurrent states read and written."""
        linear = linear_blocks()
        states = sum(
            mixer.state_bytes(context, torch.bfloat16) * (2 if name in linear else 1)
            for name, mixer in zip(self.placement, self.mixers, strict=True)
        )
        return LOW * self.read_parameters + batch * states

    def mlp_flops(self, tokens: int) -> int:
        """Operations of one layer's MLP."""
        return 6 * tokens * self.config.hidden_size * self.config.intermediate_size

    def head_flops(self, tokens: int) -> int:
        """Operations of one product with the head."""
        return 2 * tokens * self.config.hidden_size * self.config.vocab_size

    def body_flops(self, tokens: int, past: int = 0) -> int:
        """Operations of `tokens` tokens after `past` cached ones, without the head; norms and sums are negligible.

        Attention counts the pairs that its mask lets through. Of linear blocks `ops.linear_attention.attention_flops`
        says what counts.
        """
        return sum(mixer.flops(tokens, past) for mixer in self.mixers) + self.layers * self.mlp_flops(tokens)


def numel(mixer: torch.nn.Module) -> int:
    return sum(p.numel() for p in mixer.parameters())


def decode_seconds(model: Decoder, context: int, batch: int, gpu: Gpu) -> float:
    """The least time of one decode step of `batch` sequences that have `context` tokens in their caches."""
    flops = batch * (model.body_flops(1, context) + model.head_flops(1))
    return max(model.step_bytes(context, batch) / gpu.bandwidth, flops / gpu.flops)


def prefill_seconds(model: Decoder, context: int, batch: int, gpu: Gpu) -> float:
    """The least time to read `batch` prompts of `context` tokens; the head sees the last token only."""
    flops = batch * (model.body_flops(context) + model.head_flops(1))
    moved = LOW * model.read_parameters + batch * model.cache_bytes(context)
    return max(moved / gpu.bandwidth, flops / gpu.flops)


def largest_batch(model: Decoder, context: int, gpu: Gpu) -> int:
    """Sequences of `context` tokens whose caches fit into the GPU's memory beside the weights; 0 where none does."""
    return max(0, gpu.memory - LOW * model.parameters) // model.cache_bytes(context)


def break_even(base: Decoder, hybrid: Decoder, batch: int, gpu: Gpu, limit: int) -> int | None:
    """The smallest context, 1 to `limit`, at which the hybrid's decode step is faster; None where it never is.

    The base's step grows faster with the context than the hybrid's, so the two cross once.
    """

    def wins(context: int) -> bool:
        return decode_seconds(hybrid, context, batch, gpu) < decode_seconds(base, context, batch, gpu)

    if not wins(limit):
        return None
    low, high = 0, limit  # the hybrid does not win at low (nobody asks at 0) and wins at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Stage:
    """What one stage of a run takes."""

    name: str
    tokens: int
    flops: int
    """Operations of the whole stage."""
    memory: int
    """Bytes of weights, gradients, moments and kept states; activations depend on the batch and are left out."""


def align_stage(base: Decoder, linear: Decoder, tokens: int, length: int) -> Stage:
    """Each token: the base forward without its head, and every layer's candidate forward and backward.

    linear: all layers on the linear block. length: tokens of a sequence, which attention's share depends on.
    An upper bound: products that a candidate begins with need no gradient of their input.
    """
    candidates = sum(mixer.flops(length) for mixer in linear.mixers)
    flops = (base.body_flops(length) + 3 * candidates) * tokens // length
    return Stage("align", tokens, flops, LOW * base.parameters + TRAINED * linear.mixer_parameters)


def search_stage(base: Decoder, linear: Decoder, tokens: int, objectives: int, length: int) -> Stage:
    """`swap`: each layer alone on its candidate, scored on `tokens` tokens for each objective.

    The base's hidden states are kept, so a score runs the layers from the changed one on: half of them
    on average. Its loss takes two products with the head, the teacher's and the student's.
    """
    scored = tokens * objectives
    body, head = base.body_flops(length), 2 * base.head_flops(length)
    flops = (body + base.layers * (body // 2 + head)) * scored // length
    states = LOW * (base.layers + 1) * scored * base.config.hidden_size
    memory = LOW * base.parameters + WIDE * linear.mixer_parameters + states
    return Stage("search", base.layers * scored, flops, memory)


def mixers_stage(base: Decoder, hybrid: Decoder, linear: Decoder, tokens: int, length: int) -> Stage:
    """Stage 1: teacher and student forward, and backward through every layer, of which only new mixers learn.

    A frozen product costs its input's gradient only; scores of attention have two factors and cost twice.
    """
    backward, trained = hybrid.layers * hybrid.mlp_flops(length), 0
    for before, after, mixer in zip(base.placement, hybrid.placement, hybrid.mixers, strict=True):
        new = after != before
        frozen = 0 if new else 2 * length * sum(p.numel() for p in mixer.parameters() if p.ndim == 2)
        backward += 2 * mixer.flops(length) - frozen
        trained += numel(mixer) if new else 0
    forward = base.body_flops(length) + hybrid.body_flops(length)
    flops = (forward + backward + 3 * base.head_flops(length)) * tokens // length
    memory = LOW * base.parameters + WIDE * linear.mixer_parameters + (TRAINED - WIDE) * trained
    return Stage("mixers only", tokens, flops, memory)


def weights_stage(base: Decoder, hybrid: Decoder, linear: Decoder, tokens: int, length: int) -> Stage:
    """Stage 2: the teacher forward, the student forward and backward with all weights; the candidates stay loaded."""
    body = base.body_flops(length) + 3 * hybrid.body_flops(length)
    flops = (body + 4 * base.head_flops(length)) * tokens // length
    memory = LOW * base.parameters + WIDE * linear.mixer_parameters + TRAINED * hybrid.parameters
    return Stage("all weights", tokens, flops, memory)

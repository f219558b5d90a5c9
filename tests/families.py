"""Hybrids of every family that we read, small and random, in which no weight is idle."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from test_families import GEMMA, GEMMA_ROPE, ROPES, family_model
from tiny import PAD
from torch import Tensor

from postnas.blocks import BLOCKS, linear_blocks
from postnas.export.jet_nemotron import to_jet_nemotron
from postnas.models.convert import convert
from postnas.models.jet_nemotron import MIXERS
from postnas.models.model import HybridForCausalLM

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": ROPES["llama3"]}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA_ROPE}),
}
"""transformers' own class and what its config is told, by the name in the tests."""
JET_NEMOTRON = "jet_nemotron"
"""The official names: a hybrid of a Qwen2 base, moved into that format."""
ALL = [*FAMILIES, JET_NEMOTRON]
WINDOW = 9


def blocks_of(family: str) -> list[str]:
    """What a layer of the family may be."""
    return [block for block in BLOCKS if family != JET_NEMOTRON or block in MIXERS]


CASES = [(family, block) for family in ALL for block in blocks_of(family)]


def around(block: str) -> tuple[str, ...]:
    """The block before and after both kinds of attention."""
    return (block, "swa", "attn", block)


def every_block(family: str) -> tuple[str, ...]:
    """Each block once, and the first linear one again at the end."""
    return (*blocks_of(family), next(block for block in blocks_of(family) if block in linear_blocks()))


def own_model(kind: str, changes: dict[str, Any]) -> Any:
    """A random model of transformers' own class that says something.

    With a tied head a large embedding repeats the last token for ever: the stream through the layers hardly moves it.
    """
    model = family_model(kind, changes | {"pad_token_id": PAD})
    if model.config.tie_word_embeddings:
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.1)
            model.model.norm.weight.add_(9.0)
    return model


def save_base(family: str, placement: tuple[str, ...], folder: Path) -> None:
    """A random base of transformers' own class as a folder, which can become a hybrid of this placement.

    Gemma's layers have each their kind of attention, and `swa` and `attn` must be that of the base.
    """
    kind, given = FAMILIES["qwen2" if family == JET_NEMOTRON else family]
    changes: dict[str, Any] = {"num_hidden_layers": len(placement)}
    if kind == "gemma3_text":
        under = [name if name in ("swa", "attn") else ("swa", "attn")[i % 2] for i, name in enumerate(placement)]
        changes["layer_types"] = ["sliding_attention" if name == "swa" else "full_attention" for name in under]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        own_model(kind, given | changes).save_pretrained(folder)


def options_of(family: str, placement: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """A window, and biases on q, k and v wherever the block and the format can have them."""
    options: dict[str, dict[str, Any]] = {}
    for block in placement:
        if "qkv_bias" in {field.name for field in fields(BLOCKS[block].Options)}:
            options[block] = {"qkv_bias": family != JET_NEMOTRON}
    if "swa" in placement:
        options["swa"] = {"window_size": WINDOW}
    return options


def converted(family: str, placement: tuple[str, ...]) -> HybridForCausalLM:
    """What `convert` makes of a random base, in float32."""
    with TemporaryDirectory() as folder:
        save_base(family, placement, Path(folder))
        model = convert(folder, list(placement), options_of(family, placement), dtype=torch.float32)
    return to_jet_nemotron(model).eval() if family == JET_NEMOTRON else model


@torch.no_grad()
def randomise(model: HybridForCausalLM) -> None:
    """The linear mixers' weights anew: as inherited, convolutions are the identity and generators silent.

    Large biases and taps, and a decay of about 0.97 a token, so that what leaks shows.
    """
    generator = torch.Generator().manual_seed(11)
    assert model.config.placement is not None
    for layer, block in zip(model.model.layers, model.config.placement, strict=True):
        if block not in linear_blocks():
            continue
        for name, parameter in layer.self_attn.named_parameters():
            shift = 1.0 if "norm" in name else -3.0 if "A_log" in name else 0.0
            wide = 0.5 if "bias" in name or "conv1d.weight" in name else 0.15
            parameter.copy_(shift + wide * torch.randn(parameter.shape, generator=generator))


@cache
def hybrid(family: str, placement: tuple[str, ...]) -> HybridForCausalLM:
    """A hybrid with every weight random, in float64; shared by the tests, so none may change it."""
    model = converted(family, placement)
    randomise(model)
    assert model.model.embed_tokens(torch.tensor(PAD)).norm() > 0.5  # padding that leaks must show
    return model.double()


def feed(model: HybridForCausalLM, ids: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Logits of pieces of these sizes, each with its own part of the mask, on the cache of the one before."""
    cache, logits = None, []
    for piece, part in zip(ids.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True):
        output = model(piece, attention_mask=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)

"""A base to a hybrid in one call: weights inherited, nothing trained."""

from __future__ import annotations

from typing import Any

import torch

from postnas.blocks import BLOCKS, make_block
from postnas.blocks.inherit import inherit
from postnas.blocks.linear import LinearMixer
from postnas.errors import UserError
from postnas.models.checkpoint import load_base
from postnas.models.config import check_placement
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.recipe import STARTS


def convert(
    base: str | HybridForCausalLM,
    placement: Placement,
    options: dict[str, dict[str, Any]] | None = None,
    start: str = "random",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> HybridForCausalLM:
    """A hybrid of `base` with one mixer a layer as `placement` says, each started from the attention it replaces.

    base: a name that `sources` resolves (hub id, folder, GGUF, package:...), or a loaded base. options:
    of the blocks, {block: {option: value}}. Untrained linear layers lose much: align them, then distil.
    start: `random` or `plus_minus`, as in `inherit`. seed: of everything random; torch's own generator goes on as
    if nothing had been drawn. Raises UserError for a placement of the wrong length, unknown blocks, or sizes that
    cannot be.
    """
    if start not in STARTS:
        raise UserError(f"start: {start!r} is unknown; choose from {', '.join(STARTS)}")
    for block in options or {}:
        if block not in BLOCKS:
            raise UserError(f"options.{block}: no such block; choose from {', '.join(BLOCKS)}")
    model = load_base(base, dtype=dtype) if isinstance(base, str) else base
    supernet = Supernet(model, {})
    held = dict(model.config.blocks or {})
    wanted = held | (options or {})
    if "swa" in held and wanted["swa"] != held["swa"]:
        raise UserError(f"options.swa: {wanted['swa']} is not the base's own window {held['swa']}; leave it out")
    check_placement(placement, supernet.layers)
    for layer, block in enumerate(placement):
        if block == supernet.attention[layer]:
            continue
        attention = model.model.layers[layer].self_attn
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + layer)
            mixer = make_block(block, model.config.dims(), wanted.get(block))
        if isinstance(mixer, LinearMixer):
            inherit(mixer, attention, start=start, seed=seed + layer)
        elif block == "swa" and model.config.swa_rope_parameters is None:
            mixer.load_state_dict(attention.state_dict())
        else:
            raise UserError(
                f"placement[{layer}]: {block!r} cannot start from the base's {supernet.attention[layer]!r}; "
                f"choose {supernet.attention[layer]!r} or a linear block"
            )
        supernet.candidates.setdefault(block, {})[layer] = mixer
    return supernet.build(placement, dtype)

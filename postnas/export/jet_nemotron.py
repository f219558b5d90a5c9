"""The official Jet-Nemotron format, which SGLang and the released code read."""

from __future__ import annotations

from inspect import get_annotations
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from postnas.blocks import make_block
from postnas.blocks.jet import JetOptions
from postnas.errors import UserError
from postnas.files import replacing
from postnas.models.checkpoint import model_from_weights
from postnas.models.config import HybridConfig
from postnas.models.jet_nemotron import FIXED, MIXERS, OURS, JetNemotronConfig
from postnas.models.load import load_model
from postnas.models.model import HybridForCausalLM, JetNemotronForCausalLM


def refusal(config: HybridConfig) -> str | None:
    """Why the format cannot hold such a hybrid, in one line; None where it can."""
    placement = config.placement or []
    for index, name in enumerate(placement):
        if name not in MIXERS:
            return f"placement[{index}]: {name!r} has no place in the format; it holds {', '.join(MIXERS)}"
    for name, value in FIXED.items():
        if name not in ("qkv_bias", "swa_rope_parameters") and getattr(config, name) != value:
            return f"{name}: {getattr(config, name)!r} of the base ({config.family}) has no place in the format"
    if "swa" in placement and config.swa_rope_parameters is not None:
        return "swa_rope_parameters: the format has one RoPE for all layers"
    if config.hidden_size != config.num_attention_heads * (config.head_dim or 0):
        return (
            f"head_dim: {config.head_dim} is not hidden_size / num_attention_heads "
            f"({config.hidden_size} / {config.num_attention_heads}), as the format needs"
        )
    theta = (config.rope_parameters or {}).get("rope_theta", 0)
    if theta != int(theta):
        return f"rope_theta: {theta} is no whole number, and SGLang cuts it to one"
    if config.hidden_act != "silu":
        return f"hidden_act: {config.hidden_act!r} has no place in the format; its MLP is SwiGLU"
    if "jet" in placement:
        options = _options("jet", config)
        for name, value in options.changes().items():
            only = getattr(JetOptions, name)
            return f"blocks.jet.{name}: {value!r} has no place in the format; it holds {only!r} alone"
        if options.qkv_bias:
            return "blocks.jet.qkv_bias: Jet layers have no biases in the format; make the hybrid with qkv_bias: false"
    return None


def _options(name: str, config: HybridConfig) -> Any:
    """A block's options with everything filled in that the base decides."""
    with torch.device("meta"):
        return make_block(name, config.dims(), (config.blocks or {}).get(name)).options


def to_jet_nemotron(model: HybridForCausalLM) -> JetNemotronForCausalLM:
    """The same model under the official names, sharing the weights; attention without biases gets zeros.

    A model that is one already is given back as it is.
    Raises UserError where the format cannot hold it.
    """
    if isinstance(model, JetNemotronForCausalLM):
        return model
    config = cast(HybridConfig, model.config)
    reason = refusal(config)
    if reason is not None:
        raise UserError(f"{reason}; keep the postnas format, or make another hybrid")
    placement = cast(list[str], config.placement)
    fields = {name: getattr(config, name) for name in get_annotations(HybridConfig) if name not in OURS}
    held: dict[str, Any] = {}
    for name in ("jet", "swa"):
        if name in placement:
            options = _options(name, config)
            held[name] = {key: getattr(options, key) for key in options.__dataclass_fields__}
    official = JetNemotronConfig(
        **fields, placement=placement, blocks=held, rope_parameters=dict(config.rope_parameters or {})
    )
    official.dtype = model.dtype
    weights: dict[str, Tensor] = dict(model.state_dict())
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    for index, name in enumerate(placement):
        if name != "jet":
            for part in "qkv":
                weight = weights[f"model.layers.{index}.self_attn.{part}_proj.weight"]
                weights.setdefault(
                    f"model.layers.{index}.self_attn.{part}_proj.bias", torch.zeros_like(weight[:, 0]).contiguous()
                )
    found: Any = model_from_weights(official, weights, model.dtype, JetNemotronForCausalLM)
    return found


def export(model: HybridForCausalLM, tokenizer: Any, out: Path) -> float:
    """Write `model` to the folder `out` and return the largest difference of its logits when it is read back.

    The folder appears once it is whole. Raises UserError where the format cannot hold the model, or what was read
    back differs by more than rounding.
    """
    official = to_jet_nemotron(model)
    ids = torch.arange(64, device=model.device)[None] % model.config.vocab_size
    with replacing(out) as temporary, torch.inference_mode():
        official.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        again = load_model(temporary).to(model.device).eval()
        logits = model(ids, use_cache=False).logits.float()
        difference = float((again(ids, use_cache=False).logits.float() - logits).abs().max())
        size = float(logits.abs().max())
        if not difference <= 1e-4 * max(1.0, size):
            raise UserError(f"{out}: the logits read back differ by {difference:.2g}; report this, nothing was written")
    return difference

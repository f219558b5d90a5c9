"""What differs between the base families, as data. Their weight names are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postnas.errors import UserError


@dataclass(frozen=True)
class Family:
    """One family. A text value names the field of the base's own config that decides."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    activation: str = "hidden_act"
    """The field that names the MLP's activation."""
    attn_scalar: str | None = None
    """The field whose -1/2 power is the factor on attention's scores; it is the head dim where None."""
    norm_offset: float = 0.0
    """Added to the stored weights of the norms."""
    sandwich_norm: bool = False
    """Norms after the mixer and after the MLP, too."""
    scaled_embedding: bool = False
    """Embeddings times the root of the hidden size."""


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
    "gemma3_text": Family(
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=True,
        activation="hidden_activation",
        attn_scalar="query_pre_attn_scalar",
        norm_offset=1.0,
        sandwich_norm=True,
        scaled_embedding=True,
    ),
}
"""By the `model_type` of the base's config."""

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields that mean the same in every family's config and in ours."""

WRAPPED = {"gemma3": "gemma3_text"}
"""Models of text and images whose text part can be a base: their `model_type`, and that of their `text_config`."""

WHERE_SET = ("head_dim", "attn_logit_softcapping", "final_logit_softcapping")
"""Fields that mean the same, in the configs that have them."""


MIXERS = {"full_attention": "attn", "sliding_attention": "swa"}
"""Our mixer for each kind of layer that a base may have."""


def from_base(config: Any) -> dict[str, Any]:
    """Fields of a HybridConfig for a base's transformers config, every layer on attention as the base has it.

    Raises UserError for an architecture that is not among FAMILIES, attention that looks ahead or is of another
    kind, or a field that makes no attention.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model_type: {config.model_type!r} is not supported; choose a base of {', '.join([*FAMILIES, *WRAPPED])}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError("use_bidirectional_attention: true, so it is no causal model; choose another base")

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value)) if isinstance(value, str) else value

    fields = {name: getattr(config, name) for name in SAME}
    fields |= {name: getattr(config, name, None) for name in WHERE_SET}
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for index, kind in enumerate(types):
        if kind not in MIXERS:
            raise UserError(
                f"layer_types[{index}]: {kind!r} is not supported; choose a base whose layers are {' or '.join(MIXERS)}"
            )
    fields["placement"] = [MIXERS[kind] for kind in types]
    if "swa" in fields["placement"]:
        fields["blocks"] = {"swa": {"window_size": _positive(config, "sliding_window")}}
    return (
        fields
        | _ropes(config.rope_parameters)
        | {
            "family": config.model_type,
            "hidden_act": getattr(config, family.activation),
            "qkv_bias": flag(family.qkv_bias),
            "out_bias": flag(family.out_bias),
            "mlp_bias": flag(family.mlp_bias),
            "qk_norm": family.qk_norm,
            "attn_scale": _positive(config, family.attn_scalar) ** -0.5 if family.attn_scalar else None,
            "norm_offset": family.norm_offset,
            "sandwich_norm": family.sandwich_norm,
            "embed_scale": config.hidden_size**0.5 if family.scaled_embedding else 1.0,
        }
    )


def _positive(config: Any, name: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{name}: {value!r} is no number above 0; mend it")
    return value


def _ropes(parameters: dict[str, Any]) -> dict[str, Any]:
    """One RoPE for all layers, or one for full attention and one for the windowed layers."""
    if "full_attention" not in parameters:
        return {"rope_parameters": parameters}
    full, windowed = parameters["full_attention"], parameters["sliding_attention"]
    return {"rope_parameters": full, "swa_rope_parameters": None if windowed == full else windowed}

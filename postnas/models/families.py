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


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
}
"""By the `model_type` of the base's config."""

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields that mean the same in every family's config and in ours."""


def from_base(config: Any) -> dict[str, Any]:
    """Fields of a HybridConfig for a base's transformers config, every layer on attention as the base has it.

    Raises UserError for an architecture that is not among FAMILIES.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"base.model: architecture {config.model_type!r} is not supported; choose a base of {', '.join(FAMILIES)}"
        )

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value)) if isinstance(value, str) else value

    fields = {name: getattr(config, name) for name in SAME}
    fields["head_dim"] = getattr(config, "head_dim", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    fields["placement"] = ["swa" if kind == "sliding_attention" else "attn" for kind in types]
    if "swa" in fields["placement"]:
        fields["blocks"] = {"swa": {"window_size": config.sliding_window}}
    return fields | {
        "family": config.model_type,
        "qkv_bias": flag(family.qkv_bias),
        "out_bias": flag(family.out_bias),
        "mlp_bias": flag(family.mlp_bias),
        "qk_norm": family.qk_norm,
    }

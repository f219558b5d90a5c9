"""Jet-Nemotron under its official names: the same model, another config.json.

The released files name the mixers `layer_types` and hold their options under `efficient_attention_config`; attention
has biases on q, k and v, Jet layers have none, and a head is hidden size / heads wide.
"""

from __future__ import annotations

from typing import Any, cast

import yaml

from postnas.blocks.jet import DESIGN, JetOptions
from postnas.errors import UserError
from postnas.models.config import HybridConfig

MIXERS = ("attn", "swa", "jet")
"""What the format can hold."""
JET_KEYS = ("conv_size", "dconv_generator_reduction", "expand_v", "head_dim", "norm_eps", "num_heads")
"""The Jet options that mean something here; `mode` and `dconv_implementation` choose kernels in the released code."""
KERNELS = {"mode": "chunk", "dconv_implementation": "triton"}
FIXED: dict[str, Any] = {
    "qkv_bias": True,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "attn_scale": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "norm_offset": 0.0,
    "sandwich_norm": False,
    "embed_scale": 1.0,
    "swa_rope_parameters": None,
}
"""Fields of a HybridConfig that the format has no place for, with the values that they have in it."""
OURS = (*FIXED, "family", "placement", "blocks", "head_dim", "rope_parameters")
"""Fields of a HybridConfig that the official config.json does not have."""


class JetNemotronConfig(HybridConfig):
    """The configuration of the released Jet-Nemotron checkpoints, read and written with its official fields.

    layer_types: `attn`, `swa` or `jet` for each layer, a list or its text form; all `attn` where left out.
    efficient_attention_config: {"jet": {num_heads, head_dim, expand_v, conv_size, dconv_generator_reduction,
    norm_eps, ...}, "swa": {"window_size": tokens}}. rope_theta, rope_scaling: as in transformers' Llama.
    The fields of HybridConfig that they stand for (`placement`, `blocks`, `rope_parameters`) can be read, too.
    Raises UserError for layer types or options that the format does not have.
    """

    model_type = "jet_nemotron"

    qkv_bias: bool = True
    family: str = "jet_nemotron"

    def __post_init__(
        self,
        layer_types: list[str] | str | None = None,
        efficient_attention_config: dict[str, Any] | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if layer_types is not None:
            self.placement = _layer_types(layer_types)
        if efficient_attention_config is not None:
            self.blocks = _blocks(efficient_attention_config)
        if self.rope_parameters is None:
            scaling = dict(rope_scaling or {})
            kind = scaling.pop("rope_type", scaling.pop("type", "default"))
            self.rope_parameters = {"rope_type": kind, "rope_theta": rope_theta} | scaling
        super().__post_init__(**kwargs)
        placement, blocks = cast(list[str], self.placement), cast(dict[str, Any], self.blocks)
        if isinstance(blocks.get("jet"), dict):
            # By themselves Jet layers have the biases of attention, which are always there in this format.
            if blocks["jet"].get("qkv_bias"):
                raise UserError("blocks.jet.qkv_bias: Jet layers have no biases in this format; set it to false")
            for name in DESIGN:
                value, released = blocks["jet"].get(name), getattr(JetOptions, name)
                if value not in (None, released):
                    raise UserError(
                        f"blocks.jet.{name}: {value!r} has no place in this format; it must be {released!r}"
                    )
            blocks["jet"] = blocks["jet"] | {"qkv_bias": False}
        for index, name in enumerate(placement):
            if name not in MIXERS:
                raise UserError(f"layer_types[{index}]: {name!r} is not possible; choose from {', '.join(MIXERS)}")
        for name in ("swa", "jet"):
            if name in placement and name not in blocks:
                raise UserError(f"efficient_attention_config.{name}: is missing, and a layer is {name!r}; add it")
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise UserError(f"{name}: {getattr(self, name)!r} has no place in this format; it must be {value!r}")
        if self.hidden_size != self.num_attention_heads * (self.head_dim or 0):
            raise UserError(
                f"head_dim: {self.head_dim} is not hidden_size / num_attention_heads "
                f"({self.hidden_size} / {self.num_attention_heads}), as this format needs"
            )

    def to_dict(self) -> dict[str, Any]:
        """The official config.json."""
        found = super().to_dict()
        for name in OURS:
            found.pop(name, None)
        rope = dict(self.rope_parameters or {})
        found["rope_theta"] = rope.pop("rope_theta", 10000.0)
        found["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        found["layer_types"] = list(self.placement or [])
        found["efficient_attention_config"] = {
            name: _official(options) if name == "jet" else {"window_size": options["window_size"]}
            for name, options in (self.blocks or {}).items()
        }
        found["torch_dtype"] = found.pop("dtype", None)  # the name that the released code reads
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: the released code and SGLang have other defaults than we, so nothing may be left out."""
        found = self.to_dict()
        found.pop("_name_or_path", None)
        return found


def _layer_types(given: Any) -> list[str]:
    """A list of names. The text form that some files hold is a list of YAML, too."""
    found = given
    if isinstance(given, str):
        try:
            found = yaml.safe_load(given)
        except yaml.YAMLError:
            found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"layer_types: {given!r} is no list of names; give one of {', '.join(MIXERS)} a layer")
    return found


def _blocks(given: Any) -> dict[str, Any]:
    """Options of our blocks for those of the official file."""
    if not isinstance(given, dict) or not all(isinstance(options, dict) for options in given.values()):
        raise UserError(f"efficient_attention_config: {given!r} is not possible; give {{block: {{option: value}}}}")
    blocks: dict[str, Any] = {}
    for name, options in given.items():
        known = {"jet": (*JET_KEYS, *KERNELS), "swa": ("window_size",)}.get(name)
        if known is None:
            raise UserError(f"efficient_attention_config.{name}: is unknown; choose from jet, swa")
        for option in options:
            if option not in known:
                raise UserError(
                    f"efficient_attention_config.{name}.{option}: is unknown; choose from {', '.join(known)}"
                )
        if name == "swa" and "window_size" not in options:
            raise UserError("efficient_attention_config.swa.window_size: is missing; add it")
        blocks[name] = {key: value for key, value in options.items() if key not in KERNELS}
    return blocks


def _official(options: dict[str, Any]) -> dict[str, Any]:
    """The eight keys that SGLang's loader wants, no more; norm_eps as text, as in the released files."""
    return (
        {name: options[name] for name in JET_KEYS if name in options}
        | KERNELS
        | ({"norm_eps": str(options["norm_eps"])} if "norm_eps" in options else {})
    )

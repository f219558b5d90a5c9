"""The configuration of a hybrid: the base's sizes, and one mixer name a layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from postnas.blocks import BLOCKS
from postnas.blocks.dims import Dims
from postnas.errors import UserError


class HybridConfig(PreTrainedConfig):
    """A pre-norm decoder whose layers may have different mixers.

    placement: one mixer name a layer (`attn`, `swa`, `jet`, `gated_deltanet`); all `attn` where None.
    blocks: options of the mixers, {block: {option: value}}.
    swa_rope_parameters: RoPE of the `swa` layers; that of all layers, `rope_parameters`, where None.
    attn_scale: factor on attention's scores; head_dim ** -0.5 where None.
    norm_offset: added to the stored weights of the norms. sandwich_norm: a norm also after the mixer and after
    the MLP. embed_scale: factor on the embeddings.
    The other fields have the meaning they have in transformers' LlamaConfig and Gemma3TextConfig; qkv_bias,
    out_bias and qk_norm say what attention has in the base.
    """

    model_type = "postnas"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    swa_rope_parameters: dict[str, Any] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attn_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    norm_offset: float = 0.0
    sandwich_norm: bool = False
    embed_scale: float = 1.0
    family: str = "llama"
    placement: list[str] | None = None
    blocks: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.placement is None:
            self.placement = ["attn"] * self.num_hidden_layers
        self.placement = list(self.placement)
        self.blocks = dict(self.blocks or {})
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        check_placement(self.placement, self.num_hidden_layers)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide the {self.num_attention_heads} "
                "attention heads; give a divisor"
            )

    def dims(self) -> Dims:
        """The sizes that the mixers take from the base."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        return Dims(
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.qk_norm,
            eps=self.rms_norm_eps,
            scale=self.attn_scale,
            softcap=self.attn_logit_softcapping,
            norm_offset=self.norm_offset,
        )


def check_placement(placement: list[str], layers: int) -> None:
    """Raises UserError unless `placement` names a known mixer for each of `layers` layers."""
    if len(placement) != layers:
        raise UserError(f"placement: {len(placement)} mixers for {layers} layers; give one a layer")
    for index, name in enumerate(placement):
        if name not in BLOCKS:
            raise UserError(f"placement[{index}]: {name!r} is unknown; choose from {', '.join(BLOCKS)}")

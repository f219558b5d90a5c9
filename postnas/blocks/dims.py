"""The sizes that a base gives its mixers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """What attention looks like in the base; every mixer's defaults follow from it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    eps: float = 1e-6
    scale: float | None = None
    """Factor on attention's scores; head_dim ** -0.5 where None."""
    softcap: float | None = None
    """Attention's scores s become softcap * tanh(s / softcap); left as they are where None."""
    norm_offset: float = 0.0
    """Added to the weights of the q/k norms: 1 in Gemma."""

"""What every linear block shares: sizes, q, k and v by heads, and the start of its output gate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.state import LinearState
from postnas.errors import UserError


@dataclass(frozen=True)
class LinearOptions:
    """Options of a linear block; None means: as in the base's attention."""

    num_heads: int | None = None
    """Heads of queries, keys and values alike."""
    head_dim: int | None = None
    """Key dim."""
    expand_v: float = 1.0
    """Value dim as a multiple of the key dim, cut to a whole number."""
    norm_eps: float = 1e-5
    """Epsilon of the gated norm."""
    qkv_bias: bool | None = None
    """Biases on q, k and v."""

    def resolve(self, dims: Dims) -> Self:
        """The options with every None filled in. Raises UserError for sizes that cannot be."""
        # The official files hold norm_eps as text ("1e-5").
        filled = replace(
            self,
            num_heads=dims.heads if self.num_heads is None else self.num_heads,
            head_dim=dims.head_dim if self.head_dim is None else self.head_dim,
            qkv_bias=dims.qkv_bias if self.qkv_bias is None else self.qkv_bias,
            norm_eps=float(self.norm_eps),
        )
        filled.at_least("num_heads", 1)
        filled.at_least("head_dim", 1)
        if filled.value_dim < 1:
            raise UserError(f"expand_v: {self.expand_v} leaves no value dim; give a larger one")
        return filled

    def at_least(self, name: str, least: int) -> None:
        """Raises UserError where the option of this name is smaller."""
        if getattr(self, name) < least:
            raise UserError(f"{name}: {getattr(self, name)} is too small for a linear block; give {least} or more")

    @property
    def value_dim(self) -> int:
        return int((self.head_dim or 0) * self.expand_v)


class LinearMixer(nn.Module):
    """Sizes, and the projections to q, k and v; a block adds `g_proj` and `o_proj`, its gates, rule and norm.

    `inherit` sets the rows of q, k, v and o, then calls `start_gates`, then fits `o_norm` where there is one.
    """

    State = LinearState
    squashes_values = True
    """Whether v goes through SiLU, so that a row and its negative are two features. Where it does not, a pair of them
    has mirrored gradients and stays one feature for ever: `plus_minus` is then `random`."""
    conv_channels = 0
    """Channels whose last inputs are remembered; each block sets its own."""
    g_proj: Any
    """To the output gate: an nn.Linear, or what a block that starts it itself makes of it."""
    o_proj: nn.Linear

    def __init__(self, dims: Dims, options: LinearOptions, key_heads: int | None = None) -> None:
        """key_heads: heads of queries and keys, where values have more of them."""
        super().__init__()
        self.dims, self.options = dims, options
        assert options.num_heads is not None and options.head_dim is not None
        self.heads, self.key_dim, self.value_dim = options.num_heads, options.head_dim, options.value_dim
        keys, bias = (key_heads or self.heads) * self.key_dim, bool(options.qkv_bias)
        self.q_proj = nn.Linear(dims.hidden, keys, bias=bias)
        self.k_proj = nn.Linear(dims.hidden, keys, bias=bias)
        self.v_proj = nn.Linear(dims.hidden, self.heads * self.value_dim, bias=bias)

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Start what attention has nothing for; here the output gate g_proj, a block adds its own.

        sample, start: as in `inherit`. generator: of everything random, on the CPU.
        """
        hidden, own = self.dims.hidden, self.dims.head_dim
        gate = normal((self.heads, self.value_dim, hidden), 0.5 * hidden**-0.5, generator, self.g_proj.weight)
        if start == "plus_minus":
            mirrored = gate[:, own : 2 * own]
            mirrored.copy_(gate[:, : mirrored.shape[1]])
        gate = gate.flatten(0, 1)
        if sample is not None:
            gate = gate * 0.2 + 1.5 * constant_direction(sample[0])
        self.g_proj.weight.copy_(gate)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence, whatever its length: the state in float32, the convolution's inputs in dtype."""
        taps: int = getattr(self.options, "conv_size", 1)
        return self.heads * self.key_dim * self.value_dim * 4 + (taps - 1) * self.conv_channels * dtype.itemsize


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Drawn where the generator is, so that it is the same on every device; then brought to `like`'s."""
    return (torch.randn(shape, generator=generator) * std).to(like.device)


def time_bias(heads: int, generator: torch.Generator | None) -> Tensor:
    """[heads] float32 whose softplus, the time step, is log-uniform in [1e-3, 1e-1]; drawn where the generator is."""
    time = torch.empty(heads, dtype=torch.float32, device=None if generator is None else generator.device)
    time.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    return time + torch.log(-torch.expm1(-time))  # the inverse of softplus


def constant_direction(x: Tensor) -> Tensor:
    """u [hidden] that comes closest to u.x = 1 for every token of x [N, T, hidden].

    Normed hidden states share a large mean: with it a gate starts nearly open and constant instead of random.
    """
    x = x.flatten(0, 1).double()
    hidden = x.shape[1]
    ridge = 1e-3 * x.square().sum() / hidden * torch.eye(hidden, dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.T @ x + ridge, x.sum(0)).float()

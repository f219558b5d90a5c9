"""Mamba-3 (arXiv 2603.15569): a state that turns as it fades, and takes in each token over two steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.dims import Dims
from postnas.blocks.linear import LinearMixer, LinearOptions, normal, time_bias
from postnas.blocks.norm import GatedRMSNorm, RMSNorm, widened
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.ops.dynamic_conv import last_inputs
from postnas.ops.linear_attention import attention_flops, linear_attention

SLOWEST = 1e-4
"""The least that A may be, as in the authors' code."""


@dataclass(frozen=True)
class Mamba3Options(LinearOptions):
    """Options of Mamba-3; None means: as in the base's attention."""

    expand_v: float = 2.0
    """Value dim as a multiple of the key dim (the state dim), cut to a whole number; 2 gives the paper's inner width,
    twice the hidden size, where heads times key dim is the hidden size."""
    rope_fraction: float = 0.5
    """Share of the key channels that turn, in pairs; 0 leaves the state real, 0.5 as in the authors' code."""

    def resolve(self, dims: Dims) -> Self:
        if not 0 <= self.rope_fraction <= 1:
            raise UserError(f"rope_fraction: {self.rope_fraction} is no share of the key channels; give 0 to 1")
        return super().resolve(dims)


class Mamba3(LinearMixer):
    """S <- exp(-A dt) turn(S + (1 - lambda) dt k' v'^T) + lambda dt k v^T, with k' and v' those of the token before;
    o = S^T q + D v; out = W_o (RMSNorm(o) * SiLU(W_g x)).

    q, k = RMSNorm(W x) + bias; a head's dt = softplus(W_dt x + dt_bias), A = softplus(W_A x), lambda = sigmoid(W x);
    turn() rotates the pairs of key channels (2i, 2i + 1) by -pi tanh(W_theta x) dt, with one W_theta for all heads.

    From attention: C is q, B is k, x is v, z is `g_proj`; angles start near 0, lambda near 1/2. Left out: several
    inputs and outputs a head (MIMO), heads that share B and C, and the variant without the last norm, which has here
    one weight a value channel for all heads. `state` keeps S turned to its last token, not the sum of all angles.
    """

    Options = Mamba3Options
    squashes_values = False
    options: Mamba3Options

    def __init__(self, dims: Dims, options: Mamba3Options) -> None:
        super().__init__(dims, options)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.conv_channels = keys + values
        self.pairs = int(self.key_dim * options.rope_fraction) // 2
        self.g_proj = nn.Linear(dims.hidden, values, bias=False)
        self.o_proj = nn.Linear(values, dims.hidden, bias=False)
        self.dt_proj, self.A_proj, self.lambda_proj = (nn.Linear(dims.hidden, self.heads, bias=False) for _ in range(3))
        if self.pairs:
            self.theta_proj = nn.Linear(dims.hidden, self.pairs, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.key_dim, options.norm_eps) for _ in range(2))
        self.o_norm = GatedRMSNorm(self.value_dim, options.norm_eps)
        self.q_bias, self.k_bias = (nn.Parameter(torch.empty(self.heads, self.key_dim)) for _ in range(2))
        self.dt_bias, self.D = (nn.Parameter(torch.empty(self.heads)) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """dt log-uniform in [1e-3, 1e-1]; the skip D and the biases of q and k are 1.

        generator: on the CPU, so that the draw is the same on every device; torch's own where None.
        """
        self.dt_bias.copy_(time_bias(self.heads, generator))
        for ones in (self.D, self.q_bias, self.k_bias):
            ones.fill_(1.0)

    @torch.no_grad()
    def start_gates(self, sample: tuple[Tensor, Tensor] | None, start: str, generator: torch.Generator) -> None:
        """Output gate; a time step, decay, lambda and angles nearly the same for all tokens; no skip and no biases of
        q and k, since attention has none: at 1 they would drown what it computes."""
        super().start_gates(sample, start, generator)
        for projection in (self.dt_proj, self.A_proj, self.lambda_proj, *([self.theta_proj] if self.pairs else [])):
            weight = projection.weight
            weight.copy_(normal(tuple(weight.shape), 0.1 * self.dims.hidden**-0.5, generator, weight))
        self.reset_parameters(generator)
        for zero in (self.D, self.q_bias, self.k_bias):
            zero.zero_()

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        raw_k, raw_v = self.k_proj(x), self.v_proj(x)
        k, v = self._keys(raw_k), raw_v.unflatten(-1, (self.heads, -1))
        q = widened(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1)))) + widened(self.q_bias)
        # zero at padding, so that it neither writes nor fades nor turns anything
        dt = step.mask(F.softplus(widened(self.dt_proj(x)) + widened(self.dt_bias)))
        decay = -F.softplus(widened(self.A_proj(x))).clamp(min=SLOWEST) * dt
        share = torch.sigmoid(widened(self.lambda_proj(x)))
        at_once, later = share * dt, (1 - share) * dt
        # What a token takes in of the one before fades as that token's own write does. So each token writes what the
        # next one will take in of it together with its own; its output, which must not see that yet, is mended below.
        ahead = F.pad(later[:, 1:], (0, 0, 0, 1))
        angle = self._angles(x, dt)
        held = None
        if state is not None and state.recurrent is not None and state.conv is not None:
            last_k, last_v = state.conv[:, 0].split([raw_k.shape[-1], raw_v.shape[-1]], dim=-1)
            last_k, last_v = self._keys(last_k) * later[:, 0, :, None], widened(last_v).unflatten(-1, (self.heads, -1))
            held = torch.addcmul(state.recurrent, last_k[..., None], last_v[..., None, :])
        o, recurrent = linear_attention(
            q=turned(q, angle).to(v.dtype),
            k=turned(k, angle).to(v.dtype),
            v=(widened(v) * (at_once + ahead)[..., None]).to(v.dtype),
            g=decay,
            state=held,
            segments=step.segments,
        )
        if state is not None:
            now = -angle[:, -1, :, None]  # [B, H, 1, pairs]: the next piece counts its angles from here
            kept = last_inputs(torch.cat([raw_k, raw_v], dim=-1), 2, state.conv, step.segments, step.lengths)
            state.store(conv=kept, recurrent=turned(recurrent.transpose(-1, -2), now).transpose(-1, -2))
        own = widened(self.D) - (q * k).sum(-1) * ahead
        o = (widened(o) + own[..., None] * widened(v)).to(v.dtype)
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, (self.heads, -1))).flatten(2)), state

    def _keys(self, raw: Tensor) -> Tensor:
        """raw [..., heads * key_dim], k_proj's -> k [..., heads, key_dim] in float32 at least, not turned."""
        return widened(self.k_norm(raw.unflatten(-1, (self.heads, -1)))) + widened(self.k_bias)

    def _angles(self, x: Tensor, dt: Tensor) -> Tensor:
        """[B, T, heads, pairs], in dt's type: how far each token is turned from the state before x."""
        if not self.pairs:
            return dt[..., None][..., :0]
        turn = math.pi * torch.tanh(widened(self.theta_proj(x)))[:, :, None] * dt[..., None]
        # in float64: after many turns the sum in float32 would be as coarse as bfloat16
        return turn.double().cumsum(1).remainder(2 * math.pi).to(dt.dtype)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of one sequence, whatever its length: the state in float32, the last token's k and v in dtype."""
        return super().state_bytes(context, dtype) + self.conv_channels * dtype.itemsize

    def flops(self, tokens: int, past: int = 0) -> int:
        """Floating-point operations (a multiply-add is two) of `tokens` tokens: projections, the rule's products, and
        what the first token takes in of the last one of the past. Left out, as everywhere, is what works element by
        element; here that is much: turning q, k and the state."""
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        linear = self.dims.hidden * (2 * keys + 3 * values + 3 * self.heads + self.pairs)
        rule = attention_flops(tokens, self.key_dim, self.value_dim)
        return 2 * tokens * linear + self.heads * (rule + (2 * self.key_dim * self.value_dim if past else 0))


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """x [..., K] with its pairs of channels (2i, 2i + 1) turned by angle [..., P], 2 P <= K; the rest as it is."""
    pairs = angle.shape[-1]
    if not pairs:
        return x
    even, odd = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    both = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([both, x[..., 2 * pairs :]], dim=-1)

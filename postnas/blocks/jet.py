"""The JetBlock (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with a dynamic convolution on the values.

Its options vary the design for ablations: which of q, k and v are convolved and how, what the kernels are made from,
and where SiLU stands. The defaults are the released block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.delta import DeltaMixer, DeltaOptions
from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import ShortConv
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.ops.dynamic_conv import causal_conv, dynamic_conv
from postnas.ops.jet_decode import conv_step, jet_decode

CONVS = ("none", "static", "dynamic")
DESIGN: dict[str, tuple[Any, ...]] = {
    "conv_q": CONVS,
    "conv_k": CONVS,
    "conv_v": CONVS,
    "generator_input": ("x", "v"),
    "silu_first": (False, True),
}
"""The options that vary the design, each with what it may be."""


@dataclass(frozen=True)
class JetOptions(DeltaOptions):
    """Options of the JetBlock."""

    dconv_generator_reduction: int = 8
    """The kernel generator's inner width is the value channels divided by this."""
    conv_q: str = "none"
    """Convolution of the queries: `none`, `static` (one kernel a channel) or `dynamic` (one a channel and token)."""
    conv_k: str = "none"
    """Convolution of the keys."""
    conv_v: str = "dynamic"
    """Convolution of the values."""
    generator_input: str = "x"
    """What dynamic kernels are made from: the block's input `x`, or the projected values `v`."""
    silu_first: bool = False
    """SiLU before the convolutions instead of after them."""

    def resolve(self, dims: Dims) -> JetOptions:
        filled = super().resolve(dims)
        assert isinstance(filled, JetOptions) and filled.num_heads is not None
        if not 1 <= filled.dconv_generator_reduction <= filled.num_heads * filled.value_dim:
            raise UserError(
                f"jet.dconv_generator_reduction: {filled.dconv_generator_reduction} leaves the kernel "
                f"generator no width; give 1 to {filled.num_heads * filled.value_dim}"
            )
        for name, known in DESIGN.items():
            value = getattr(filled, name)
            if value not in known:
                raise UserError(f"jet.{name}: {value!r} is unknown; choose from {', '.join(map(str, known))}")
        return filled

    def changes(self) -> dict[str, Any]:
        """The options by which this is another block than the released one, with their values."""
        return {name: getattr(self, name) for name in DESIGN if getattr(self, name) != getattr(JetOptions, name)}


class KernelGenerator(nn.Module):
    """The weights of w2(SiLU(w1 x)): a kernel of W taps for each of D channels, from the token itself.

    w2's rows hold the taps of a channel side by side. Its product belongs to the convolution, see `ops.dynamic_conv`.
    """

    def __init__(self, inputs: int, inner: int, channels: int, taps: int) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps
        self.w1 = nn.Linear(inputs, inner, bias=False)
        self.w2 = nn.Linear(inner, channels * taps, bias=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin as the identity. As released both matrices start at zero and never get a gradient; with
        w1 an ordinary layer, w2 zero and the bias a static convolution the generator can learn."""
        self.w2.weight.zero_()
        self.w2.bias.zero_()
        self.w2.bias.view(self.channels, self.taps)[:, -1] = 1.0


class DynamicConv(nn.Module):
    """Holds the kernel generator under its official name, `dynamic_conv1d.kernel_generator`."""

    def __init__(self, kernel_generator: KernelGenerator) -> None:
        super().__init__()
        self.kernel_generator = kernel_generator


class Jet(DeltaMixer):
    """q = SiLU(W_q x), k = SiLU(W_k x), v = SiLU(conv(W_v x)) with kernels made from x, then the gated delta rule.

    Where more than the values is convolved dynamically, one generator makes all kernels: its w2 has one range of rows
    after the other, in the order q, k, v. Static kernels are weights of their own. `LinearState.conv` holds the inputs
    of the dynamic convolutions, then those of the static ones.
    """

    Options = JetOptions
    options: JetOptions

    def __init__(self, dims: Dims, options: JetOptions) -> None:
        super().__init__(dims, options)
        keys, values, taps = self.heads * self.key_dim, self.heads * self.value_dim, options.conv_size
        self.widths = {"q": keys, "k": keys, "v": values}
        self.dynamic = [name for name in "qkv" if self._kind(name) == "dynamic"]
        self.static = [name for name in "qkv" if self._kind(name) == "static"]
        self.conv_channels = sum(self.widths[name] for name in self.dynamic + self.static)
        if self.dynamic:
            channels = sum(self.widths[name] for name in self.dynamic)
            inputs = values if options.generator_input == "v" else dims.hidden
            inner = values // options.dconv_generator_reduction
            self.dynamic_conv1d = DynamicConv(KernelGenerator(inputs, inner, channels, taps))
        for name in self.static:
            self.add_module(f"{name}_conv1d", ShortConv(self.widths[name], taps))
        self.released = not options.changes()
        """Whether this is the block as released, the one that `ops.jet_decode` does."""

    def _kind(self, name: str) -> str:
        """The convolution of q, k or v."""
        return str(getattr(self.options, f"conv_{name}"))

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        if self.released and self._decodes(x, step, state):
            assert state is not None
            return self._decode(x, state), state
        q, k, v = self._convolve(x, step, state)
        return self.mix(x, q, k, v, step, state), state

    def _convolve(self, x: Tensor, step: Step, state: LinearState | None) -> list[Tensor]:
        """q, k [B, T, heads * key_dim] and v [B, T, heads * value_dim], each through its convolution and SiLU."""
        first = self.options.silu_first
        v = self.v_proj(x)
        if self.dynamic:
            generator = self.dynamic_conv1d.kernel_generator
            inner = F.silu(generator.w1(v if self.options.generator_input == "v" else x))
        parts = {"q": self.q_proj(x), "k": self.k_proj(x), "v": v}
        held = None if state is None else state.conv
        rows = {"segments": step.segments, "lengths": step.lengths}
        kept = []
        for names in (self.dynamic, self.static):
            if not names:
                continue
            sizes = [self.widths[name] for name in names]
            inputs = _joined([parts[name] for name in names])
            inputs = step.mask(F.silu(inputs) if first else inputs)
            history = None
            if held is not None:
                history, held = held.split([sum(sizes), held.shape[-1] - sum(sizes)], dim=-1)
            if names is self.dynamic:
                w2 = generator.w2
                y, conv = dynamic_conv(inputs, inner, w2.weight, w2.bias, history, **rows, silu=not first)
            else:
                taps = torch.cat([getattr(self, f"{name}_conv1d").weight for name in names])[:, 0].T
                y, conv = causal_conv(inputs, taps, history, **rows)
                y = y if first else F.silu(y)
            parts |= zip(names, y.split(sizes, dim=-1), strict=True)
            kept.append(conv)
        if state is not None and kept:
            state.store(conv=_joined(kept))
        return [F.silu(part) if self._kind(name) == "none" else part for name, part in parts.items()]

    @staticmethod
    def _decodes(x: Tensor, step: Step, state: LinearState | None) -> bool:
        """One real token a row on a filled state, nothing to learn: a step that `ops.jet_decode` does at once."""
        if state is None or state.conv is None or state.recurrent is None or torch.is_grad_enabled():
            return False
        return x.shape[1] == 1 and step.valid is None and step.segments is None

    def _decode(self, x: Tensor, state: LinearState) -> Tensor:
        row = x[:, 0]
        return self.finish_decode(
            q=self.q_proj(row),
            k=self.k_proj(row),
            v=self.v_proj(row),
            gate=self.g_proj(row),
            a=self.a_proj(row),
            b=self.b_proj(row),
            inner=self.dynamic_conv1d.kernel_generator.w1(row),
            state=state,
        )

    def finish_decode(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        inner: Tensor,
        state: LinearState,
        fused: bool = False,
    ) -> Tensor:
        """A token a row, [B, 1, hidden], from its projections as in `ops.jet_decode`; `state` is changed in place.

        inner: [B, R], w1's product before its SiLU. fused: the convolution as an epilogue of w2's product.
        """
        assert state.conv is not None and state.recurrent is not None
        w2 = self.dynamic_conv1d.kernel_generator.w2
        kernels = conv = None
        if fused:
            v = conv_step(x=v, inner=inner, weight=w2.weight, bias=w2.bias, conv=state.conv)
        else:
            kernels, conv = w2(F.silu(inner)).unflatten(-1, (self.conv_channels, -1)), state.conv
        o = jet_decode(
            q=q,
            k=k,
            v=v,
            gate=gate,
            a=a,
            b=b,
            kernels=kernels,
            conv=conv,
            state=state.recurrent,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.o_norm.weight,
            eps=self.o_norm.eps,
        )
        return self.o_proj(o)[:, None]

    def extra_flops(self) -> int:
        flops = super().extra_flops()
        if self.dynamic:
            generator = self.dynamic_conv1d.kernel_generator
            flops += 2 * (generator.w1.weight.numel() + generator.w2.weight.numel())
        return flops


def _joined(parts: list[Tensor]) -> Tensor:
    """[B, T, their channels together]; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

"""The JetBlock (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with a dynamic convolution on the values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.delta import DeltaMixer, DeltaOptions
from postnas.blocks.dims import Dims
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.ops.dynamic_conv import dynamic_conv
from postnas.ops.jet_decode import conv_step, jet_decode


@dataclass(frozen=True)
class JetOptions(DeltaOptions):
    """Options of the JetBlock."""

    dconv_generator_reduction: int = 8
    """The kernel generator's inner width is the value channels divided by this."""

    def resolve(self, dims: Dims) -> JetOptions:
        filled = super().resolve(dims)
        assert isinstance(filled, JetOptions) and filled.num_heads is not None
        if not 1 <= filled.dconv_generator_reduction <= filled.num_heads * filled.value_dim:
            raise UserError(
                f"jet.dconv_generator_reduction: {filled.dconv_generator_reduction} leaves the kernel "
                f"generator no width; give 1 to {filled.num_heads * filled.value_dim}"
            )
        return filled


class KernelGenerator(nn.Module):
    """The weights of w2(SiLU(w1 x)): a kernel of W taps for each of D channels, from the token itself.

    w2's rows hold the taps of a channel side by side. Its product belongs to the convolution, see `ops.dynamic_conv`.
    """

    def __init__(self, hidden: int, channels: int, taps: int, reduction: int) -> None:
        super().__init__()
        self.channels, self.taps = channels, taps
        self.w1 = nn.Linear(hidden, channels // reduction, bias=False)
        self.w2 = nn.Linear(channels // reduction, channels * taps, bias=True)
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

    def __init__(self, hidden: int, channels: int, options: JetOptions) -> None:
        super().__init__()
        self.kernel_generator = KernelGenerator(hidden, channels, options.conv_size, options.dconv_generator_reduction)


class Jet(DeltaMixer):
    """q = SiLU(W_q x), k = SiLU(W_k x), v = SiLU(conv(W_v x)) with kernels made from x, then the gated delta rule."""

    Options = JetOptions

    def __init__(self, dims: Dims, options: JetOptions) -> None:
        super().__init__(dims, options)
        self.conv_channels = self.heads * self.value_dim
        self.dynamic_conv1d = DynamicConv(dims.hidden, self.conv_channels, options)

    def forward(self, x: Tensor, step: Step, state: LinearState | None = None) -> tuple[Tensor, LinearState | None]:
        """x: [B, T, hidden] -> y of the same shape; `state` is changed in place."""
        if self._decodes(x, step, state):
            assert state is not None
            return self._decode(x, state), state
        generator = self.dynamic_conv1d.kernel_generator
        v, conv = dynamic_conv(
            step.mask(self.v_proj(x)),
            F.silu(generator.w1(x)),
            generator.w2.weight,
            generator.w2.bias,
            history=None if state is None else state.conv,
            segments=step.segments,
            lengths=step.lengths,
            silu=True,
        )
        if state is not None:
            state.store(conv=conv)
        return self.mix(x, F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), v, step, state), state

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
        generator = self.dynamic_conv1d.kernel_generator
        return super().extra_flops() + 2 * (generator.w1.weight.numel() + generator.w2.weight.numel())

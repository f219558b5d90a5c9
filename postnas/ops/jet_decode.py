"""One token a row of the JetBlock, after its projections: convolution, gates, delta rule and gated norm at once.

Decode moves states, not products: the state is read once and written once, and nothing in between reaches memory.
States change in place, so every address stays and a CUDA graph can hold the step. The plain forms here are the
reference and serve every device; on CUDA the Triton forms of `jet_decode_triton` take their place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops.dynamic_conv import has_triton
from postnas.ops.gated_delta_rule import recurrent_gated_delta_rule


def jet_decode(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    kernels: Tensor | None,
    conv: Tensor | None,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """The JetBlock's output before W_o, [B, H * V] in v's type; `conv` and `state` move on by one token in place.

    q, k: [B, H * K], before SiLU. v, gate: [B, H * V], v the convolution's new input, gate before SiLU. a, b: [B, H],
    before softplus and sigmoid. All six may be columns of one product: rows may be apart, channels may not.
    kernels: [B, H * V, W], the token's taps, the last on the token itself. conv: [B, W - 1, H * V], the inputs
    before v. Where both are None, v is what `conv_step` gave. state: [B, H, K, V], float32 or bfloat16 (float64 on
    the plain form), contiguous; the arithmetic is in float32 either way. A_log, dt_bias: [H]. norm_weight: [V].
    out: what the output is written to, contiguous; new where None.
    """
    form: Callable[..., Tensor] = jet_decode_plain
    if _has_kernels(state, v):
        from postnas.ops.jet_decode_triton import jet_decode_triton as form
    return form(
        q=q,
        k=k,
        v=v,
        gate=gate,
        a=a,
        b=b,
        kernels=kernels,
        conv=conv,
        state=state,
        A_log=A_log,
        dt_bias=dt_bias,
        norm_weight=norm_weight,
        eps=eps,
        out=out,
    )


def conv_step(
    *, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, conv: Tensor, out: Tensor | None = None
) -> Tensor:
    """SiLU of the dynamic convolution at one token a row, its taps made on the way: [B, D] in x's type.

    x: [B, D], the new input. inner: [B, R], w1's product before its SiLU; both may be columns of a wider product.
    weight [D * W, R] and bias [D * W]: w2, the taps of a channel side by side. conv: [B, W - 1, D], the inputs
    before x, moved on by one token in place. out: what the output is written to, contiguous; new where None.
    """
    form: Callable[..., Tensor] = conv_step_plain
    if _has_kernels(conv, x):
        from postnas.ops.jet_decode_triton import conv_step_triton as form
    return form(x=x, inner=inner, weight=weight, bias=bias, conv=conv, out=out)


def jet_decode_plain(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    kernels: Tensor | None,
    conv: Tensor | None,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """See `jet_decode`; in plain PyTorch."""
    _, heads, key_dim, value_dim = state.shape
    given, wide = v.dtype, _wide(v)
    if kernels is not None:
        assert conv is not None
        v = _convolve(v, kernels, conv)
    with torch.autocast(state.device.type, enabled=False):  # which would round the products to bfloat16
        o, after = recurrent_gated_delta_rule(
            q=F.silu(q.to(wide)).unflatten(-1, (1, heads, key_dim)),
            k=F.silu(k.to(wide)).unflatten(-1, (1, heads, key_dim)),
            v=v.to(wide).unflatten(-1, (1, heads, value_dim)),
            g=-A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))[:, None],
            beta=torch.sigmoid(b.to(wide))[:, None],
            state=state,
        )
    state.copy_(after)
    o = o[:, 0] * torch.rsqrt(o[:, 0].square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    o = o.flatten(1) * F.silu(gate.to(wide))
    return o.to(given) if out is None else out.copy_(o)


def conv_step_plain(
    *, x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor, conv: Tensor, out: Tensor | None = None
) -> Tensor:
    """See `conv_step`; in plain PyTorch."""
    kernels = F.linear(F.silu(inner), weight, bias).unflatten(-1, (x.shape[-1], -1))
    y = _convolve(x, kernels, conv)
    return y.to(x.dtype) if out is None else out.copy_(y)


def _convolve(x: Tensor, kernels: Tensor, conv: Tensor) -> Tensor:
    """SiLU(convolution), [B, D] in float32 or float64; conv moves on. x: [B, D]. kernels: [B, D, W]."""
    window = torch.cat([conv, x[:, None].to(conv.dtype)], dim=1)
    y = (window.to(_wide(x)) * kernels.to(_wide(x)).transpose(1, 2)).sum(1)
    conv.copy_(window[:, 1:])
    return F.silu(y)


def _has_kernels(state: Tensor, x: Tensor) -> bool:
    """May the Triton forms take a token x on this state?"""
    return state.is_cuda and x.dtype != torch.float64 and has_triton()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

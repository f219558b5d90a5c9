"""Start a linear block from the attention that it replaces, head by head.

Query head h of the base reads KV head h // (heads / kv_heads), so each new head gets the rows of
its own query head and of that KV head: keys and values are repeated per head, never per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from postnas.blocks.attention import Attention
from postnas.blocks.linear import LinearMixer, normal
from postnas.blocks.norm import RMSNorm
from postnas.blocks.step import Rope, Step

EXTRA_STD = 0.02
"""Standard deviation of value rows that the attention has no source for."""
EXTRA_OUT_STD = 0.002
"""Standard deviation of their columns in the output projection: small, so that they disturb little."""


@torch.no_grad()
def inherit(
    mixer: LinearMixer,
    attention: Attention,
    sample: tuple[Tensor, Tensor] | None = None,
    start: str = "random",
    seed: int = 0,
) -> None:
    """Set `mixer`'s weights from `attention`'s, in place.

    - New head i takes the source head floor((i + 1/2) heads / new heads): itself at equal counts.
    - Key dim below the head dim: q and k become the leading singular directions of W_q^T W_k of that
      head. Above: extra rows are small random. A q/k norm of the base is folded into the rows as its
      weight; its division by the norm is not needed, since the rule normalises q and k itself.
    - Value dim below the head dim: v and o become the leading singular directions of W_o W_v. Above:
      extra rows are small random (`random`), or the same rows and output columns with the opposite
      sign and equal gates (`plus_minus`): SiLU(v) - SiLU(-v) = v, so values pass linearly; rows beyond
      twice the head dim are small random again. Blocks that do not squash v start `random` in either case.
    - Where heads share q and k (mamba2's groups), these become the leading singular directions of the sum of
      W_q^T W_k over the source heads.
    - The convolution is the identity; gates start as the block's own `start_gates` says: a slow decay, and an
      output gate that is nearly 1 where that can be had from `sample`. o_norm, where the block has one, is the
      least-squares fit to the attention's output.

    A bias of attention's output is left out: no block has one.

    sample: the attention's input and output x, y [N, T, hidden] on a few thousand tokens; without it
    gates start random and o_norm at one. seed: of everything random here; what the block itself drew when it
    was made (a kernel generator's w1) stays.
    """
    start = start if mixer.squashes_values else "random"
    generator = torch.Generator().manual_seed(seed)
    dims = attention.dims
    group = dims.heads // dims.kv_heads
    biased = mixer.q_proj.bias is not None
    q = _head_rows(attention.q_proj, dims.heads, biased)
    k = _head_rows(attention.k_proj, dims.kv_heads, biased)
    v = _head_rows(attention.v_proj, dims.kv_heads, biased)
    if dims.qk_norm:
        q, k = q * attention.q_norm.scale[:, None], k * attention.k_norm.scale[:, None]
    o = attention.o_proj.weight.float().unflatten(1, (dims.heads, dims.head_dim))  # [hidden, heads, head_dim]
    rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "o": []}
    key_heads = mixer.q_proj.out_features // mixer.key_dim
    shared = mixer.heads // key_heads
    for index in range(mixer.heads):
        head = _source(index, mixer.heads, dims.heads)
        if index % shared == 0:
            heads = {_source(index + i, mixer.heads, dims.heads): None for i in range(shared)}
            sources = torch.tensor(list(heads), device=q.device)
            joined_q, joined_k = q[sources].flatten(0, 1), k[sources // group].flatten(0, 1)
            for name, value in zip("qk", _fit_keys(joined_q, joined_k, mixer.key_dim, generator), strict=True):
                rows[name].append(value)
        head_v, head_o = _fit_values(v[head // group], o[:, head], mixer.value_dim, start, generator)
        rows["v"].append(head_v)
        rows["o"].append(head_o)
    for name in "qkv":
        projection = getattr(mixer, f"{name}_proj")
        joined = torch.cat(rows[name])
        projection.weight.copy_(joined[:, : dims.hidden])
        if projection.bias is not None:
            projection.bias.copy_(joined[:, dims.hidden])
    mixer.o_proj.weight.copy_(torch.cat(rows["o"], dim=1))
    for module in mixer.modules():
        if module is not mixer and not isinstance(module, nn.Linear):
            start_module(module)
    mixer.start_gates(sample, start, generator)
    norm = getattr(mixer, "o_norm", None)
    if sample is not None and isinstance(norm, RMSNorm):
        _fit_norm(mixer, norm, *sample)


def start_module(module: nn.Module) -> None:
    """Give a module its own start, where it has one of its own (`reset_parameters`)."""
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


def _source(index: int, heads: int, base_heads: int) -> int:
    """The head of the base that head `index` of `heads` starts from."""
    return int((index + 0.5) * base_heads / heads)


def _head_rows(projection: nn.Linear, heads: int, biased: bool) -> Tensor:
    """[heads, head_dim, hidden + 1] in float32; the last column is the bias, zero where there is or will be none."""
    weight = projection.weight.float()
    kept = biased and projection.bias is not None
    bias = projection.bias.float() if kept else weight.new_zeros(weight.shape[0])
    return torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (heads, -1))


def _fit_keys(q: Tensor, k: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """q, k [rows of one or more heads, hidden + 1] at `size` rows."""
    own = q.shape[0]
    if size < own:
        return _leading(q, k, size)
    extra = (size - own, q.shape[1])
    return (
        torch.cat([q, normal(extra, EXTRA_STD, generator, q)]),
        torch.cat([k, normal(extra, EXTRA_STD, generator, k)]),
    )


def _fit_values(v: Tensor, o: Tensor, size: int, start: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """v [head_dim, hidden + 1] and o [hidden, head_dim] at `size` channels."""
    own = v.shape[0]
    if size < own:
        v, o = _leading(v, o.T, size)
        return v, o.T
    extra = size - own
    if start == "plus_minus":
        v, o = torch.cat([v, -v[:extra]]), torch.cat([o, -o[:, :extra]], dim=1)
        extra = size - v.shape[0]
    return (
        torch.cat([v, normal((extra, v.shape[1]), EXTRA_STD, generator, v)]),
        torch.cat([o, normal((o.shape[0], extra), EXTRA_OUT_STD, generator, o)], dim=1),
    )


def _leading(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """a [n, p], b [n, r] replaced by `size` rows each, so that a^T b is the best of that rank."""
    a_basis, a_rest = torch.linalg.qr(a.T)
    b_basis, b_rest = torch.linalg.qr(b.T)
    left, values, right = torch.linalg.svd(a_rest @ b_rest.T)
    root = values[:size].sqrt()
    return (a_basis @ left[:, :size] * root).T, (b_basis @ right[:size].T * root).T


def _fit_norm(mixer: LinearMixer, norm: RMSNorm, x: Tensor, y: Tensor) -> None:
    """o_norm's weight w by least squares: the output is linear in w, sum over channels of w_c z_c.

    One weight a value channel, shared by the heads, or one a channel of each head.
    """
    norm.weight.fill_(1.0)
    captured: list[Tensor] = []
    handle = mixer.o_proj.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        mixer(x.to(mixer.o_proj.weight.dtype), plain_step(x))
    finally:
        handle.remove()
    weights = norm.weight.numel()
    z = captured[0].double().flatten(0, 1).unflatten(1, (-1, weights))
    o = mixer.o_proj.weight.double().unflatten(1, (-1, weights))
    # Normal equations of y[n] = sum_c w_c sum_h z[n, h, c] o[:, h, c], without the products themselves:
    # A[c, d] = sum over h, g of (z_h,c . z_g,d) (o_h,c . o_g,d).
    size = (weights, z.shape[1])
    flat_z, flat_o = z.transpose(1, 2).flatten(1), o.transpose(1, 2).flatten(1)
    products = (flat_z.T @ flat_z) * (flat_o.T @ flat_o)
    a = products.unflatten(0, size).unflatten(2, size).sum((1, 3))
    b = ((y.double().flatten(0, 1) @ flat_o) * flat_z).sum(0).unflatten(0, size).sum(1)
    ridge = 1e-3 * a.diagonal().mean() * torch.eye(weights, dtype=a.dtype, device=a.device)
    norm.weight.copy_(torch.linalg.solve(a + ridge, b).float())


def plain_step(x: Tensor, rope: Rope | None = None) -> Step:
    """The step of whole, unpadded, unpacked rows x [B, T, hidden]."""

    def angles(kind: str) -> Rope:
        assert rope is not None, "attention needs RoPE"
        return rope

    return Step(x.shape[0], x.shape[1], x.device, angles)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error as a share of the target's squared size, over everything: 0 is exact, 1 is as bad as zero."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum().clamp(min=1e-12)

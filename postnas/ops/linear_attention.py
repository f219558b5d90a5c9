"""Linear attention with decay in plain PyTorch, recurrent and chunked; on a GPU through fla.

A state S [K, V] a head fades, then adds what the token writes:
    S <- exp(g) S + k v^T;  o = scale S^T q
The decay g <= 0 is one number a head (RetNet, Mamba-2) or one a key channel (GLA, arXiv 2312.06635). All forms compute
in float32 (float64 where the inputs are), have the same keywords, and give the same outputs, states and gradients.
exp() is only ever taken of what is <= 0, so that no decay overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops import fla

CHUNK = 64
"""Tokens whose products the chunked form takes at once."""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of linear attention with decay, by the form that suits the length.

    q, k: [B, T, H, K], any float type. v: [B, T, H, V]. g: [B, T, H] or [B, T, H, K], the log of the decay, <= 0.
    state: [B, H, K, V] float32, zeros where None. segments: [B, T] integers from 0 that never fall; the state is
    forgotten where they rise, and `state` belongs to segment 0. A token with k = 0 and g = 0 leaves the state as
    it was.

    Returns o [B, T, H, V] in v's type and the state after the last token [B, H, K, V] float32. On a GPU fla's
    kernels take 16-bit inputs of more than one token, where a trial has shown that they are right.
    """
    if q.is_cuda and q.shape[1] > 1:
        rule = "gla" if g.ndim == 4 else "linear_attention"
        if fla.usable(rule, q, v, segments):
            return fla.run(rule, q=q, k=k, v=v, g=g, state=state, segments=segments, scale=scale)
    form = recurrent_linear_attention if q.shape[1] == 1 else chunk_linear_attention
    with torch.autocast(q.device.type, enabled=False):  # which would round the products to bfloat16
        return form(q=q, k=k, v=v, g=g, state=state, segments=segments, scale=scale)


def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """Everything in float32 (or float64) with heads before tokens: [B, H, T, ...]; q scaled; g [B, H, T, 1 or K]."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    g = g if g.ndim == 4 else g[..., None]
    q, k, v, g = (x.to(dtype).transpose(1, 2) for x in (q, k, v, g))
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
    return q * scale, k, v, g, state.to(dtype)


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Token by token; see `linear_attention`. The reference, and the step of decode."""
    dtype = v.dtype
    q, k, v, g, state = _prepare(q, k, v, g, state, scale)
    decay = g.exp()
    if segments is not None:
        decay = decay * (segments == F.pad(segments[:, :-1], (1, 0)))[:, None, :, None]
    outputs = []
    for t in range(q.shape[2]):
        state = torch.addcmul(decay[:, :, t, :, None] * state, k[:, :, t, :, None], v[:, :, t, None])
        outputs.append((q[:, :, t, None] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(dtype), state


def chunk_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; see `linear_attention`. With G the running sum of g in the chunk and S0 the state before it,

    o_i = sum over j <= i of (q_i . exp(G_i - G_j) k_j) v_j + S0^T exp(G_i) q_i
    """
    dtype, (batch, length, heads, _) = v.dtype, q.shape
    by_channel = g.ndim == 4
    q, k, v, g, state = _prepare(q, k, v, g, state, scale)
    size = chunk_size(length, by_channel)
    padding = -length % size
    if padding:
        q, k, v, g = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v, g))
    q, k, v, g = (x.unflatten(2, (-1, size)) for x in (q, k, v, g))  # [B, H, N, C, ...]
    sees = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if segments is not None:
        chunks = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, size))
        sees = sees & (chunks[..., :, None] == chunks[..., None, :])[:, None]
        reaches = (chunks == F.pad(chunks[:, :-1, -1], (1, 0))[..., None])[:, None, ..., None]
        stays = (chunks == chunks[..., -1:])[:, None, ..., None]
    if by_channel:
        scores, before, after = _pairs(q, k, g)
        scores = scores if segments is None else scores.masked_fill(~sees, 0.0)
    else:
        before = g.cumsum(-2)
        after = before[..., -1:, :] - before
        # exp only where it is wanted: above the diagonal it could overflow and poison the gradient
        decay = (before - before.transpose(-1, -2)).masked_fill(~sees, float("-inf")).exp()
        scores = (q @ k.transpose(-1, -2)) * decay
    reach, remaining = before.exp(), after.exp()
    last = reach[..., -1, :, None]
    if segments is not None:
        reach, remaining = reach * reaches, remaining * stays
        last = last * reaches[..., -1:, :]
    inner = scores @ v
    q, k = q * reach, (k * remaining).transpose(-1, -2)
    outputs = []
    # unbind, not indexing: the gradient of an index fills a whole tensor with zeros for each chunk
    for q_n, k_n, v_n, inner_n, last_n in zip(*(x.unbind(2) for x in (q, k, v, inner, last)), strict=True):
        outputs.append(inner_n + q_n @ state)
        state = last_n * state + k_n @ v_n
    output = torch.stack(outputs, dim=2).reshape(batch, heads, length + padding, -1)
    return output[:, :, :length].transpose(1, 2).to(dtype), state


def chunk_size(length: int, by_channel: bool) -> int:
    """Tokens of a chunk when there are `length` in all: a power of two where the decay is one a channel."""
    return min(CHUNK, 1 << (length - 1).bit_length() if by_channel else length)


def _pairs(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_i . exp(G_i - G_j) k_j for j <= i, zero elsewhere; the log of what fades up to each token, and after it.

    q, k, g: [..., C, K], C a power of two. Returns [..., C, C], and [..., C, K] twice.

    exp(G_i) exp(-G_j) would overflow, and a decay for every pair and channel would not fit in memory. But with a border
    m between them exp(G_i - G_j) is exp(G_i - G_m) exp(G_m - G_j), both at most 1. So blocks of 1, 2, 4, ... tokens are
    joined two by two, and the queries of the second half meet the keys of the first at the border, in one product.
    """
    scores = (q * k).sum(-1)[..., None, None]
    before = g[..., None, :]
    after = torch.zeros_like(before)
    while (width := before.shape[-2]) < q.shape[-2]:
        early, late = k.unflatten(-2, (-1, 2, width)).unbind(-3)[0], q.unflatten(-2, (-1, 2, width)).unbind(-3)[1]
        (before_1, before_2), (after_1, after_2), (upper, lower) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (before, after, scores)
        )
        met = (late * before_2.exp()) @ (early * after_1.exp()).transpose(-1, -2)
        scores = torch.cat([F.pad(upper, (0, width)), torch.cat([met, lower], dim=-1)], dim=-2)
        after = torch.cat([after_1 + before_2[..., -1:, :], after_2], dim=-2)
        before = torch.cat([before_1, before_2 + before_1[..., -1:, :]], dim=-2)
    return scores.squeeze(-3), before.squeeze(-3), after.squeeze(-3)


def attention_flops(tokens: int, key_dim: int, value_dim: int, by_channel: bool = False) -> int:
    """Floating-point operations (a multiply-add is two) of one head's products over `tokens` tokens.

    What all rules count is said here: the matrix products of the plain form that suits the length, each at its full
    size, with zeros that it is filled up with and squares that are masked afterwards; C C for a column of a triangular
    system; and a lone token's write to the state. Other work element by element is left out. It is what torch's counter
    sees once it knows these two, to the last operation (tests/test_plan.py). fla's kernels may multiply more or less.

    A chunk of C tokens, full or not, needs q.k, scores times values (2 C C V) and two products with the state
    (2 C K V each); one token alone the latter two. With one decay a head q.k is a whole square, 2 C C K. With one a
    channel it cannot be one product, and the blocks that `_pairs` joins hold the pairs j < i and no others,
    C (C - 1) K. So for the same score half as much is counted, because half as much is multiplied.
    """
    if tokens == 1:
        return 4 * key_dim * value_dim
    size = chunk_size(tokens, by_channel)
    seen = size - 1 if by_channel else 2 * size
    return -(-tokens // size) * size * (seen * key_dim + 2 * size * value_dim + 4 * key_dim * value_dim)

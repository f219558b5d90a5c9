"""Delta rules with a decay a key channel, in plain PyTorch, recurrent and chunked; on a GPU through fla.

Both rules of this file are one: a state S [K, V] a head is multiplied by a diagonal plus a matrix of rank one,
    S <- diag(exp(w)) S + b u^T + k v^T  with  u = a^T S + c;  o = S^T r
- Kimi Delta Attention (`kda`, arXiv 2510.26692) is a = exp(g) k, b = -beta k, c = -v, and no k v^T.
- RWKV-7 (`rwkv7`, arXiv 2503.14456) is just that without c.
All forms compute in float32 (float64 where the inputs are), have the same keywords, and give the same outputs, states
and gradients. No exponent is above zero, so no decay, however strong, overflows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops import fla

CHUNK = 64
"""Tokens that the chunked form solves at once, a power of two."""


@dataclass
class Terms:
    """One rule's terms, heads before tokens: r, w, a, b, k [B, H, T, K]; c, v [B, H, T, V]; state [B, H, K, V]."""

    r: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    state: Tensor
    c: Tensor | None = None
    """None where nothing is added to what the state says."""
    k: Tensor | None = None
    """None where nothing is written but along b."""
    v: Tensor | None = None


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule with one decay a key channel.

    S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q

    q, k: [B, T, H, K], any float type; they are normalised in L2 here, and q scaled by K^-0.5. v: [B, T, H, V].
    g: [B, T, H, K], the log of the decay, <= 0. beta: [B, T, H] in (0, 1). state: [B, H, K, V] float32, zeros where
    None. segments: [B, T] integers from 0 that never fall; the state is forgotten where they rise, and `state`
    belongs to segment 0. A token with beta = 0 and g = 0 leaves the state as it was.

    Returns o [B, T, H, V] in v's type and the state after the last token [B, H, K, V] float32. On a GPU fla's
    kernels take 16-bit inputs of more than one token, where a trial has shown that they are right.
    """
    if q.is_cuda and q.shape[1] > 1 and fla.usable("kda", q, v, segments):
        return fla.run("kda", q=q, k=k, v=v, g=g, beta=beta, state=state, segments=segments)
    form = recurrent_kda if q.shape[1] == 1 else chunk_kda
    with torch.autocast(q.device.type, enabled=False):  # which would round the products to bfloat16
        return form(q=q, k=k, v=v, g=g, beta=beta, state=state, segments=segments)


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's rule: S <- diag(exp(w)) S + b (a^T S) + k v^T;  o = S^T r.

    r, k, a, b: [B, T, H, K], any float type, taken as they are. w: [B, T, H, K], the log of the decay, <= 0; fla's
    kernel takes it to be above -0.61, as the block's is.
    v: [B, T, H, V]. state, segments, the results and when fla is taken: as in `kda`. A token with w = 0, k = 0 and
    b = 0 leaves the state as it was.
    """
    if r.is_cuda and r.shape[1] > 1 and fla.usable("rwkv7", r, v, segments):
        return fla.run("rwkv7", r=r, w=w, k=k, v=v, a=a, b=b, state=state, segments=segments)
    form = recurrent_rwkv7 if r.shape[1] == 1 else chunk_rwkv7
    with torch.autocast(r.device.type, enabled=False):
        return form(r=r, w=w, k=k, v=v, a=a, b=b, state=state, segments=segments)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; see `kda`. The reference, and the step of decode."""
    return _result(_recurrent(_kda_terms(q, k, v, g, beta, state, segments)), v)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; see `kda`."""
    return _result(_chunked(_kda_terms(q, k, v, g, beta, state, segments)), v)


def recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; see `rwkv7`. The reference, and the step of decode."""
    return _result(_recurrent(_rwkv7_terms(r, w, k, v, a, b, state, segments)), v)


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; see `rwkv7`."""
    return _result(_chunked(_rwkv7_terms(r, w, k, v, a, b, state, segments)), v)


def rule_flops(tokens: int, keys: int, values: int, writes: int) -> int:
    """Floating-point operations of a rule's `tokens` tokens in one head.

    What counts, for all rules alike, says `linear_attention.attention_flops`.

    writes: the vectors that a token writes along, P: 1 in `kda`, 2 in `rwkv7`. A chunk of C tokens, full or not, needs
    two reads of the P writes at the pairs j < i alone (2 P C (C - 1) K), as with any decay a channel; the triangular
    system on V + K columns (C C a column); P = 1 or, with k's values, 3 products of such pairs with values (2 C C V
    each, whole squares); and 2 + P products with the state (2 C K V each).
    """
    if tokens == 1:
        return 2 * keys * values * (2 + writes)
    size = min(CHUNK, _power_of_two(tokens))
    pairs = 2 * writes * (size - 1) * keys
    system = size * (keys + values)
    inside = 2 * size * values * (1 if writes == 1 else 3)
    return -(-tokens // size) * size * (pairs + system + inside + 2 * keys * values * (2 + writes))


def _kda_terms(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, segments: Tensor | None
) -> Terms:
    q, k, wide, g, beta = _ready(v, q, k, v, g, beta)
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    g = _forget(g, segments)
    return Terms(r=q, w=g, a=g.exp() * k, b=-beta[..., None] * k, c=-wide, state=_start(state, k, wide))


def _rwkv7_terms(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> Terms:
    r, w, k, wide, a, b = _ready(v, r, w, k, v, a, b)
    if segments is not None:
        a = a.masked_fill(_begins(segments), 0.0)
    return Terms(r=r, w=_forget(w, segments), a=a, b=b, k=k, v=wide, state=_start(state, k, wide))


def _ready(like: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Everything in float32 (or float64) with heads before tokens: [B, H, T, ...]."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return tuple(x.to(dtype).transpose(1, 2) for x in inputs)


def _start(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, K, V] in k's type."""
    return v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(v.dtype)


def _begins(segments: Tensor) -> Tensor:
    """[B, 1, T, 1] bool: does a new segment begin at the token?"""
    return (segments != F.pad(segments[:, :-1], (1, 0)))[:, None, :, None]


def _forget(w: Tensor, segments: Tensor | None) -> Tensor:
    """w with a decay to nothing where a segment begins. Logs of decays are only ever added up, so -inf stays -inf."""
    return w if segments is None else w.masked_fill(_begins(segments), float("-inf"))


def _result(found: tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] as [B, T, H, V] in v's type, and the state."""
    return found[0].transpose(1, 2).to(v.dtype), found[1]


def _recurrent(terms: Terms) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] and the last state, token by token."""
    state, decay, outputs = terms.state, terms.w.exp(), []
    for t in range(decay.shape[2]):
        now = slice(t, t + 1)
        u = terms.a[:, :, now] @ state
        if terms.c is not None:
            u = u + terms.c[:, :, now]
        state = decay[:, :, t, :, None] * state + terms.b[:, :, now].transpose(-1, -2) @ u
        if terms.k is not None and terms.v is not None:
            state = state + terms.k[:, :, now].transpose(-1, -2) @ terms.v[:, :, now]
        outputs.append(terms.r[:, :, now] @ state)
    return torch.cat(outputs, dim=2), state


def _chunked(terms: Terms) -> tuple[Tensor, Tensor]:
    """o [B, H, T, V] and the last state, chunk by chunk.

    With S0 the state before a chunk, u of all its tokens together solves a triangular system,
        (I - A) u = c + B v + (a exp(before)) S0,
    where A and B are a's products with the earlier b and k, each decayed by what lies between the two tokens. What
    does not need S0 is done for all chunks at once.
    """
    length = terms.w.shape[2]
    size = min(CHUNK, _power_of_two(length))

    def cut(x: Tensor) -> Tensor:
        """[B, H, T, ...] -> [B, H, N, C, ...], filled up with tokens that change nothing."""
        return F.pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size))

    r, w, a = cut(terms.r), cut(terms.w), cut(terms.a)
    writes = torch.stack([cut(x) for x in (terms.b, terms.k) if x is not None], dim=-2)  # [B, H, N, C, P, K]
    # A token reads the state after its own decay and writes: exp(w) r reads the state before it, as a does.
    reads = torch.stack([a, w.exp() * r], dim=-2)  # [B, H, N, C, 2, K]
    own = (r[..., None, :] * writes).sum(-1)
    pairs, before, after, total = _pairs(reads, writes, w, torch.stack([torch.zeros_like(own), own], dim=-2))
    of_a, of_r = pairs.unbind(-3)  # [B, H, N, C, C, P]
    a, r = (reads * before.exp()[..., None, :]).unbind(-2)
    left = (writes * after.exp()[..., None, :]).unbind(-2)
    given = None if terms.c is None else cut(terms.c)
    if terms.v is not None:
        v = cut(terms.v)
        known = of_a[..., 1] @ v
        given = known if given is None else given + known
    assert given is not None, "a rule needs values"
    system = torch.cat([given, a], dim=-1)
    solved = torch.linalg.solve_triangular(-of_a[..., 0], system, upper=False, unitriangular=True)
    values, keys = solved.split([given.shape[-1], a.shape[-1]], dim=-1)
    last = total.exp().unsqueeze(-1)
    added = left[1].transpose(-1, -2) @ v if terms.v is not None else torch.zeros_like(last)
    state, us, far = terms.state, [], []
    # unbind, not indexing: the gradient of an index fills a whole tensor with zeros for each chunk
    parts = (x.unbind(2) for x in (torch.cat([keys, r], dim=-2), values, left[0].transpose(-1, -2), last, added))
    for reads_n, values_n, b_n, last_n, added_n in zip(*parts, strict=True):
        seen, far_n = (reads_n @ state).split(size, dim=-2)
        u = values_n + seen
        state = last_n * state + added_n + b_n @ u
        us.append(u)
        far.append(far_n)
    o = torch.stack(far, dim=2) + of_r[..., 0] @ torch.stack(us, dim=2)
    if terms.v is not None:
        o = o + of_r[..., 1] @ v
    return o.flatten(2, 3)[:, :, :length], state


def _pairs(reads: Tensor, writes: Tensor, w: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every token's reads of every earlier token's writes in its chunk, decayed by the tokens between the two.

    reads [..., C, R, K], writes [..., C, P, K], w [..., C, K]; own [..., C, R, P]: what a token reads of its own.
    Returns pairs [..., C, R, C, P], zero for later tokens; the log of the decay before each token and after it,
    [..., C, K] each, and of the whole chunk, [..., K].

    A pair's decay, exp of a sum over the tokens between, would have to be held a channel and a pair. But with any
    token m between the two it is a product of the decay from the write to m and of that from m to the read, both at
    most 1. So blocks of 1, 2, 4, ... tokens are joined two by two: reads of the second half meet writes of the first
    at the border of the halves, in one product.
    """
    size, n_reads, n_writes = w.shape[-2], reads.shape[-2], writes.shape[-2]
    pairs, total = own, w.unsqueeze(-2)
    before = after = torch.zeros_like(total)
    while (width := before.shape[-2]) < size:
        early, late = _halves(writes, -3, width)[0], _halves(reads, -3, width)[1]
        (before_1, before_2), (after_1, after_2), (total_1, total_2) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (before, after, total)
        )
        late = (late * before_2.exp().unsqueeze(-2)).flatten(-3, -2)
        early = (early * after_1.exp().unsqueeze(-2)).flatten(-3, -2)
        upper, lower = pairs.unflatten(-3, (-1, 2)).unbind(-3)
        lower = torch.cat([late @ early.transpose(-1, -2), lower], dim=-1)
        pairs = torch.cat([F.pad(upper, (0, width * n_writes)), lower], dim=-2)
        before = torch.cat([before_1, before_2 + total_1], dim=-2)
        after = torch.cat([after_1 + total_2, after_2], dim=-2)
        total = total_1 + total_2
    pairs = pairs.squeeze(-3).unflatten(-2, (size, n_reads)).unflatten(-1, (size, n_writes))
    return pairs, before.squeeze(-3), after.squeeze(-3), total.squeeze(-3).squeeze(-2)


def _halves(x: Tensor, dim: int, width: int) -> tuple[Tensor, ...]:
    """The first and second halves, `width` long, of each block of twice that."""
    return x.unflatten(dim, (-1, 2, width)).unbind(dim - 1)


def _power_of_two(tokens: int) -> int:
    """The smallest one that is not below `tokens`."""
    return 1 << (tokens - 1).bit_length()

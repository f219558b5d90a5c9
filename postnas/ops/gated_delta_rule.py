"""The gated delta rule (Yang et al., arXiv 2412.06464) in plain PyTorch, recurrent and chunked; on a GPU through fla.

Without a decay it is the delta rule (arXiv 2406.06484).

A state S [K, V] a head decays, then learns what it does not yet say about the key:
    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
with k and q normalised in L2 and q scaled by K^-0.5. Both forms compute in float32 (float64 where
the inputs are), have the same keywords, and give the same outputs, states and gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.ops import fla

CHUNK = 64
"""Tokens that the chunked form solves at once; longer chunks cost quadratic work, shorter ones more steps."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of the gated delta rule, by the form that suits the length.

    q, k: [B, T, H, K], any float type, not yet normalised. v: [B, T, H, V]. g: [B, T, H], the log
    of the decay, <= 0; None where nothing decays. beta: [B, T, H] in (0, 1). state: [B, H, K, V] float32,
    zeros where None. segments: [B, T] integers from 0 that never fall; the state is forgotten where they rise,
    and `state` belongs to segment 0. A token with beta = 0 and g = 0 leaves the state as it was.

    Returns o [B, T, H, V] in v's type and the state after the last token [B, H, K, V] float32. On a GPU fla's
    kernels take 16-bit inputs of more than one token, where a trial has shown that they are right.
    """
    if q.is_cuda and q.shape[1] > 1:
        rule = "delta_rule" if g is None else "gated_delta_rule"
        if fla.usable(rule, q, v, segments):
            return fla.run(rule, q=q, k=k, v=v, g=g, beta=beta, state=state, segments=segments)
    form = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    with torch.autocast(q.device.type, enabled=False):  # which would round the products to bfloat16
        return form(q=q, k=k, v=v, g=g, beta=beta, state=state, segments=segments)


def rule_flops(tokens: int, keys: int, values: int) -> int:
    """Floating-point operations (a multiply-add is two) of `tokens` tokens in one head.

    A chunk of C tokens, full or not, needs the products k.k, q.k (2 C C K each), the triangular system on V + K
    columns (C C a column), scores times values (2 C C V), and three products with the state.
    """
    if tokens == 1:
        return 6 * keys * values
    size = min(CHUNK, tokens)
    return -(-tokens // size) * size * (size * (5 * keys + 3 * values) + 6 * keys * values)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Everything in float32 (or float64) with heads before tokens: [B, H, T, ...]; q, k normalised."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, beta = (x.to(dtype).transpose(1, 2) for x in (q, k, v, beta))
    g = None if g is None else g.to(dtype).transpose(1, 2)
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
    return q, k, v, g, beta, state.to(dtype)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; see `gated_delta_rule`. The reference, and the step of decode."""
    dtype = v.dtype
    q, k, v, g, beta, state = _prepare(q, k, v, g, beta, state)
    decay = None if g is None else g.exp()
    if segments is not None:
        stays = _continues(segments)[:, None].to(q.dtype)
        decay = stays if decay is None else decay * stays
    outputs = []
    for t in range(q.shape[2]):
        k_t, q_t = k[:, :, t : t + 1], q[:, :, t : t + 1]
        if decay is not None:
            state = decay[:, :, t, None, None] * state
        delta = beta[:, :, t, None, None] * (v[:, :, t : t + 1] - k_t @ state)
        state = torch.addcmul(state, k_t.transpose(-1, -2), delta)
        outputs.append((q_t @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(dtype), state


def _continues(segments: Tensor) -> Tensor:
    """[B, T] bool: does the token belong to the segment of the one before it?"""
    return segments == F.pad(segments[:, :-1], (1, 0))


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk; see `gated_delta_rule`. Within a chunk the updates are one triangular system.

    With G the running sum of g in the chunk, L[i, j] = beta_i exp(G_i - G_j) k_i.k_j for j < i, the
    corrections are U = (I + L)^-1 (beta v - beta exp(G) k S0), after which outputs and the next
    state are plain matrix products (the WY form of arXiv 2406.06484 with decay).
    """
    dtype, length = v.dtype, q.shape[1]
    q, k, v, g, beta, state = _prepare(q, k, v, g, beta, state)
    batch, heads = q.shape[:2]
    size = min(CHUNK, length)
    padding = -length % size
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        g, beta = None if g is None else F.pad(g, (0, padding)), F.pad(beta, (0, padding))
    q, k, v, beta = (x.unflatten(2, (-1, size)) for x in (q, k, v, beta))
    g = None if g is None else g.unflatten(2, (-1, size))
    if segments is not None:
        segments = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, size))
    decay, reach, remaining, last = _fading(g, segments, beta)
    system = (beta[..., None] * (k @ k.transpose(-1, -2)) * decay).tril(-1)
    sources = torch.cat([beta[..., None] * v, beta[..., None] * reach * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, sources, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.transpose(-1, -2)) * decay
    q = q * reach
    k = k * remaining
    last = last.expand(*q.shape[:3], 1, 1)
    outputs = []
    # unbind, not indexing: the gradient of an index fills a whole tensor with zeros for each chunk
    parts = (x.unbind(2) for x in (q, k, values, keys, scores, last))
    for q_n, k_n, values_n, keys_n, scores_n, last_n in zip(*parts, strict=True):
        delta = values_n - keys_n @ state
        outputs.append(q_n @ state + scores_n @ delta)
        state = last_n * state + k_n.transpose(-1, -2) @ delta
    output = torch.stack(outputs, dim=2).reshape(batch, heads, length + padding, -1)
    return output[:, :, :length].transpose(1, 2).to(dtype), state


def _fading(g: Tensor | None, segments: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of a write in a chunk: for g [B, H, N, C], segments [B, N, C], and `like` shaped as g.

    Between its tokens [..., C, C], zero for later ones; from the state before the chunk to each token and from each
    token to the chunk's end, [..., C, 1] both; of the state over the whole chunk, [..., 1, 1].
    """
    size = like.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if segments is not None:
        causal = causal & (segments[..., :, None] == segments[..., None, :])[:, None]
        before = F.pad(segments[:, :-1, -1], (1, 0))
        reaches = (segments == before[..., None])[:, None]  # does the state before the chunk reach the token?
        stays = (segments == segments[..., -1:])[:, None]  # does the token belong to the chunk's last segment?
    if g is None:
        decay, last = causal.to(like.dtype), like.new_ones(1, 1)
        reach = remaining = like.new_ones(size, 1)
    else:
        total = g.cumsum(-1)
        # exp only where it is wanted: above the diagonal it could overflow and poison the gradient
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
        reach, remaining = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        last = total[..., -1].exp()[..., None, None]
    if segments is not None:
        reach, remaining = reach * reaches[..., None], remaining * stays[..., None]
        last = last * (reaches & stays)[..., -1, None, None]
    return decay, reach, remaining, last

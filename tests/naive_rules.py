"""Kimi Delta Attention's rule and RWKV-7's, as their papers write them: one row, head and token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S <- (I - beta k k^T) Diag(alpha) S + beta k v^T; o = S^T q, one row, head and token at a time (section 3)."""
    outputs, states = [], []
    for row, head in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[2])).tolist():
        s = state[row, head]
        for t in range(q.shape[1]):
            if segments is not None and t > 0 and segments[row, t] != segments[row, t - 1]:
                s = torch.zeros_like(s)
            key, query = (x[row, t, head] / (x[row, t, head].square().sum() + 1e-6).sqrt() for x in (k, q))
            strength = beta[row, t, head]
            removal = torch.eye(len(key), dtype=s.dtype) - strength * torch.outer(key, key)
            s = removal @ torch.diag(g[row, t, head].exp()) @ s + strength * torch.outer(key, v[row, t, head])
            outputs.append(s.T @ query / len(key) ** 0.5)
        states.append(s)
    o = torch.stack(outputs).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return o, torch.stack(states).view_as(state)


def naive_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The paper's rows: wkv [V, K] <- wkv (diag(w) + a^T b) + v^T k; y = wkv r, one row, head and token at a time."""
    outputs, states = [], []
    for row, head in torch.cartesian_prod(torch.arange(r.shape[0]), torch.arange(r.shape[2])).tolist():
        wkv = state[row, head].T
        for t in range(r.shape[1]):
            if segments is not None and t > 0 and segments[row, t] != segments[row, t - 1]:
                wkv = torch.zeros_like(wkv)
            at = (row, t, head)
            wkv = wkv @ (torch.diag(w[at].exp()) + torch.outer(a[at], b[at])) + torch.outer(v[at], k[at])
            outputs.append(wkv @ r[at])
        states.append(wkv.T)
    o = torch.stack(outputs).view(r.shape[0], r.shape[2], r.shape[1], -1).transpose(1, 2)
    return o, torch.stack(states).view_as(state)

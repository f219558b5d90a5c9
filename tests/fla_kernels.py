"""Kernels with fla's keywords that compute each sequence token by token: fla itself needs a GPU.

Keywords, their order apart, and defaults are as in fla-core 0.6.0, less those that must keep their defaults.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from postnas.ops import fla

OPERATORS = [name for name in fla.RULES if not name.endswith("_by_gla")]
"""Rules that operators ask for; the others are detours."""


def steps(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All rules are S <- diag(exp(w)) S + b a^T S + k v^T; o = S^T r, written out. [B, T, H, ...], [B, H, K, V]."""
    outputs = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        state = w[:, t].exp()[..., None] * state + b[:, t, :, :, None] * removed[:, :, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, t], state))
    return torch.stack(outputs, dim=1), state


def sequences(
    scale: float, cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool, **given: Tensor
) -> tuple[Tensor, Tensor]:
    """What fla promises: with cu_seqlens one row of sequences, each with its own state; what it asserts: the types."""
    assert output_final_state
    assert initial_state is None or initial_state.dtype in (torch.float32, torch.float64)
    kind, given = given["v"].dtype, {name: x.double() for name, x in given.items()}
    r, v = given["r"] * scale, given["v"]
    number = len(r) if cu_seqlens is None else len(cu_seqlens) - 1
    state = v.new_zeros(number, r.shape[2], r.shape[3], v.shape[3]) if initial_state is None else initial_state.double()
    assert len(state) == number
    given["r"] = r
    if cu_seqlens is None:
        o, last = steps(**given, state=state)
    else:
        assert len(r) == 1 and cu_seqlens.tolist() == sorted(set(cu_seqlens.tolist()))
        borders = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        parts = [
            steps(**{name: x[:, begin:end] for name, x in given.items()}, state=state[n : n + 1])
            for n, (begin, end) in enumerate(borders)
        ]
        o, last = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts])
    return o.to(kind), last.to(torch.float64 if kind == torch.float64 else torch.float32)


def alike(*inputs: Tensor) -> None:
    """The kernels' products need one type, and gates that are not rounded."""
    assert len({x.dtype for x in inputs}) == 1


def precise(*inputs: Tensor) -> None:
    assert all(x.dtype in (torch.float32, torch.float64) for x in inputs)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert g is not None and g.shape == q.shape[:3] and g_gamma is None
    return chunk_gla(q, k, v, g[..., None].expand_as(q), scale, initial_state, output_final_state, cu_seqlens)


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert q.shape == k.shape == g.shape
    alike(q, k, v)
    precise(g)
    zero = torch.zeros_like(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return sequences(scale, cu_seqlens, initial_state, output_final_state, r=q, w=g, k=k, v=v, a=zero, b=zero)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert q.shape == k.shape == g.shape and beta.shape == q.shape[:3]
    alike(q, k, v)
    precise(g, beta)
    q, k, g, beta = (x.double() for x in (q, k, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    strength = beta[..., None]
    rank_one = {"a": g.exp() * k, "b": -strength * k}
    return sequences(scale, cu_seqlens, initial_state, output_final_state, r=q, w=g, k=strength * k, v=v, **rank_one)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert g.shape == q.shape[:3]
    wide = g[..., None].expand_as(q)
    settings = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return chunk_kda(q, k, v, wide, beta, *settings)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    none = torch.zeros_like(q, dtype=torch.float64)
    settings = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return chunk_kda(q, k, v, none, beta, *settings)


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    alike(r, k, v, a, b)
    precise(w)
    assert lower_bound is None or w.min() > lower_bound
    return sequences(scale, cu_seqlens, initial_state, output_final_state, r=r, w=w, k=k, v=v, a=a, b=b)


KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fla.ops.gated_delta_rule": chunk_gated_delta_rule,
    "fla.ops.delta_rule": chunk_delta_rule,
    "fla.ops.kda": chunk_kda,
    "fla.ops.rwkv7": chunk_rwkv7,
    "fla.ops.gla": chunk_gla,
    "fla.ops.simple_gla": chunk_simple_gla,
}
"""The kernels by the module that has them, whose names they bear."""


def instead(monkeypatch: pytest.MonkeyPatch, module: str, kernel: Any) -> None:
    made: Any = ModuleType(module)
    setattr(made, KERNELS[module].__name__, kernel)
    monkeypatch.setitem(sys.modules, module, made)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all of them where fla would be, and forget what this process knows of it."""
    monkeypatch.setattr(fla, "asked", {})
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module, kernel in KERNELS.items():
        instead(monkeypatch, module, kernel)


def operator(rule: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The plain form of a rule, as a trial finds it."""
    module, function = fla.RULES[rule].plain.split(":")
    found: Callable[..., tuple[Tensor, Tensor]] = getattr(importlib.import_module(module), function)
    return found


def inputs(rule: str, tokens: int = 20) -> dict[str, Any]:
    """An operator's own keywords, three rows in float64."""
    drawn = fla.RULES[rule].draw(lambda *size: torch.randn(3, tokens, 2, *size, dtype=torch.float64), 4, 6)
    return drawn | dict.fromkeys(fla.RULES[rule].absent)

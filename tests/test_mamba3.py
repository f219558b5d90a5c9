"""Mamba-3 against the paper's recurrence, written out twice: with turned keys and queries, and with complex numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_inherit import attention_of, inherited, inputs, sample_of
from torch import Tensor

from postnas.blocks import make_block
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import plain_step, relative_error
from postnas.blocks.mamba3 import Mamba3, turned
from postnas.blocks.state import LinearState
from postnas.errors import UserError

EXACT = {"rtol": 0.0, "atol": 1e-10}
DIMS = Dims(hidden=24, heads=4, kv_heads=2, head_dim=6, qkv_bias=True)
SIZES: list[dict[str, Any]] = [
    {},
    {"rope_fraction": 0.0},
    {"rope_fraction": 1.0, "expand_v": 1.5},
    {"rope_fraction": 1.0, "head_dim": 5},
    {"head_dim": 1},
]
each_size = pytest.mark.parametrize("options", SIZES, ids=str)


def made(seed: int = 3, **options: Any) -> Mamba3:
    """A block in float64 with every weight random, so that no path is idle."""
    mixer: Mamba3 = make_block("mamba3", DIMS, options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return mixer.requires_grad_(False)


def tokens(count: int = 75, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, DIMS.hidden, dtype=torch.float64)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def parts(mixer: Mamba3, x: Tensor) -> dict[str, Tensor]:
    """What the recurrence reads of x [B, T, hidden]: [B, T, heads], and one more dimension in q, k, v and turn."""
    q, k, v = (getattr(mixer, f"{name}_proj")(x).unflatten(-1, (mixer.heads, -1)) for name in "qkv")
    dt = F.softplus(x @ mixer.dt_proj.weight.T + mixer.dt_bias)
    turn = dt.new_zeros(*dt.shape, 0)
    if mixer.pairs:
        turn = math.pi * torch.tanh(x @ mixer.theta_proj.weight.T)[:, :, None] * dt[..., None]
    return {
        "q": rms(q) * mixer.q_norm.weight + mixer.q_bias,
        "k": rms(k) * mixer.k_norm.weight + mixer.k_bias,
        "v": v,
        "dt": dt,
        "A": F.softplus(x @ mixer.A_proj.weight.T),
        "share": torch.sigmoid(x @ mixer.lambda_proj.weight.T),
        "turn": turn,
    }


def rotary(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, share: Tensor, turn: Tensor) -> Tensor:
    """One head, [T, .]: alpha h + beta B' x' + gamma B x, B and C turned by the sum of all angles so far."""
    state, total, outputs = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), torch.zeros_like(turn[0]), []
    past_k, past_v = torch.zeros_like(k[0]), torch.zeros_like(v[0])
    for t in range(len(q)):
        total, turning = total + turn[t], torch.eye(k.shape[1], dtype=v.dtype)
        for i, angle in enumerate(total.tolist()):
            cos, sin = math.cos(angle), math.sin(angle)
            pair = slice(2 * i, 2 * i + 2)
            turning[pair, pair] = torch.tensor([[cos, -sin], [sin, cos]], dtype=v.dtype)
        alpha = torch.exp(-A[t] * dt[t])
        beta, gamma = (1 - share[t]) * dt[t] * alpha, share[t] * dt[t]
        now = turning @ k[t]
        state = alpha * state + beta * torch.outer(past_k, past_v) + gamma * torch.outer(now, v[t])
        outputs.append(state.T @ (turning @ q[t]))
        past_k, past_v = now, v[t]
    return torch.stack(outputs)


def complex_pairs(x: Tensor, pairs: int) -> Tensor:
    """[K] -> [pairs + rest]: a pair is one complex number, what never turns stays real."""
    turning, still = x[: 2 * pairs], x[2 * pairs :]
    return torch.cat([torch.complex(turning[::2], turning[1::2]), still.to(torch.complex128)])


def complex_state(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, share: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor]:
    """One head, [T, .]: a diagonal complex transition, the input taken half before and half after it. Also the state,
    [K, V] in pairs of real numbers."""
    pairs, outputs = turn.shape[1], []
    state = torch.zeros(k.shape[1] - pairs, v.shape[1], dtype=torch.complex128)
    for t in range(len(q)):
        step = torch.polar(torch.ones_like(turn[t]), -turn[t])
        step = torch.exp(-A[t] * dt[t]) * torch.cat([step, torch.ones(k.shape[1] - 2 * pairs)])
        if t:
            state = state + (1 - share[t]) * dt[t] * torch.outer(complex_pairs(k[t - 1], pairs), v[t - 1] + 0j)
        state = step[:, None] * state + share[t] * dt[t] * torch.outer(complex_pairs(k[t], pairs), v[t] + 0j)
        outputs.append((complex_pairs(q[t], pairs).conj() @ state).real)
    real = torch.cat([torch.view_as_real(state[:pairs]).transpose(1, 2).flatten(0, 1), state[pairs:].real])
    return torch.stack(outputs), real


def finished(mixer: Mamba3, o: Tensor, v: Tensor, x: Tensor) -> Tensor:
    o = o + mixer.D[:, None] * v
    gate = F.silu(mixer.g_proj(x)).unflatten(-1, (mixer.heads, -1))
    return mixer.o_proj((rms(o) * mixer.o_norm.weight * gate).flatten(2))


def by_head(given: dict[str, Tensor], row: int, head: int, span: slice) -> dict[str, Tensor]:
    return {name: value[row, span, head] for name, value in given.items()}


@each_size
@torch.no_grad()
def test_the_block_is_the_papers_recurrence(options: dict[str, Any]) -> None:
    """In one piece, which is chunked, with two packed sequences in the second row."""
    mixer, x = made(**options), tokens(70)
    step, given = plain_step(x), parts(mixer, x)
    step.segments = (torch.arange(70) >= torch.tensor([[70], [23]])).long()
    spans = [[slice(0, 70)], [slice(0, 23), slice(23, 70)]]
    o = torch.zeros_like(given["v"])
    for row, head in [(row, head) for row in range(2) for head in range(mixer.heads)]:
        for span in spans[row]:
            o[row, span, head] = rotary(**by_head(given, row, head, span))
    torch.testing.assert_close(mixer(x, step)[0], finished(mixer, o, given["v"], x), **EXACT)


@each_size
@torch.no_grad()
def test_in_pieces_it_is_the_complex_recurrence_state_and_all(options: dict[str, Any]) -> None:
    mixer, x, state = made(**options), tokens(70), LinearState()
    y = torch.cat([mixer(part, plain_step(part), state)[0] for part in x.split([1, 2, 65, 1, 1], dim=1)], dim=1)
    given = parts(mixer, x)
    o, held = torch.zeros_like(given["v"]), torch.zeros(2, mixer.heads, mixer.key_dim, mixer.value_dim).double()
    for row, head in [(row, head) for row in range(2) for head in range(mixer.heads)]:
        o[row, :, head], held[row, head] = complex_state(**by_head(given, row, head, slice(None)))
    torch.testing.assert_close(y, finished(mixer, o, given["v"], x), **EXACT)
    assert state.recurrent is not None
    torch.testing.assert_close(state.recurrent, held, **EXACT)


@torch.no_grad()
def test_a_state_of_zeros_is_that_of_a_row_without_tokens() -> None:
    """The biases of k and v make no token of it; the decode step on a graph starts so."""
    mixer, x, state = made(), tokens(3), LinearState()
    mixer(x, plain_step(x), state)
    for tensor in state.tensors().values():
        tensor.zero_()
    torch.testing.assert_close(mixer(x, plain_step(x), state)[0], mixer(x, plain_step(x))[0], **EXACT)


@torch.no_grad()
def test_many_turns_stay_as_exact_in_float32() -> None:
    """3,000 tokens that turn by 7 to 47 each: a sum of these in float32 would be wrong by thousandths."""
    wide, narrow, x = made(rope_fraction=1.0), make_block("mamba3", DIMS, {"rope_fraction": 1.0}), tokens(3000, 1).abs()
    wide.dt_bias.fill_(8.0)
    wide.A_proj.weight.fill_(-0.1)
    wide.theta_proj.weight.abs_()
    narrow.load_state_dict(wide.float().state_dict())
    wide, x = wide.double(), x.float().double()
    assert parts(wide, x)["turn"].sum(1).min() > 45_000
    assert relative_error(narrow(x.float(), plain_step(x))[0], wide(x, plain_step(x))[0]) < 1e-9


@torch.no_grad()
def test_a_state_fades_however_small_a_is() -> None:
    mixer, x, state = made(), tokens(4).abs(), LinearState()
    mixer.A_proj.weight.fill_(-100.0)
    mixer(x[:, :2], plain_step(x[:, :2]), state)
    for projection in (mixer.v_proj.weight, mixer.v_proj.bias):
        projection.zero_()  # the third token takes in the second; the fourth writes nothing
    mixer(x[:, 2:3], plain_step(x[:, 2:3]), state)
    assert state.recurrent is not None
    before = state.recurrent.norm(dim=(-1, -2))
    mixer(x[:, 3:], plain_step(x[:, 3:]), state)
    left = torch.exp(-1e-4 * parts(mixer, x)["dt"][:, 3])
    torch.testing.assert_close(state.recurrent.norm(dim=(-1, -2)), left * before, **EXACT)


def test_turned_is_a_rotation_of_pairs() -> None:
    found = turned(torch.tensor([1.0, 0.0, 0.0, 2.0, 5.0]), torch.tensor([math.pi / 2, math.pi]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, -2.0, 5.0]))


@torch.no_grad()
def parity(rope_fraction: float, bits: Tensor) -> Tensor:
    """Outputs [T] of one head that a first token fills, and that each 1 after it turns by half a circle."""
    mixer = make_block(
        "mamba3",
        Dims(hidden=3, heads=1, kv_heads=1, head_dim=2),
        {"expand_v": 0.5, "rope_fraction": rope_fraction},
    )
    for parameter in mixer.parameters():
        parameter.zero_()
    first, one = 0, 1
    mixer.v_proj.weight[0, first] = 1.0
    if rope_fraction:
        mixer.theta_proj.weight[0, one] = 20.0
    mixer.dt_bias.fill_(math.log(math.e - 1))  # dt is 1
    mixer.A_proj.weight.fill_(-20.0)
    mixer.lambda_proj.weight.fill_(20.0)
    mixer.q_bias[0, 0] = mixer.k_bias[0, 0] = 1.0
    mixer.g_proj.weight.fill_(2.0)
    mixer.o_norm.weight.fill_(1.0)
    mixer.o_proj.weight.fill_(1.0)
    x = F.one_hot(torch.cat([torch.tensor([first]), 2 - bits]), 3).float()[None]
    return mixer(x, plain_step(x))[0][0, 1:, 0]


def test_a_state_that_turns_counts_parity_and_one_that_does_not_cannot() -> None:
    bits = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(1))
    odd = bits.cumsum(0) % 2 == 1
    assert torch.equal(parity(1.0, bits) < 0, odd)
    assert (parity(0.0, bits) > 0).all()


# The start from attention, and options


@torch.no_grad()
def test_it_starts_without_turns_skips_and_biases() -> None:
    mixer, x = inherited(attention_of(group=8), "mamba3"), inputs()
    given = parts(mixer, x)
    assert all((value == 0).all() for value in (mixer.D, mixer.q_bias, mixer.k_bias))
    assert given["turn"].abs().max() < 0.3
    assert (given["share"] - 0.5).abs().mean() < 0.1
    rate = (given["A"] * given["dt"]).mean((0, 1))
    assert rate.min() > 4e-4 and rate.max() < 0.2 and rate.unique().numel() == mixer.heads


@pytest.mark.parametrize("options", [{}, {"rope_fraction": 0.0}, {"head_dim": 4}, {"head_dim": 9}], ids=str)
def test_every_weight_gets_a_gradient_from_the_start(options: dict[str, Any]) -> None:
    attention = attention_of()
    x, y = sample_of(attention)
    mixer = inherited(attention, "mamba3", sample=(x, y), **options).requires_grad_(True)
    error = relative_error(mixer(x, plain_step(x))[0], y)
    assert error < 1
    error.backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_share_that_cannot_be_is_one_line(value: float) -> None:
    with pytest.raises(UserError, match=r"^rope_fraction: .* give 0 to 1$") as caught:
        make_block("mamba3", DIMS, {"rope_fraction": value})
    assert "\n" not in str(caught.value)

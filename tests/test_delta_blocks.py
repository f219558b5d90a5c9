"""DeltaNet, Kimi Delta Attention and RWKV-7's time mix against the papers' formulas; their start from attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive_rules import naive_kda, naive_rwkv7
from torch import Tensor, nn

from postnas.blocks.attention import Attention, AttentionOptions
from postnas.blocks.delta_net import DeltaNet
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import inherit, plain_step, relative_error
from postnas.blocks.kda import KDA
from postnas.blocks.linear import LinearMixer
from postnas.blocks.rwkv7 import RWKV7
from postnas.blocks.state import LinearState
from postnas.errors import UserError
from postnas.ops import dplr

EXACT = {"rtol": 0.0, "atol": 1e-10}
DIMS = Dims(hidden=24, heads=4, kv_heads=2, head_dim=6, qkv_bias=True)
BLOCKS: dict[str, Any] = {"delta_net": DeltaNet, "kda": KDA, "rwkv7": RWKV7}
every_block = pytest.mark.parametrize("block", list(BLOCKS))


def made(block: str, dims: Dims = DIMS, seed: int = 3, **options: Any) -> Any:
    """A block in float64 with every weight random, so that no path is idle."""
    kind = BLOCKS[block]
    mixer = kind(dims, kind.Options(**options).resolve(dims)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return mixer


def tokens(count: int = 75, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, DIMS.hidden, dtype=torch.float64)


def before(x: Tensor) -> Tensor:
    return F.pad(x[:, :-1], (0, 0, 1, 0))


def convolved(x: Tensor, projection: nn.Linear, taps: Tensor) -> Tensor:
    """SiLU of the projection's own causal convolution, by heads."""
    inputs = projection(x).transpose(1, 2)
    y = F.conv1d(F.pad(inputs, (taps.shape[-1] - 1, 0)), taps, groups=len(taps))
    return F.silu(y.transpose(1, 2)).unflatten(-1, (DIMS.heads, -1))


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def zeros(mixer: LinearMixer, batch: int) -> Tensor:
    return torch.zeros(batch, mixer.heads, mixer.key_dim, mixer.value_dim, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("gate", [True, False])
def test_delta_net_is_the_papers(gate: bool) -> None:
    mixer, x = made("delta_net", use_gate=gate, expand_v=1.5), tokens(20)
    q, k, v = (convolved(x, getattr(mixer, f"{n}_proj"), getattr(mixer, f"{n}_conv1d").weight) for n in "qkv")
    beta = torch.sigmoid(mixer.b_proj(x))
    o, _ = naive_kda(q, k, v, torch.zeros_like(k), beta, zeros(mixer, 2))
    o = rms(o) * mixer.o_norm.weight
    if gate:
        o = o * F.silu(mixer.g_proj(x)).unflatten(-1, (DIMS.heads, -1))
    torch.testing.assert_close(mixer(x, plain_step(x))[0], mixer.o_proj(o.flatten(2)), **EXACT)
    assert hasattr(mixer, "g_proj") == gate


@torch.no_grad()
def test_kda_is_the_papers() -> None:
    mixer, x = made("kda", expand_v=1.5, rank=3), tokens(20)
    q, k, v = (convolved(x, getattr(mixer, f"{n}_proj"), getattr(mixer, f"{n}_conv1d").weight) for n in "qkv")
    low = x @ mixer.f_proj.down.weight.T @ mixer.f_proj.up.weight.T
    g = -mixer.A_log.exp()[:, None] * F.softplus(low + mixer.dt_bias).unflatten(-1, (DIMS.heads, -1))
    o, _ = naive_kda(q, k, v, g, torch.sigmoid(mixer.b_proj(x)), zeros(mixer, 2))
    gate = torch.sigmoid(x @ mixer.g_proj.down.weight.T @ mixer.g_proj.up.weight.T + mixer.g_proj.up.bias)
    y = mixer.o_proj((rms(o) * mixer.o_norm.weight).flatten(2) * gate)
    torch.testing.assert_close(mixer(x, plain_step(x))[0], y, **EXACT)


@torch.no_grad()
def test_rwkv7_is_the_papers() -> None:
    """Equations of the paper's time mix, one after the other, without the mixing of v across layers."""
    mixer, x = made("rwkv7", expand_v=1.5, decay_rank=3, rate_rank=5, gate_rank=7), tokens(20)
    shift = before(x)
    x_r, x_w, x_k, x_v, x_a, x_g = (torch.lerp(x, shift, mix) for mix in mixer.mixes.unflatten(0, (6, -1)))

    def low(part: Any, inner: Tensor) -> Tensor:
        up = inner @ part.up.weight.T
        return up if part.up.bias is None else up + part.up.bias

    r, k, v = mixer.q_proj(x_r) * mixer.key_dim**-0.5, mixer.k_proj(x_k), mixer.v_proj(x_v)
    w = -torch.exp(torch.tensor(-0.5)) * torch.sigmoid(low(mixer.w_proj, torch.tanh(x_w @ mixer.w_proj.down.weight.T)))
    rate = torch.sigmoid(low(mixer.a_proj, x_a @ mixer.a_proj.down.weight.T))
    gate = low(mixer.g_proj, torch.sigmoid(x_g @ mixer.g_proj.down.weight.T))
    removal, k = k * mixer.k_k, k * torch.lerp(torch.ones_like(rate), rate, mixer.k_a)
    r, w, k, v, rate, removal = (y.unflatten(-1, (DIMS.heads, -1)) for y in (r, w, k, v, rate, removal))
    removal = removal / (removal.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    o, _ = naive_rwkv7(r, w, k, v, -removal, removal * rate, zeros(mixer, 2))
    even = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + 1e-5 * mixer.value_dim).sqrt()
    bonus = (r * mixer.r_k.view(r.shape[-2:]) * k).sum(-1, keepdim=True) * v
    y = even.flatten(2) * mixer.o_norm.weight + mixer.o_norm.bias + bonus.flatten(2)
    torch.testing.assert_close(mixer(x, plain_step(x))[0], mixer.o_proj(y * gate), rtol=0, atol=1e-7)


@every_block
@torch.no_grad()
def test_in_bfloat16_the_state_stays_in_float32(block: str) -> None:
    mixer, x = made(block), tokens(70)
    exact, state = mixer(x, plain_step(x))[0], LinearState()
    low = mixer.bfloat16()
    found = low(x.bfloat16(), plain_step(x), state)[0]
    assert found.dtype == torch.bfloat16
    assert state.recurrent is not None and state.recurrent.dtype == torch.float32
    assert state.conv is not None and state.conv.dtype == torch.bfloat16
    assert relative_error(found, exact) < 1e-2


# The start from attention


def attention() -> Attention:
    torch.manual_seed(1)
    return Attention(DIMS, AttentionOptions())


def sample(base: Attention) -> tuple[Tensor, Tensor]:
    """Inputs that share a mean, as normed hidden states do, and what attention gives for them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 60, DIMS.hidden, generator=generator) + torch.randn(DIMS.hidden, generator=generator)
    angles = torch.ones(1, 60, DIMS.head_dim), torch.zeros(1, 60, DIMS.head_dim)
    with torch.no_grad():
        return x, base(x, plain_step(x, angles))[0]


def inherited(block: str, seed: int = 0, start: str = "random", **options: Any) -> Any:
    kind, base = BLOCKS[block], attention()
    mixer = kind(DIMS, kind.Options(**options).resolve(DIMS))
    inherit(mixer, base, sample(base), start=start, seed=seed)
    return mixer


@every_block
@torch.no_grad()
def test_heads_keep_the_bases_q_k_v_and_o(block: str) -> None:
    mixer, base = inherited(block), attention()
    group = DIMS.heads // DIMS.kv_heads
    for name in "qkv":
        own, source = (getattr(part, f"{name}_proj") for part in (mixer, base))
        times = 1 if name == "q" else group
        for found, given in ((own.weight, source.weight), (own.bias, source.bias)):
            rows = given.unflatten(0, (-1, DIMS.head_dim)).repeat_interleave(times, dim=0).flatten(0, 1)
            torch.testing.assert_close(found, rows, rtol=0, atol=0)
    torch.testing.assert_close(mixer.o_proj.weight, base.o_proj.weight, rtol=0, atol=0)


@torch.no_grad()
def test_the_token_shift_starts_as_the_token_itself() -> None:
    """So the input before the first token is of no account, until a mix is learnt."""
    mixer, x = inherited("rwkv7"), torch.randn(1, 9, DIMS.hidden)

    def after(earlier: Tensor) -> Tensor:
        state = LinearState()
        state.store(conv=earlier, recurrent=torch.zeros(1, 4, 6, 6))
        y: Tensor = mixer(x, plain_step(x), state)[0]
        return y

    torch.testing.assert_close(after(torch.randn(1, 1, DIMS.hidden)), mixer(x, plain_step(x))[0])
    mixer.mixes.fill_(0.5)
    assert (after(torch.randn(1, 1, DIMS.hidden)) - mixer(x, plain_step(x))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("block", ["delta_net", "kda"])
@torch.no_grad()
def test_the_convolution_starts_as_the_identity(block: str) -> None:
    mixer, x = inherited(block), torch.randn(1, 9, DIMS.hidden)
    q, k, v = mixer.convolved(x, plain_step(x), None)
    for name, found in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(found.flatten(2), F.silu(getattr(mixer, f"{name}_proj")(x)))


@pytest.mark.parametrize("block", ["kda", "rwkv7"])
@torch.no_grad()
def test_decays_start_slow_and_nearly_one_a_head(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, seen = inherited(block), sample(attention())[0], {}

    def watched(**given: Any) -> Any:
        seen.update(given)
        return getattr(dplr, block)(**given)

    monkeypatch.setattr(f"postnas.blocks.{block}.{block}", watched)
    mixer(x, plain_step(x))
    decay = seen["g" if block == "kda" else "w"]
    assert decay.max() < 0 and decay.min() > -1.5
    middle = decay.mean((0, 1, 3))
    assert (decay / middle[:, None] - 1).abs().mean() < 0.3


@torch.no_grad()
def test_gates_and_strengths_start_nearly_the_same_for_all_tokens() -> None:
    x = sample(attention())[0]
    for block, start in (("rwkv7", 1.0), ("kda", 0.5)):
        gate = inherited(block).g_proj(x)
        gate = gate if block == "rwkv7" else torch.sigmoid(gate)
        assert (gate - start).abs().mean() < 0.1
        assert gate.std() > 1e-3
    for block in ("kda", "delta_net"):
        assert (inherited(block).strength(x, plain_step(x)) - 0.5).abs().mean() < 0.1
    assert (torch.sigmoid(inherited("rwkv7").a_proj(x)) - 0.5).abs().mean() < 0.1


@torch.no_grad()
def test_mirrored_values_have_equal_gates() -> None:
    mixer, x = inherited("kda", start="plus_minus", expand_v=2.0), sample(attention())[0]
    gate = mixer.g_proj(x).unflatten(-1, (DIMS.heads, 2, DIMS.head_dim))
    torch.testing.assert_close(gate[..., 0, :], gate[..., 1, :])


@every_block
@pytest.mark.parametrize("start", ["random", "plus_minus"])
def test_the_norm_is_fitted_to_attention(block: str, start: str) -> None:
    base = attention()
    x, y = sample(base)
    mixer = inherited(block, start=start, expand_v=2.0)
    with torch.no_grad():
        fitted = relative_error(mixer(x, plain_step(x))[0], y)
        mixer.o_norm.weight.fill_(1.0)
        unfitted = relative_error(mixer(x, plain_step(x))[0], y)
    assert fitted < 1 and fitted < unfitted


@every_block
def test_every_weight_gets_a_gradient_from_the_start(block: str) -> None:
    mixer, (x, y) = inherited(block), sample(attention())
    relative_error(mixer(x, plain_step(x))[0], y).backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@every_block
def test_the_same_seed_gives_the_same_start(block: str) -> None:
    first, again, other = (inherited(block, seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_block
@pytest.mark.parametrize("options", [{"head_dim": 4}, {"head_dim": 9}, {"num_heads": 3}, {"expand_v": 0.5}])
@torch.no_grad()
def test_other_sizes_start_too(block: str, options: dict[str, Any]) -> None:
    mixer, (x, y) = inherited(block, **options), sample(attention())
    assert relative_error(mixer(x, plain_step(x))[0], y) < 1


@pytest.mark.parametrize(
    ("block", "options", "field"),
    [
        ("delta_net", {"conv_size": 1}, "conv_size"),
        ("delta_net", {"expand_v": 0.1}, "expand_v"),
        ("kda", {"rank": 0}, "rank"),
        ("kda", {"num_heads": 0}, "num_heads"),
        ("rwkv7", {"decay_rank": 0}, "decay_rank"),
        ("rwkv7", {"rate_rank": -1}, "rate_rank"),
        ("rwkv7", {"gate_rank": 0}, "gate_rank"),
    ],
)
def test_options_that_cannot_be_are_one_line(block: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: ") as caught:
        BLOCKS[block].Options(**options).resolve(DIMS)
    assert "\n" not in str(caught.value)


def test_rwkv7_sizes_are_the_papers() -> None:
    """The paper's table of inner widths (decay, gate) by hidden width."""
    for hidden, ranks in {768: (64, 128), 2048: (96, 256), 2560: (96, 320), 4096: (128, 480)}.items():
        options = RWKV7.Options().resolve(Dims(hidden, heads=8, kv_heads=8, head_dim=64))
        assert (options.decay_rank, options.rate_rank, options.gate_rank) == (ranks[0], *ranks)

"""A mixer started from attention: what each head computes, what the docstring of `inherit` promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.blocks import linear_blocks, make_block
from postnas.blocks.attention import Attention
from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import ShortConv
from postnas.blocks.inherit import inherit, plain_step, relative_error
from postnas.blocks.linear import LinearMixer
from postnas.ops.dynamic_conv import generated_taps
from postnas.train.align import fingerprint

HIDDEN, SIZE = 40, 8
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
each_block = pytest.mark.parametrize("block", linear_blocks())
SILU_GATES = [name for name in linear_blocks() if name not in ("kda", "rwkv7")]
"""Blocks whose output gate is SiLU(W_g x), not a sigmoid through few channels."""
each_group = pytest.mark.parametrize("group", [1, 2, 3, 6, 8])
with_and_without_bias = pytest.mark.parametrize("bias", [False, True])


def attention_of(group: int = 2, kv_heads: int = 2, bias: bool = False, qk_norm: bool = False) -> Attention:
    """Attention with every weight random."""
    dims = Dims(HIDDEN, group * kv_heads, kv_heads, SIZE, qkv_bias=bias, qk_norm=qk_norm)
    attention = make_block("attn", dims)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return attention.requires_grad_(False)


def inherited(attention: Attention, block: str = "jet", **options: Any) -> LinearMixer:
    """A mixer of other weights first, so that nothing it should have been given is right by chance."""
    arguments = {name: options.pop(name) for name in ("sample", "start", "seed") if name in options}
    mixer = make_block(block, attention.dims, options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(0.0, 0.2)
    inherit(mixer, attention, **arguments)
    return mixer.requires_grad_(False)


def inputs(rows: int = 3, tokens: int = 50) -> Tensor:
    """[rows, tokens, hidden] with a mean that all tokens share, as normed hidden states have."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, tokens, HIDDEN, generator=generator) + 0.7 * torch.randn(HIDDEN, generator=generator)


def of_head(attention: Attention, name: str, head: int, x: Tensor) -> Tensor:
    """q, k or v of one query head of the base, written out: KV head h // (heads / kv_heads)."""
    index = head if name == "q" else head // (attention.dims.heads // attention.dims.kv_heads)
    projection = getattr(attention, f"{name}_proj")
    rows = slice(index * SIZE, (index + 1) * SIZE)
    y = x @ projection.weight[rows].T
    return y if projection.bias is None else y + projection.bias[rows]


def heads_of(mixer: LinearMixer, name: str, x: Tensor) -> Tensor:
    """[..., heads, channels] of a mixer's own projection."""
    return getattr(mixer, f"{name}_proj")(x).unflatten(-1, (mixer.heads, -1))


# Projections


@pytest.mark.parametrize("expand_v", [1.0, 1.5, 2.0])
@with_and_without_bias
@each_group
@each_block
def test_each_head_computes_the_bases_own_q_k_v(block: str, group: int, bias: bool, expand_v: float) -> None:
    attention, x = attention_of(group, bias=bias), inputs()
    mixer = inherited(attention, block, expand_v=expand_v)
    assert mixer.heads == attention.dims.heads
    assert (mixer.q_proj.bias is not None) == bias
    for head in range(mixer.heads):
        for name in "qkv":
            expected = of_head(attention, name, head, x)
            torch.testing.assert_close(heads_of(mixer, name, x)[..., head, :SIZE], expected, **ROUNDING)
        columns = mixer.o_proj.weight.unflatten(1, (mixer.heads, -1))[:, head, :SIZE]
        torch.testing.assert_close(columns, attention.o_proj.weight[:, head * SIZE : (head + 1) * SIZE])


@each_group
def test_the_attention_of_the_inherited_heads_is_the_bases(group: int) -> None:
    """Softmax attention on the mixer's own q, k, v and o, without RoPE, against attention with grouped keys."""
    attention, x = attention_of(group, bias=True), inputs()
    mixer = inherited(attention, expand_v=1.0)
    q, k, v = (heads_of(mixer, name, x).transpose(1, 2) for name in "qkv")
    y = mixer.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
    still = torch.ones(1, x.shape[1], SIZE), torch.zeros(1, x.shape[1], SIZE)  # RoPE that turns nothing
    expected, _ = attention(x, plain_step(x, still))
    torch.testing.assert_close(y, expected, **ROUNDING)


def test_biases_stay_behind_where_the_block_may_have_none() -> None:
    attention = attention_of(bias=True)
    mixer = inherited(attention, qkv_bias=False)
    assert mixer.q_proj.bias is mixer.k_proj.bias is mixer.v_proj.bias is None
    torch.testing.assert_close(mixer.q_proj.weight, attention.q_proj.weight)


@with_and_without_bias
@each_group
@each_block
def test_q_and_k_norms_are_folded_as_weights(block: str, group: int, bias: bool) -> None:
    """The rule normalises q and k itself, so the direction is all that counts."""
    attention, x = attention_of(group, bias=bias, qk_norm=True), inputs()
    mixer = inherited(attention, block)
    for head in range(mixer.heads):
        for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
            expected = F.normalize(norm(of_head(attention, name, head, x)), dim=-1)
            found = F.normalize(heads_of(mixer, name, x)[..., head, :], dim=-1)
            torch.testing.assert_close(found, expected, **ROUNDING)
        expected = of_head(attention, "v", head, x)
        torch.testing.assert_close(heads_of(mixer, "v", x)[..., head, :SIZE], expected, **ROUNDING)


@with_and_without_bias
@each_group
def test_plus_minus_makes_the_value_path_linear(group: int, bias: bool) -> None:
    """SiLU(v) - SiLU(-v) = v: through the block's own columns, W_o SiLU(W_v x) is what attention's W_o W_v x is."""
    attention, x = attention_of(group, bias=bias), inputs()
    mixer = inherited(attention, expand_v=2.0, start="plus_minus")
    values = torch.cat([of_head(attention, "v", head, x) for head in range(mixer.heads)], dim=-1)
    torch.testing.assert_close(mixer.o_proj(F.silu(mixer.v_proj(x))), attention.o_proj(values), **ROUNDING)
    gates = mixer.g_proj.weight.unflatten(0, (mixer.heads, 2, SIZE))
    assert torch.equal(gates[:, 0], gates[:, 1])
    assert (mixer.o_norm.weight == 1).all()


def test_random_starts_leave_the_extra_values_small() -> None:
    mixer = inherited(attention_of(), expand_v=2.0)
    rows = mixer.v_proj.weight.unflatten(0, (mixer.heads, 2, SIZE))[:, 1]
    columns = mixer.o_proj.weight.unflatten(1, (mixer.heads, 2, SIZE))[:, :, 1]
    assert 0.015 < rows.std() < 0.025
    assert 0.0015 < columns.std() < 0.0025


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def with_bias(projection: torch.nn.Linear, rows: slice) -> Tensor:
    """[rows, hidden + 1], the bias as one more column, so that it takes part in W_q^T W_k; [rows, hidden] without."""
    weight = projection.weight[rows]
    return weight if projection.bias is None else torch.cat([weight, projection.bias[rows, None]], dim=1)


@pytest.mark.parametrize("rank", [1, 3, 7])
@with_and_without_bias
@pytest.mark.parametrize("group", [1, 3])
@each_block
def test_fewer_key_channels_are_the_best_of_their_rank(block: str, group: int, bias: bool, rank: int) -> None:
    attention = attention_of(group, bias=bias)
    mixer = inherited(attention, block, head_dim=rank, expand_v=SIZE / rank)
    assert mixer.value_dim in (SIZE - 1, SIZE)  # cut to a whole number
    for head in range(mixer.heads):
        own, source = slice(head * rank, (head + 1) * rank), slice(head * SIZE, (head + 1) * SIZE)
        shared = slice(head // group * SIZE, (head // group + 1) * SIZE)
        found = with_bias(mixer.q_proj, own).T @ with_bias(mixer.k_proj, own)
        product = with_bias(attention.q_proj, source).T @ with_bias(attention.k_proj, shared)
        torch.testing.assert_close(found, best_of_rank(product, rank).float(), rtol=0, atol=2e-5)


def test_fewer_key_channels_without_bias_are_the_best_for_the_weights_alone() -> None:
    """A bias that the block cannot keep must not take directions away from the weights."""
    attention = attention_of(bias=True)
    mixer = inherited(attention, head_dim=3, expand_v=2.0, qkv_bias=False)
    plain = attention_of(bias=False)
    plain.load_state_dict({name: value for name, value in attention.state_dict().items() if "bias" not in name})
    expected = inherited(plain, head_dim=3, expand_v=2.0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        torch.testing.assert_close(getattr(mixer, name).weight, getattr(expected, name).weight)


@pytest.mark.parametrize("size", [2, 5])
@with_and_without_bias
def test_fewer_value_channels_are_the_best_of_their_rank(bias: bool, size: int) -> None:
    attention = attention_of(2, bias=bias)
    mixer = inherited(attention, expand_v=size / SIZE)
    for head in range(mixer.heads):
        own, source = slice(head * size, (head + 1) * size), slice(head * SIZE, (head + 1) * SIZE)
        shared = slice(head // 2 * SIZE, (head // 2 + 1) * SIZE)
        found = mixer.o_proj.weight[:, own] @ with_bias(mixer.v_proj, own)
        product = attention.o_proj.weight[:, source] @ with_bias(attention.v_proj, shared)
        torch.testing.assert_close(found, best_of_rank(product, size).float(), rtol=0, atol=2e-5)


def test_more_key_channels_keep_the_bases_and_add_small_ones() -> None:
    attention, x = attention_of(), inputs()
    mixer = inherited(attention, head_dim=SIZE + 4, expand_v=1.0)
    for head in range(mixer.heads):
        for name in "qk":
            found = heads_of(mixer, name, x)[..., head, :]
            torch.testing.assert_close(found[..., :SIZE], of_head(attention, name, head, x), **ROUNDING)
            assert found[..., SIZE:].std() < 0.3 * found[..., :SIZE].std()


@pytest.mark.parametrize(
    "count, sources",
    [
        (1, [2]),
        (2, [1, 3]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (6, [0, 1, 1, 2, 3, 3]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
@each_block
def test_other_head_counts_take_the_nearest_source_head(block: str, count: int, sources: list[int]) -> None:
    """New head i takes floor((i + 1/2) 4 / count) of four."""
    attention, x = attention_of(group=2, kv_heads=2, bias=True), inputs()
    mixer = inherited(attention, block, num_heads=count, expand_v=1.0)
    for head, source in enumerate(sources):
        for name in "qkv":
            expected = of_head(attention, name, source, x)
            torch.testing.assert_close(heads_of(mixer, name, x)[..., head, :], expected, **ROUNDING)


@pytest.mark.parametrize("size", [3, 2 * SIZE])
@with_and_without_bias
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_heads_that_share_q_and_k_get_the_best_for_all_of_them(groups: int, bias: bool, size: int) -> None:
    """The sum of W_q^T W_k over the group's heads, at the rank of its key dim."""
    attention = attention_of(group=3, bias=bias)
    mixer = inherited(attention, "mamba2", n_groups=groups, head_dim=size, expand_v=SIZE / size)
    assert mixer.q_proj.out_features == groups * size
    shared = mixer.heads // groups
    for index in range(groups):
        own = slice(index * size, (index + 1) * size)
        product = torch.zeros(HIDDEN + bias, HIDDEN + bias)
        for head in range(index * shared, (index + 1) * shared):
            source, keys = slice(head * SIZE, (head + 1) * SIZE), slice(head // 3 * SIZE, (head // 3 + 1) * SIZE)
            product += with_bias(attention.q_proj, source).T @ with_bias(attention.k_proj, keys)
        found = with_bias(mixer.q_proj, own).T @ with_bias(mixer.k_proj, own)
        torch.testing.assert_close(found, best_of_rank(product, size).float(), rtol=0, atol=5e-5)


@each_block
def test_what_it_starts_as_follows_attention(block: str) -> None:
    """With a sample, a good part of the output is there before any training; zero is as good as an output of zeros."""
    attention = attention_of()
    x, y = sample_of(attention)
    mixer = inherited(attention, block, sample=(x, y))
    assert relative_error(mixer(x, plain_step(x))[0], y) < 0.98


# What attention has nothing for


@each_block
def test_the_convolution_starts_as_the_identity(block: str) -> None:
    mixer, x = inherited(attention_of(), block), inputs()
    if block == "jet":
        generator = mixer.dynamic_conv1d.kernel_generator
        inner = F.silu(generator.w1(x))
        taps = generated_taps(inner, generator.w2.weight, generator.w2.bias, generator.channels)
        assert (taps[:-1] == 0).all() and (taps[-1] == 1).all()
        assert mixer.dynamic_conv1d.kernel_generator.w1.weight.abs().max() > 0  # else it could never learn
    if block == "rwkv7":
        assert (mixer.mixes == 0).all()
    convs = [module for module in mixer.modules() if isinstance(module, ShortConv)]
    assert len(convs) == {"gated_deltanet": 3, "delta_net": 3, "kda": 3, "mamba2": 1}.get(block, 0)
    for conv in convs:
        assert (conv.weight[..., :-1] == 0).all() and (conv.weight[..., -1] == 1).all()
        assert getattr(conv, "bias", None) is None or (conv.bias == 0).all()


@pytest.mark.parametrize("block", ["jet", "gated_deltanet", "mamba2"])
def test_the_decay_starts_slow(block: str) -> None:
    mixer = inherited(attention_of(group=8), block)
    rate, time = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert rate.min() >= 0.5 and rate.max() <= 8.0
    assert time.min() >= 1e-3 * 0.999 and time.max() <= 0.1 * 1.001
    assert rate.unique().numel() == mixer.heads


@each_block
def test_a_state_fades_slowly_and_each_head_in_its_own_time(block: str) -> None:
    """After tokens of all zeros, which write nothing, what is left of a state is what the decay alone leaves."""
    mixer, x = inherited(attention_of(group=8), block), inputs(1, 4)
    state = mixer.State()
    mixer(x, plain_step(x), state)
    still = torch.zeros(1, 4, HIDDEN)
    mixer(still, plain_step(still), state)  # no convolution remembers x after these
    before = state.recurrent.clone()
    mixer(still[:, :1], plain_step(still[:, :1]), state)
    left = state.recurrent.norm(dim=(-1, -2)) / before.norm(dim=(-1, -2))
    assert left.min() > 0.4 and left.max() <= 1 and left.median() > 0.9
    assert (left == 1).all() if block == "delta_net" else left.unique().numel() > mixer.heads // 2


def sample_of(attention: Attention) -> tuple[Tensor, Tensor]:
    x = inputs(4, 60)
    angles = torch.arange(60)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
    return x, attention(x, plain_step(x, (angles.cos()[None], angles.sin()[None])))[0]


@pytest.mark.parametrize("block", SILU_GATES)
def test_gates_start_nearly_open_where_a_sample_says_how(block: str) -> None:
    attention = attention_of()
    sample = sample_of(attention)
    gate = inherited(attention, block, sample=sample).g_proj(sample[0])
    blind = inherited(attention, block).g_proj(sample[0])
    assert gate.mean() > 1.0 > 0.5 > blind.mean().abs()
    assert gate.std() < 0.6 * gate.mean()


@pytest.mark.parametrize("start", ["random", "plus_minus"])
@pytest.mark.parametrize("expand_v", [0.5, 1.0, 2.0])
@each_block
def test_the_norm_is_fitted_by_least_squares(block: str, expand_v: float, start: str) -> None:
    """Against torch's own solver on the very products, with the small ridge that `inherit` states."""
    attention = attention_of(group=3)
    x, y = sample_of(attention)
    mixer = inherited(attention, block, expand_v=expand_v, start=start, sample=(x, y))
    fitted = mixer.o_norm.weight.clone()
    error_fitted = relative_error(mixer(x, plain_step(x))[0], y)
    mixer.o_norm.weight.fill_(1.0)
    error_ones = relative_error(mixer(x, plain_step(x))[0], y)
    assert error_fitted <= error_ones
    columns = []
    for channel in range(fitted.numel()):
        mixer.o_norm.weight.zero_()
        mixer.o_norm.weight[channel] = 1.0
        columns.append(mixer(x, plain_step(x))[0].flatten().double())
    a = torch.stack(columns, dim=1)
    ridge = 1e-3 * (a.T @ a).diagonal().mean()
    a = torch.cat([a, ridge.sqrt() * torch.eye(fitted.numel(), dtype=a.dtype)])
    target = torch.cat([y.flatten().double(), torch.zeros(fitted.numel(), dtype=a.dtype)])
    solved = torch.linalg.lstsq(a, target[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(fitted, solved.float(), rtol=1e-3, atol=1e-4)


@each_block
def test_the_same_seed_gives_the_same_start(block: str) -> None:
    """Whatever torch's own generator has done meanwhile."""
    attention = attention_of()

    def start(seed: int) -> dict[str, Tensor]:
        torch.rand(7)
        return dict(inherited(attention, block, expand_v=2.0, seed=seed, sample=sample_of(attention)).state_dict())

    drawn_when_made = "w1"  # the block's own, made before it inherits
    first, second, other = start(1), start(1), start(2)
    for name in first:
        assert torch.equal(first[name], second[name]) or drawn_when_made in name, name
    for name in (
        "v_proj.weight",
        "a_proj.weight",
        "b_proj.weight",
        "g_proj.weight",
        "gk_up.weight",
        "A_log",
        "dt_bias",
    ):
        assert name not in first or not torch.equal(first[name], other[name]), name


def test_the_attention_is_not_touched() -> None:
    attention = attention_of(bias=True, qk_norm=True)
    before = fingerprint(attention)
    inherited(attention, head_dim=3, sample=sample_of(attention))
    assert fingerprint(attention) == before


@pytest.mark.parametrize("block", linear_blocks())
def test_extra_value_channels_come_apart_in_training(block: str) -> None:
    """A pair of mirrored channels has mirrored gradients for ever, unless v is squashed between them."""
    attention = attention_of()
    x, y = sample_of(attention)
    mixer = inherited(attention, block, expand_v=2.0, start="plus_minus", sample=(x, y)).requires_grad_(True)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-2)
    for _ in range(3):
        ((mixer(x, plain_step(x))[0] - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    size = attention.dims.head_dim
    v = mixer.v_proj.weight.unflatten(0, (mixer.heads, -1))
    o = mixer.o_proj.weight.unflatten(1, (mixer.heads, -1))
    for near, far in ((v[:, :size], v[:, size:]), (o[..., :size], o[..., size:])):
        assert float(((near + far).norm() / near.norm()).detach()) > 1e-3

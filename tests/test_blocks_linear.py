"""What every linear block promises beyond `test_blocks.py`: longer rows, counted operations, saving; and the stock
layers of transformers that `mamba2` and `gated_deltanet` can stand for exactly. A new block in BLOCKS is taken along.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blocks import EXACT, in_pieces, inputs, layer, leaves, mix, packed_positions
from test_inherit import attention_of, inherited
from tiny import make_hybrid, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from postnas.blocks import linear_blocks, make_block
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import plain_step
from postnas.blocks.linear import LinearMixer
from postnas.errors import UserError
from postnas.models.cache import HybridCache
from postnas.models.model import HybridForCausalLM

LENGTH = 150
"""Tokens: more than two chunks of 64, and no whole number of them."""
each_block = pytest.mark.parametrize("block", linear_blocks())


# The contract


@each_block
@torch.no_grad()
def test_chunked_equals_recurrent(block: str) -> None:
    model, x = layer(block), inputs(tokens=LENGTH)
    torch.testing.assert_close(in_pieces(model, x, [1] * LENGTH), mix(model, x), **EXACT)


@each_block
@pytest.mark.parametrize("sizes", [[1, 2, 3, 7, LENGTH - 13], [LENGTH - 13, 7, 3, 2, 1], [65, 64, 21]])
@torch.no_grad()
def test_pieces_equal_one_piece(block: str, sizes: list[int]) -> None:
    model, x = layer(block), inputs(tokens=LENGTH)
    torch.testing.assert_close(in_pieces(model, x, sizes), mix(model, x), **EXACT)


@each_block
@pytest.mark.parametrize("padding", [1, 3, 70])
@torch.no_grad()
def test_left_padding_changes_no_output_and_no_state(block: str, padding: int) -> None:
    model, x = layer(block), inputs(tokens=LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :padding] = 0
    cache, alone = HybridCache(model.config), HybridCache(model.config)
    y = mix(model, x, mask, cache=cache)
    torch.testing.assert_close(y[:1, padding:], mix(model, x[:1, padding:], cache=alone), **EXACT)
    for name, value in alone.states[0].tensors().items():
        torch.testing.assert_close(cache.states[0].tensors()[name][:1], value, **EXACT)


PACK = [1, 2, 70, 3, 64, 10]


@each_block
def test_packed_equals_separate_in_outputs_and_gradients(block: str) -> None:
    model, x, weight = layer(block), inputs(1, LENGTH).requires_grad_(), inputs(1, LENGTH)
    packed = mix(model, x, positions=packed_positions(PACK))
    separate = torch.cat([mix(model, part) for part in x.split(PACK, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, **EXACT)
    found, expected = (torch.autograd.grad((y * weight).sum(), leaves(model, x)) for y in (packed, separate))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in found)  # no parameter is idle


@each_block
def test_gradients_are_those_of_finite_differences(block: str) -> None:
    """Of the whole layer along a random direction, over a border of chunks."""
    model, x, weight = layer(block), inputs(1, 66), inputs(1, 66)
    parameters = list(model.layers[0].self_attn.parameters())
    along = [torch.randn(value.shape, dtype=value.dtype) for value in parameters]
    gradients = torch.autograd.grad((mix(model, x) * weight).sum(), parameters)
    slope = sum((gradient * a).sum() for gradient, a in zip(gradients, along, strict=True))

    @torch.no_grad()
    def moved(step: float) -> Tensor:
        for value, a in zip(parameters, along, strict=True):
            value += step * a
        total = (mix(model, x) * weight).sum()
        for value, a in zip(parameters, along, strict=True):
            value -= step * a
        return total

    step = 1e-6
    difference = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(torch.as_tensor(slope), difference, rtol=1e-6, atol=1e-6)


@each_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_state_bytes_are_what_the_cache_holds(block: str, dtype: torch.dtype) -> None:
    model, cache = layer(block, dtype), None
    for count in (1, 2, 130):
        cache = cache or HybridCache(model.config)
        mix(model, inputs(1, count, dtype), cache=cache)
        held = cache.states[0].tensors()
        assert cache.states[0].nbytes == model.layers[0].self_attn.state_bytes(count, dtype)
        assert {value.dtype for name, value in held.items() if name == "recurrent"} <= {torch.float32}


def _multiply_adds(*shapes: Any, out_shape: Any, **rest: Any) -> int:
    return 2 * math.prod(out_shape)


def _triangular(system: Any, sources: Any, *rest: Any, **more: Any) -> int:
    """Half a square of multiply-adds a column."""
    return math.prod(sources) * system[-1]


UNCOUNTED = {torch.ops.aten.addcmul: _multiply_adds, torch.ops.aten.linalg_solve_triangular: _triangular}
"""What FlopCounterMode passes over: outer products and taps as fused multiply-adds, and triangular systems."""


@each_block
@pytest.mark.parametrize("count", [1, 20, 130])
@torch.no_grad()
def test_flops_are_those_that_a_forward_does(block: str, count: int) -> None:
    mixer = make_block(block, Dims(hidden=96, heads=4, kv_heads=2, head_dim=16))
    state, past = mixer.State(), torch.randn(1, 9, 96)
    mixer(past, plain_step(past), state)
    x = torch.randn(1, count, 96)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        mixer(x, plain_step(x), state)
    assert mixer.flops(count, past=9) == pytest.approx(counter.get_total_flops(), rel=0.02)


@each_block
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_bits(block: str, tmp_path: Path) -> None:
    model = make_hybrid([block, "attn", block])
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert again.config.placement == model.config.placement
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.model.layers[0].self_attn.options == model.model.layers[0].self_attn.options
    assert torch.equal(again(tokens(2, 70)).logits, model(tokens(2, 70)).logits)


@each_block
def test_a_fresh_layer_learns_in_every_weight(block: str) -> None:
    """From the start that a new model gives it: finite, and no matrix that can never get a gradient."""
    model = layer(block, torch.float32)
    mixer = make_block(block, model.config.dims(), {})
    x = inputs(2, 70, torch.float32)
    optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
    for _ in range(3):  # what starts at zero beside another zero needs a step of the first
        optimizer.zero_grad()
        (mixer(x, plain_step(x))[0] - x).square().mean().backward()
        optimizer.step()
    for name, value in mixer.named_parameters():
        assert value.isfinite().all(), name
        assert value.grad is not None and value.grad.abs().max() > 0, name


# Options


DIMS = Dims(hidden=24, heads=4, kv_heads=2, head_dim=6)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gla", {"rank": 0}, "rank: 0 is too small"),
    ("gla", {"conv_size": 4}, "conv_size: no such option"),
    ("retnet", {"expand_v": 0.1}, "expand_v"),
    ("mamba2", {"n_groups": 3}, "n_groups: 3 does not divide 4 heads"),
    ("mamba2", {"n_groups": 0}, "n_groups: 0 is too small"),
    ("mamba2", {"conv_size": 1}, "conv_size: 1 is too small"),
    ("mamba2", {"conv_bias": "no"}, "conv_bias"),
]


@pytest.mark.parametrize("block, options, message", REFUSED)
def test_options_that_cannot_be_are_one_line(block: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_block(block, DIMS, options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("block", ["gla", "retnet", "mamba2", "kda", "rwkv7"])
def test_an_inherited_block_reads_a_step_that_is_padded_and_packed(block: str) -> None:
    """The start leaves no path undefined: finite outputs and gradients from the first step."""
    mixer = inherited(attention_of(bias=True), block).requires_grad_(True)
    x = torch.randn(2, 20, 40)
    step = plain_step(x)
    step.valid = torch.arange(20) < torch.tensor([[13], [20]])
    step.segments = (torch.arange(20) >= 7).long().expand(2, -1)
    y, _ = mixer(x, step)
    y[step.valid].square().sum().backward()
    assert y.isfinite().all()
    assert all(value.grad is None or value.grad.isfinite().all() for value in mixer.parameters())


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_mamba2_with_groups_is_mamba2_with_its_heads_repeated(
    groups: int, conv_bias: bool, norm_before_gate: bool
) -> None:
    """Head h reads group h // (heads / groups); in pieces, on a filled state, under every order of gate and norm."""
    options = {"conv_bias": conv_bias, "norm_before_gate": norm_before_gate}
    grouped, whole = (make_block("mamba2", DIMS, options | more).double() for more in ({"n_groups": groups}, {}))
    for value in grouped.parameters():
        value.normal_(0.0, 0.4)
    spread = {name: value for name, value in grouped.state_dict().items()}
    for name in ("q_proj.weight", "k_proj.weight"):
        spread[name] = spread[name].unflatten(0, (groups, 6)).repeat_interleave(4 // groups, dim=0).flatten(0, 1)
    for name in ("conv1d.weight", "conv1d.bias")[: 1 + conv_bias]:
        v, k, q = spread[name].split([4 * 12, groups * 6, groups * 6])
        k, q = (part.unflatten(0, (groups, 6)).repeat_interleave(4 // groups, dim=0).flatten(0, 1) for part in (k, q))
        spread[name] = torch.cat([v, k, q])
    whole.load_state_dict(spread)
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    expected, state = whole(x, plain_step(x))[0], grouped.State()
    found = torch.cat([grouped(part, plain_step(part), state)[0] for part in x.split([70, 1, 9], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, **EXACT)


# Stock layers


@torch.no_grad()
def randomise(stock: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, value in stock.named_parameters():
        value.copy_(("norm" in name) + 0.3 * torch.randn(value.shape, generator=generator))


def assert_same(mixer: LinearMixer, stock: nn.Module) -> None:
    """In one piece, and in pieces on our own state."""
    x = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(6))
    expected = stock(x)
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(mixer(x, plain_step(x))[0], expected, rtol=1e-4, atol=1e-4)
    state = mixer.State()
    pieces = [mixer(part, plain_step(part), state)[0] for part in x.split([3, 1, 100, 1, 45], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv_bias", [True, False])
@torch.no_grad()
def test_mamba2_is_granites_layer(conv_bias: bool) -> None:
    """GraniteMoeHybrid's own layer, on its plain path, with one group and an inner width of twice the hidden size."""
    hidden, heads, head_dim, state_dim = 32, 4, 16, 12
    config = GraniteMoeHybridConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        layer_types=["mamba"],
        mamba_n_heads=heads,
        mamba_d_head=head_dim,
        mamba_d_state=state_dim,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_d_conv=4,
        mamba_conv_bias=conv_bias,
        mamba_proj_bias=False,
        mamba_chunk_size=64,
        rms_norm_eps=1e-5,
    )
    stock = GraniteMoeHybridMambaLayer(config, 0).eval()
    randomise(stock)
    options = {"num_heads": heads, "head_dim": state_dim, "expand_v": head_dim / state_dim, "n_groups": 1}
    dims = Dims(hidden=hidden, heads=2, kv_heads=1, head_dim=16, qkv_bias=True)
    mixer = make_block("mamba2", dims, options | {"conv_bias": conv_bias, "qkv_bias": False, "norm_eps": 1e-5})
    inner = heads * head_dim
    z, x, b, c, dt = stock.in_proj.weight.split([inner, inner, state_dim, state_dim, heads])
    weights = {
        "g_proj.weight": z,
        "v_proj.weight": x,
        "k_proj.weight": b,
        "q_proj.weight": c,
        "a_proj.weight": dt,
        "o_proj.weight": stock.out_proj.weight,
        "o_norm.weight": stock.norm.weight,
        "conv1d.weight": stock.conv1d.weight,
        "A_log": stock.A_log,
        "dt_bias": stock.dt_bias,
        "D": stock.D,
    }
    if stock.conv1d.bias is not None:
        weights["conv1d.bias"] = stock.conv1d.bias
    mixer.load_state_dict(weights)  # nothing is missing, nothing left over
    assert sum(value.numel() for value in stock.parameters()) == sum(value.numel() for value in mixer.parameters())
    assert_same(mixer, stock)


@torch.no_grad()
def test_gated_deltanet_is_qwen3_5s_layer() -> None:
    """Qwen3.5's gated delta net on its plain path; there v heads are as many as k heads."""
    hidden, heads, key_dim, value_dim = 32, 4, 8, 12
    config = Qwen3_5TextConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
    )
    stock = Qwen3_5GatedDeltaNet(config, 0).eval()
    randomise(stock)
    options = {"num_heads": heads, "head_dim": key_dim, "expand_v": value_dim / key_dim, "norm_eps": 1e-6}
    mixer = make_block("gated_deltanet", Dims(hidden=hidden, heads=2, kv_heads=1, head_dim=16), options)
    sizes = [heads * key_dim, heads * key_dim, heads * value_dim]
    weights = {
        "g_proj.weight": stock.in_proj_z.weight,
        "b_proj.weight": stock.in_proj_b.weight,
        "a_proj.weight": stock.in_proj_a.weight,
        "o_proj.weight": stock.out_proj.weight,
        "o_norm.weight": stock.norm.weight,
        "A_log": stock.A_log,
        "dt_bias": stock.dt_bias,
    }
    for name, rows, taps in zip(
        "qkv", stock.in_proj_qkv.weight.split(sizes), stock.conv1d.weight.split(sizes), strict=True
    ):
        weights |= {f"{name}_proj.weight": rows, f"{name}_conv1d.weight": taps}
    mixer.load_state_dict(weights)
    assert sum(value.numel() for value in stock.parameters()) == sum(value.numel() for value in mixer.parameters())
    assert_same(mixer, stock)

"""The JetBlock's designs: every choice of convolutions, of what kernels are made from, and of SiLU's place."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import test_blocks
import torch
import torch.nn.functional as F
from test_blocks import EXACT, MASKS, in_pieces, inputs, layer, leaves, mix
from test_blocks_linear import UNCOUNTED
from test_inherit import attention_of, inherited
from test_inherit import inputs as mean_inputs
from tiny import make_base, make_hybrid, plain, tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from postnas.blocks import make_block
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import plain_step
from postnas.blocks.jet import DESIGN, Jet, JetOptions
from postnas.errors import UserError
from postnas.export.jet_nemotron import to_jet_nemotron
from postnas.generate.step import Decoder
from postnas.models import JetNemotronConfig
from postnas.models.cache import HybridCache
from postnas.models.convert import convert
from postnas.models.model import HybridForCausalLM, HybridModel

DIMS = Dims(hidden=24, heads=4, kv_heads=2, head_dim=6, qkv_bias=True)
EVERY = [dict(zip(DESIGN, values, strict=True)) for values in product(*DESIGN.values())]
"""All 108 designs."""
SOME: dict[str, dict[str, Any]] = {
    "static q and k": {"conv_q": "static", "conv_k": "static"},
    "all static": {"conv_q": "static", "conv_k": "static", "conv_v": "static"},
    "all dynamic": {"conv_q": "dynamic", "conv_k": "dynamic", "generator_input": "v"},
    "one of each": {"conv_q": "static", "conv_k": "dynamic", "conv_v": "none", "silu_first": True},
    "from values": {"generator_input": "v"},
    "SiLU first": {"silu_first": True, "conv_k": "static"},
    "no convolution": {"conv_v": "none"},
}
"""A few in which every kind meets every other."""


def named(design: dict[str, Any]) -> str:
    return "-".join(str(value) for value in design.values())


every_design = pytest.mark.parametrize("design", EVERY, ids=named)
some_designs = pytest.mark.parametrize("design", SOME.values(), ids=list(SOME))


def jet_layer(
    monkeypatch: pytest.MonkeyPatch, design: dict[str, Any], dtype: torch.dtype = torch.float64
) -> HybridModel:
    """`test_blocks.layer` of this design; whatever that file's tests make of `jet` is of this design, too."""
    monkeypatch.setitem(test_blocks.OPTIONS, "jet", {"expand_v": 1.5} | design)
    return layer("jet", dtype)


# What a design computes


def by_hand(block: Jet, x: Tensor) -> Tensor:
    """The output for one row x [T, hidden] by definition, a token and a tap at a time; kernels are [T, D, W]."""
    options, parts = block.options, []
    values = block.v_proj(x)
    kernels: dict[str, Tensor] = {}
    generated = [name for name in "qkv" if getattr(options, f"conv_{name}") == "dynamic"]
    if generated:
        generator = block.dynamic_conv1d.kernel_generator
        made = generator.w2(F.silu(generator.w1(values if options.generator_input == "v" else x)))
        widths = [block.get_submodule(f"{name}_proj").out_features for name in generated]
        for name, part in zip(generated, made.unflatten(-1, (-1, options.conv_size)).split(widths, dim=1), strict=True):
            kernels[name] = part
    for name in "qkv":
        part = block.get_submodule(f"{name}_proj")(x)
        if options.silu_first:
            part = F.silu(part)
        kind = getattr(options, f"conv_{name}")
        if kind == "static":
            kernels[name] = block.get_submodule(f"{name}_conv1d").weight[:, 0].expand(len(x), -1, -1)
        if kind != "none":
            rows = []
            for t in range(len(x)):
                reach = min(t + 1, options.conv_size)
                taps = kernels[name][t, :, options.conv_size - reach :]  # [D, reach]
                rows.append((taps.T * part[t + 1 - reach : t + 1]).sum(0))
            part = torch.stack(rows)
        parts.append((part if options.silu_first else F.silu(part))[None])
    return block.mix(x[None], *parts, plain_step(x[None]), None)[0]


@every_design
@torch.no_grad()
def test_a_design_is_what_its_options_say(design: dict[str, Any]) -> None:
    block = make_block("jet", DIMS, design | {"conv_size": 3, "expand_v": 1.5}).double()
    for value in block.parameters():
        value.normal_(0.0, 0.4)
    x = torch.randn(9, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x[None], plain_step(x[None]))[0][0], by_hand(block, x), **EXACT)


@torch.no_grad()
def test_no_two_designs_are_the_same() -> None:
    """One seed for the weights that they share: no option is without effect where there is a convolution to change."""
    x, found = torch.randn(1, 9, 24, dtype=torch.float64), {}
    for design in EVERY:
        kinds = [design[f"conv_{name}"] for name in "qkv"]
        if ("dynamic" not in kinds and design["generator_input"] == "v") or (
            set(kinds) == {"none"} and design["silu_first"]
        ):
            continue  # no kernels to make, no convolution to stand before
        block = make_block("jet", DIMS, design).double()
        for name, value in block.named_parameters():
            generator = torch.Generator().manual_seed(sum(name.encode()))
            value.copy_(0.4 * torch.randn(value.shape, generator=generator))
        found[named(design)] = block(x, plain_step(x))[0]
    names, outputs = list(found), torch.stack(list(found.values())).flatten(1)
    apart = torch.cdist(outputs, outputs) + torch.eye(len(names))
    assert len(names) == 108 - 8 * 2 - 1
    assert apart.min() > 1e-3, [names[index] for index in divmod(int(apart.argmin()), len(names))]


def test_the_released_block_is_the_default() -> None:
    given = JetOptions()
    assert [getattr(given, name) for name in DESIGN] == ["none", "none", "dynamic", "x", False]
    assert not given.changes() and make_block("jet", DIMS, {"conv_v": "dynamic", "silu_first": False}).released
    assert JetOptions(conv_k="static", silu_first=True).changes() == {"conv_k": "static", "silu_first": True}


# The contract of a mixer


@every_design
@torch.no_grad()
def test_pieces_equal_one_piece(design: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1, 2 and 3 tokens on a filled cache, and of more; the state's bytes are those that it says."""
    model, x = jet_layer(monkeypatch, design), inputs(tokens=20)
    whole = mix(model, x)
    for sizes in ([1] * 20, [6, 1, 2, 3, 3, 2, 1, 2], [2, 3, 1, 14]):
        torch.testing.assert_close(in_pieces(model, x, sizes), whole, **EXACT)
    low = jet_layer(monkeypatch, design, torch.bfloat16)
    for count in (1, 5):
        cache = HybridCache(low.config)
        mix(low, inputs(1, count, torch.bfloat16), cache=cache)
        assert cache.states[0].nbytes == low.layers[0].self_attn.state_bytes(count, torch.bfloat16)


@every_design
def test_padded_and_packed_equal_alone_in_outputs_and_gradients(
    design: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding inside, then a border between two texts; no parameter is idle."""
    model, mask = jet_layer(monkeypatch, design), torch.tensor(MASKS["inside"])
    x, weight = inputs(tokens=8).requires_grad_(), inputs(tokens=8)
    positions = torch.tensor([[0, 9, 1, 2, 9, 9, 0, 1], [9, 0, 1, 0, 1, 9, 2, 9]])
    y = mix(model, x, mask, positions)
    found = torch.autograd.grad((y * weight)[mask.bool()].sum(), leaves(model, x))
    total = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate([[3, 2], [2, 3]]):
        real = mask[row].bool()
        alone = [mix(model, part)[0] for part in x[row, real][None].split(lengths, dim=1)]
        torch.testing.assert_close(y[row, real], torch.cat(alone), **EXACT)
        total = total + (torch.cat(alone) * weight[row, real]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, leaves(model, x)), **EXACT)
    assert found[0][~mask.bool()].abs().max() == 0
    assert all(gradient.abs().max() > 0 for gradient in found)


@some_designs
def test_the_contract_of_every_block(design: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of `test_blocks.py` that say most, on this design."""
    jet_layer(monkeypatch, design)
    with torch.no_grad():
        for first, second in product(["left", "right", "inside", "a whole row"], repeat=2):
            test_blocks.test_padding_anywhere_changes_nothing("jet", first, second)
        for sizes in ([3, 72], [39, 2, 34], [1] * 75):
            test_blocks.test_packed_in_chunks_equals_separate("jet", sizes)
        test_blocks.test_packed_rows_may_be_padded("jet")
        test_blocks.test_no_token_sees_a_later_one("jet")
        test_blocks.test_rows_of_a_state_can_be_picked_and_repeated("jet")
    test_blocks.test_a_cache_changes_no_gradient("jet")


@every_design
@torch.no_grad()
def test_flops_are_those_that_a_forward_does(design: dict[str, Any]) -> None:
    mixer = make_block("jet", Dims(hidden=96, heads=4, kv_heads=2, head_dim=16), design)
    for count in (1, 20):
        state, past, x = mixer.State(), torch.randn(1, 9, 96), torch.randn(1, count, 96)
        mixer(past, plain_step(past), state)
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            mixer(x, plain_step(x), state)
        assert mixer.flops(count, past=9) == pytest.approx(counter.get_total_flops(), rel=0.02)


# Its start, and its way through a model


@torch.no_grad()
def test_every_design_starts_as_the_same_block() -> None:
    """Every convolution begins as the identity, so neither its kind nor SiLU's place can show."""
    attention, x = attention_of(bias=True), mean_inputs()
    wanted = inherited(attention, seed=5)(x, plain_step(x))[0]
    for design in EVERY:
        found = inherited(attention, **design, seed=5)(x, plain_step(x))[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=named(design))


@some_designs
def test_a_fresh_layer_learns_in_every_weight(design: dict[str, Any]) -> None:
    mixer, x = make_block("jet", DIMS, design), inputs(2, 20, torch.float32)
    optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
    for _ in range(3):  # w1 stands before a w2 that starts at zero
        optimizer.zero_grad()
        (mixer(x, plain_step(x))[0] - x).square().mean().backward()
        optimizer.step()
    assert [name for name, value in mixer.named_parameters() if value.grad is None or not value.grad.any()] == []


def hybrid(design: dict[str, Any]) -> HybridForCausalLM:
    return make_hybrid(["jet", "attn", "jet"], blocks={"jet": design})


@some_designs
@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same_bits(design: dict[str, Any], tmp_path: Path) -> None:
    model = hybrid(design)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert again.model.layers[0].self_attn.options == model.model.layers[0].self_attn.options
    assert again.model.layers[0].self_attn.options.changes() == {
        name: value for name, value in design.items() if value != getattr(JetOptions, name)
    }
    assert torch.equal(plain(again, tokens(2, 30)), plain(model, tokens(2, 30)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("design", [{}, *SOME.values()], ids=["as released", *SOME])
@torch.no_grad()
def test_only_the_released_block_takes_the_decode_kernel(
    design: dict[str, Any], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model and in the static decode step, whose states stay where they are; the tokens are the model's."""
    calls: list[bool] = []
    real = Jet.finish_decode
    monkeypatch.setattr(Jet, "finish_decode", lambda self, **given: calls.append(True) or real(self, **given))
    model, ids = hybrid(design), tokens(2, 20)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    decoder = Decoder(model, batch=2, context=24, dtype=dtype)
    assert list(decoder.products) == ([] if design else [0, 2])
    decoder.load(cache)
    places = [value.data_ptr() for value in decoder._tensors()]
    kind = torch.float32 if design or dtype is None else dtype
    assert {state.recurrent.dtype for state in (decoder.states[0], decoder.states[2])} == {kind}
    close = 1e-4 if kind == torch.float32 else 0.3  # float32 where nobody asked for less
    for token in ids[:, 9:].unbind(1):
        wanted = model(token[:, None], past_key_values=cache).logits[:, 0]
        assert (decoder.step(token) - wanted).abs().max() < close
    assert places == [value.data_ptr() for value in decoder._tensors()]
    assert bool(calls) == (not design)
    torch.testing.assert_close(wanted, plain(model, ids)[:, -1], rtol=1e-4, atol=1e-4)


def test_a_base_converts_to_a_design(tmp_path: Path) -> None:
    design = SOME["one of each"]
    model = convert(str(make_base(tmp_path / "base", layers=2)), ["jet", "attn"], {"jet": design}, dtype=torch.float32)
    assert model.model.layers[0].self_attn.options.changes() == design
    assert plain(model, tokens(1, 12)).isfinite().all()


# What is refused


@pytest.mark.parametrize("name", list(DESIGN))
def test_the_official_format_holds_no_other_design(name: str) -> None:
    for value in DESIGN[name]:
        model = make_hybrid(["attn", "jet"], blocks={"jet": {name: value, "qkv_bias": False}})
        default = getattr(JetOptions, name)
        if value == default:
            assert to_jet_nemotron(model).config.placement == ["attn", "jet"]
            continue
        with pytest.raises(UserError) as raised:
            to_jet_nemotron(model)
        message = str(raised.value)
        assert "\n" not in message
        assert message.startswith(
            f"blocks.jet.{name}: {value!r} has no place in the format; it holds {default!r} alone;"
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conv_q": "short"}, "jet.conv_q: 'short' is unknown; choose from none, static, dynamic"),
        ({"conv_k": ""}, "jet.conv_k: '' is unknown; choose from none, static, dynamic"),
        ({"conv_v": "Dynamic"}, "jet.conv_v: 'Dynamic' is unknown; choose from none, static, dynamic"),
        ({"generator_input": "q"}, "jet.generator_input: 'q' is unknown; choose from x, v"),
        ({"conv_q": None}, "blocks.jet.conv_q: None is no str; give one"),
        ({"conv_v": False}, "blocks.jet.conv_v: False is no str; give one"),
        ({"silu_first": "yes"}, "blocks.jet.silu_first: 'yes' is no bool; give one"),
    ],
)
def test_values_that_cannot_be_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        make_block("jet", DIMS, options)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", list(DESIGN))
def test_the_official_config_refuses_another_design(name: str) -> None:
    released = getattr(JetOptions, name)
    assert JetNemotronConfig(blocks={"jet": {name: released}}, placement=["jet"] * 16).blocks["jet"][name] == released
    other = next(value for value in DESIGN[name] if value != released)
    with pytest.raises(UserError, match=f"blocks.jet.{name}: {other!r} has no place"):
        JetNemotronConfig(blocks={"jet": {name: other}}, placement=["jet"] * 16)

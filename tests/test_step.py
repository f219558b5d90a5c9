"""The whole-model decode step: on static states it gives what the model gives with a growing cache."""

from __future__ import annotations

import os
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import ALL, every_block, hybrid
from tiny import MIXED, PAD, make_hybrid, padded, tokens
from torch import Tensor

from postnas.blocks import jet as jet_module
from postnas.errors import UserError
from postnas.generate.step import Decoder
from postnas.models.cache import HybridCache
from postnas.models.load import load_model
from postnas.models.model import HybridForCausalLM

PLACEMENTS = [
    ["jet"],
    ["attn", "jet"],
    ["swa", "gated_deltanet"],
    MIXED,
]


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1 in the environment",
)


@torch.no_grad()
def prefilled(model: HybridForCausalLM, ids: Tensor, mask: Tensor | None = None) -> HybridCache:
    return model(ids, attention_mask=mask, use_cache=True).past_key_values


@torch.no_grad()
def follow(model: HybridForCausalLM, decoder: Decoder, cache: HybridCache, ids: Tensor, close: float) -> None:
    """Both read the tokens of ids one by one; their logits must agree."""
    for token in ids.unbind(1):
        wanted = model(token[:, None], past_key_values=cache).logits[:, 0]
        got = decoder.step(token)
        assert (got - wanted).abs().max() < close


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS, ids="-".join)
def test_step_goes_on_from_a_prefilled_cache(placement: list[str], fused: bool) -> None:
    """The window of 9 goes round its ring, and the prompt is longer and shorter than it."""
    model, ids = make_hybrid(placement), tokens(2, 40)
    decoder = Decoder(model, batch=2, context=40, fused=fused)
    for prompt in (20, 5, 1):
        cache = prefilled(model, ids[:, :prompt])
        decoder.load(cache)
        follow(model, decoder, cache, ids[:, prompt : prompt + 15], 1e-4)


def test_step_begins_with_nothing() -> None:
    model, ids = make_hybrid(), tokens(2, 12)
    decoder, whole = Decoder(model, batch=2, context=12), model(ids, use_cache=False).logits
    for _ in range(2):  # the second time after a reset
        got = torch.stack([decoder.step(token).clone() for token in ids.unbind(1)], dim=1)
        assert (got - whole).abs().max() < 1e-4
        decoder.reset()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_go_on_each_at_its_own(side: str) -> None:
    model, ids = make_hybrid(), tokens(3, 40)
    batch, mask = padded([ids[0, :3], ids[1, :11], ids[2, :24]], side)
    cache = prefilled(model, batch, mask)
    decoder = Decoder(model, batch=3, context=40)
    decoder.load(cache)
    follow(model, decoder, cache, ids[:, 26:38], 1e-4)


def test_a_packed_prompt_goes_on_with_its_last_text() -> None:
    model, ids = make_hybrid(), tokens(1, 40)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    cache = model(ids[:, :23], position_ids=positions, use_cache=True).past_key_values
    decoder = Decoder(model, batch=1, context=30)
    decoder.load(cache)
    alone = prefilled(model, ids[:, 9:23])
    follow(model, decoder, alone, ids[:, 23:37], 1e-4)


@pytest.mark.parametrize("family", ALL)
def test_every_family_with_every_block(family: str) -> None:
    model, ids = deepcopy(hybrid(family, every_block(family))), tokens(2, 30) % 90
    cache = prefilled(model, ids[:, :14])
    decoder = Decoder(model, batch=2, context=32)
    decoder.load(cache)
    follow(model, decoder, cache, ids[:, 14:], 1e-9)


@interpreted
@pytest.mark.parametrize("fused", [True, False])
def test_step_through_the_triton_forms(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the kernels read columns of one product, with and without biases."""
    from postnas.ops.jet_decode_triton import conv_step_triton, jet_decode_triton

    monkeypatch.setattr(jet_module, "jet_decode", jet_decode_triton)
    monkeypatch.setattr(jet_module, "conv_step", conv_step_triton)
    monkeypatch.setattr(jet_module.Jet, "_decodes", staticmethod(lambda x, step, state: False))  # the model's own way
    for bias in (True, False):
        model, ids = make_hybrid(["jet", "swa", "jet"], qkv_bias=bias), tokens(3, 30)
        cache = prefilled(model, ids[:, :20])
        decoder = Decoder(model, 3, 40, fused=fused)
        decoder.load(cache)
        follow(model, decoder, cache, ids[:, 20:25], 1e-4)


def test_generate_is_greedy() -> None:
    model, ids = make_hybrid(), tokens(2, 10)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)[:, 10:]
    decoder = Decoder(model, batch=2, context=40)
    decoder.load(prefilled(model, ids[:, :9]))
    assert torch.equal(decoder.generate(ids[:, 9], 12), wanted)


def test_bfloat16_states_stay_close_to_float32() -> None:
    model, ids = make_hybrid(["jet", "jet"]), tokens(2, 30)
    exact, small = Decoder(model, 2, 30), Decoder(model, 2, 30, dtype=torch.bfloat16)
    for token in ids.unbind(1):
        one, other = exact.step(token), small.step(token)
    assert small.states[0].recurrent.dtype == torch.bfloat16
    assert 0 < (one - other).norm() / one.norm() < 0.02


def test_a_float64_model_may_have_states_of_float64_or_less() -> None:
    model, token = make_hybrid(["jet", "attn"]).double(), tokens(2, 1)[:, 0]
    wanted = Decoder(model, 2, 8).step(token)
    assert torch.equal(Decoder(model, 2, 8, dtype=torch.float64).step(token), wanted)
    assert (Decoder(model, 2, 8, dtype=torch.float32).step(token) - wanted).norm() / wanted.norm() < 1e-5


def test_states_never_move_and_random_ones_are_seen() -> None:
    decoder, token = Decoder(make_hybrid(), 2, 16), tokens(2, 1)[:, 0]
    places = [tensor.data_ptr() for tensor in decoder._tensors()]
    empty = decoder.step(token).clone()
    decoder.fill_random(6)
    filled = decoder.step(token)
    assert decoder.length.tolist() == [7, 7]
    assert (empty - filled).abs().max() > 1e-2
    assert [tensor.data_ptr() for tensor in decoder._tensors()] == places


def test_fixed_stands_at_the_last_token() -> None:
    """It equals the step that fills the last slot, and is the same every time but for the linear states."""
    model, token = make_hybrid(["attn", "swa"]), tokens(2, 1)[:, 0]
    moving, fixed = Decoder(model, 2, 24), Decoder(model, 2, 24, fixed=True)
    moving.fill_random()
    fixed.fill_random()
    wanted = moving.step(token)
    for _ in range(3):
        assert (fixed.step(token) - wanted).abs().max() < 1e-5


def test_weights_are_held_once_and_still_save(tmp_path: Path) -> None:
    model = make_hybrid(["jet", "attn"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Decoder(model, 1, 8), Decoder(model, 2, 8)
    held = first.products[0].weight
    assert second.products[0].weight.data_ptr() == held.data_ptr()
    assert model.model.layers[0].self_attn.g_proj.weight.untyped_storage().data_ptr() == held.data_ptr()
    assert first.products[0].weight.shape[0] % 64 == 0
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float32).state_dict()
    assert loaded.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(loaded[name], value), name


def test_mistakes_are_named() -> None:
    model, ids = make_hybrid(["attn", "jet"]), tokens(2, 12)
    decoder = Decoder(model, 2, 8)
    with pytest.raises(UserError, match=r"^context: 8 slots do not hold the cache's 12 tokens"):
        decoder.load(prefilled(model, ids))
    with pytest.raises(UserError, match=r"^cache: holds 1 rows"):
        decoder.load(prefilled(model, ids[:1, :4]))
    decoder.generate(ids[:, 0], 8)
    with pytest.raises(UserError, match=r"^context: 8 tokens are full"):
        decoder.step(ids[:, 0])
    with pytest.raises(UserError, match=r"^batch: 0 is too small"):
        Decoder(model, 0, 8)
    with pytest.raises(UserError, match=r"^fixed: True"):
        Decoder(model, 2, 8, fixed=True).load(prefilled(model, ids))
    for wrong in (ids[:, :2], ids[0, :1], ids[:, 0].float()):
        with pytest.raises(UserError, match=r"^tokens: .* give one whole number for each of 2 rows$"):
            Decoder(model, 2, 8).step(wrong)
    for number in (9, -1):
        with pytest.raises(UserError, match=rf"^tokens: {number} is not possible; give 0 to the context's 8$"):
            Decoder(model, 2, 8).fill_random(number)
    for kind in (torch.float16, torch.float64, torch.int64):
        with pytest.raises(UserError, match=r"^dtype: torch\..* is no type of a state here; give torch.float32 or"):
            Decoder(model, 2, 8, dtype=kind)
    endless = Decoder(make_hybrid(["swa", "jet"]), 2, 12)  # a window and a state never fill
    assert endless.generate(ids[:, 0], 30).shape == (2, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_cuda_graph_gives_the_same_tokens(batch: int) -> None:
    """As the step without a graph, and as the model with a growing cache, beyond the window and after a reload."""
    model, ids = make_hybrid().cuda(), tokens(batch, 30).cuda()
    decoder = Decoder(model, batch, context=80)
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=PAD)[:, 30:]
    for _ in range(2):
        decoder.load(prefilled(model, ids[:, :-1]))
        assert torch.equal(decoder.generate(ids[:, -1], 40), wanted)
    decoder.load(prefilled(model, ids[:, :-1]))
    assert decoder.graph is not None
    decoder.graph = None
    assert torch.equal(decoder.generate(ids[:, -1], 40), wanted)

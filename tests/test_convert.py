"""`convert`: a base and a placement to a hybrid, weights inherited, nothing else touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_base, make_hybrid
from torch import Tensor

from postnas.errors import UserError
from postnas.models.checkpoint import load_base
from postnas.models.convert import convert
from postnas.models.model import HybridForCausalLM
from postnas.train.align import fingerprint

MIXED = ["attn", "jet", "swa", "gated_deltanet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), attention_bias=True)


@pytest.fixture(scope="module")
def base(folder: Path) -> HybridForCausalLM:
    return load_base(str(folder), dtype=torch.float32)


def tokens() -> Tensor:
    return torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_convert_keeps_what_it_does_not_replace(base: HybridForCausalLM) -> None:
    before = fingerprint(base)
    hybrid = convert(base, MIXED, dtype=torch.float32)
    assert fingerprint(base) == before
    assert hybrid.config.placement == MIXED
    own, source = hybrid.state_dict(), base.state_dict()
    assert all(torch.equal(own[n], source[n]) for n in source if ".self_attn." not in n or "layers.0." in n)
    for layer in (1, 3):
        for name in ("q_proj.weight", "q_proj.bias"):
            name = f"model.layers.{layer}.self_attn.{name}"
            torch.testing.assert_close(own[name], source[name])
    assert hybrid(tokens()).logits.isfinite().all()


def test_a_hybrid_shares_no_memory_with_its_base(base: HybridForCausalLM) -> None:
    before = fingerprint(base)
    hybrid = convert(base, MIXED, dtype=torch.float32)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(1.0)
    assert fingerprint(base) == before


@torch.no_grad()
def test_a_placement_of_attention_is_the_base(base: HybridForCausalLM) -> None:
    hybrid = convert(base, ["attn"] * 4, dtype=torch.float32)
    assert torch.equal(hybrid(tokens()).logits, base(tokens()).logits)


@torch.no_grad()
def test_a_window_inherits_the_attention_whole(base: HybridForCausalLM) -> None:
    wide = convert(base, ["attn", "swa", "swa", "attn"], {"swa": {"window_size": 40}}, dtype=torch.float32)
    torch.testing.assert_close(wide(tokens()).logits, base(tokens()).logits, rtol=0, atol=1e-4)
    narrow = convert(base, ["attn", "swa", "swa", "attn"], {"swa": {"window_size": 5}}, dtype=torch.float32)
    assert narrow.config.blocks["swa"] == {"window_size": 5}
    assert (narrow(tokens()).logits - base(tokens()).logits).abs().max() > 1e-2


def test_options_reach_the_blocks_and_the_config(base: HybridForCausalLM) -> None:
    options = {"jet": {"head_dim": 4, "expand_v": 3.0, "qkv_bias": False}, "gated_deltanet": {"conv_size": 3}}
    hybrid = convert(base, MIXED, options, dtype=torch.float32)
    jet, delta = hybrid.model.layers[1].self_attn, hybrid.model.layers[3].self_attn
    assert (jet.key_dim, jet.value_dim, jet.q_proj.bias) == (4, 12, None)
    assert delta.q_conv1d.weight.shape[-1] == 3
    assert delta.q_proj.bias is not None  # the base's default
    for block, chosen in options.items():
        stored = hybrid.config.blocks[block]
        assert chosen.items() <= stored.items()
        assert None not in stored.values()  # so that the folder stands without its base


def test_plus_minus_reaches_the_blocks(base: HybridForCausalLM) -> None:
    hybrid = convert(base, MIXED, {"jet": {"expand_v": 2.0}}, start="plus_minus", dtype=torch.float32)
    rows = hybrid.model.layers[1].self_attn.v_proj.weight.unflatten(0, (4, 2, -1))
    assert torch.equal(rows[:, 0], -rows[:, 1])


def test_convert_by_name_and_type(folder: Path) -> None:
    hybrid = convert(str(folder), MIXED)
    assert {parameter.dtype for parameter in hybrid.parameters()} == {torch.bfloat16}
    assert hybrid.config.dtype == torch.bfloat16


def test_the_seed_decides_the_whole_hybrid(base: HybridForCausalLM) -> None:
    def made(seed: int) -> str:
        torch.rand(3)
        return fingerprint(convert(base, MIXED, seed=seed))

    state = torch.get_rng_state()
    first = made(1)
    torch.set_rng_state(state)
    torch.rand(3)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    made(1)
    assert torch.equal(torch.rand(1), expected)  # the caller's own draws go on as if nothing had been made
    assert made(1) == first
    assert made(2) != first


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["attn"] * 3, {}, "placement: 3 mixers for 4 layers"),
    (["attn"] * 5, {}, "placement: 5 mixers for 4 layers"),
    ([], {}, "placement: 0 mixers for 4 layers"),
    (["attn", "jet", "mamba9", "attn"], {}, r"placement\[2\]: 'mamba9' is unknown"),
    (MIXED, {"options": {"jet": {"expand": 2}}}, "blocks.jet.expand: no such option"),
    (MIXED, {"options": {"jet": {"num_heads": 0}}}, "num_heads"),
    (MIXED, {"options": {"jett": {"num_heads": 2}}}, "options.jett"),
    (MIXED, {"start": "minus"}, "start: 'minus'"),
]


@pytest.mark.parametrize("placement, arguments, message", REFUSED)
def test_a_conversion_that_cannot_be_is_one_line(
    base: HybridForCausalLM, placement: list[str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        convert(base, placement, **arguments)
    assert "\n" not in str(raised.value)


def test_a_windowed_layer_cannot_become_full_attention() -> None:
    base = make_hybrid(["swa", "attn"])
    with pytest.raises(UserError, match=r"placement\[0\].*the base's 'swa'") as raised:
        convert(base, ["attn", "attn"])
    assert "\n" not in str(raised.value)
    assert convert(base, ["swa", "jet"]).config.blocks["swa"] == {"window_size": 9}

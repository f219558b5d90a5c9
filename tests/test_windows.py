"""The second pass on scores that are known, and on a tiny model whose windows see everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_base, make_hybrid
from torch import Tensor

from postnas.blocks import make_block
from postnas.errors import UserError
from postnas.models.checkpoint import load_base
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.ops.chunked_loss import chunked_kl
from postnas.search.windows import window_candidates, windows
from postnas.train.align import fingerprint

PLACEMENT: Placement = ["jet", "attn", "jet", "jet", "attn", "gated_deltanet", "jet", "jet"]
WORTH = [1.0, 50.0, 4.0, 3.0, 50.0, 2.0, 0.5, -1.0]
"""What a window in each layer takes off the planted score; most where attention already stands."""


def planted(placements: list[Placement]) -> list[float]:
    """Layers 2 and 3 do the same: a window in both is worth no more than one in layer 2."""
    each = [{layer for layer, name in enumerate(placement) if name == "swa"} for placement in placements]
    return [10.0 - sum(WORTH[layer] for layer in on) + WORTH[3] * ({2, 3} <= on) for on in each]


def test_windows_go_where_they_help_most_beside_those_chosen() -> None:
    """Layer 3 is second by itself and of no use once layer 2 has a window."""
    found, records = windows(planted, PLACEMENT, 3)
    assert found == ["swa", "attn", "swa", "jet", "attn", "swa", "jet", "jet"]
    assert records == [
        {"layer": 2, "score": 6.0, "gain": 4.0},
        {"layer": 5, "score": 4.0, "gain": 2.0},
        {"layer": 0, "score": 3.0, "gain": 1.0},
    ]
    assert PLACEMENT.count("swa") == 0  # the caller's own list is left alone


def test_attention_stays_and_a_window_that_hurts_says_so() -> None:
    found, records = windows(planted, PLACEMENT, 6)
    assert [name for name in found if name != "swa"] == ["attn", "attn"]
    assert [record["layer"] for record in records] == [2, 5, 0, 6, 3, 7]
    assert [record["gain"] for record in records[-2:]] == [0.0, -1.0]


def test_equal_layers_go_first_to_last_and_none_asks_for_no_score() -> None:
    def flat(placements: list[Placement]) -> list[float]:
        return [1.0] * len(placements)

    assert [record["layer"] for record in windows(flat, PLACEMENT, 3)[1]] == [0, 2, 3]

    def never(placements: list[Placement]) -> list[float]:
        raise AssertionError("scored")

    assert windows(never, PLACEMENT, 0) == (PLACEMENT, [])


def test_the_layers_of_a_step_are_scored_together() -> None:
    asked: list[int] = []

    def score(placements: list[Placement]) -> list[float]:
        asked.append(len(placements))
        return planted(placements)

    windows(score, PLACEMENT, 2)
    assert asked == [1, 6, 5]


@pytest.mark.parametrize("count", [-1, 7])
def test_more_windows_than_linear_layers_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"^place.windows: {count} is not possible with 6 linear layers; give 0 to 6$"):
        windows(planted, PLACEMENT, count)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> HybridForCausalLM:
    return load_base(str(make_base(tmp_path_factory.mktemp("base"))), dtype=torch.float32)


def supernet(base: HybridForCausalLM, window: int) -> Supernet:
    """A tiny base with random JetBlocks and windows of this size."""
    torch.manual_seed(5)
    jets = {layer: make_block("jet", base.config.dims()) for layer in range(base.config.num_hidden_layers)}
    return Supernet(base, {"jet": jets, "swa": window_candidates(base, window)})


@torch.no_grad()
def kl(net: Supernet, placement: Placement, ids: Tensor) -> float:
    h, step = net.embed(ids)
    student, teacher = (net.norm(net.run(h, step, p)).flatten(0, 1) for p in (placement, net.attention))
    return float(chunked_kl(student, net.head, teacher, net.head))


IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def test_a_window_as_long_as_the_text_gains_what_attention_would(base: HybridForCausalLM) -> None:
    start: Placement = ["jet", "attn", "jet", "jet"]

    def gains(window: int, stand_in: str) -> tuple[Placement, list[dict[str, Any]]]:
        net = supernet(base, window)

        def score(placements: list[Placement]) -> list[float]:
            return [kl(net, [stand_in if n == "swa" else n for n in p], IDS) for p in placements]

        return windows(score, start, 2)

    full, seen = gains(40, "attn"), gains(40, "swa")
    assert seen == full
    assert full[1][0]["gain"] > 1e-3
    short = gains(4, "swa")
    assert short[1][0]["score"] != full[1][0]["score"]


@torch.no_grad()
def test_a_hybrid_with_windows_is_built_with_them(base: HybridForCausalLM) -> None:
    net, placement = supernet(base, 7), ["jet", "attn", "swa", "swa"]
    hybrid = net.build(placement, torch.float32)
    assert [getattr(layer.self_attn, "window", None) for layer in hybrid.model.layers] == [None, None, 7, 7]
    h, step = net.embed(IDS)
    torch.testing.assert_close(
        hybrid.model(IDS, use_cache=False).last_hidden_state, net.norm(net.run(h, step, placement))
    )


def test_windows_are_copies_that_can_be_trained(base: HybridForCausalLM) -> None:
    """Training a window must not reach the base, and draws nothing from torch's generator."""
    before, state = fingerprint(base), torch.get_rng_state()
    mixers = window_candidates(base, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(mixers) == [0, 1, 2, 3]
    for mixer in mixers.values():
        for parameter in mixer.parameters():
            assert parameter.requires_grad and parameter.dtype == torch.float32
            with torch.no_grad():
                parameter.add_(1.0)
    assert fingerprint(base) == before


def test_a_base_with_windows_of_its_own() -> None:
    """Its full layers may get the same window; another window, or another RoPE, is refused in one line."""
    plain = make_hybrid(["swa", "attn"])
    assert list(window_candidates(plain, 9)) == [1]
    with pytest.raises(UserError, match=r"^place.window: 8 is not the 9 that the base's own windows have; give 9$"):
        window_candidates(plain, 8)
    turned = make_hybrid(["swa", "attn"], swa_rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with pytest.raises(UserError, match=r"^place.windows: this base has another RoPE for windows, .*; give 0$"):
        window_candidates(turned, 9)


def test_a_window_of_one_token_is_refused(base: HybridForCausalLM) -> None:
    with pytest.raises(UserError, match=r"window_size: 1 is too small"):
        window_candidates(base, 1)

"""Faults of the authors' code and of stock hybrids (padding, packing, short chunks, beams), on every family and block.

All in float64, so that the only difference between two ways of asking is rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CASES, around, feed, hybrid
from test_generate import beam_search
from tiny import PAD, padded, plain, tokens
from torch import Tensor

from postnas.blocks import linear_blocks
from postnas.blocks.state import KVState
from postnas.errors import UserError
from postnas.models.cache import HybridCache
from postnas.models.model import HybridForCausalLM

EXACT = {"rtol": 0.0, "atol": 1e-9}


LINEAR = [(family, block) for family, block in CASES if block in linear_blocks()]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    """A family's model with a block before and after attention."""
    family, block = request.param
    return hybrid(family, around(block))


@pytest.fixture(scope="module", params=LINEAR, ids="-".join)
def linear(request: pytest.FixtureRequest) -> HybridForCausalLM:
    """The same for the linear blocks only."""
    family, block = request.param
    return hybrid(family, around(block))


def rows_are_alone(model: HybridForCausalLM, ids: Tensor, mask: Tensor, logits: Tensor) -> None:
    """Are the logits at each row's real tokens those of these tokens by themselves?"""
    assert logits.isfinite().all()
    for row, real, found in zip(ids, mask.bool(), logits, strict=True):
        if real.any():
            torch.testing.assert_close(found[real], plain(model, row[real][None])[0], **EXACT)


# Padding


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_row_alone(model: HybridForCausalLM, side: str) -> None:
    """In the released code one row's convolution inputs leak into the next."""
    ids, mask = padded([row[:length] for row, length in zip(tokens(4), (40, 23, 2, 1), strict=True)], side)
    rows_are_alone(model, ids, mask, model(ids, attention_mask=mask).logits)


ONE_BY_ONE = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1],
        [1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


@torch.no_grad()
def test_a_chunk_of_one_token_heeds_its_mask(model: HybridForCausalLM) -> None:
    """Token by token, with padding before, within and after the rows, and a row of nothing else."""
    ids = tokens(4, ONE_BY_ONE.shape[1])
    logits = feed(model, ids, ONE_BY_ONE, [1] * ids.shape[1])
    rows_are_alone(model, ids, ONE_BY_ONE, logits)


SECOND_TURN = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


@torch.no_grad()
@pytest.mark.parametrize("whole_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_second_turn_on_a_filled_cache(model: HybridForCausalLM, side: str, whole_mask: bool) -> None:
    """With the mask of this turn, or with that of both; then a third turn without a mask."""
    ids, mask = padded([row[:length] for row, length in zip(tokens(4), (16, 2, 11, 7), strict=True)], side)
    turn, last = tokens(4, 6, seed=2), tokens(4, 3, seed=3)
    first = model(ids, attention_mask=mask)
    cache = first.past_key_values
    ids, mask = torch.cat([ids, turn], dim=1), torch.cat([mask, SECOND_TURN], dim=1)
    second = model(turn, attention_mask=mask if whole_mask else SECOND_TURN, past_key_values=cache)
    third = model(last, past_key_values=cache)
    ids, mask = torch.cat([ids, last], dim=1), torch.cat([mask, torch.ones_like(last)], dim=1)
    rows_are_alone(model, ids, mask, torch.cat([first.logits, second.logits, third.logits], dim=1))


@torch.no_grad()
def test_biases_do_not_leak_from_left_padding(linear: HybridForCausalLM) -> None:
    """Stock hybrids zero the hidden states at padding, so that q, k and v there are the bias."""
    mixer = linear.model.layers[0].self_attn
    if getattr(mixer.options, "qkv_bias", False):  # all but the official Jet layers
        assert min(getattr(mixer, f"{part}_proj").bias.norm() for part in "qkv") > 1
    ids = tokens(1, 20)
    expected = plain(linear, ids)
    for count in (1, 3, 30):
        batch, mask = padded([torch.full((20 + count,), PAD), ids[0]], "left")
        found = linear(batch, attention_mask=mask).logits[1:, count:]
        torch.testing.assert_close(found, expected, **EXACT)


def linear_states(cache: HybridCache) -> list[dict[str, Tensor]]:
    return [state.tensors() for state in cache.states if not isinstance(state, KVState)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_states_after_padding_are_those_of_the_row_alone(linear: HybridForCausalLM, side: str) -> None:
    rows = [row[:length] for row, length in zip(tokens(3), (21, 10, 2), strict=True)]
    ids, mask = padded(rows, side)
    cache = linear(ids, attention_mask=mask).past_key_values
    more = tokens(3, 2, seed=4)
    for index, row in enumerate(rows):
        alone = linear(row[None]).past_key_values
        for held, expected in zip(linear_states(cache), linear_states(alone), strict=True):
            assert held.keys() == expected.keys()
            for name in held:
                torch.testing.assert_close(held[name][index : index + 1], expected[name], **EXACT)
    logits = linear(more, past_key_values=cache).logits
    for row, extra, found in zip(rows, more, logits, strict=True):
        torch.testing.assert_close(found, plain(linear, torch.cat([row, extra])[None])[0, -2:], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_padding_alone_changes_no_bit_of_a_state(linear: HybridForCausalLM, count: int) -> None:
    ids = tokens(2, 12)
    cache = linear(ids).past_key_values
    before = [{name: value.clone() for name, value in held.items()} for held in linear_states(cache)]
    mask = torch.stack([torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)])
    linear(tokens(2, count, seed=2), attention_mask=mask, past_key_values=cache)
    for held, expected in zip(linear_states(cache), before, strict=True):
        for name in held:
            assert torch.equal(held[name][0], expected[name][0]), name
            assert not torch.equal(held[name][1], expected[name][1]), name


# Masks


@torch.no_grad()
def test_a_causal_mask_is_never_taken_for_padding(model: HybridForCausalLM) -> None:
    """The released `sdpa` path hands the JetBlock the causal mask [B, 1, T, T]. Ours is given none, and refuses one."""
    ids = tokens(2, 12)
    whole = plain(model, ids)
    found = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    causal = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(UserError, match="attention_mask: 4 dimensions") as raised:
        model(ids, attention_mask=causal)
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_no_token_hears_a_later_one(model: HybridForCausalLM) -> None:
    ids = tokens(1, 20)
    other = ids.clone()
    other[0, 14:] = (other[0, 14:] + 1) % 97
    a, b = plain(model, ids), plain(model, other)
    torch.testing.assert_close(a[:, :14], b[:, :14], **EXACT)
    assert (a[:, 14:] - b[:, 14:]).abs().amax(-1).min() > 1e-3


# Chunks


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[12, 2, 3, 2, 2, 3, 1, 3, 12], [1, 2, 3, 2, 32], [2] * 20, [3] * 13 + [1]])
def test_chunks_of_two_and_three_tokens_go_on_with_the_cache(model: HybridForCausalLM, sizes: list[int]) -> None:
    """They are shorter than the convolution's memory, so that old inputs have to move along."""
    ids = tokens(2, 40)
    logits = feed(model, ids, torch.ones_like(ids), sizes)
    torch.testing.assert_close(logits, plain(model, ids), **EXACT)


@torch.no_grad()
def test_short_chunks_of_a_padded_batch(model: HybridForCausalLM) -> None:
    ids, mask = padded([row[:length] for row, length in zip(tokens(3), (24, 17, 3), strict=True)], "left")
    logits = feed(model, ids, mask, [9, 2, 3, 3, 2, 2, 3])
    rows_are_alone(model, ids, mask, logits)


# Packing

LENGTHS = [5, 1, 2, 57, 3, 4]
"""Sequences shorter than the convolution's reach, and one across the border of the delta rule's chunks of 64."""


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@torch.no_grad()
def test_packed_rows_with_padding_after_them(model: HybridForCausalLM) -> None:
    """Two rows with borders of their own; the second is padded."""
    packs = [[6, 1, 2, 11], [9, 3]]
    ids, mask = padded([row[: sum(pack)] for row, pack in zip(tokens(2, 20), packs, strict=True)], "right")
    places = torch.zeros_like(ids)
    for index, pack in enumerate(packs):
        places[index, : sum(pack)] = positions(pack)
    logits = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    for index, pack in enumerate(packs):
        parts = ids[index, : sum(pack)].split(pack)
        expected = torch.cat([plain(model, part[None])[0] for part in parts])
        torch.testing.assert_close(logits[index, : sum(pack)], expected, **EXACT)


@torch.no_grad()
def test_a_packed_row_in_chunks(model: HybridForCausalLM) -> None:
    """Borders at the start, within and at the end of a chunk, on a filled cache."""
    ids, places = tokens(1, sum(LENGTHS)), positions(LENGTHS)
    cache, logits = None, []
    for piece, part in zip(
        ids.split([5, 2, 3, 54, 2, 6], dim=1), places.split([5, 2, 3, 54, 2, 6], dim=1), strict=True
    ):
        output = model(piece, position_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    separate = torch.cat([plain(model, part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(torch.cat(logits, dim=1), separate, **EXACT)


def test_gradients_of_a_packed_row_are_the_sums_of_its_sequences(model: HybridForCausalLM) -> None:
    """In the released code the convolution's backward does not know the borders."""
    ids = tokens(1, sum(LENGTHS))
    weigh = torch.randn(1, sum(LENGTHS), 97, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(ids: Tensor, weigh: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        """Of the logits' weighted sum: with respect to the embeddings [1, T, hidden], then to each weight."""
        embeds = model.model.embed_tokens(ids)
        logits = model(inputs_embeds=embeds, use_cache=False, **arguments).logits
        return torch.autograd.grad((logits * weigh).sum(), (embeds, *parameters))

    packed = gradients(ids, weigh, position_ids=positions(LENGTHS))
    parts = [gradients(*part) for part in zip(ids.split(LENGTHS, dim=1), weigh.split(LENGTHS, dim=1), strict=True)]
    expected = [torch.cat([part[0] for part in parts], dim=1), *map(sum, list(zip(*parts, strict=True))[1:])]
    for name, found, wanted in zip(("embeddings", *names), packed, expected, strict=True):
        assert found.abs().max() > 1e-4, name  # no path is idle
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


# Beams


@torch.no_grad()
def test_four_beams_equal_a_beam_search_without_a_cache(model: HybridForCausalLM) -> None:
    prompt = tokens(1, 6, seed=6)[0]
    options: dict[str, Any] = {"attention_mask": torch.ones(1, 6), "max_new_tokens": 8, "do_sample": False}
    found = model.generate(prompt[None], **options, num_beams=4)
    assert torch.equal(found[0, 6:], beam_search(model, prompt, 4, 8))

"""The hybrid's logits in every way of asking for them, its cache, and wrong input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXED, PAD, in_pieces, make_hybrid, padded, plain, tokens
from torch import Tensor
from transformers import DynamicCache

from postnas.blocks import BLOCKS
from postnas.errors import UserError
from postnas.models.cache import HybridCache
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM

CLOSE = {"rtol": 0.0, "atol": 1e-9}
TOKENS = 150
PLACEMENTS = {
    "mixed": MIXED,
    "attention first": ["swa", "attn", "jet", "gated_deltanet"],
    "attention last": ["gated_deltanet", "jet", "swa", "attn"],
}


@pytest.fixture(scope="module", params=list(PLACEMENTS))
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    """In float64, so that the only difference between two ways of asking is rounding, through every block in turn."""
    return make_hybrid(PLACEMENTS[request.param]).requires_grad_(False).double()


def test_the_pad_embedding_is_not_zero(model: HybridForCausalLM) -> None:
    assert model.model.embed_tokens.weight[PAD].norm() > 1


def test_every_block_stands_in_the_mixed_placement() -> None:
    assert set(MIXED) == set(BLOCKS)


@pytest.mark.parametrize("sizes", [[1] * TOKENS, [1, 7, 64, 1, 2, 75], [150], [149, 1], [3, 3, 3, 141]])
def test_logits_in_pieces_are_those_of_one_piece(model: HybridForCausalLM, sizes: list[int]) -> None:
    ids = tokens()
    torch.testing.assert_close(in_pieces(model, ids, sizes), plain(model, ids), **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_the_logits_of_each_row_alone(model: HybridForCausalLM, side: str, use_cache: bool) -> None:
    rows = [row[:length] for row, length in zip(tokens(4), (150, 131, 7, 1), strict=True)]
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    assert logits.isfinite().all()
    for row, found, real in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(found[real], plain(model, row[None])[0], **CLOSE)


def test_padded_batch_in_chunks(model: HybridForCausalLM) -> None:
    """The shorter rows' first chunks are padding alone, and one chunk is one token."""
    rows = [row[:length] for row, length in zip(tokens(3), (150, 131, 7), strict=True)]
    ids, mask = padded(rows, "left")
    cache, logits = None, []
    for piece, part in zip(ids.split([1, 64, 77, 1, 7], dim=1), mask.split([1, 64, 77, 1, 7], dim=1), strict=True):
        output = model(piece, attention_mask=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    for row, found, real in zip(rows, torch.cat(logits, dim=1), mask.bool(), strict=True):
        torch.testing.assert_close(found[real], plain(model, row[None])[0], **CLOSE)


LENGTHS = [60, 1, 89]


def packed_positions(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("lengths", [[75, 75], LENGTHS, [1, 149], [149, 1]])
def test_sequences_packed_in_one_row_do_not_meet(model: HybridForCausalLM, lengths: list[int]) -> None:
    ids = tokens()
    packed = model(ids, position_ids=packed_positions(lengths).expand(2, -1), use_cache=False).logits
    separate = torch.cat([plain(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, **CLOSE)


@pytest.mark.parametrize("sizes", [[60, 90], [60, 1, 89], [61, 89], [59, 91], [7, 53, 1, 1, 88]])
def test_a_packed_row_in_chunks(model: HybridForCausalLM, sizes: list[int]) -> None:
    """A sequence may begin where a chunk does; the cache then holds only another's states."""
    ids = tokens(1)
    cache, logits = None, []
    for piece, part in zip(ids.split(sizes, dim=1), packed_positions().split(sizes, dim=1), strict=True):
        output = model(piece, position_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    separate = torch.cat([plain(model, part) for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(torch.cat(logits, dim=1), separate, **CLOSE)


@pytest.mark.parametrize("lengths", [LENGTHS, [149, 1], [148, 2]])
def test_a_packed_row_goes_on_with_its_last_sequence(model: HybridForCausalLM, lengths: list[int]) -> None:
    ids, more = tokens(), tokens(count=12, seed=1)
    positions = packed_positions(lengths).expand(2, -1)
    cache = model(ids, position_ids=positions, use_cache=True).past_key_values
    found = in_pieces_from(model, cache, more, [1, 2, 9])
    expected = plain(model, torch.cat([ids[:, -lengths[-1] :], more], dim=1))[:, -12:]
    torch.testing.assert_close(found, expected, **CLOSE)


def in_pieces_from(model: HybridForCausalLM, cache: HybridCache, ids: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([model(p, past_key_values=cache).logits for p in ids.split(sizes, dim=1)], dim=1)


def test_position_ids_that_only_rise_are_one_sequence(model: HybridForCausalLM) -> None:
    ids = tokens()
    positions = torch.arange(TOKENS)[None]
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, plain(model, ids), **CLOSE)
    cache = model(ids[:, :70], position_ids=positions[:, :70], use_cache=True).past_key_values
    found = model(ids[:, 70:], position_ids=positions[:, 70:], past_key_values=cache).logits
    torch.testing.assert_close(found, plain(model, ids)[:, 70:], **CLOSE)


TURN = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("whole_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_second_turn_on_a_filled_cache(model: HybridForCausalLM, side: str, whole_mask: bool) -> None:
    """Then a third turn of one token with a mask, and a fourth without: each row as if it were alone."""
    rows = [row[:length] for row, length in zip(tokens(4), (20, 31, 7, 1), strict=True)]
    ids, mask = padded(rows, side)
    turns = [(tokens(4, 6, seed=2), TURN), (tokens(4, 1, seed=3), torch.tensor([[1], [0], [1], [1]]))]
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    seen = [[row] for row in rows]
    for turn, part in turns:
        mask = torch.cat([mask, part], dim=1)
        logits = model(turn, attention_mask=mask if whole_mask else part, past_key_values=cache).logits
        for index, real in enumerate(part.bool()):
            seen[index].append(turn[index, real])
            expected = plain(model, torch.cat(seen[index])[None])[0]
            count = int(real.sum())
            torch.testing.assert_close(logits[index, real], expected[len(expected) - count :], **CLOSE)
    last = tokens(4, 3, seed=4)
    logits = model(last, past_key_values=cache).logits
    for index, row in enumerate(seen):
        expected = plain(model, torch.cat([*row, last[index]])[None])[0, -3:]
        torch.testing.assert_close(logits[index], expected, **CLOSE)


def test_a_returned_cache_is_gone_on_with(model: HybridForCausalLM) -> None:
    ids = tokens()
    first = model(ids[:, :100])
    assert isinstance(first.past_key_values, HybridCache)
    second = model(ids[:, 100:140], past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values  # in place
    third = model(ids[:, 140:], past_key_values=second.past_key_values)
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(found, plain(model, ids), **CLOSE)


def test_inputs_embeds_and_logits_to_keep(model: HybridForCausalLM) -> None:
    ids = tokens()
    whole = plain(model, ids)
    embeds = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, use_cache=False).logits, whole, rtol=0, atol=0)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], **CLOSE)
    kept = torch.tensor([4, 90])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, whole[:, kept], **CLOSE)


def test_bfloat16_logits_are_near_float32(model: HybridForCausalLM) -> None:
    ids = tokens()
    low = copy.deepcopy(model).to(torch.bfloat16)
    distance = (plain(low, ids).float() - plain(model, ids)).norm() / plain(model, ids).norm()
    assert distance < 0.08


# The cache


def filled(model: HybridForCausalLM) -> tuple[HybridCache, list[Tensor]]:
    """A cache of three rows of different lengths, and the rows."""
    rows = [row[:length] for row, length in zip(tokens(3), (20, 13, 5), strict=True)]
    ids, mask = padded(rows, "left")
    cache = model(ids, attention_mask=mask).past_key_values
    assert isinstance(cache, HybridCache)
    return cache, rows


def goes_on(model: HybridForCausalLM, cache: HybridCache, rows: list[Tensor]) -> None:
    """Does the cache hold these rows, in this order?"""
    more = tokens(len(rows), 4, seed=5)
    logits = model(more, past_key_values=cache).logits
    for row, extra, found in zip(rows, more, logits, strict=True):
        torch.testing.assert_close(found, plain(model, torch.cat([row, extra])[None])[0, -4:], **CLOSE)


def test_reorder_cache_moves_and_repeats_rows(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    goes_on(model, cache, [rows[2], rows[0], rows[0]])


def test_reorder_cache_grows_one_row_to_many(model: HybridForCausalLM) -> None:
    ids = tokens(1, 30)
    cache = model(ids).past_key_values
    cache.reorder_cache(torch.zeros(4, dtype=torch.int64))
    assert cache.batch_size == 4
    goes_on(model, cache, [ids[0]] * 4)


def test_batch_repeat_interleave_repeats_each_row_beside_itself(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    cache.batch_repeat_interleave(2)
    goes_on(model, cache, [row for row in rows for _ in range(2)])


def test_batch_select_indices_keeps_some_rows(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert cache.batch_size == 2
    goes_on(model, cache, [rows[2], rows[1]])


def test_get_seq_length_counts_padding_too(model: HybridForCausalLM) -> None:
    """transformers lengthens its masks by it, and those have a column for padding."""
    assert HybridCache(model.config).get_seq_length() == 0
    cache, rows = filled(model)
    assert cache.get_seq_length() == 20
    goes_on(model, cache, rows)
    assert cache.get_seq_length() == 24
    assert cache.get_seq_length(len(model.model.layers) - 1) == 24
    assert len(cache) == len(model.model.layers)


def test_a_copy_of_a_cache_is_its_own(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    other = copy.deepcopy(cache)
    goes_on(model, cache, rows)
    goes_on(model, other, rows)  # untouched by what the first one has read since
    assert other.nbytes == cache.nbytes


def test_reset_forgets_everything(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    goes_on(model, cache, [row[:0] for row in rows])


def test_crop_is_one_line(model: HybridForCausalLM) -> None:
    cache, rows = filled(model)
    with pytest.raises(UserError, match="crop") as raised:
        cache.crop(-1)
    assert "\n" not in str(raised.value)
    goes_on(model, cache, rows)


def test_cache_bytes_are_the_blocks_state_bytes(model: HybridForCausalLM) -> None:
    ids = tokens(2, 256)  # whole blocks of KV slots
    cache = copy.deepcopy(model).float()(ids).past_key_values
    mixers = [layer.self_attn for layer in model.model.layers]
    assert cache.nbytes == 2 * sum(mixer.state_bytes(256, torch.float32) for mixer in mixers)


# The window


def test_window_sees_its_last_token_and_no_further() -> None:
    """With a window of 9, what token 20 hears of token 12 (8 back) and of token 11 (9 back)."""
    model = make_hybrid(["swa"], blocks={"swa": {"window_size": 9}}).requires_grad_(False)
    ids = tokens(1, 21)
    for way in ("whole", "pieces", "padded"):
        for back, heard in ((8, True), (9, False)):
            other = ids.clone()
            other[0, 20 - back] = (other[0, 20 - back] + 1) % 97
            a, b = (last_logits(model, x, way) for x in (ids, other))
            assert ((a - b).abs().max() > 1e-3) == heard, (way, back)


def last_logits(model: HybridForCausalLM, ids: Tensor, way: str) -> Tensor:
    if way == "pieces":
        return in_pieces(model, ids, [1] * 21)[0, -1]
    if way == "padded":
        padding = torch.full((1, 4), PAD)
        mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 21)], dim=1)
        return model(torch.cat([padding, ids], dim=1), attention_mask=mask).logits[0, -1]
    return plain(model, ids)[0, -1]


def test_a_window_over_everything_is_full_attention() -> None:
    wide = make_hybrid(["swa"] * 2, blocks={"swa": {"window_size": TOKENS}})
    full = make_hybrid(["attn"] * 2)
    full.load_state_dict(wide.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(wide, tokens()), plain(full, tokens()), **CLOSE)


# Config and wrong input


def test_config_builds_without_arguments_and_survives_saving(tmp_path: Path) -> None:
    assert HybridConfig().placement == ["attn"] * HybridConfig().num_hidden_layers
    config = make_hybrid().config
    config.save_pretrained(tmp_path)
    again = HybridConfig.from_pretrained(tmp_path)
    assert again.placement == MIXED
    ours, theirs = config.to_dict(), again.to_dict()
    ours.pop("dtype", None), theirs.pop("dtype", None)
    assert theirs == ours


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 2, "placement": ["attn"]}, "placement: 1 mixers for 2 layers"),
    ({"num_hidden_layers": 2, "placement": ["attn", "mamba9"]}, r"placement\[1\]: 'mamba9' is unknown"),
    ({"num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads: 4"),
]


@pytest.mark.parametrize("fields, message", BAD_CONFIGS)
def test_a_config_that_cannot_be_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        HybridConfig(**fields)
    assert "\n" not in str(raised.value)


def test_bad_inputs_are_one_line() -> None:
    model, ids = make_hybrid(["jet"]), tokens(2, 8)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 8, 8)}, "attention_mask: 4 dimensions"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 5)}, "attention_mask: shape"),
        ({"input_ids": ids, "attention_mask": torch.ones(3, 8)}, "attention_mask: shape"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "past_key_values: DynamicCache"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 8, 32)}, "input_ids"),
        ({}, "input_ids"),
    ]
    for arguments, message in calls:
        with pytest.raises(UserError, match=message) as raised:
            model(**arguments)
        assert "\n" not in str(raised.value)

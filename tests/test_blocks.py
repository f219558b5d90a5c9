"""The contract of a token mixer, for every block in BLOCKS: one layer in float64 against itself in other pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.blocks import BLOCKS, linear_blocks, make_block
from postnas.blocks.dims import Dims
from postnas.blocks.state import BLOCK as KV_SLOTS
from postnas.blocks.state import KVState
from postnas.models.cache import HybridCache
from postnas.models.config import HybridConfig
from postnas.models.model import HybridModel

HIDDEN, TOKENS = 24, 75
OPTIONS: dict[str, dict[str, Any]] = {"swa": {"window_size": 5}, "jet": {"expand_v": 1.5}}
"""Where a block's own options suit no test of 75 tokens, or would leave a path untried."""
EXACT = {"rtol": 0.0, "atol": 1e-10}
every_block = pytest.mark.parametrize("block", list(BLOCKS))


def layer(block: str, dtype: torch.dtype = torch.float64, seed: int = 3) -> HybridModel:
    """A model of one layer, with biases and q/k norms, and every weight random so that no path is idle."""
    config = HybridConfig(
        vocab_size=11,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        qkv_bias=True,
        qk_norm=True,
        placement=[block],
        blocks={block: OPTIONS.get(block, {})},
    )
    model = HybridModel(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(True)


def mix(
    model: HybridModel,
    x: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: HybridCache | None = None,
) -> Tensor:
    """The mixer's output for its input x [B, T, hidden], as the model calls it."""
    step, order = model.make_step(x, mask, positions, cache)
    state = None if cache is None else cache.states[0]
    if order is None:
        return model.layers[0].self_attn(x, step, state)[0]
    rows = torch.arange(x.shape[0])[:, None]
    y, _ = model.layers[0].self_attn(x[rows, order], step, state)
    return y[rows, order.argsort(dim=1)]


def in_pieces(model: HybridModel, x: Tensor, sizes: list[int]) -> Tensor:
    cache = HybridCache(model.config)
    return torch.cat([mix(model, piece, cache=cache) for piece in x.split(sizes, dim=1)], dim=1)


def inputs(batch: int = 2, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN).to(dtype)


@every_block
@torch.no_grad()
def test_one_forward_equals_token_by_token(block: str) -> None:
    model, x = layer(block), inputs()
    torch.testing.assert_close(in_pieces(model, x, [1] * TOKENS), mix(model, x), **EXACT)


@every_block
@pytest.mark.parametrize("sizes", [[1, 7, 64, 1, 2], [4, 1, 5, 65], [2, 3, 2, 3, 1, 64], [70, 5], [74, 1]])
@torch.no_grad()
def test_one_forward_equals_uneven_pieces(block: str, sizes: list[int]) -> None:
    model, x = layer(block), inputs()
    torch.testing.assert_close(in_pieces(model, x, sizes), mix(model, x), **EXACT)


@every_block
@torch.no_grad()
def test_no_token_sees_a_later_one(block: str) -> None:
    model, x = layer(block), inputs()
    other = x.clone()
    other[:, 40:] = torch.randn_like(other[:, 40:])
    torch.testing.assert_close(mix(model, other)[:, :40], mix(model, x)[:, :40], **EXACT)
    assert (mix(model, other)[:, 40] - mix(model, x)[:, 40]).abs().max() > 1e-3


@every_block
@torch.no_grad()
def test_rows_do_not_meet(block: str) -> None:
    model, x = layer(block), inputs(batch=3)
    alone = torch.cat([mix(model, x[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(mix(model, x), alone, **EXACT)


MASKS: dict[str, list[list[int]]] = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    "both sides": [[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]],
    "inside": [[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 0, 1, 0]],
    "a whole row": [[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]],
    "one token": [[0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]],
    "all but none": [[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
}


def rows_alone(model: HybridModel, pieces: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """Per piece and row, the outputs of the real tokens when each row runs alone, unpadded, in one forward."""
    found: list[list[Tensor]] = [[] for _ in pieces]
    for row in range(pieces[0][0].shape[0]):
        real = [x[row, mask[row].bool()] for x, mask in pieces]
        joined = torch.cat(real)[None]
        y = mix(model, joined)[0] if joined.shape[1] else joined[0]
        for place, part in zip(found, y.split([len(r) for r in real]), strict=True):
            place.append(part)
    return found


@every_block
@pytest.mark.parametrize("second", list(MASKS))
@pytest.mark.parametrize("first", list(MASKS))
@torch.no_grad()
def test_padding_anywhere_changes_nothing(block: str, first: str, second: str) -> None:
    """A padded chunk, a padded chunk on the filled cache, a chunk of one masked token, then five plain tokens."""
    model = layer(block)
    one = torch.tensor([[1], [0]])
    masks = [torch.tensor(MASKS[first]), torch.tensor(MASKS[second]), one, torch.ones(2, 5, dtype=torch.int64)]
    pieces = [(inputs(tokens=mask.shape[1]), mask) for mask in masks]
    cache = HybridCache(model.config)
    outputs = [mix(model, x, None if mask.all() else mask, cache=cache) for x, mask in pieces]
    for (_, mask), y, alone in zip(pieces, outputs, rows_alone(model, pieces), strict=True):
        assert y.isfinite().all()
        for row in range(2):
            torch.testing.assert_close(y[row, mask[row].bool()], alone[row], **EXACT)


@every_block
@torch.no_grad()
def test_a_mask_may_cover_the_cached_tokens_too(block: str) -> None:
    model, x = layer(block), inputs(tokens=16)
    first, second = torch.tensor(MASKS["left"]), torch.tensor(MASKS["inside"])
    short, long = HybridCache(model.config), HybridCache(model.config)
    for cache in (short, long):
        mix(model, x[:, :8], first, cache=cache)
    a = mix(model, x[:, 8:], second, cache=short)
    b = mix(model, x[:, 8:], torch.cat([first, second], dim=1), cache=long)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def leaves(model: HybridModel, x: Tensor) -> list[Tensor]:
    return [x, *model.layers[0].self_attn.parameters()]


@every_block
def test_gradients_ignore_padding(block: str) -> None:
    model, mask = layer(block), torch.tensor(MASKS["inside"])
    x = inputs(tokens=8).requires_grad_()
    weight = inputs(tokens=8)
    y = mix(model, x, mask)
    padded = torch.autograd.grad((y * weight)[mask.bool()].sum(), leaves(model, x))
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        real = mask[row].bool()
        total = total + (mix(model, x[row, real][None])[0] * weight[row, real]).sum()
    alone = torch.autograd.grad(total, leaves(model, x))
    torch.testing.assert_close(padded, alone, **EXACT)
    assert padded[0][~mask.bool()].abs().max() == 0


LENGTHS = [3, 1, 1, 34, 2, 34]


def packed_positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@every_block
def test_packed_equals_separate_in_outputs_and_gradients(block: str) -> None:
    model, x = layer(block), inputs(batch=1).requires_grad_()
    packed = mix(model, x, positions=packed_positions(LENGTHS))
    separate = torch.cat([mix(model, part) for part in x.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, **EXACT)
    weight = inputs(batch=1)
    a, b = (torch.autograd.grad((y * weight).sum(), leaves(model, x)) for y in (packed, separate))
    torch.testing.assert_close(a, b, **EXACT)


@every_block
@pytest.mark.parametrize("sizes", [[3, 72], [4, 71], [5, 34, 36], [39, 2, 34], [1] * 75, [38, 1, 1, 35]])
@torch.no_grad()
def test_packed_in_chunks_equals_separate(block: str, sizes: list[int]) -> None:
    """Borders inside chunks and between them; then a chunk that goes on with the last sequence."""
    model, x, more = layer(block), inputs(batch=1), inputs(batch=1, tokens=4)
    positions = packed_positions(LENGTHS)
    cache = HybridCache(model.config)
    pieces = zip(x.split(sizes, dim=1), positions.split(sizes, dim=1), strict=True)
    packed = torch.cat([mix(model, piece, positions=part, cache=cache) for piece, part in pieces], dim=1)
    separate = [mix(model, part) for part in x.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **EXACT)
    after = mix(model, more, cache=cache)
    last = torch.cat([x[:, -LENGTHS[-1] :], more], dim=1)
    torch.testing.assert_close(after, mix(model, last)[:, -4:], **EXACT)


@every_block
@torch.no_grad()
def test_packed_rows_may_be_padded(block: str) -> None:
    """Row 0: two sequences and padding on the left; row 1: three sequences and padding inside and on the right."""
    model, x, more = layer(block), inputs(tokens=12), inputs(tokens=3)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0]])
    lengths = [[4, 5], [3, 2, 3]]
    positions = torch.full((2, 12), 5)
    for row, parts in enumerate(lengths):
        positions[row, mask[row].bool()] = packed_positions(parts)[0]
    cache = HybridCache(model.config)
    y = mix(model, x, mask, positions, cache)
    after = mix(model, more, cache=cache)
    for row, parts in enumerate(lengths):
        real = x[row, mask[row].bool()][None]
        alone = torch.cat([mix(model, part) for part in real.split(parts, dim=1)], dim=1)[0]
        torch.testing.assert_close(y[row, mask[row].bool()], alone, **EXACT)
        last = torch.cat([real[:, -parts[-1] :], more[row : row + 1]], dim=1)
        torch.testing.assert_close(after[row], mix(model, last)[0, -3:], **EXACT)


@every_block
def test_a_cache_changes_no_gradient(block: str) -> None:
    model, x = layer(block), inputs().requires_grad_()
    weight = inputs()
    without = torch.autograd.grad((mix(model, x) * weight).sum(), leaves(model, x))
    cache = HybridCache(model.config)
    with_cache = torch.autograd.grad((mix(model, x, cache=cache) * weight).sum(), leaves(model, x))
    torch.testing.assert_close(with_cache, without, rtol=0, atol=0)
    assert not any(value.requires_grad for value in cache.states[0].tensors().values())


@every_block
@torch.no_grad()
def test_rows_of_a_state_can_be_picked_and_repeated(block: str) -> None:
    model, x, more = layer(block), inputs(batch=3, tokens=9), inputs(batch=4, tokens=3)
    cache = HybridCache(model.config)
    mix(model, x, torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3]), cache=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    y = mix(model, more, cache=cache)
    for row, source in enumerate([x[2, :6], x[0], x[0], x[1, 4:]]):
        whole = torch.cat([source, more[row]])[None]
        torch.testing.assert_close(y[row], mix(model, whole)[0, -3:], **EXACT)


@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [1, 3, 4, 5, 100, KV_SLOTS, 2 * KV_SLOTS])
@torch.no_grad()
def test_state_bytes_are_the_bytes_of_the_state(block: str, dtype: torch.dtype, context: int) -> None:
    model = layer(block, dtype)
    cache = HybridCache(model.config)
    mix(model, inputs(batch=1, tokens=context, dtype=dtype), cache=cache)
    mixer, state = model.layers[0].self_attn, cache.states[0]
    if block == "attn":  # whole blocks of slots are allocated; what is used of them is what counts
        assert isinstance(state, KVState)
        assert state.nbytes == mixer.state_bytes(-(-context // KV_SLOTS) * KV_SLOTS, dtype)
        assert mixer.state_bytes(context, dtype) * KV_SLOTS == mixer.state_bytes(KV_SLOTS, dtype) * context
        assert state.length == context
    else:
        assert state.nbytes == mixer.state_bytes(context, dtype)


@pytest.mark.parametrize("block", linear_blocks())
@torch.no_grad()
def test_a_linear_state_does_not_grow_and_keeps_float32(block: str) -> None:
    model = layer(block, torch.bfloat16)
    cache = HybridCache(model.config)
    sizes, places = [], []
    for tokens in (1, 64, 200, 1):
        mix(model, inputs(tokens=tokens, dtype=torch.bfloat16), cache=cache)
        sizes.append(cache.states[0].nbytes)
        places.append(cache.states[0].recurrent.data_ptr())
    assert len(set(sizes)) == 1
    assert len(set(places)) == 1  # changed in place
    assert cache.states[0].recurrent.dtype == torch.float32


@every_block
def test_flops_grow_with_the_tokens(block: str) -> None:
    mixer = layer(block).layers[0].self_attn
    assert 0 < mixer.flops(1) < mixer.flops(64) < mixer.flops(128)
    assert mixer.flops(1, past=100) >= mixer.flops(1)


def test_attention_flops_of_two_chunks_are_those_of_one() -> None:
    for block in ("attn", "swa"):
        mixer = layer(block).layers[0].self_attn
        for tokens in (1, 4, 5, 6, 30):
            assert mixer.flops(tokens) + mixer.flops(9, past=tokens) == mixer.flops(tokens + 9), (block, tokens)


def test_a_window_limits_the_pairs_that_flops_count() -> None:
    from postnas.blocks.attention import visible_pairs

    for window in (None, 2, 5, 40):
        for past in (0, 1, 4, 5, 30):
            for tokens in (1, 3, 12):
                seen = sum(min(past + t + 1, window or 10**9) for t in range(tokens))
                assert visible_pairs(tokens, past, window) == seen


def test_training_in_bfloat16_compares_with_float32() -> None:
    """Same weights, both types: what is kept in float32 (g, state, norms) keeps the distance near bfloat16's own."""
    for block in BLOCKS:
        wide, low = layer(block, torch.float32), layer(block, torch.bfloat16)
        x = inputs(dtype=torch.float32).bfloat16()
        a, b = mix(wide, x.float()), mix(low, x)
        assert b.dtype == torch.bfloat16
        assert ((a - b.float()).norm() / a.norm()).item() < 0.03, block


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "masked"), [(1, False), (5, True), (8, True), (9, True), (9, False)])
def test_folded_queries_give_what_grouped_heads_give(kv_heads: int, tokens: int, masked: bool) -> None:
    """The form that a GPU takes under a mask, against the one with grouped heads, in float64."""
    dims = Dims(hidden=24, heads=4, kv_heads=kv_heads, head_dim=6)
    attention = make_block("attn", dims)
    q = torch.randn(2, 4, tokens, 6, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 9, 6, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, tokens, 9) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attention._folded(q, k, v, mask), expected, rtol=0, atol=1e-12)


def test_the_mask_of_many_tokens_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each query head that shares a key it would be tokens x keys larger."""
    attention = make_block("attn", Dims(hidden=24, heads=4, kv_heads=1, head_dim=6))
    seen: list[int] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **rest: Any) -> Tensor:
        seen.append(attn_mask.numel())
        return real(q, k, v, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    k = torch.randn(1, 1, 50, 6)
    for tokens in (1, 40):
        mask = torch.ones(1, 1, tokens, 50, dtype=torch.bool)
        attention._folded(torch.randn(1, 4, tokens, 6), k, k, mask)
    assert seen == [4 * 50, 40 * 50]

"""Every family through transformers' own door: its own class beside ours, a training step, and each way to generate."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, FAMILIES, JET_NEMOTRON, converted, every_block, hybrid, own_model
from test_families import WINDOWED
from test_generate import beam_search, by_hand, left_padded, prompts
from tiny import PAD, padded, plain, tokens
from torch import Tensor

from postnas.blocks import BLOCKS
from postnas.models.cache import HybridCache
from postnas.models.convert import convert
from postnas.models.load import load_model
from postnas.models.model import HybridForCausalLM
from postnas.models.outputs import CACHE

NEW = 12

# transformers' own class beside ours

BASES: dict[str, tuple[str, dict[str, Any]]] = FAMILIES | {
    "qwen2 windowed": ("qwen2", WINDOWED),
    "qwen3 windowed": ("qwen3", {"head_dim": 16} | WINDOWED),
}


@pytest.mark.parametrize("family", list(BASES))
@torch.no_grad()
def test_kept_attention_says_what_transformers_own_class_says(family: str, tmp_path: Path) -> None:
    """Logits, and 64 greedy tokens of a padded batch, in float32."""
    kind, fields = BASES[family]
    theirs = own_model(kind, fields)
    theirs.save_pretrained(tmp_path)
    types = getattr(theirs.config, "layer_types", None) or ["full_attention"] * 3
    placement = ["swa" if name == "sliding_attention" else "attn" for name in types]
    assert ("swa" in placement) == (family in ("gemma3", "qwen2 windowed", "qwen3 windowed"))
    ours = convert(str(tmp_path), placement, dtype=torch.float32)
    batch = left_padded(prompts(5, 30, 1))
    real = batch["attention_mask"].bool()
    # transformers works positions out of the mask in `generate` only
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = theirs(**batch, position_ids=places).logits[real]
    torch.testing.assert_close(ours(**batch).logits[real], expected, rtol=0.0, atol=1e-4)
    found, wanted = (model.generate(**batch, max_new_tokens=64, do_sample=False) for model in (ours, theirs))
    assert found.shape == (3, 30 + 64)
    assert torch.equal(found, wanted)
    assert min(len(row[30:].unique()) for row in found) > 1  # else a model that repeats itself would do


# Convert, train, save, load


@pytest.mark.parametrize("family", ALL)
def test_a_converted_hybrid_trains_saves_and_loads(family: str, tmp_path: Path) -> None:
    """Straight from `convert`. Two steps, since a kernel generator's second matrix starts at zero: only the second
    step reaches its first one. No weight decay, so that a weight moves by its gradient alone."""
    model = converted(family, every_block(family)).train().requires_grad_()
    ids, mask = padded([row[:length] for row, length in zip(tokens(2, 40), (40, 25), strict=True)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(2):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite())
    assert losses[1] < losses[0]
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still
    model.eval().save_pretrained(tmp_path)
    again = load_model(tmp_path).eval()
    assert type(again) is type(model)
    assert again.config.placement == list(every_block(family))
    with torch.no_grad():
        torch.testing.assert_close(plain(again, tokens()), plain(model, tokens()), rtol=0, atol=0)
        batch = left_padded(prompts(5, 9, 1))
        found, wanted = (one.generate(**batch, max_new_tokens=NEW, do_sample=False) for one in (again, model))
    assert torch.equal(found, wanted)
    assert found.shape == (3, 9 + NEW)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_the_name_of_an_attention_implementation_changes_nothing(kind: str, tmp_path: Path) -> None:
    """In the released code the choice decides what a linear layer takes for its padding mask."""
    from transformers import AutoModelForCausalLM

    model = hybrid(JET_NEMOTRON, every_block(JET_NEMOTRON))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True, attn_implementation=kind).eval()
    assert again.config._attn_implementation == kind
    ids, mask = padded([row[:length] for row, length in zip(tokens(), (150, 90), strict=True)], "left")
    found, expected = (one(ids, attention_mask=mask).logits[mask.bool()] for one in (again, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


FIRST = """
import postnas
from transformers import PreTrainedModel, LlamaForCausalLM
from transformers import AutoModelForCausalLM, AutoConfig
print(type(AutoConfig.for_model("jet_nemotron")).__name__)
"""


def test_import_postnas_leaves_transformers_free_to_load_in_any_order() -> None:
    """Its model classes load its Auto classes on the way, and ours join these while nothing else is ready."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["JetNemotronConfig"]


# Generation


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    """Every block that the family may have, in float64."""
    return hybrid(request.param, every_block(request.param))


def test_every_block_is_there(model: HybridForCausalLM) -> None:
    known = {"attn", "swa", "jet"} if model.config.model_type == "jet_nemotron" else set(BLOCKS)
    assert set(model.config.placement or []) == known


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 5}], ids=str)
def test_greedy_in_a_padded_batch_is_a_full_forward_a_token(model: HybridForCausalLM, options: dict[str, int]) -> None:
    rows = prompts(5, 20, 1)
    batch = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, **options)[:, 20:]
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(found, by_hand(model, row, NEW)[0])
    assert len(batch.unique()) > NEW  # the rows differ, and none repeats itself for ever


@torch.no_grad()
def test_beams_in_a_padded_batch(model: HybridForCausalLM) -> None:
    rows = prompts(5, 12, 1)
    batch = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, num_beams=4)[:, 12:]
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(found, beam_search(model, row, 4, NEW))
    greedy = [by_hand(model, row, NEW)[0] for row in rows]
    assert not torch.equal(torch.stack(greedy), batch)  # else beams were never reordered


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"num_beams": 2}], ids=str)
def test_sampling_with_a_seed_is_that_without_a_cache(model: HybridForCausalLM, options: dict[str, int]) -> None:
    batch = left_padded(prompts(5, 12))

    def draw(seed: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**batch, max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=20, **options, **more)

    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert not torch.equal(draw(1), draw(2))


@torch.no_grad()
def test_generate_goes_on_from_the_cache_that_it_returned(model: HybridForCausalLM) -> None:
    """A second turn, one token and then more at once, each with the padding of its own."""
    rows, turns = prompts(5, 12), prompts(1, 6)
    first = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first[CACHE], HybridCache)
    more = left_padded(turns)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    mask = torch.cat([left_padded(rows)["attention_mask"], torch.ones(2, NEW), more["attention_mask"]], dim=1)
    cache = first[CACHE]
    second = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for index, row in enumerate(rows):
        whole = torch.cat([row, first.sequences[index, 12:], turns[index]])
        assert torch.equal(second[index, ids.shape[1] :], by_hand(model, whole, NEW)[0])


@torch.no_grad()
def test_a_reordered_cache_is_generated_from(model: HybridForCausalLM) -> None:
    """Rows swapped and doubled, with their padding; then one row grown to three."""
    rows = prompts(5, 12, 3)
    read, asked = left_padded(rows), prompts(4)[0]
    cache = model(**read).past_key_values
    for order in ([2, 0, 0], [1, 1, 2, 0]):
        picked = copy.deepcopy(cache)
        picked.reorder_cache(torch.tensor(order))
        ids = torch.cat([read["input_ids"][order], asked.expand(len(order), -1)], dim=1)
        mask = torch.cat([read["attention_mask"][order], torch.ones(len(order), 4)], dim=1)
        found = model.generate(ids, attention_mask=mask, past_key_values=picked, max_new_tokens=6, do_sample=False)
        for index, row in zip(order, found, strict=True):
            assert torch.equal(row[16:], by_hand(model, torch.cat([rows[index], asked]), 6)[0])


def test_assisted_decoding_ends_in_one_clear_line(model: HybridForCausalLM) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=PAD))
    calls: list[tuple[Any, dict[str, Any]]] = [
        (model, {"assistant_model": llama}),
        (model, {"prompt_lookup_num_tokens": 3}),
        (llama, {"assistant_model": model}),
    ]
    for speaker, options in calls:
        with pytest.raises(ValueError, match=r"(?i)assist") as raised:
            speaker.generate(prompts(9)[0][None], max_new_tokens=NEW, do_sample=False, **options)
        assert "\n" not in str(raised.value).strip()

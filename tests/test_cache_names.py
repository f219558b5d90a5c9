"""The cache under both of its names, in calls, in outputs and in `generate`, whatever transformers is installed."""

from __future__ import annotations

import logging
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import torch
from tiny import MIXED, make_hybrid, plain, tokens
from torch import Tensor
from torch.utils import _pytree
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from postnas.errors import UserError
from postnas.generate.throughput import measure
from postnas.models.cache import HybridCache
from postnas.models.model import HybridForCausalLM
from postnas.models.outputs import CACHE, OTHER

NAMES = ("past_key_values", "cache")
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    return make_hybrid(MIXED).requires_grad_(False)


def test_the_name_is_the_one_that_transformers_itself_says() -> None:
    assert {CACHE, OTHER} == set(NAMES)
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast, GenerateDecoderOnlyOutput):
        assert {field.name for field in fields(output)} & set(NAMES) == {CACHE}


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_of_ones_own_may_say_either_name(model: HybridForCausalLM, name: str) -> None:
    ids = tokens(count=20)
    cache, logits = None, []
    for piece in ids.split([11, 1, 8], dim=1):
        output = model(piece, use_cache=True, **{name: cache})
        cache = getattr(output, name)
        logits.append(output.logits)
    assert isinstance(cache, HybridCache)
    assert cache.get_seq_length() == 20
    torch.testing.assert_close(torch.cat(logits, dim=1), plain(model, ids), **CLOSE)
    first = model.model(ids[:, :11], use_cache=True)
    second = model.model(ids[:, 11:], **{name: getattr(first, name)}).last_hidden_state
    torch.testing.assert_close(second, model.model(ids, use_cache=False).last_hidden_state[:, 11:], **CLOSE)


def test_the_cache_is_the_fourth_argument_as_in_transformers(model: HybridForCausalLM) -> None:
    ids = tokens(count=9)
    assert list(signature(LlamaForCausalLM.forward).parameters)[4] == CACHE  # after self
    found = model(ids[:, 5:], None, None, model(ids[:, :5]).cache).logits
    torch.testing.assert_close(found, plain(model, ids)[:, 5:], **CLOSE)


def test_outputs_are_transformers_own_and_answer_to_both_names(
    model: HybridForCausalLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)  # each time, not the first alone
    whole, bare = model(tokens()), model.model(tokens())
    for output, parent in ((whole, CausalLMOutputWithPast), (bare, BaseModelOutputWithPast)):
        assert isinstance(output, parent)
        assert output.cache is output.past_key_values is output[CACHE]
        assert isinstance(output.cache, HybridCache)
        assert set(output.keys()) & set(NAMES) == {CACHE}
        values, shape = _pytree.tree_flatten(output)
        again = _pytree.tree_unflatten(values, shape)
        assert type(again) is type(output)
        assert again.cache is again.past_key_values is output.cache
    without = model(tokens(), use_cache=False)
    assert without.cache is None
    assert without.past_key_values is None
    assert "deprecated" not in caplog.text


def call(model: HybridForCausalLM, way: str, ids: Tensor, **caches: Any) -> Any:
    """The model, its decoder, or `generate`."""
    if way == "generate":
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, **caches)
    return (model.model if way == "decoder" else model)(ids, **caches)


@pytest.mark.parametrize("way", ["model", "decoder", "generate"])
def test_wrong_caches_are_one_line(model: HybridForCausalLM, way: str) -> None:
    cache = model(tokens(count=4)).cache
    calls: list[tuple[dict[str, Any], str]] = [
        ({"past_key_values": cache, "cache": cache}, "^past_key_values, cache: two names"),
        ({"past_key_values": DynamicCache(), "cache": cache}, "^past_key_values, cache: two names"),
        ({"past_key_values": DynamicCache()}, "^past_key_values: DynamicCache"),
        ({"cache": DynamicCache()}, "^cache: DynamicCache"),
    ]
    for caches, message in calls:
        with pytest.raises(UserError, match=message) as raised:
            call(model, way, tokens(count=6), **caches)
        assert "\n" not in str(raised.value)
    assert cache.get_seq_length() == 4  # what is refused changes nothing


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("placement", [MIXED, ["jet"], ["attn"]], ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_generate_reads_what_the_cache_does_not_hold(
    placement: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than that: a token a row here, not the prompt over again."""
    model = make_hybrid(placement).requires_grad_(False)
    ids = tokens(count=30)
    expected = call(model, "generate", ids)
    cache = model(ids[:, :29]).cache
    read: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    found = call(model, "generate", ids, **{name: cache})
    assert torch.equal(found, expected)
    assert read == [1, 1]
    assert cache.get_seq_length() == 31  # the same cache went on; the last token has not been read


@pytest.mark.parametrize("placement", [MIXED, ["jet", "jet"]], ids="-".join)
def test_generate_makes_a_cache_of_ours_and_returns_it(placement: list[str]) -> None:
    model = make_hybrid(placement).requires_grad_(False)
    output = GenerationMixin.generate(
        model, tokens(count=6), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(output[CACHE], HybridCache)
    assert output[CACHE].get_seq_length() == 8


def test_throughput_measures_models_of_transformers_too() -> None:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    rows = measure(llama, context=12, batch=2, decode_tokens=2, chunk=5)
    assert [row["cache_bytes"] for row in rows] == [2 * 3 * 12 * 16 * 4] * 2  # keys and values, layers, tokens, width

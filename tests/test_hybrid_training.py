"""Losses, training steps, saving: the hybrid as transformers and torch use any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_hybrid, padded, plain, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from postnas.models.load import register_config, register_model
from postnas.models.model import HybridForCausalLM


def test_loss_is_the_mean_next_token_loss_of_the_labels() -> None:
    model, ids = make_hybrid(), tokens()
    labels = ids.clone()
    labels[:, :40] = -100
    output = model(ids, labels=labels)
    logits = plain(model, ids)[:, 39:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 40:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-5)


def test_a_training_step_with_the_default_cache_has_the_gradients_of_one_without() -> None:
    ids, mask = padded([row[:length] for row, length in zip(tokens(), (150, 100), strict=True)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    found: list[dict[str, Tensor]] = []
    for arguments in ({}, {"use_cache": False}):
        model = make_hybrid().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = model(ids, attention_mask=mask, labels=labels, **arguments).loss
        before.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        after = model(ids, attention_mask=mask, labels=labels, **arguments).loss
        assert after < before
    assert found[0].keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert all(gradient.abs().max() > 0 for name, gradient in found[0].items() if "k_proj.bias" not in name)


def test_a_kernel_generator_learns_from_its_own_start() -> None:
    """As released w1 and w2 are zero and neither ever gets a gradient; ours starts so that the second step moves w1."""
    model = HybridForCausalLM(make_hybrid(["jet"]).config)
    generator = model.model.layers[0].self_attn.dynamic_conv1d.kernel_generator
    start = generator.w1.weight.detach().clone()
    assert start.abs().max() > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert generator.w2.weight.abs().max() > 0
    assert (generator.w1.weight - start).abs().max() > 0


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {}, {"rope_parameters": ROPE}])
def test_save_and_load_keep_every_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    register_config()
    register_model()
    model = make_hybrid(**fields)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert type(again) is HybridForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(plain(again.eval(), tokens()), plain(model, tokens()), rtol=0, atol=0)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True, dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(low.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)  # float32 still


@torch.no_grad()
def test_hidden_states_are_returned_in_the_callers_order() -> None:
    model, ids = make_hybrid().eval(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    alone = model(ids[:1, 7:], output_hidden_states=True, use_cache=False).hidden_states
    for padded_state, state in zip(output.hidden_states, alone, strict=True):
        torch.testing.assert_close(padded_state[:1, 7:], state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)

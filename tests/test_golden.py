"""Logits of the official Jet-Nemotron code, recorded for small random models, against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import in_pieces, padded, plain
from torch import Tensor

from postnas.models import JetNemotronConfig, JetNemotronForCausalLM

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"rtol": 0.0, "atol": 2e-4}

Case = tuple[JetNemotronForCausalLM, Tensor, Tensor]


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The official config and all tensors of a recorded model."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as handle:
        return json.loads(handle.metadata()["config"]), {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


@pytest.fixture(scope="module", params=["attn_swa", "jet_only", "mixed"])
def golden(request: pytest.FixtureRequest) -> Case:
    """The model with the recorded weights, the token ids [2, 150], and the logits [2, 150, vocab] they gave.

    The recorded model had been cast to bfloat16 as a whole, RoPE's frequencies too, and back. So is ours. With the
    exact frequencies, which `from_pretrained` keeps, the logits of attention differ by up to 5e-3.
    """
    official, weights = read(request.param)
    ids, logits = weights.pop("_input_ids"), weights.pop("_logits")
    model = JetNemotronForCausalLM(JetNemotronConfig(**official)).to(torch.bfloat16)
    missing = {"lm_head.weight"} if official["tie_word_embeddings"] else set()
    model.load_state_dict(weights | {name: weights["model.embed_tokens.weight"] for name in missing}, strict=True)
    return model.float().eval().requires_grad_(False), ids, logits


def test_official_logits(golden: Case) -> None:
    model, ids, logits = golden
    torch.testing.assert_close(plain(model, ids), logits, **CLOSE)


@pytest.mark.parametrize("sizes", [[1, 7, 64, 1, 77], [1] * 150])
def test_official_logits_in_pieces(golden: Case, sizes: list[int]) -> None:
    model, ids, logits = golden
    torch.testing.assert_close(in_pieces(model, ids, sizes), logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_official_logits_in_a_padded_batch(golden: Case, side: str) -> None:
    """The second sequence is cut to 90 tokens."""
    model, ids, logits = golden
    batch, mask = padded([ids[0], ids[1, :90]], side)
    found = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(found[0], logits[0], **CLOSE)
    torch.testing.assert_close(found[1, mask[1].bool()], logits[1, :90], **CLOSE)


def test_official_logits_of_packed_rows(golden: Case) -> None:
    """Both sequences, the first one cut to 70 tokens, one after the other in a row; in chunks, too."""
    model, ids, logits = golden
    packed = torch.cat([ids[0, :70], ids[1]])[None]
    positions = torch.cat([torch.arange(70), torch.arange(150)])[None]
    expected = torch.cat([logits[0, :70], logits[1]])[None]
    torch.testing.assert_close(model(packed, position_ids=positions, use_cache=False).logits, expected, **CLOSE)
    cache, found = None, []
    for piece, part in zip(packed.split([70, 1, 149], dim=1), positions.split([70, 1, 149], dim=1), strict=True):
        output = model(piece, position_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


def test_the_exact_frequencies_are_what_differs(golden: Case) -> None:
    """The other side of the fixture's cast: without it nothing but attention with RoPE is off."""
    model, ids, logits = golden
    rounded = model.model.rotary_emb.inv_freq.clone()
    model.model.rotary_emb.reset_parameters()
    error = (plain(model, ids) - logits).abs().max()
    model.model.rotary_emb.inv_freq.copy_(rounded)
    if {"attn", "swa"} & set(model.config.placement or []):
        assert 2e-4 < error < 1e-2
    else:
        assert error < 2e-4

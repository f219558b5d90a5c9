"""Base models of each family: our logits against those of transformers' own class, every weight random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PAD, in_pieces, plain, tokens

from postnas.errors import UserError
from postnas.models.checkpoint import VISION, base_config, load_base

CLOSE = {"rtol": 0.0, "atol": 1e-4}


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
GEMMA = {
    "head_dim": 16,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
    "tie_word_embeddings": True,
}
GEMMA_ROPE = {"sliding_attention": ROPES["default"], "full_attention": ROPES["linear"]}
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama no groups": ("llama", {"num_key_value_heads": 6}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head dim": ("llama", {"head_dim": 16}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    **{f"llama rope {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windowed": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied, biases": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3 windowed": ("qwen3", {"head_dim": 8} | WINDOWED),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3 untied, biases": ("gemma3_text", GEMMA | {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3 scaled rope": ("gemma3_text", GEMMA | {"rope_parameters": GEMMA_ROPE}),
    "gemma3 caps": ("gemma3_text", GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
}


CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def family_model(family: str, fields: dict[str, Any]) -> Any:
    """transformers' own class with every weight random, norms and biases too."""
    import transformers

    kind = getattr(transformers, CLASSES[family])
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    # Only the plain form caps the scores of attention; the others leave the cap out in silence.
    model: Any = kind(kind.config_class(**settings | fields, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name and "gemma" not in family else 0.0
            wide = 1.0 if "embed" in name and "gemma" not in family else 0.15
            parameter.copy_(shift + wide * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("case", list(FAMILY_CASES))
@torch.no_grad()
def test_a_base_gives_the_logits_of_transformers_own_class(case: str, tmp_path: Path) -> None:
    theirs = family_model(*FAMILY_CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = load_base(str(tmp_path), dtype=torch.float32)
    ids = tokens()
    # transformers' Gemma 3 keeps the cap on attention's scores in its config and does not apply it unless told so.
    expected = theirs(ids, softcap=getattr(theirs.config, "attn_logit_softcapping", None)).logits
    torch.testing.assert_close(plain(ours, ids), expected, **CLOSE)
    torch.testing.assert_close(in_pieces(ours, ids, [1, 7, 64, 1, 77]), expected, **CLOSE)
    padding = torch.full((2, 5), PAD)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    left = ours(torch.cat([padding, ids], dim=1), attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(left, expected, **CLOSE)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    if "tied" in case and "untied" not in case:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight


@torch.no_grad()
def test_sharded_weights_are_read_whole(tmp_path: Path) -> None:
    theirs = family_model("qwen2", {})
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_base(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(plain(ours, tokens()), theirs(tokens()).logits, **CLOSE)


def test_a_base_of_another_architecture_is_one_line(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2") as raised:
        load_base(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_changes_with_the_length_is_refused(kind: str, tmp_path: Path) -> None:
    """Its frequencies are not constants of the model, so that chunks and packs would not agree."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    family_model("llama", {"rope_parameters": rope}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=kind) as raised:
        load_base(str(tmp_path))
    assert "\n" not in str(raised.value)


WRAPPER = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 98,
}


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model."])
@torch.no_grad()
def test_a_gemma_with_images_gives_its_text_part(names: str, tmp_path: Path) -> None:
    """By the names of the released files, and by those of models that newer versions hold in memory."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = family_model("gemma3_text", GEMMA).config.to_dict() | {"vocab_size": 99}
    theirs: Any = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, **WRAPPER)).eval()
    for parameter in theirs.parameters():
        parameter.copy_(0.15 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("vision_tower.") for name in weights)
    renamed = {name.replace("language_model.model.", names): value for name, value in weights.items()}
    if names.startswith("model."):
        renamed = {f"model.{name}" if name.startswith(VISION) else name: value for name, value in renamed.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    ours = load_base(str(tmp_path), dtype=torch.float32)
    assert ours.config.family == "gemma3_text"
    torch.testing.assert_close(plain(ours, tokens()), theirs(input_ids=tokens()).logits, **CLOSE)


def test_a_tied_base_with_a_head_of_its_own_is_one_line(tmp_path: Path) -> None:
    family_model("llama", {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding"):
        load_base(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    base = load_base(str(tmp_path))
    assert base.lm_head.weight is base.model.embed_tokens.weight


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"layer_types": ["chunked_attention"] * 3}, "layer_types[0]: 'chunked_attention'"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: 0"),
    ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar: -1"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window: None"),
    ("qwen2", WINDOWED | {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ("gemma3", {"text_config": None}, "text_config is None"),
]


@pytest.mark.parametrize("family, fields, said", BAD, ids=[f"{family} {said}" for family, _, said in BAD])
def test_a_config_that_makes_no_attention_of_ours_is_one_line(
    family: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    windows = GEMMA if family == "gemma3_text" else {}
    path.write_text(json.dumps({"model_type": family} | sizes | windows | fields))
    with pytest.raises(UserError) as raised:
        base_config(str(path))
    assert str(raised.value).startswith(f"{path}: ") and said in str(raised.value)

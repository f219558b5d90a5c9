"""Random models of each architecture as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import RopeScalingType, TokenType
from tiny import make_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}


def make_model(kind: str, fields: dict[str, Any]) -> Any:
    """transformers' own class with every weight random, norms and biases too."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": kind == "gemma3",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**settings | fields), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name and kind != "gemma3" else 0.0
            parameter.copy_(shift + 0.15 * torch.randn(parameter.shape))
    return model.eval()


def stored(kind: str, config: Any, name: str, weight: Tensor) -> np.ndarray:
    """A weight as llama.cpp's converter writes it."""
    if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if kind == "gemma3" and name.endswith("norm.weight"):
        weight = weight + 1
    return weight.detach().numpy().copy()


def add_byte_level(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, before: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token.startswith("<") else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)


def add_sentencepiece(writer: gguf.GGUFWriter, pieces: Sequence[str], scores: Sequence[float], **flags: bool) -> None:
    """<pad>, <eos>, <bos>, <unk>, 256 bytes, then these pieces; one that is all spaces is the file's own."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL if piece.strip() else TokenType.USER_DEFINED for piece in pieces]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * 260 + [float(score) for score in scores])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)


def add_config(writer: gguf.GGUFWriter, kind: str, config: Any) -> None:
    """The keys that llama.cpp's converter writes for a model."""
    rope = config.rope_parameters["full_attention"] if kind == "gemma3" else config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("qwen3", "gemma3") or head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope["rope_type"] == "llama3":
        turns = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((rope["original_max_position_embeddings"] * turns - low) / (high - low), 0, 1)
        factors = 1 / ((1 - kept) / rope["factor"] + kept)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    if kind == "gemma3":
        if config.sliding_window:
            writer.add_sliding_window(config.sliding_window)
        if "full_attention" in config.layer_types[:3]:
            writer.add_sliding_window_pattern(3)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write(
    path: Path,
    kind: str,
    model: Any,
    quantised: Kind | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    leave_out: str = "nothing",
) -> Path:
    """`model` as a GGUF. With `quantised`, its matrices are rounded in place to what the file holds."""
    writer = gguf.GGUFWriter(path, kind)
    add_config(writer, kind, model.config)
    if tokenizer is None:
        add_byte_level(writer, make_tokenizer(), {"qwen2": "qwen2", "qwen3": "qwen2"}.get(kind, "gpt-2"))
    else:
        tokenizer(writer)
    change(writer)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    short = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, end = name.rsplit(".", 1)
        theirs = f"{short.get_name(stem)}.{end}"
        if leave_out in theirs or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if quantised is not None and value.ndim == 2:
            rounded = gguf.dequantize(gguf.quantize(value.numpy(), quantised), quantised)
            value.copy_(torch.from_numpy(rounded))
            writer.add_tensor(
                theirs, gguf.quantize(stored(kind, model.config, name, value), quantised), raw_dtype=quantised
            )
        else:
            writer.add_tensor(theirs, stored(kind, model.config, name, value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def set_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Replace a key of the metadata, or remove it."""
    old = writer.kv_data[0].pop(key)
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        writer.add_key_value(key, value, old.type)

"""GGUF files of each architecture, written as llama.cpp writes them: the original's logits, one line for a mistake."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import RopeScalingType
from gguf_files import CONFIGS, add_byte_level, add_sentencepiece, make_model, set_value, write
from tiny import make_tokenizer, sentences
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from postnas.errors import UserError
from postnas.models.checkpoint import base_config, load_base
from postnas.models.gguf import dequantised
from postnas.sources import cache_dir, file_sha256

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def gemma3(**full: Any) -> dict[str, Any]:
    """Layers that see 9 tokens and, each third, everything; the rope of the latter may differ."""
    return {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6} | full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


ALL_FULL = {"sliding_window": 0, "layer_types": ["full_attention"] * 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {}),
    "llama no groups": ("llama", {"num_key_value_heads": 4}),
    "llama head dim": ("llama", {"head_dim": 32}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama 3": (
        "llama",
        {"rope_parameters": LLAMA3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama 3, other borders": (
        "llama",
        {"head_dim": 32}
        | {"rope_parameters": LLAMA3 | {"high_freq_factor": 16.0, "original_max_position_embeddings": 72}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", gemma3()),
    "gemma3 linear": ("gemma3", gemma3(rope_type="linear", factor=8.0) | {"final_logit_softcapping": 3.0}),
    "gemma3 no window": ("gemma3", gemma3() | ALL_FULL),
}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def ids(count: int = 120) -> Tensor:
    return torch.randint(2, 300, (2, count), generator=torch.Generator().manual_seed(5))


def refused(path: Path, *parts: str) -> None:
    """One line that names the file and these parts, and nothing in the cache."""
    with pytest.raises(UserError) as raised:
        dequantised(path)
    for part in (str(path), *parts):
        assert part in str(raised.value), raised.value
    assert "\n" not in str(raised.value)
    assert not list((cache_dir() / "gguf").glob(f"*{file_sha256(path)[:24]}*"))


@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_a_gguf_gives_the_logits_of_the_original(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    original = make_model(kind, fields)
    path = write(tmp_path / "a.gguf", kind, original)
    again = load(dequantised(path))
    assert type(again) is type(original)
    assert not hasattr(again.config, "quantization_config")
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(again(ids()).logits, original(ids()).logits, **CLOSE)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "tie_word_embeddings"):
        if case != "llama 3, other borders" or name != "rope_parameters":
            assert getattr(again.config, name) == getattr(original.config, name)


@torch.no_grad()
def test_the_largest_gemma_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """The file does not tell it: its 62 layers do."""
    sizes = {"num_hidden_layers": 62, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8}
    fields = gemma3() | sizes | {"layer_types": None, "query_pre_attn_scalar": 8}
    original = make_model("gemma3", fields)
    again = load(dequantised(write(tmp_path / "a.gguf", "gemma3", original)))
    assert (again.config.query_pre_attn_scalar, again.config.head_dim) == (8, 32)
    assert again.config.layer_types == original.config.layer_types
    torch.testing.assert_close(again(ids()).logits, original(ids()).logits, **CLOSE)


def test_gemmas_windows_may_be_told_layer_by_layer(tmp_path: Path) -> None:
    key, slides = "gemma3.attention.sliding_window_pattern", [True, False, True, False]
    path = write(
        tmp_path / "a.gguf", "gemma3", make_model("gemma3", gemma3()), change=lambda w: set_value(w, key, slides)
    )
    kinds = json.loads((dequantised(path) / "config.json").read_text())["layer_types"]
    assert kinds == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("quantised", [Kind.Q8_0, Kind.Q4_1, Kind.F16])
@torch.no_grad()
def test_quantised_weights_come_back_as_they_were_rounded(kind: str, quantised: Kind, tmp_path: Path) -> None:
    original = make_model(kind, {"tie_word_embeddings": False})
    path = write(tmp_path / "a.gguf", kind, original, quantised)
    torch.testing.assert_close(load(dequantised(path))(ids()).logits, original(ids()).logits, **CLOSE)


@pytest.mark.parametrize("kind", list(CONFIGS))
@torch.no_grad()
def test_a_gguf_is_a_base(kind: str, tmp_path: Path) -> None:
    original = make_model(kind, gemma3() if kind == "gemma3" else {})
    path = write(tmp_path / "a.gguf", kind, original)
    base = load_base(str(path), dtype=torch.float32)
    assert base_config(str(path)).to_dict() | {"dtype": None} == base.config.to_dict() | {"dtype": None}
    torch.testing.assert_close(base(ids()).logits, original(ids()).logits, **CLOSE)


@torch.no_grad()
def test_the_folder_is_named_after_the_file_and_made_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", "llama", make_model("llama", {}))
    folder = dequantised(path)
    assert folder == cache_dir() / "gguf" / f"{file_sha256(path)[:24]}-2"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantised(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


@torch.no_grad()
def test_a_large_matrix_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of seven rows, with a shorter one at the end, and with norms, which are one row."""
    monkeypatch.setattr("postnas.models.gguf.PART", 7 * 64)
    original = make_model("qwen3", {"head_dim": 32})
    path = write(tmp_path / "a.gguf", "qwen3", original, Kind.Q8_0)
    torch.testing.assert_close(load(dequantised(path))(ids()).logits, original(ids()).logits, **CLOSE)


def test_a_type_of_weights_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    name, whole_numbers = "blk.2.ffn_down.weight", np.ones((64, 96), np.int8)
    path = write(
        tmp_path / "a.gguf",
        "llama",
        make_model("llama", {}),
        change=lambda w: w.add_tensor(name, whole_numbers),
        leave_out=name,
    )
    refused(path, name, "I8")


@torch.no_grad()
def test_a_bias_that_some_projections_lack_is_zero(tmp_path: Path) -> None:
    """Qwen2-like files under the name llama have biases of q, k and v alone; transformers has one switch for all."""
    original = make_model("llama", {"attention_bias": True})
    path = write(tmp_path / "a.gguf", "llama", original, leave_out="attn_output.bias")
    for layer in original.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    torch.testing.assert_close(load(dequantised(path))(ids()).logits, original(ids()).logits, **CLOSE)


def test_ids_that_the_file_leaves_out_are_none(tmp_path: Path) -> None:
    """Not those of the class' own defaults, which are another model's."""
    model = make_model("llama", {})
    path = write(tmp_path / "a.gguf", "llama", model, tokenizer=lambda writer: no_ids(writer))
    config = json.loads((dequantised(path) / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


def no_ids(writer: gguf.GGUFWriter) -> None:
    add_byte_level(writer, make_tokenizer(), "gpt-2")
    for name in ("bos", "eos", "padding"):
        del writer.kv_data[0][f"tokenizer.ggml.{name}_token_id"]


TEXTS = [*sentences(3), "1234 rivers, it's  late\n\n\n of 5", " é 水 😀\ttab", "a<end>b"]


@pytest.mark.parametrize("before", ["gpt-2", "olmo", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_comes_back(before: str, tmp_path: Path) -> None:
    original = make_tokenizer()
    path = write(
        tmp_path / "a.gguf", "llama", make_model("llama", {}), tokenizer=lambda w: add_byte_level(w, original, before)
    )
    again = AutoTokenizer.from_pretrained(dequantised(path))
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<end>", "<end>", "<pad>")
    assert len(again) == 300
    for text in TEXTS:
        assert again.decode(again(text).input_ids) == text
        if before == "gpt-2":
            assert again(text).input_ids == original(text).input_ids
    words = [word for word, _ in again.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234 it's  5")]
    assert (
        words
        == {
            "gpt-2": ["1234", "Ġit", "'s", "Ġ", "Ġ5"],
            "olmo": ["1234", "Ġit", "'s", "Ġ", "Ġ5"],
            "smollm": ["1", "2", "3", "4", "Ġit", "'s", "ĠĠ", "5"],
            "llama-bpe": ["123", "4", "Ġit", "'s", "Ġ", "Ġ", "5"],
            "qwen2": ["1", "2", "3", "4", "Ġit", "'s", "Ġ", "Ġ", "5"],
        }[before]
    )
    composed, apart = again("\u00e9").input_ids, again("e\u0301").input_ids
    assert (composed == apart) is (before in ("olmo", "qwen2"))  # Unicode's normal form C


def test_llama3_takes_a_whole_word_without_its_merges(tmp_path: Path) -> None:
    def without_merges(writer: gguf.GGUFWriter) -> None:
        add_byte_level(writer, make_tokenizer(), "llama-bpe")
        writer.kv_data[0]["tokenizer.ggml.merges"].value[:] = ["r i"]
        del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]

    path = write(tmp_path / "a.gguf", "llama", make_model("llama", {}), tokenizer=without_merges)
    again = AutoTokenizer.from_pretrained(dequantised(path))
    word = max((token for token in again.get_vocab() if token.startswith("Ġ")), key=len)
    assert len(word) > 3
    named = again.convert_ids_to_tokens(again(word.replace("Ġ", " ")).input_ids)
    assert named == ["<end>", word]  # llama.cpp also begins such texts where the file does not say


def test_a_gemma_tokenizer_comes_back(tmp_path: Path) -> None:
    """Merges in the order of the tokens, whatever the scores; runs of spaces; bytes for what has no piece."""
    words = ["▁river", "▁stone"]
    pieces = ["  ", "▁", *"riveston", *[word[:end] for word in words for end in range(2, len(word) + 1)]]
    assert len(pieces) < 40
    path = write(
        tmp_path / "a.gguf",
        "gemma3",
        make_model("gemma3", gemma3() | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}),
        tokenizer=lambda w: add_sentencepiece(
            w, pieces, range(len(pieces)), add_space_prefix=False, add_bos_token=True
        ),
    )
    again = AutoTokenizer.from_pretrained(dequantised(path))
    named = again.convert_ids_to_tokens(again(" river stoner").input_ids)
    assert named == ["<bos>", "▁river", "▁stone", "r"]
    assert again.convert_ids_to_tokens(again("  river").input_ids) == ["<bos>", "▁▁", *"river"]
    assert again.convert_ids_to_tokens(again("é").input_ids) == ["<bos>", "<0xC3>", "<0xA9>"]
    for text in (" river", "river  stone", "é 水\n", "<eos>river"):
        assert again.decode(again(text).input_ids) == "<bos>" + text
    assert again.decode(again("<eos>river").input_ids, skip_special_tokens=True) == "river"
    assert (again.bos_token, again.eos_token, again.pad_token, again.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")


def test_a_sentencepiece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    pieces = ["▁", "a", "b", "c", "ab", "bc"]
    path = write(
        tmp_path / "a.gguf",
        "llama",
        make_model("llama", {}),
        tokenizer=lambda w: add_sentencepiece(w, pieces, [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0]),
    )
    again = AutoTokenizer.from_pretrained(dequantised(path))
    assert again.convert_ids_to_tokens(again("abc ab").input_ids) == ["<bos>", "▁", "a", "bc", "▁", "ab"]
    assert again.decode(again("abc ab").input_ids, skip_special_tokens=True) == "abc ab"


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.gguf", "llama", make_model("llama", {}))
    data = path.read_bytes()
    for size in (*range(0, 400, 37), 3000, len(data) // 2, len(data) - 40):
        cut = tmp_path / f"cut-{size}.gguf"
        cut.write_bytes(data[:size])
        refused(cut, "again")
    text = tmp_path / "text.gguf"
    text.write_text("no GGUF at all, and long enough to hold a header")
    refused(text, "not a whole GGUF")


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    """A byte anywhere in the metadata: the file is refused in one line, or still read."""
    path = write(tmp_path / "a.gguf", "llama", make_model("llama", {"num_hidden_layers": 1}))
    data = path.read_bytes()
    outcomes = set()
    for at in range(4, 1200, 13):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            dequantised(bad)
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert {"read", "refused"} == outcomes


def test_another_architecture_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", "llama", make_model("llama", {}))
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
    path.write_bytes(data)
    refused(path, "'mamba'", "llama, qwen2, qwen3, gemma3")


WRONG: dict[str, tuple[str, Callable[[gguf.GGUFWriter], None], str]] = {
    "longrope": ("llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "'longrope'"),
    "part of a head turns": ("qwen3", lambda w: w.add_uint32("qwen3.rope.dimension_count", 8), "rope.dimension_count"),
    "yarn's own factor": ("qwen2", lambda w: add_yarn(w), "yarn_attn_factor"),
    "layers that differ": ("qwen2", lambda w: set_value(w, "qwen2.feed_forward_length", [96, 64, 96, 96]), "layer"),
    "no layers": ("qwen2", lambda w: set_value(w, "qwen2.block_count", 0), "block_count"),
    "no eps": ("gemma3", lambda w: set_value(w, "gemma3.attention.layer_norm_rms_epsilon", None), "epsilon"),
    "more layers than the file has": ("llama", lambda w: set_value(w, "llama.block_count", 5), "blk.4."),
    "fewer layers than the file has": ("llama", lambda w: set_value(w, "llama.block_count", 3), "blk.3."),
    "another width": ("qwen3", lambda w: set_value(w, "qwen3.feed_forward_length", 97), "ffn_down.weight"),
    "experts": ("llama", lambda w: add_ones(w, "blk.0.ffn_gate_inp.weight"), "ffn_gate_inp"),
    "factors of no Llama": ("llama", lambda w: add_ones(w, "rope_freqs.weight", 2.0), "rope_freqs"),
    "the other byte order": ("llama", lambda w: setattr(w, "endianess", gguf.GGUFEndian.BIG), "byte order"),
    "an unknown cut": ("llama", lambda w: set_value(w, "tokenizer.ggml.pre", "default"), "'default'"),
    "an unknown tokenizer": ("llama", lambda w: set_value(w, "tokenizer.ggml.model", "bert"), "'bert'"),
    "an end beyond the tokens": ("llama", lambda w: set_value(w, "tokenizer.ggml.eos_token_id", 300), "tokenizer"),
    "half a head": ("qwen2", lambda w: half_a_head(w), "head_count is 0.5 and no whole number"),
    "factors that are whole numbers": ("llama", lambda w: add_whole(w, "rope_freqs.weight"), "rope_freqs"),
    "merges of other tokens": ("llama", lambda w: set_value(w, "tokenizer.ggml.merges", ["zz yy"]), "tokenizer"),
}  # fmt: skip


def add_ones(writer: gguf.GGUFWriter, name: str, times: float = 1.0) -> None:
    writer.add_tensor(name, np.full(8, times, np.float32))


def half_a_head(writer: gguf.GGUFWriter) -> None:
    set_value(writer, "qwen2.attention.head_count", None)
    writer.add_float32("qwen2.attention.head_count", 0.5)


def add_whole(writer: gguf.GGUFWriter, name: str) -> None:
    writer.add_tensor(name, np.ones(8, np.int32))


def add_yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_yarn_attn_factor(1.5)


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_be_known_is_one_line(case: str, tmp_path: Path) -> None:
    kind, change, part = WRONG[case]
    path = write(tmp_path / "a.gguf", kind, make_model(kind, {}), change=change)
    refused(path, part)


def test_embeddings_of_one_dimension_are_one_line(tmp_path: Path) -> None:
    name = "token_embd.weight"
    path = write(
        tmp_path / "a.gguf", "llama", make_model("llama", {}), change=lambda w: add_ones(w, name), leave_out=name
    )
    refused(path, name, "two dimensions")


def header(value: bytes) -> bytes:
    """A GGUF with no tensors and one array in its metadata: its type and what it holds are `value`."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + value


HOSTILE = {
    "2^40 whole numbers": header(struct.pack("<IQ", 4, 2**40)),
    "2^40 texts": header(struct.pack("<IQ", 8, 2**40)),
    "arrays in arrays": header(struct.pack("<IQ", 9, 1) * 5000),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_array_is_one_line_at_once(case: str, tmp_path: Path) -> None:
    """In a process of its own, which is stopped if it goes on for ever."""
    path = tmp_path / "a.gguf"
    path.write_bytes(HOSTILE[case])
    code = (
        "import sys; from pathlib import Path; from postnas.models.gguf import dequantised as d; d(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert "UserError: " + str(path) + ": is not a whole GGUF file" in done.stderr.splitlines()[-1]

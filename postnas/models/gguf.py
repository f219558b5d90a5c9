"""A GGUF file as a folder of safetensors: weights by gguf-py, config and tokenizer from the metadata.

transformers has a reader too. It is not used: it leaves out what its table of keys does not name (Llama 3's rope
factors, rope scaling, biases, Qwen3's head dim, most of what is peculiar to Gemma 3), and its search for names takes
a minute where layers are many. Here every tensor of the file is accounted for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from postnas.errors import UserError
from postnas.files import replacing
from postnas.models.gguf_tokenizer import tokenizer_of
from postnas.progress import Progress
from postnas.sources import cache_dir, file_sha256

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""The architectures that can be read, and the model type that transformers gives each."""

IGNORED = ("rope_freqs.weight", "attn_rot_embd")
"""Tensors that are constants: the first is turned into the config's rope, the second repeats it."""

VERSION = 2
"""Of what is made of a file. It is part of the cache folder's name, so a change of meaning never meets an old folder:
1 had no number in its name, and cut SmolLM2's text as GPT-2 does."""

PART = 2**22
"""Values that are dequantised at a time."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    path: Path
    architecture: str
    values: dict[str, Any]
    """Metadata by key."""
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors, in torch's order."""
    tensors: dict[str, Any]
    """gguf-py's, by name, mapped and not read."""
    rope_factors: Tensor | None
    """By what each frequency is divided, float64 [head_dim / 2]."""

    def number(self, key: str, default: float | None = None) -> float:
        """The value of the architecture's own `key`, above 0.

        Raises UserError where it is missing without a default, no number above 0, or a list: one for each layer.
        """
        name = f"{self.architecture}.{key}"
        value = self.values.get(name, default)
        if value is None:
            raise UserError(f"{self.path}: has no {name}; convert the model again")
        if isinstance(value, list):
            raise UserError(
                f"{self.path}: {name} is a list, one for each layer, which is not supported; choose another"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.path}: {name} is {value!r} and should be above 0; convert the model again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """As `number`, a whole number."""
        value = self.number(key, default)
        if value != int(value):
            raise UserError(f"{self.path}: {self.architecture}.{key} is {value} and no whole number; convert it again")
        return int(value)


def dequantised(path: Path) -> Path:
    """The cache folder of a GGUF file, made when it is not there yet: config.json, model.safetensors, a tokenizer.

    Weights are float32. The folder is named after the file's SHA-256. Memory: one copy of the weights and one tensor.
    Raises UserError for a file that is cut off, of another architecture, or whose meaning cannot be told.
    """
    folder = cache_dir() / "gguf" / f"{file_sha256(path)[:24]}-{VERSION}"
    if (folder / "config.json").exists():
        return folder
    header = _header(path)
    config, tokenizer = _config(header), tokenizer_of(path, header.values, rows=header.shapes["token_embd.weight"][0])
    weights = _weights(header, config)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(temporary)
        config.save_pretrained(temporary)
    return folder


DAMAGE = (ValueError, LookupError, OSError, ArithmeticError, MemoryError, TypeError, RecursionError)
"""What gguf-py raises over counts, offsets, types, text, names twice and arrays in arrays of a damaged file."""


def _open(path: Path) -> tuple[Any, str]:
    """A gguf.GGUFReader over a whole file, whose tensors are mapped and not read, and the architecture."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """gguf-py's, but for an array that claims more values than the file holds: it would read nothing for ever."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            if len(found) != count:
                raise ValueError(f"it ends before byte {offset} and {count} values")
            return found

    try:
        reader = Reader(path)
        field = reader.get_field("general.architecture")
        name = None if field is None else str(field.contents())
    except DAMAGE as error:
        raise UserError(f"{path}: is not a whole GGUF file ({error}); fetch it again") from error
    if name is None:
        raise UserError(f"{path}: names no architecture; fetch it again")
    if reader.byte_order == "S":  # gguf-py turns the bytes of the metadata, and not those of quantised blocks
        raise UserError(f"{path}: was written for machines of the other byte order; choose another")
    return reader, name


def _header(path: Path) -> Header:
    """Metadata and shapes. Raises UserError for an architecture that is not among ARCHITECTURES."""
    from gguf import dequantize

    reader, name = _open(path)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{path}: GGUF of architecture {name!r} is not supported; give one of {', '.join(ARCHITECTURES)}"
        )
    try:
        values = {key: field.contents() for key, field in reader.fields.items()}
    except DAMAGE as error:
        raise UserError(f"{path}: its metadata is damaged ({error}); fetch it again") from error
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    tensors, factors = {tensor.name: tensor for tensor in reader.tensors}, None
    if rope := tensors.get("rope_freqs.weight"):
        try:
            factors = torch.from_numpy(np.array(dequantize(rope.data, rope.tensor_type), np.float64)).flatten()
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"{path}: its rope_freqs.weight cannot be read ({error}); choose another") from error
    return Header(path, name, values, shapes, tensors, factors)


def _config(header: Header) -> Any:
    """The configuration of transformers' own class, in llama.cpp's meaning of the keys and with its defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if len(header.shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{header.path}: has no token_embd.weight of two dimensions; convert the model again")
    layers, width = header.count("block_count"), header.count("embedding_length")
    if layers > len(header.shapes):
        raise UserError(f"{header.path}: block_count is {layers} for {len(header.shapes)} tensors; fetch it again")
    heads = header.count("attention.head_count")
    head_dim = header.count("attention.key_length", max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.count(key, head_dim) != head_dim:
            raise UserError(
                f"{header.path}: {header.architecture}.{key} is {header.count(key)} where heads have {head_dim}, "
                "which is not supported; choose another"
            )
    fields: dict[str, Any] = {
        "vocab_size": header.shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": header.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": header.count("context_length"),
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.shapes,
        "bos_token_id": header.values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.values.get("tokenizer.ggml.padding_token_id"),
    }
    if header.architecture == "gemma3":
        fields |= _gemma3(header, layers, width, heads, head_dim)
    else:
        fields["rope_parameters"] = _rope(header, head_dim)
    if header.architecture != "qwen2":  # its q, k and v always have biases, and no other projection
        fields["attention_bias"] = any(".attn_" in name and name.endswith(".bias") for name in header.shapes)
    if header.architecture == "llama":
        fields["mlp_bias"] = any(".ffn_" in name and name.endswith(".bias") for name in header.shapes)
    try:
        return AutoConfig.for_model(ARCHITECTURES[header.architecture], **fields)
    except (StrictDataclassError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{header.path}: its sizes make no {header.architecture} ({error}); choose another") from error


def _gemma3(header: Header, layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    """What only Gemma 3 has. The file is silent on attention's scale: llama.cpp knows the 27B by its 62 layers."""
    none = header.values.get("gemma3.attention.sliding_window", 0) == 0
    window = 0 if none else header.count("attention.sliding_window")
    pattern = header.values.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):  # a period: the last layer of each sees everything, and 0 means that none does
        pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) < layers:
        raise UserError(f"{header.path}: sliding_window_pattern does not tell all {layers} layers; convert it again")
    return {
        # transformers makes this mask even where no layer slides.
        "sliding_window": window or header.count("context_length"),
        "layer_types": ["sliding_attention" if window and slides else "full_attention" for slides in pattern[:layers]],
        "rope_parameters": {
            "full_attention": _rope(header, head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": header.number("rope.freq_base_swa", 10000.0)},
        },
        "query_pre_attn_scalar": width // heads if layers == 62 else head_dim,
        "final_logit_softcapping": header.values.get("gemma3.final_logit_softcapping") or None,
    }


def _rope(header: Header, head_dim: int) -> dict[str, Any]:
    """The rope of the layers that see everything. Raises UserError for a kind that transformers cannot express."""
    theta = header.number("rope.freq_base", 10000.0)
    kind = header.values.get(f"{header.architecture}.rope.scaling.type", "linear")
    factor = header.number("rope.scaling.factor", header.number("rope.scale_linear", 1.0))
    if kind == "none":
        factor = 1.0
    if header.rope_factors is not None and bool((header.rope_factors != 1).any()):
        if factor != 1:
            raise UserError(f"{header.path}: has rope_freqs and rope.scaling.factor {factor}; choose another")
        return {"rope_type": "llama3", "rope_theta": theta} | _llama3(header, theta, head_dim, header.rope_factors)
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor} | _yarn(header)
    if kind not in ("none", "linear"):
        raise UserError(f"{header.path}: rope.scaling.type {kind!r} is not supported; choose another")
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _yarn(header: Header) -> dict[str, Any]:
    """YaRN's original context and borders. Other knobs have no equal in transformers, so they must be neutral."""
    start = f"{header.architecture}.rope.scaling"
    neutral = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0, "alpha": 0}
    for key, value in neutral.items():
        if header.values.get(f"{start}.{key}", value) != value:
            raise UserError(f"{header.path}: {start}.{key} is not {value}, which is not supported; choose another")
    return {
        "original_max_position_embeddings": header.count(
            "rope.scaling.original_context_length", header.count("context_length")
        ),
        "beta_fast": header.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": header.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(header: Header, theta: float, head_dim: int, factors: Tensor) -> dict[str, Any]:
    """Llama 3's rope scaling from its effect on each frequency, float64 [head_dim / 2].

    A frequency of t turns a token keeps the share clip((context t - low) / (high - low), 0, 1) of itself, a line in t.
    A line gives two of the three constants, and the third is free: low is 1, as in every Llama. Raises UserError
    where the constants that are found do not give the factors back.
    """
    factor = float(factors.max())
    turns = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    context, high = 8192, 4.0  # the published models', where no frequency lies between the borders
    if len(factors) == len(turns) and factor > 1:
        share = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (share > 1e-4) & (share < 1 - 1e-4)
        if between.sum() > 1:
            line = torch.stack([turns[between], torch.ones_like(turns[between])], dim=1)
            slope, offset = torch.linalg.lstsq(line, share[between, None]).solution.flatten().tolist()
            if offset < 0:
                context, high = round(slope / -offset), round(1 - 1 / offset, 3)
        elif between.any():
            context = round(float(((high - 1) * share[between] + 1) / turns[between]))
        again = ((context * turns - 1) / (high - 1)).clamp(0, 1)
        if torch.allclose(1 / ((1 - again) / factor + again), factors, rtol=1e-3, atol=0):
            return {
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise UserError(f"{header.path}: its rope_freqs are not those of Llama 3; choose another")


def _weights(header: Header, config: Any) -> dict[str, Tensor]:
    """Float32 weights by transformers' names, a tied head left out. Raises UserError where file and config differ."""
    wanted, weights = _wanted(header, config), {}
    size = sum(header.tensors[theirs].n_bytes for theirs in wanted if theirs in header.tensors)
    with Progress("dequantise", total=size, unit="bytes") as bar:
        for theirs, (name, shape) in wanted.items():
            if theirs in header.tensors:
                weights[name] = _as_transformers(header, config, name, _dequantise(header, theirs, bar))
            else:
                weights[name] = torch.zeros(shape)
    return weights


def _dequantise(header: Header, theirs: str, bar: Progress) -> Tensor:
    """A tensor of the file, float32 in torch's order. Raises UserError for a type that gguf-py cannot read.

    Some rows at a time, since gguf-py holds what it makes twice.
    """
    from gguf import dequantize

    tensor = header.tensors[theirs]
    rows = np.atleast_2d(tensor.data)
    values = np.empty(header.shapes[theirs], np.float32)
    out = values.reshape(len(rows), -1)
    step = max(1, PART // out.shape[1])
    try:
        for at in range(0, len(rows), step):
            out[at : at + step] = dequantize(rows[at : at + step], tensor.tensor_type)
            bar.advance(rows[at : at + step].nbytes)
    except NotImplementedError as error:
        raise UserError(
            f"{header.path}: {theirs} is of a type that cannot be read ({error}); choose another"
        ) from error
    return torch.from_numpy(values)


def _as_transformers(header: Header, config: Any, name: str, weight: Tensor) -> Tensor:
    """A weight without what llama.cpp's converter has done to it. name: transformers'."""
    if header.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        # Two dimensions that turn together are neighbours in llama.cpp, and half a head apart in transformers.
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    if header.architecture == "gemma3" and name.endswith("norm.weight"):
        return weight - 1  # transformers adds it in the forward pass
    return weight


def _wanted(header: Header, config: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """transformers' name and shape of each weight, by the file's name. Only biases may be absent there: they are zero.

    Raises UserError where another tensor is missing, is left over or has a shape that the metadata do not give.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    short = get_tensor_name_map(number, config.num_hidden_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {}
    for name, value in model.state_dict().items():
        stem, end = name.rsplit(".", 1)
        wanted[f"{short.get_name(stem)}.{end}"] = (name, tuple(value.shape))
    if config.tie_word_embeddings:
        del wanted["output.weight"]
    absent = {name for name in wanted if name not in header.shapes and name.endswith(".bias")}
    found = {name: shape for name, shape in header.shapes.items() if not any(part in name for part in IGNORED)}
    for name in sorted((wanted.keys() | found.keys()) - absent):
        shape = wanted[name][1] if name in wanted else "absent"
        if found.get(name, "missing") != shape:
            raise UserError(
                f"{header.path}: {name} is {found.get(name, 'missing')} and should be {shape} in a "
                f"{header.architecture} of its sizes; choose another"
            )
    return wanted

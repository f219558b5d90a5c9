"""Base models from disk: a folder of safetensors or a GGUF file, as a model with every layer on attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postnas.errors import UserError
from postnas.files import read_json
from postnas.models.config import HybridConfig
from postnas.models.families import WRAPPED, from_base
from postnas.models.gguf import dequantised
from postnas.models.model import HybridForCausalLM
from postnas.sources import resolve_config, resolve_model

UNTIED = "lm_head.weight is not the embedding, and tie_word_embeddings is true; set it to false in config.json"
"""What is wrong with weights that contradict their config."""

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
MAYBE_SIZES = ("num_key_value_heads", "head_dim")
"""Fields of a config.json that are whole numbers above 0, and those that may be null instead."""
NUMBERS = ("rope_theta", "rms_norm_eps", "embed_scale")
MAYBE_NUMBERS = ("attn_scale", "attn_logit_softcapping", "final_logit_softcapping")
"""Those that are numbers above 0, and those that may be null instead."""

VISION = ("vision_tower.", "multi_modal_projector.")
"""Where the names of weights begin that a wrapper has besides its text part, but for a `model.` before them."""


def base_folder(name: str, sha256: str | None = None) -> Path:
    """A folder with config.json, safetensors and a tokenizer, for any name that `sources` resolves.

    A GGUF file is dequantised once, to float32, into the user's cache.
    """
    path = resolve_model(name, sha256)
    return dequantised(path) if path.suffix == ".gguf" else path


def base_config(name: str, sha256: str | None = None) -> HybridConfig:
    """The base's sizes, from its config alone: of its text part where it takes images, too.

    A GGUF file, which has no config beside it, is read whole. sha256: what its bytes must have. Raises UserError for
    an unknown architecture, or values that make no model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = base_folder(name, sha256) / "config.json" if name.endswith(".gguf") else resolve_config(name)
    values = read_json(path)
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{path}: has no model_type; give the config.json of a model")
    kind = str(values["model_type"])
    if kind in WRAPPED:
        kind, values = WRAPPED[kind], _text_config(path, values)
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: model_type {kind!r} is unknown to transformers; choose another base")
    fields = {key: value for key, value in values.items() if key != "model_type"}
    return checked_config(
        path, values, lambda: HybridConfig(**from_base(AutoConfig.for_model(kind, **fields))), HybridForCausalLM
    )


def _text_config(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The config of a wrapper's text part. What concerns all of the model stands outside of it."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{path}: text_config is {text!r} and should hold the sizes of the text part; mend it")
    shared = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return text | {name: values[name] for name in shared if name in values}


def checked_config(path: Path, values: dict[str, Any], make: Callable[[], Any], kind: type[HybridForCausalLM]) -> Any:
    """The config that `make` makes of the `values` in the file `path`, once a model of class `kind` could be built.

    That model has shapes and no memory. Raises UserError with the file and the cause where either fails: whatever
    is stumbled over here stands in the user's file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.activations import ACT2FN

    try:
        _check_values(values)
        config = make()
        if config.hidden_act not in ACT2FN:
            raise UserError(f"hidden_act: {config.hidden_act!r} is unknown to transformers; mend it")
        with torch.device("meta"):
            kind(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (
        *(StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError),
        *(OSError, RuntimeError, TypeError, ValueError),
    ) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: makes no model ({cause}); mend it or choose another") from error
    return config


def _check_values(values: dict[str, Any]) -> None:
    """Tell of the commonest faults by the name of their field, which the errors of others do not hold."""
    for name in SIZES + MAYBE_SIZES:
        value = values.get(name, 1)
        if not (type(value) is int and value > 0) and not (value is None and name in MAYBE_SIZES):
            raise UserError(f"{name}: {value!r} is no whole number above 0; mend it")
    for name in NUMBERS + MAYBE_NUMBERS:
        value = values.get(name, 1.0)
        if not (type(value) in (int, float) and value > 0) and not (value is None and name in MAYBE_NUMBERS):
            raise UserError(f"{name}: {value!r} is no number above 0; mend it")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(name), dict | None):
            raise UserError(f"{name}: {values[name]!r} is no mapping; mend it")


def load_base(name: str, sha256: str | None = None, dtype: torch.dtype = torch.bfloat16) -> HybridForCausalLM:
    """The base on the CPU, weights in `dtype`, in evaluation mode, nothing requiring a gradient."""
    folder = base_folder(name, sha256)
    model = model_from_weights(base_config(str(folder)), text_weights(read_weights(folder)), dtype)
    return model.requires_grad_(False)


def model_from_weights(
    config: HybridConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    kind: type[HybridForCausalLM] = HybridForCausalLM,
) -> HybridForCausalLM:
    """A model of class `kind` that holds these very tensors (cast to `dtype`).

    Raises UserError where one is missing or left over.
    """
    with torch.device("meta"):
        model = kind(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted((wanted.keys() | found.keys()) - tied):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"weights: {name} is {found.get(name, 'missing')} and should be {wanted.get(name, 'absent')}; "
                "the file does not fit its config"
            )
    if tied:
        embedding = weights["model.embed_tokens.weight"]
        if not torch.equal(weights.get("lm_head.weight", embedding), embedding):
            raise UserError(f"weights: {UNTIED}")
        weights = weights | {"lm_head.weight": embedding}
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    model.model.make_rope()
    model.tie_weights()
    return model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: of the files that its index names, else of model.safetensors, else of the
    only file there is. Raises UserError for a cut-off file, or where it is not clear which files are meant."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= read_tensors(path)
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, as `read_weights` chooses them."""
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if index.exists():
        held = read_json(index)
        names = held.get("weight_map") if isinstance(held, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index}: has no weight_map of {{tensor: file}}; fetch or make it again")
        files = sorted({folder / name for name in names.values()})
    elif folder / "model.safetensors" in files:
        files = [folder / "model.safetensors"]
    elif len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} safetensors and no index; keep one, or add {index.name}")
    if not files:
        raise UserError(f"{folder}: holds no safetensors; give a folder with *.safetensors")
    return files


def text_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text part's weights by its own names, where these are a wrapper's; else the weights as they are.

    Older files say `language_model.model.` where newer ones say `model.language_model.`.
    """
    starts = {
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
    }
    if not any(name.startswith(tuple(starts)) for name in weights):
        return weights
    found = {}
    for name, value in weights.items():
        if not name.removeprefix("model.").startswith(VISION):
            start = next((start for start in starts if name.startswith(start)), "")
            found[starts.get(start, "") + name.removeprefix(start)] = value
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises UserError for a missing or cut-off file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); fetch or make it again") from error

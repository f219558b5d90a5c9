"""Base models from disk: a folder of safetensors or a GGUF file, as a model with every layer on attention."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postnas.errors import UserError
from postnas.files import read_json
from postnas.models.config import HybridConfig
from postnas.models.families import from_base
from postnas.models.gguf import dequantised
from postnas.models.model import HybridForCausalLM
from postnas.sources import resolve_config, resolve_model


def base_folder(name: str, sha256: str | None = None) -> Path:
    """A folder with config.json, safetensors and a tokenizer, for any name that `sources` resolves.

    A GGUF file is dequantised once, to float32, into the user's cache.
    """
    path = resolve_model(name, sha256)
    return dequantised(path) if path.suffix == ".gguf" else path


def base_config(name: str) -> HybridConfig:
    """The base's sizes, from its config alone. Raises UserError for an unknown architecture."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.activations import ACT2FN

    path = resolve_config(name)
    values = read_json(path)
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{path}: has no model_type; give the config.json of a model")
    kind = str(values.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: model_type {kind!r} is unknown to transformers; choose another base")
    try:
        config = AutoConfig.for_model(kind, **values)
    except (StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        # Whatever transformers stumbles over here stands in the user's file.
        raise UserError(f"{path}: is no configuration of {kind!r} ({error}); mend it or choose another base") from error
    fields = from_base(config)
    if fields["hidden_act"] not in ACT2FN:
        raise UserError(f"{path}: hidden_act {fields['hidden_act']!r} is unknown to transformers; mend it")
    return HybridConfig(**fields)


def load_base(name: str, sha256: str | None = None, dtype: torch.dtype = torch.bfloat16) -> HybridForCausalLM:
    """The base on the CPU, weights in `dtype`, in evaluation mode, nothing requiring a gradient."""
    folder = base_folder(name, sha256)
    model = model_from_weights(base_config(str(folder)), read_weights(folder), dtype)
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
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    model.model.make_rope()
    model.tie_weights()
    return model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder: of the files that its index names, else of model.safetensors, else of the
    only file there is. Raises UserError for a cut-off file, or where it is not clear which files are meant."""
    weights: dict[str, Tensor] = {}
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if index.exists():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    elif folder / "model.safetensors" in files:
        files = [folder / "model.safetensors"]
    elif len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} safetensors and no index; keep one, or add {index.name}")
    if not files:
        raise UserError(f"{folder}: holds no safetensors; give a folder with *.safetensors")
    for path in files:
        weights |= read_tensors(path)
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises UserError for a missing or cut-off file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); fetch or make it again") from error

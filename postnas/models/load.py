"""Our classes among transformers' Auto classes, and a finished hybrid from its folder or from the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from postnas.data import load_tokenizer
from postnas.errors import UserError
from postnas.files import read_json
from postnas.sources import resolve_model

MODEL_TYPES = ("postnas", "jet_nemotron")


def register_config() -> None:
    """Make AutoConfig know the model types `postnas` and `jet_nemotron`."""
    from transformers import AutoConfig

    from postnas.models.config import HybridConfig
    from postnas.models.jet_nemotron import JetNemotronConfig

    for config in (HybridConfig, JetNemotronConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_model() -> None:
    """Make AutoModel and AutoModelForCausalLM know our configurations."""
    from transformers import AutoModel, AutoModelForCausalLM

    from postnas.models.model import HybridForCausalLM, HybridModel, JetNemotronForCausalLM, JetNemotronModel

    for model in (HybridModel, JetNemotronModel):
        AutoModel.register(model.config_class, model, exist_ok=True)
    for whole in (HybridForCausalLM, JetNemotronForCausalLM):
        AutoModelForCausalLM.register(whole.config_class, whole, exist_ok=True)


def load(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """A finished hybrid and its tokenizer, in evaluation mode.

    name: the `model` folder of a run, the folder of a Jet-Nemotron checkpoint, or a hub id such as
    jet-ai/Jet-Nemotron-2B. dtype: as saved where None. Raises UserError where there is no hybrid, a file is cut off,
    or the weights are not exactly those that its config asks for.
    """
    folder = _folder(str(name))
    model = load_model(folder, dtype)
    return model.to(device).eval(), load_tokenizer(folder)


def load_any(name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """A hybrid as `load` gives it, or a base that `sources` resolves, and its tokenizer, in evaluation mode.

    dtype: as saved for a hybrid and bfloat16 for a base where None. Only safetensors and GGUF are read.
    Raises UserError where there is no model that we can run.
    """
    from postnas.models.checkpoint import base_folder, load_base

    folder = base_folder(str(name))
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") in MODEL_TYPES:
        return load(folder, dtype, device)
    base: Any = load_base(str(folder), dtype=dtype or torch.bfloat16)
    return base.to(device), load_tokenizer(folder)


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The hybrid in `folder`, without a tokenizer; otherwise as `load`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from postnas.models.checkpoint import UNTIED, checked_config, weight_files
    from postnas.models.model import HybridForCausalLM, JetNemotronForCausalLM

    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    classes = {whole.config_class.model_type: whole for whole in (HybridForCausalLM, JetNemotronForCausalLM)}
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{folder}: holds a model of type {kind!r}, not one of {', '.join(MODEL_TYPES)}; "
            "give the `model` folder of a finished run, or a Jet-Nemotron checkpoint"
        )
    config = checked_config(
        path, values, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), classes[kind]
    )
    weight_files(folder)  # what is wrong with the index is told there
    try:
        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=False,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in one line
            )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); write the model again") from error
    model, found = loaded
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:
        raise UserError(f"{folder}: {wrong[0]} is missing or has a wrong shape; write the model again")
    if found["unexpected_keys"]:
        extra = sorted(found["unexpected_keys"])[0]
        raise UserError(f"{folder}: {extra} has no place in the model that config.json tells of; mend config.json")
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise UserError(f"{folder}: {UNTIED}")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of weights that do not fit from the screen: we say the same in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{name}: holds no config.json; give the `model` folder of a finished run")
    folder = resolve_model(name)
    if not folder.is_dir():
        raise UserError(f"{name}: is a file and no folder of a hybrid; give the `model` folder of a finished run")
    return folder

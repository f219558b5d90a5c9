"""Our classes among transformers' Auto classes, and a finished hybrid from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from postnas.data import load_tokenizer
from postnas.errors import UserError
from postnas.files import read_json


def register_config() -> None:
    """Make AutoConfig know the model type `postnas`."""
    from transformers import AutoConfig

    from postnas.models.config import HybridConfig

    AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)


def register_model() -> None:
    """Make AutoModelForCausalLM know our configuration."""
    from transformers import AutoModelForCausalLM

    from postnas.models.config import HybridConfig
    from postnas.models.model import HybridForCausalLM

    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


def load(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """A finished hybrid and its tokenizer, from the `model` folder of a run, in evaluation mode.

    dtype: as saved where None. Raises UserError where the folder holds no hybrid or a file is cut off.
    """
    from postnas.models.config import HybridConfig
    from postnas.models.model import HybridForCausalLM

    folder = Path(folder)
    mend = "give the `model` folder of a finished run"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds no config.json; {mend}")
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != HybridConfig.model_type:
        raise UserError(f"{folder}: holds a model of type {kind!r}, not {HybridConfig.model_type!r}; {mend}")
    try:
        loaded: Any = HybridForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, in one line
        )
        model, found = loaded
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}); write the model again") from error
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:
        raise UserError(f"{folder}: {wrong[0]} is missing or has a wrong shape; write the model again")
    return model.to(device).eval(), load_tokenizer(folder)

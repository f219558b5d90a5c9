"""Configurations and models. The names stand here lazily, so that registering a model type loads no model."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "HybridConfig": "config",
    "HybridModel": "model",
    "HybridForCausalLM": "model",
    "HybridCache": "cache",
    "JetNemotronConfig": "jet_nemotron",
    "JetNemotronModel": "model",
    "JetNemotronForCausalLM": "model",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__

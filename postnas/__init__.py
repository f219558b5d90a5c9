"""postnas: turn a pretrained full-attention language model into a hybrid that is cheap at long context.

    import postnas
    model = postnas.convert("Qwen/Qwen2.5-1.5B", placement=[...])
    model = transformers.AutoModelForCausalLM.from_pretrained("runs/x/model")    # after `import postnas`

Importing does one thing: our classes join transformers' Auto classes, as soon as transformers is there.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["convert", "load"]

_HOMES = {"convert": "postnas.models.convert", "load": "postnas.models.load"}
_WAITED_FOR = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_model",
}
"""Modules of transformers, and what joins them once they are loaded."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'postnas' has no attribute {name!r}")


class _Registering(Loader):
    """Loads a module of transformers as it is, then lets our class join it."""

    def __init__(self, loader: Loader, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _join(self.name)


class _Finder(MetaPathFinder):
    """Waits for transformers' Auto classes, so that `import postnas` stays quick."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, fullname)
        return spec


def _join(name: str) -> None:
    getattr(importlib.import_module("postnas.models.load"), _WAITED_FOR[name])()


for _name in _WAITED_FOR:
    if _name in sys.modules:
        _join(_name)
    else:
        sys.meta_path.insert(0, _Finder(_name))

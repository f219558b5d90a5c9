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
_TRIGGER = "transformers.models.auto.modeling_auto"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'postnas' has no attribute {name!r}")


class _Registering(Loader):
    """Loads transformers' Auto classes as they are, then registers ours."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    """Waits for transformers' Auto classes, so that `import postnas` stays quick."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def _register() -> None:
    importlib.import_module("postnas.models.load").register()


if _TRIGGER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Finder())

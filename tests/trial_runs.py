"""Recipes that compare variants at a tiny size, for the tests of select, design and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_recipe, write_recipe

TRIAL: dict[str, Any] = {
    "tokens": 512,
    "align_tokens": 512,
    "lrs": [1e-3, 1e-2],
    "lr_tokens": 256,
    "context": 16,
    "limit": 4,
    "weights": {"kl": 1.0},
}
SELECT = TRIAL | {"blocks": ["jet", "gla"], "options": {"jet": {"expand_v": 1.0}, "gla": {"expand_v": 1.0}}}
DESIGN = TRIAL | {"variants": {"thin": {"head_dim": 4}, "wide": {"expand_v": 1.5}}}
CHANGES: dict[str, Any] = {"select": SELECT, "design": DESIGN, "stage2": {"tokens": 0}}
CHOSEN_BY = {"weights": {"params": 1.0}}
"""So that a test knows the choice: the fewest parameters."""


def written(folder: Path, inputs: tuple[Path, Path], **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    return str(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, *inputs, **CHANGES | changes)))


def timeless(value: Any) -> Any:
    """Without what is a time, or made from one."""
    if isinstance(value, dict):
        times = ("train_tokens_per_s", "decode_tokens_per_s", "decode_stderr", "tokens_per_s", "seconds")
        return {name: timeless(inner) for name, inner in value.items() if name not in times}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value

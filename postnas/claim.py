"""Whose a run directory is: it belongs to the recipe that things in it were made by."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from postnas.errors import UserError
from postnas.files import write_text
from postnas.recipe import Recipe, Text, differences
from postnas.trials import TRIALS

AGAIN = {"place", *TRIALS, "evaluate", "bench"}
"""The stages that may be asked again, by themselves, with other settings."""


def claim(recipe: Recipe, done: dict[str, Any], only: str | None = None) -> None:
    """Write the resolved recipe, or refuse as `differing` does."""
    folder = Path(recipe.out)
    if any(field.startswith("evaluate.") for field in differing(recipe, done, only)):
        (folder / "eval.partial.json").unlink(missing_ok=True)
    path, resolved = folder / "recipe.yaml", _plain(recipe)
    if not path.exists() or yaml.safe_load(path.read_text(encoding="utf-8")) != resolved:
        write_text(path, yaml.safe_dump(resolved, sort_keys=False))


def differing(recipe: Recipe, done: dict[str, Any], only: str | None = None) -> list[str]:
    """The fields in which a recipe differs from that of its directory, none where that is new.

    done: the stages that are done, as in stages.json. only: the stage that is asked by itself.
    Only what has been used already must stay as it was: the base and the text once they are tokenised, a stage's
    own section once it has begun. `place`, `select`, `design`, `size`, `evaluate` and `bench` may be asked again by
    themselves with other settings, the first four until training has begun. Raises UserError for a change of
    anything else.
    """
    folder = Path(recipe.out)
    path = folder / "recipe.yaml"
    if not path.exists():
        return []
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: is no recipe; choose another `out`, or remove the file")
    fixed = _fixed(folder, done, only)
    changed = differences(_with_defaults(Recipe, stored), _plain(recipe))
    for field, values in changed.items():
        if field.split(".")[0] in fixed:
            raise UserError(
                f"{path}: holds a run of another recipe ({field} {values}); choose another `out`, or remove the folder"
            )
    return list(changed)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values as YAML gives them back."""
    return yaml.safe_load(yaml.safe_dump(recipe.to_dict()))


def _with_defaults(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a kept recipe (kind: Recipe, or a section of it) with today's defaults for what they lack.

    A field that came after a run was made stands for what was done before it, as its default does.
    """
    filled, types = dict(values), get_type_hints(kind)
    for field in fields(kind):
        if field.name not in values:
            if field.default_factory is not MISSING:
                made = field.default_factory()
                filled[field.name] = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
            elif field.default is not MISSING:
                filled[field.name] = field.default
            continue
        value, of = values[field.name], types[field.name]
        if is_dataclass(of) and isinstance(value, dict):
            filled[field.name] = _with_defaults(of, value)
        elif of == list[Text] and isinstance(value, list):
            filled[field.name] = [_with_defaults(Text, one) if isinstance(one, dict) else one for one in value]
    return filled


def _fixed(folder: Path, done: dict[str, Any], only: str | None) -> set[str]:
    """The recipe's sections that what is in the directory was made by."""
    checkpoints = [path.name for path in (folder / "checkpoints").glob("*")]
    fixed: set[str] = set()
    if (folder / "data" / "tokens.json").exists():
        fixed |= {"base", "data", "seed"}
    if (folder / "candidates").exists() or any(name.startswith("align") for name in checkpoints):
        fixed |= {"align", "paths", "compute", "device", "threads"}
    if "train" in done or {"train", "stage2"} & set(checkpoints):
        fixed |= {"place", *TRIALS, "train", "stage2"}
    return fixed | (AGAIN & set(done) - {only})

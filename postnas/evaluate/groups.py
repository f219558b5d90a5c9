"""The paper's groups of benchmarks, as data: what each holds, who runs it here, and what is missing for it."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from importlib import resources
from typing import Any

from postnas.errors import UserError
from postnas.evaluate.task import task_names
from postnas.sources.formats import short

PAPER = "paper"
"""The group of all groups."""


@dataclass(frozen=True)
class Member:
    """One benchmark of a group; groups.yaml says what each field means. `ours`, `harness` or `needs` is given."""

    name: str
    """As the paper writes it."""
    shots: int
    """Examples in the prompt, as in the paper."""
    ours: str | None = None
    """A task of tasks/*.yaml."""
    harness: str | None = None
    """A task or a group of lm_eval."""
    metric: str | None = None
    """Key of the harness's result: METRIC, or METRIC,FILTER where the answer is cut out of a text."""
    data: str | None = None
    """What the harness fetches: OWNER/NAME or OWNER/NAME:CONFIG on the hub."""
    extra: str | None = None
    """Extra of lm_eval that the harness's task needs."""
    modules: tuple[str, ...] = ()
    """Modules that the extra brings."""
    needs: str | None = None
    """Why neither can run it, and what can; one line."""

    def harness_arguments(self) -> list[str]:
        """What `harness.main` takes for this benchmark, the model and the device apart. Empty without `harness`."""
        return ["--tasks", self.harness, "--num_fewshot", str(self.shots)] if self.harness else []


def group_names() -> list[str]:
    """The names of all groups in the paper's order, and `paper` for all of them."""
    return [*_groups(), PAPER]


def resolve(group: str) -> list[Member]:
    """The benchmarks of a group. Raises UserError, with the groups there are, for another name."""
    if group == PAPER:
        return [member for members in _groups().values() for member in members]
    if group not in _groups():
        raise UserError(f"group: {group!r} is unknown; choose from {', '.join(group_names())}")
    return list(_groups()[group])


def runnable(member: Member) -> str | None:
    """None where our suite or the harness can run it here, else the reason in one line.

    A task of ours counts as runnable where its YAML is there. For the harness the hub is asked, once a data set;
    with HF_HUB_OFFLINE=1, the cache of `datasets`.
    """
    if member.ours in task_names():
        return None
    if member.harness is None:
        return member.needs or f"{member.ours} is no task of this version; choose another benchmark"
    if _missing("lm_eval"):
        return "lm_eval is not installed; pip install 'postnas[eval]'"
    for module in member.modules:
        if _missing(module):
            return f"{module} is not installed; pip install 'lm_eval[{member.extra}]'"
    return _unreachable(member.data) if member.data else None


def _missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


@functools.cache
def _unreachable(data: str) -> str | None:
    """Why a data set of the hub cannot be had (no way there, gated, gone), in one line; None where it can."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    name, _, config = data.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().auth_check(name, repo_type="dataset")  # one quick question; `datasets` would ask six times
        datasets.load_dataset_builder(name, config or None)
    except (OSError, RuntimeError, ValueError, HTTPError) as error:  # each means that there will be no rows
        return f"{name} is on the hub only and cannot be had ({short(error)})"
    return None


@functools.cache
def _groups() -> dict[str, tuple[Member, ...]]:
    import yaml

    text = resources.files("postnas.evaluate").joinpath("groups.yaml").read_text(encoding="utf-8")
    return {group: tuple(_member(fields) for fields in members) for group, members in yaml.safe_load(text).items()}


def _member(fields: dict[str, Any]) -> Member:
    return Member(**fields | {"modules": tuple(fields.get("modules", ()))})

"""The model card: what a reader of the checkpoint must know, as Markdown with the front matter of Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from postnas.report.measures import KEPT_HEAD, Kept
from postnas.report.results import WON_HEAD, Results, base_name, linear_layers, read_results


def model_card(run: Path) -> str:
    """The text of model/README.md, from the files of a run directory. Raises UserError as `read_results` does."""
    results = read_results(run)
    pages = Environment(
        loader=PackageLoader("postnas.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["code"] = _code
    return pages.get_template("card.md.j2").render(_card(results))


def _card(results: Results) -> dict[str, Any]:
    recipe, placement = results.recipe, results.placement
    base = recipe["base"]
    mixers = placement["placement"] if placement else []
    return {
        "front": yaml.safe_dump(_front_matter(base), sort_keys=False),
        "name": base_name(base["model"]),
        "base": base,
        "limits": _base_limits(base["model"]),
        "folder": f"{recipe['out'].rstrip('/')}/model",
        "kept_head": KEPT_HEAD,
        "kept": [row.cells() for row in results.kept],
        "scored": _scored(results.kept),
        "won_head": WON_HEAD,
        "won": [row.cells() for row in results.won],
        "placement": placement,
        "linear": linear_layers(mixers),
        "attention": [layer for layer, mixer in enumerate(mixers) if mixer == "attn"],
        "text": recipe["data"]["text"],
        "tokens": [(stage, results.stages[stage]["tokens"]) for stage in _trained(results)],
        "device": results.bench,
        "command": results.command,
    }


def _scored(rows: list[Kept]) -> str:
    """Whether the measures score what the model writes or given text, as sentences; empty without measures."""
    written = list(dict.fromkeys(row.task for row in rows if row.read.written))
    given = any(row.task not in written for row in rows)
    if not rows:
        return ""
    if not written:
        return (
            "The measures here score given text. Generated answers were not scored, and log-likelihood can hide "
            "damage to them."
        )
    words = f"What the model writes was scored in {', '.join(map(_code, written))}"
    if given:
        words += "; the other measures score given text, and log-likelihood can hide damage to what is written"
    return words + ". What it writes elsewhere can be damaged in ways that no measure here shows."


def _trained(results: Results) -> list[str]:
    return [stage for stage in ("align", "train", "stage2") if results.stages.get(stage, {}).get("tokens")]


def _front_matter(base: dict[str, Any]) -> dict[str, Any]:
    """The hub takes licences by their lower-case id, and only its own ids as a base: others stand in the text."""
    licence = base["licence"].strip().lower()
    front: dict[str, Any] = {"license": licence}
    if not re.fullmatch(r"[a-z0-9.-]+", licence):
        front = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")}
    if _is_hub_id(base["model"]):
        front["base_model"] = base["model"]
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["postnas", "hybrid", "linear-attention"],
    }
    return front


def _is_hub_id(model: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)) and not model.endswith(".gguf") and not Path(model).exists()


def _base_limits(model: str) -> str:
    """What the name of the base says of its limits, as a sentence."""
    name = base_name(model)
    size = re.search(r"(?<![\d.])\d+(?:\.\d+)?[MB](?![a-z])", name)
    traits = []
    if size:
        traits.append(f"has {size.group()} parameters by its name")
    if re.search("instruct", name, re.IGNORECASE):
        traits.append("is an instruct model")
    bits = re.search(r"Q(\d)", name, re.IGNORECASE) if model.endswith(".gguf") else None
    if bits:
        traits.append(f"was read from {bits.group(1)}-bit weights")
    if not traits:
        return ""
    *first, last = traits
    return "The base " + (", ".join(first) + " and " if first else "") + last + "."


def _code(value: Any) -> str:
    """A Markdown code span on one line; a backtick within would end it."""
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"

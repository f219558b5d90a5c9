"""The report: one HTML file that asks nobody for anything, for a phone or a desk, light or dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from postnas.files import write_text
from postnas.report.results import (
    KEPT_HEAD,
    WON_HEAD,
    Results,
    base_name,
    byte_text,
    headline,
    linear_layers,
    rate,
    read_results,
)


def write_report(run: Path) -> Path:
    """Write `report.html` into the run directory from the files there; returns its path.

    Equal files give equal bytes. Raises UserError where recipe.yaml is missing, a file is not JSON, or the
    directory cannot be written.
    """
    results = read_results(run)
    pages = Environment(
        loader=PackageLoader("postnas.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = run / "report.html"
    write_text(path, pages.get_template("report.html.j2").render(_page(results)))
    return path


def _page(results: Results) -> dict[str, Any]:
    """The values that the template shows."""
    return {
        "base": results.recipe["base"]["model"],
        "name": base_name(results.recipe["base"]["model"]),
        "device": _device(results),
        "tiles": headline(results),
        "kept_head": KEPT_HEAD,
        "kept": [row.cells() for row in results.kept],
        "won_head": WON_HEAD,
        "won": [row.cells() for row in results.won],
        "placement": _placement(results),
        "swapped": bool(results.scores and results.scores.get("swap")),
        "cost": _cost(results),
        "command": results.command,
        "recipe": results.recipe_text,
        "plots": {name: Markup(_inline(svg)) for name, svg in _plots(results).items()},
    }


def _plots(results: Results) -> dict[str, str]:
    """The SVG of every plot whose stages have run."""
    from postnas.report import plots

    kept, won = results.kept, results.won
    found = {}
    if results.eval_ and kept:
        found["kept"] = plots.kept(results.eval_)
    if results.bench and won:
        found["speed"] = plots.speed(results.bench)
    if results.eval_ and results.bench and won and any(row.share is not None for row in kept):
        found["quality"] = plots.quality_against_cache(results.eval_, results.bench, results.placement)
    if results.placement or (results.scores and results.scores.get("swap")):
        found["sensitivity"] = plots.sensitivity(results.scores, results.placement)
    if results.placement and results.placement.get("table"):
        found["budgets"] = plots.budget_table(results.placement)
    if results.metrics:
        found["losses"] = plots.losses(results.metrics)
    if plots.final_errors(results.metrics):
        found["alignment"] = plots.alignment_by_layer(results.metrics)
    return found


def _inline(svg: str) -> str:
    """Inside HTML an SVG needs no names of namespaces, and its size is the page's to say."""
    head, rest = svg.split(">", 1)
    return re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + ">" + rest


def _device(results: Results) -> str:
    if results.bench:
        bench = results.bench
        return f"{bench['device']}, {bench['threads']} threads, torch {bench['torch']}"
    return f"device {results.recipe['device']}, {results.recipe['threads']} threads"


def _placement(results: Results) -> dict[str, Any] | None:
    """What was chosen, and a row a layer: its mixer and what was measured of it."""
    from postnas.report.plots import final_errors

    placement = results.placement
    if placement is None:
        return None
    mixers, block = placement["placement"], placement["block"]
    errors = final_errors(results.metrics).get(block, [])
    swap = results.scores.get("swap", []) if results.scores else []
    cost = {row["layer"]: row for row in swap if row["block"] == block}
    base = results.scores["base"] if results.scores else {}
    layers = []
    for layer, mixer in enumerate(mixers):
        cells = [mixer, f"{errors[layer]:.3f}" if errors else ""]
        if layer in cost:
            row = cost[layer]
            cells += [f"{row[name] - value:+.4f}" for name, value in base.items()] + [f"{row['score']:.4f}"]
        layers.append([str(layer), *cells])
    return {
        "strategy": placement["strategy"],
        "block": block,
        "linear": linear_layers(mixers),
        "all": len(mixers),
        "attention": [layer for layer, mixer in enumerate(mixers) if mixer == "attn"],
        "objective": ", ".join(f"{weight:g} × {name}" for name, weight in placement["objective"].items()),
        "scores": ", ".join(f"{name} {value:.3f}" for name, value in placement["scores"].items()),
        "head": ["layer", "mixer", "error aligned", *([*base, "score"] if cost else [])],
        "layers": layers,
    }


def _cost(results: Results) -> list[list[str]]:
    """A row for each finished stage, and one for all: stage, seconds, tokens, tokens/s, peak memory."""
    rows = []
    for stage, cost in results.stages.items():
        tokens, peak = cost.get("tokens"), cost.get("peak_bytes")
        speed = rate(tokens / cost["seconds"]) if tokens else ""
        seconds, count = f"{cost['seconds']:,.1f}", f"{tokens:,}" if tokens else ""
        rows.append([stage, seconds, count, speed, byte_text(peak) if peak else ""])
    if rows:
        seconds = f"{sum(cost['seconds'] for cost in results.stages.values()):,.1f}"
        peak = max(cost.get("peak_bytes") or 0 for cost in results.stages.values())
        rows.append(["all", seconds, "", "", byte_text(peak) if peak else ""])
    return rows

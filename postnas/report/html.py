"""The report: one HTML file that asks nobody for anything, for a phone or a desk, light or dark."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from postnas.errors import UserError
from postnas.files import write_text
from postnas.report.measures import KEPT_HEAD, Kept, grouped
from postnas.report.results import (
    WON_HEAD,
    Results,
    alone,
    base_name,
    byte_text,
    chosen,
    headline,
    linear_layers,
    rate,
    read_results,
)
from postnas.trials import TRIALS


def write_report(run: Path) -> Path:
    """Write `report.html` into the run directory from the files there; returns its path.

    Equal files give equal bytes. Raises UserError where recipe.yaml is missing, a file is not JSON, or the
    directory cannot be written.
    """
    path = run / "report.html"
    write_text(path, render("report.html.j2", _page(read_results(run))))
    return path


def render(template: str, values: dict[str, Any]) -> str:
    """A page from its template. `plots` in `values` are SVG texts by name; all other text is escaped."""
    pages = Environment(
        loader=PackageLoader("postnas.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["breakable"] = _breakable
    plots = {name: Markup(_inline(name, svg)) for name, svg in values["plots"].items()}
    return pages.get_template(template).render(values | {"plots": plots})


def _page(results: Results) -> dict[str, Any]:
    """The values that the template shows."""
    return {
        "base": results.recipe["base"]["model"],
        "title": f"{base_name(results.recipe['base']['model'])} as a hybrid",
        "device": device_name(results),
        "tiles": headline(results),
        "kept_head": KEPT_HEAD,
        "kept": [table_group(group, rows) for group, rows in grouped(results.kept).items()],
        "counted": _counted(results.kept),
        "won_head": WON_HEAD,
        "won": [row.cells() for row in results.won],
        "placement": _placement(results),
        "compared": _compared(results),
        "swapped": bool(results.scores and results.scores.get("swap")),
        "cost": _cost(results),
        "command": results.command,
        "recipe": results.recipe_text,
        "remake": {
            "eval": results.remake("eval"),
            "bench": results.remake("bench"),
            "both": results.remake("eval", "bench"),
            "place": results.remake("place"),
            "train": results.remake("align", "train"),
            "compared": results.remake(*results.compared),
        },
        "plots": _plots(results),
    }


def table_group(name: str, rows: list[Kept]) -> dict[str, Any]:
    """Rows of a table: what the base can do, and what it cannot, which is shown in grey."""
    return {
        "name": name,
        "able": [row.cells() for row in rows if row.able],
        "unable": [row.cells() for row in rows if not row.able],
    }


def _counted(rows: list[Kept]) -> dict[str, int]:
    shares = [row for row in rows if row.read.share]
    able = sum(row.able for row in shares)
    return {"shares": len(shares), "able": able, "unable": len(shares) - able}


def _plots(results: Results) -> dict[str, str]:
    """The SVG of every plot whose stages have run."""
    from postnas.report import placements, plots, quality

    kept, won = results.kept, results.won
    found: dict[str, str] = {}
    if results.eval_ and kept:
        found |= {f"kept-{number}": svg for number, svg in enumerate(quality.kept(results.eval_).values(), start=1)}
    if results.bench and won:
        found["speed"] = plots.speed(results.bench)
    if results.eval_ and results.bench and won and any(row.share is not None for row in kept):
        found["quality"] = quality.against_cost(results.eval_, results.bench)
    if results.placement or (results.scores and results.scores.get("swap")):
        found["sensitivity"] = plots.sensitivity(results.scores, results.placement)
    if results.placement and results.placement.get("table"):
        found["budgets"] = plots.budget_table(results.placement)
    if results.placement and (choices := chosen(results.placement)):
        found["choices"] = placements.choices(choices, "budget, layers")
    if results.placement:
        single = alone(results.scored, results.placement)
        # The single swaps of scores.json are in the plot above already.
        one_linear = {} if results.scores and results.scores.get("swap") else single.one_linear
        if one_linear or single.one_full:
            found["alone"] = placements.alone(one_linear, single.one_full)
    if results.metrics:
        found["losses"] = plots.losses(results.metrics)
    if plots.final_errors(results.metrics):
        found["alignment"] = plots.alignment_by_layer(results.metrics)
    return found


def _breakable(text: str) -> Markup:
    """A name that a narrow column may break behind its underscores and points."""
    return Markup(re.sub("([_.])", r"\1<wbr>", str(escape(text))))


def _inline(name: str, svg: str) -> str:
    """Inside HTML an SVG needs no namespaces, its size is the page's to say, and its ids are unlike other plots'."""
    head, rest = svg.split(">", 1)
    rest = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", rest)
    return re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + ">" + rest


def device_name(results: Results) -> str:
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
    errors = final_errors(results.metrics)
    swap = results.scores.get("swap", []) if results.scores else []
    cost = {row["layer"]: row for row in swap if row["block"] == block}
    base = results.scores["base"] if results.scores else {}
    layers = []
    for layer, mixer in enumerate(mixers):
        own = errors.get(mixer if mixer in errors else block, [])
        cells = [mixer, f"{own[layer]:.3f}" if own else ""]
        if layer in cost:
            row = cost[layer]
            cells += [f"{row[name] - value:+.4f}" for name, value in base.items()] + [f"{row['score']:.4f}"]
        layers.append([str(layer), *cells])
    return {
        "strategy": placement["strategy"],
        "block": ", ".join(placement.get("blocks", [block])),
        "linear": linear_layers(mixers),
        "all": len(mixers),
        "attention": [layer for layer, mixer in enumerate(mixers) if mixer == "attn"],
        "objective": ", ".join(f"{weight:g} × {name}" for name, weight in placement["objective"].items()),
        "scores": ", ".join(f"{name} {value:.3f}" for name, value in placement["scores"].items()),
        "head": ["layer", "mixer", "error aligned", *([*base, "score"] if cost else [])],
        "layers": layers,
    }


def _compared(results: Results) -> list[dict[str, Any]]:
    """A table of each stage that compared variants. Raises UserError for a file of another shape."""
    from postnas.report.variants import compared

    tables = []
    for stage, found in results.compared.items():
        try:
            tables.append(compared(stage, found))
        except (KeyError, TypeError) as error:
            raise UserError(f"{TRIALS[stage]}: lacks {error}; make it anew with `postnas {stage}`") from error
    return tables


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

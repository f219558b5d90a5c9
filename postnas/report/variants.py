"""Tables of what the stages select, design and size compared."""

from __future__ import annotations

from typing import Any

from postnas.report.measures import LOSS, Metric, metric_of
from postnas.report.results import byte_text, context_name, rate

TITLES = {"select": "Blocks", "design": "Designs of the block", "size": "Sizes of the block"}
DIMS = {"key_dim": "key dim", "value_dim": "value dim", "heads": "heads"}


def compared(stage: str, found: dict[str, Any]) -> dict[str, Any]:
    """A table with a row a variant, the chosen one marked, and a sentence; `found` is what the stage wrote.

    Raises KeyError or TypeError for a file of another shape.
    """
    rows, chosen = found["rows"], found["chosen"]["name"]
    score = {one["name"]: one["score"] for one in found["ranking"]}
    chief: dict[str, str] = {}
    for one in rows[0]["scores"]:
        chief.setdefault(one["task"], one["metric"])
    dims = DIMS if stage == "size" else {}
    head = ["variant", *dims.values(), *(_column(task, metric) for task, metric in chief.items())]
    head += ["parameters", "cache", "trained, tokens/s", "decode, tokens/s", "learning rate", "score"]
    lines = []
    for row in rows:
        scores = {(one["task"], one["metric"]): one for one in row["scores"]}
        line = [f"{row['name']} (chosen)" if row["name"] == chosen else row["name"], *(str(row[dim]) for dim in dims)]
        line += [_score(scores[pair]) for pair in chief.items()]
        line += [f"{row['params']:,}", byte_text(row["cache_bytes"]), rate(row["train_tokens_per_s"])]
        line += [rate(row["decode_tokens_per_s"], row["decode_stderr"]), f"{row['lr']:g}", f"{score[row['name']]:+.4f}"]
        lines.append(line)
    return {"stage": stage, "title": TITLES[stage], "head": head, "rows": lines, "note": _note(stage, found)}


def _column(task: str, metric: str) -> str:
    return task if task == metric != "kl" else _read(metric, task).words.replace("{task}", task)


def _read(metric: str, task: str) -> Metric:
    return Metric("KL, nats a token", LOSS, share=False) if metric == "kl" else metric_of(metric, task)


def _score(score: dict[str, Any]) -> str:
    """The value, behind it the paired difference from the first variant; the first shows its own error."""
    metric = _read(score["metric"], score["task"])
    value = metric.value(score["value"]) if metric.share else f"{score['value']:.4g}"
    if score["difference"] is None:
        return value + metric.error(score["stderr"])
    change = score["difference"]
    number = f"{100 * change:+.1f}" if metric.share else f"{change:+.3f}"
    return f"{value} ({number}{metric.error(score['difference_stderr'])})"


def _note(stage: str, found: dict[str, Any]) -> str:
    weights = ", ".join(f"{weight:g} × {name}" for name, weight in found["weights"].items() if weight > 0)
    words = (
        f"Decode at {context_name(found['context'])} tokens of context, batch {found['batch']}, on {found['device']}. "
        f"The score sums gains on the first variant: {weights}."
    )
    if stage == "size":
        left = len(found["grid"]) - len(found["rows"])
        words += (
            f" A layer's state takes {byte_text(found['cache_bytes'])} in every row, within {found['tolerance']:.0%}."
        )
        words += f" Of {len(found['grid'])} sizes that were timed {left} were not trained." if left else ""
        words += f" Not beaten in both accuracy and decode speed: {', '.join(found['front'])}."
    return words

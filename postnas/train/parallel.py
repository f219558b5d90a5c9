"""Several processes at one run, as torchrun starts them; with one process everything here does nothing.

Candidates are spread by layer, since they do not need each other. Distillation splits each batch and
averages gradients. Stages that do neither run on rank 0 while the others wait.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=24)
"""How long ranks wait for rank 0, which may evaluate for hours."""


def start(device: torch.device) -> None:
    """Join the other ranks, where torchrun has started any."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over ranks, on every rank; in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def smallest(value: int) -> int:
    """The smallest of the ranks' values, on every rank."""
    if world() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)


def average(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over ranks; in place, in one message."""
    if world() == 1:
        return
    flat = total(torch.cat([x.flatten() for x in tensors])) / world()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))

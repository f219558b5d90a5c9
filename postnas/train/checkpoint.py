"""Checkpoints of a training stage: safetensors for tensors, JSON for the rest, no pickle anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from postnas.errors import UserError
from postnas.files import read_json, recover, replacing, write_json
from postnas.models.checkpoint import read_tensors


def save(
    folder: Path, key: str, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write weights, optimizer moments, step and random states; `folder` holds the old or the new, whole.

    key: says what is being trained from what; a checkpoint of another key counts as none.
    """
    moments: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                moments[f"{name}:{moment}"] = state[moment]
        if "step" in state:
            steps[name] = float(state["step"])
    random = {"cpu": _hex(torch.get_rng_state())}
    if torch.cuda.is_available():
        random["cuda"] = _hex(torch.cuda.get_rng_state())
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, temporary / "weights.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"key": key, "step": step, "optimizer_steps": steps, "random": random})


def step_of(folder: Path, key: str) -> int:
    """The step that a checkpoint was taken at; 0 where there is none of this key."""
    recover(folder)
    if not (folder / "state.json").exists():
        return 0
    state = read_json(folder / "state.json")
    return int(state["step"]) if state["key"] == key else 0


def load(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint back in place and return the step it was taken at."""
    state: dict[str, Any] = read_json(folder / "state.json")
    weights = read_tensors(folder / "weights.safetensors")
    moments = read_tensors(folder / "optimizer.safetensors")
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{folder}: is the checkpoint of another model; remove the folder to begin the stage anew")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(weights[name])
        if name in state["optimizer_steps"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(state["optimizer_steps"][name], dtype=torch.float32, device=parameter.device),
                "exp_avg": moments[f"{name}:exp_avg"].to(parameter.device),
                "exp_avg_sq": moments[f"{name}:exp_avg_sq"].to(parameter.device),
            }
    torch.set_rng_state(_unhex(state["random"]["cpu"]))
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(state["random"]["cuda"]))
    return int(state["step"])


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()

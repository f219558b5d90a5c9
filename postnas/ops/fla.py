"""The chunk kernels of flash-linear-attention (fla) on a GPU; the only file that imports fla.

Some versions refuse the backward of the gated delta rule on Hopper, some get it wrong in silence, some do not come
back. So a shape is tried before it is used: a process of its own compares outputs and gradients with the plain form in
float64, under a time limit, and what it finds is kept in the user's cache for these versions on this device. That
process also compiles and tunes, and Triton keeps the result on disk, so the trial is the warm-up.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.files import read_json, write_json
from postnas.sources import cache_dir

CLOSE = 2e-2
"""Largest relative error of an output or a gradient in bfloat16; right kernels are at 5e-3."""
LIMIT = 300
"""Seconds that a trial may take: compiling and tuning one shape takes about 100."""
PATIENCE = LIMIT + 60
"""Seconds that the other ranks wait for the first one's trial, which they may have asked for a little earlier."""
PAUSE = 1.0
"""Seconds between two looks at the record while waiting."""
DAY = 24 * 3600
"""Seconds for which a trial that did not come back is not repeated."""
WRONG, REFUSES, LATE = "fla is wrong", "fla refuses", "fla did not come back"
"""How the problems begin that say something about the kernels, not about the moment."""
FINAL = (WRONG, REFUSES)
LOW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Types that the kernels compute as they are; in float32 they would round to tf32, so the plain form is taken."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    packed: bool
    gradients: bool


def usable(q: Tensor, v: Tensor, segments: Tensor | None) -> bool:
    """May the kernels take these tensors, [B, T, H, K] and [B, T, H, V]? False where fla is missing, with a warning
    once, and where a trial of the shape failed."""
    if not q.is_cuda or v.dtype not in LOW or q.dtype != v.dtype:
        return False
    gradients = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    return works(Shape(q.shape[2], q.shape[3], v.shape[3], LOW[v.dtype], segments is not None, gradients))


@cache
def works(shape: Shape) -> bool:
    """Has a trial of this shape on this machine succeeded? Tries it where none is on record."""
    problem, again = missing(), ""
    if problem is None:
        problem = trial(shape)
        kept = problem is not None and problem.startswith((*FINAL, LATE))
        again = f"; to try again, remove {record()}" if kept else "; the next start tries again"
    if problem is not None:
        warnings.warn(
            f"gated delta rule: the plain PyTorch form is taken on this GPU ({problem}); it is right, and several "
            f"times slower in training and prefill{again}",
            stacklevel=2,
        )
    return problem is None


@cache
def missing() -> str | None:
    """Why fla cannot be imported here; None where it can."""
    for name in ("triton", "fla"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'postnas[gpu]'"
    return None


def trial(shape: Shape) -> str | None:
    """What is wrong with the kernels at this shape; None where they are right.

    Found out once for a device and a set of versions: that they are right, wrong or refuse is kept for ever, that
    they did not come back for a day, and any other failure, such as a full GPU, for the ranks of this start alone.
    Of a machine's ranks the first one tries, and the others wait for what it finds.
    """
    key = " ".join([*versions(), *(f"{name}={value}" for name, value in asdict(shape).items())])
    found = _kept(key)
    if found is None and _follows():
        until = time.monotonic() + PATIENCE
        while found is None and time.monotonic() < until:
            time.sleep(PAUSE)
            found = _kept(key)
        return found["problem"] if found else f"rank 0 left no word of its trial in {PATIENCE} s"
    if found is None:
        found = {"problem": _in_a_process(shape), "tried": time.time(), "start": _start()}
        path = record()
        write_json(path, (read_json(path) if path.exists() else {}) | {key: found})
    return found["problem"]


def record() -> Path:
    """The file of all trials: by device, versions and shape what was wrong, when it was tried, and in which start."""
    return cache_dir() / "fla-trials.json"


def _kept(key: str) -> dict[str, Any] | None:
    """What is on record and still holds."""
    found = read_json(record()).get(key) if record().exists() else None
    if not isinstance(found, dict):
        return None
    problem = found["problem"]
    if problem is None or problem.startswith(FINAL) or (_start() is not None and found["start"] == _start()):
        return found
    return found if problem.startswith(LATE) and time.time() - found["tried"] < DAY else None


def _start() -> int | None:
    """What all ranks of one torchrun on a machine share, and no later start does; None for a process by itself."""
    return os.getppid() if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 else None


def _follows() -> bool:
    """Does another rank on this machine try the kernels?"""
    return _start() is not None and os.environ.get("LOCAL_RANK", "0") != "0"


def versions() -> list[str]:
    """Device and versions that a trial holds for."""
    found = [torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", f"torch-{torch.__version__}"]
    for name in ("triton", "fla-core", "tilelang"):
        try:
            found.append(f"{name}-{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no-{name}")
    return found


def _in_a_process(shape: Shape) -> str | None:
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    command = [sys.executable, "-m", "postnas.ops.fla", json.dumps(asdict(shape)), str(device)]
    print(f"fla: trying {shape} once, which takes about 100 s", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"{LATE} in {LIMIT} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        # Its guard names the issue and the mend; where the mend then lacks its compiler, that may be mended any time.
        refused = ("#640" in last or "tilelang" in last.lower()) and "nvcc" not in last.lower()
        return f"{REFUSES if refused else 'fla failed'}: {last}"
    errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: error for name, error in errors.items() if not error < CLOSE}
    return f"{WRONG}: relative errors {wrong}" if wrong else None


def compare(shape: Shape, device: str = "cuda", tokens: int = 192) -> dict[str, float]:
    """Relative errors of outputs, state and gradients against the plain form in float64, on random inputs."""
    from postnas.ops.gated_delta_rule import chunk_gated_delta_rule

    generator = torch.Generator().manual_seed(0)
    heads, dtype = shape.heads, getattr(torch, shape.dtype)

    def drawn(*size: int) -> Tensor:
        return torch.randn(1, tokens, heads, *size, generator=generator, dtype=torch.float64)

    wide = {"q": drawn(shape.key_dim), "k": drawn(shape.key_dim), "v": drawn(shape.value_dim)}
    wide = {name: value.to(dtype).double() for name, value in wide.items()}
    wide |= {"g": -drawn().abs() * 0.1, "beta": drawn().sigmoid()}
    wide = {name: value.to(device).requires_grad_(shape.gradients) for name, value in wide.items()}
    low = {name: value.detach().to(dtype if name in "qkv" else torch.float32) for name, value in wide.items()}
    low = {name: value.requires_grad_(shape.gradients) for name, value in low.items()}
    segments = None
    if shape.packed:
        segments = (torch.arange(tokens, device=device) >= tokens // 3).int()[None]
    expected, last = chunk_gated_delta_rule(**wide, segments=segments)
    got, state = gated_delta_rule(**low, segments=segments)
    errors = {"o": _relative(got, expected), "state": _relative(state, last)}
    if shape.gradients:
        along = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(device)
        expected.backward(along)
        got.backward(along.to(got.dtype))
        errors |= {f"d{name}": _relative(low[name].grad, wide[name].grad) for name in wide}
    return errors


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """fla's chunk kernel with the keywords of `ops.gated_delta_rule.gated_delta_rule`, and its results."""
    kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    settings = {"scale": q.shape[-1] ** -0.5, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if segments is None:
        o, last = kernel(q=q, k=k, v=v, g=g, beta=beta, initial_state=state, **settings)
        return o, last
    # Rows one after another as one packed row: a sequence begins with each row and with each segment.
    batch, tokens = segments.shape
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    borders = torch.cat([starts, starts.new_tensor([batch * tokens])])
    first = starts % tokens == 0
    initial = None
    if state is not None:  # it belongs to segment 0 of its row
        initial = state.new_zeros(len(starts), *state.shape[1:])
        goes_on = segments[:, 0] == 0
        initial[first] = state * goes_on[:, None, None, None].to(state.dtype)
    flat = {name: x.flatten(0, 1)[None] for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta))}
    o, last = kernel(**flat, initial_state=initial, cu_seqlens=borders, **settings)
    ends = torch.cat([first[1:], first.new_ones(1)])  # the last sequence of each row
    return o[0].unflatten(0, (batch, tokens)), last[ends]


if __name__ == "__main__":
    torch.cuda.set_device(int(sys.argv[2]))
    print(json.dumps(compare(Shape(**json.loads(sys.argv[1])))))

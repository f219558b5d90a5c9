"""The chunk kernels of flash-linear-attention (fla) on a GPU; the only file that imports fla.

Some versions refuse a backward on Hopper, some get it wrong in silence, some do not come back. So a shape of a rule is
tried before it is used: a process of its own compares outputs and gradients with the plain form in float64, under a
time limit, and what it finds is kept in the user's cache for these versions on this device. That process also compiles
and tunes, and Triton keeps the result on disk, so the trial is the warm-up. What differs from rule to rule is data.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.files import alone, read_json, write_json
from postnas.sources import cache_dir

CLOSE = 2e-2
"""Largest relative error of an output or a gradient in bfloat16; right kernels are at 5e-3."""
LIMIT = 600
"""Seconds that a trial may take. On an H100 with other work beside it one took 150 to 260 for the delta rules and KDA,
356 for GLA and 527 for RWKV-7; alone, about 100 for the gated delta rule."""
PATIENCE = LIMIT + 60
"""Seconds that the other ranks wait for the first one's trial, which they may have asked for a little earlier."""
CHUNK = 64
"""A row's tokens become a multiple of this: the kernels' chunks are then always of one size, and each kernel is
compiled for one kind of length. Zeros change no state: they decay nothing, write nothing and ask for nothing."""
PAUSE = 1.0
"""Seconds between two looks at the record while waiting."""
DAY = 24 * 3600
"""Seconds for which a trial that did not come back is not repeated."""
WRONG, REFUSES, LATE = "fla is wrong", "fla refuses", "fla did not come back"
"""How the problems begin that say something about the kernels, not about the moment."""
FINAL = (WRONG, REFUSES)
LOW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Types that the kernels compute as they are; in float32 they would round to tf32, so the plain form is taken."""

Draw = Callable[..., Tensor]
"""normal(*size): standard normal [1, T, H, *size]."""


def _gate(normal: Tensor) -> Tensor:
    """Logs of decays: most keep the state, one in twenty all but forgets it."""
    return -normal.abs() * torch.where(normal > 1.645, 5.0, 0.1)


def _qkv(normal: Draw, keys: int, values: int) -> dict[str, Tensor]:
    return {"q": normal(keys), "k": normal(keys), "v": normal(values)}


def _rwkv7(normal: Draw, keys: int, values: int) -> dict[str, Tensor]:
    """As the block makes them: decays above exp(-exp(-0.5)), and a unit key that is removed and partly put back."""
    drawn = {"r": normal(keys), "w": -0.6 * normal(keys).sigmoid(), "k": normal(keys), "v": normal(values)}
    unit = torch.nn.functional.normalize(normal(keys), dim=-1)
    return drawn | {"a": -unit, "b": unit * normal(keys).sigmoid()}


@dataclass(frozen=True)
class Rule:
    """How the keywords of an operator in `ops` become those of a chunk kernel, which has the same names for them."""

    kernel: str
    """module:function in fla."""
    plain: str
    """module:function of the operator, with which a trial compares."""
    draw: Callable[[Draw, int, int], dict[str, Tensor]]
    """(normal, K, V): what a trial draws."""
    low: tuple[str, ...] = ("q", "k", "v")
    """Inputs that the kernel reads in v's type, the query first."""
    wide: tuple[str, ...] = ("g", "beta")
    """Inputs in float32; the gates are logs of decays, as fla's are."""
    absent: tuple[str, ...] = ()
    """Inputs that the operator must give as None, and the kernel does not have."""
    spread: tuple[str, ...] = ()
    """Inputs [B, T, H] that the kernel wants as [B, T, H, K]."""
    scale: float | None = None
    """Factor of the outputs where the caller gives none; K^-0.5 where None."""
    settings: dict[str, Any] = field(default_factory=dict)
    detour: str | None = None
    """The rule whose kernel computes the same more slowly; it is tried where this one fails."""


_DELTA = "postnas.ops.gated_delta_rule:gated_delta_rule"
_LINEAR = "postnas.ops.linear_attention:linear_attention"
_UNIT = {"use_qk_l2norm_in_kernel": True}

RULES = {
    "gated_delta_rule": Rule(
        "fla.ops.gated_delta_rule:chunk_gated_delta_rule",
        _DELTA,
        lambda normal, keys, values: _qkv(normal, keys, values) | {"g": _gate(normal()), "beta": normal().sigmoid()},
        settings=_UNIT,
    ),
    "delta_rule": Rule(
        "fla.ops.delta_rule:chunk_delta_rule",
        _DELTA,
        lambda normal, keys, values: _qkv(normal, keys, values) | {"beta": normal().sigmoid()},
        wide=("beta",),
        absent=("g",),
        settings=_UNIT,
    ),
    "kda": Rule(
        "fla.ops.kda:chunk_kda",
        "postnas.ops.dplr:kda",
        lambda normal, keys, values: (
            _qkv(normal, keys, values) | {"g": _gate(normal(keys)), "beta": normal().sigmoid()}
        ),
        settings=_UNIT,
    ),
    "rwkv7": Rule(
        "fla.ops.rwkv7:chunk_rwkv7",
        "postnas.ops.dplr:rwkv7",
        _rwkv7,
        low=("r", "k", "v", "a", "b"),
        wide=("w",),
        scale=1.0,
        settings={"lower_bound": -0.61},  # of w; with it the kernel takes chunks of 64 on tensor cores
    ),
    "gla": Rule(
        "fla.ops.gla:chunk_gla",
        _LINEAR,
        lambda normal, keys, values: _qkv(normal, keys, values) | {"g": _gate(normal(keys))},
        wide=("g",),
        scale=1.0,
    ),
    "linear_attention": Rule(
        "fla.ops.simple_gla:chunk_simple_gla",
        _LINEAR,
        lambda normal, keys, values: _qkv(normal, keys, values) | {"g": _gate(normal())},
        wide=("g",),
        scale=1.0,
        detour="linear_attention_by_gla",  # Hopper refuses the backward with a gate (fla's issue 640), here not
    ),
    "linear_attention_by_gla": Rule(
        "fla.ops.gla:chunk_gla",
        _LINEAR,
        lambda normal, keys, values: _qkv(normal, keys, values) | {"g": _gate(normal())},
        wide=("g",),
        spread=("g",),
        scale=1.0,
    ),
}
"""The rules by name; an operator asks for its own by that name."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    rule: str
    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    packed: bool
    gradients: bool


asked: dict[Shape, str | None] = {}
"""By shape that this process asked for, the rule whose kernel takes it; None where that is the plain form."""


def usable(rule: str, q: Tensor, v: Tensor, segments: Tensor | None) -> bool:
    """May a kernel of this rule take these tensors, [B, T, H, K] and [B, T, H, V]? False where fla is missing, with a
    warning once, and where a trial of the shape failed."""
    if not q.is_cuda or v.dtype not in LOW or q.dtype != v.dtype:
        return False
    return works(_shape(rule, q, v, segments))


def _shape(rule: str, q: Tensor, v: Tensor, segments: Tensor | None) -> Shape:
    gradients = torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)
    dtype = LOW.get(v.dtype, str(v.dtype))
    return Shape(rule, q.shape[2], q.shape[3], v.shape[3], dtype, segments is not None, gradients)


def works(shape: Shape) -> bool:
    """Has a trial of this shape on this machine succeeded? Tries it, and then its detour, where none is on record."""
    if shape not in asked:
        asked[shape] = _settle(shape)
    return asked[shape] is not None


def _settle(shape: Shape) -> str | None:
    absent, problems = missing(), []
    name = shape.rule if absent is None else None
    while name is not None:
        problem = trial(replace(shape, rule=name))
        if problem is None:
            return name
        problems.append(problem)
        name = RULES[name].detour
    kept = absent is None and all(problem.startswith((*FINAL, LATE)) for problem in problems)
    again = f"to try again, remove {record()}" if kept else "the next start tries again"
    warnings.warn(
        f"{shape.rule}: the plain PyTorch form is taken on this GPU ({absent or ', then '.join(problems)}); it is "
        f"right, and several times slower in training and prefill; {again}",
        stacklevel=2,
    )
    return None


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
        path = record()
        number = hashlib.sha256(key.encode()).hexdigest()[:16]
        with alone(path.with_name(f"fla-trial-{number}.lock")):  # two trials of one shape only hold each other up
            found = _kept(key)
            if found is None:
                found = {"problem": _in_a_process(shape), "tried": time.time(), "start": _start()}
                with alone(path.with_suffix(".lock")):
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
    print(f"fla: trying {shape} once, which takes minutes", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"{LATE} in {LIMIT} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        # Its guard names the issue and the mend, and it asserts what sizes it takes; where the mend then lacks its
        # compiler, that may be mended any time.
        limits = ("#640" in last, "tilelang" in last.lower(), last.startswith("AssertionError: "))
        refused = any(limits) and "nvcc" not in last.lower()
        return f"{REFUSES if refused else 'fla failed'}: {last}"
    errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: error for name, error in errors.items() if not error < CLOSE}
    return f"{WRONG}: relative errors {wrong}" if wrong else None


def compare(shape: Shape, device: str = "cuda", tokens: int = 200) -> dict[str, float]:
    """Relative errors of outputs, state and gradients against the plain form in float64, on random inputs.

    Without gradients the state is filled, as in a later piece of a prompt. Length and border fall inside chunks.
    """
    rule, generator, dtype = RULES[shape.rule], torch.Generator().manual_seed(0), getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, tokens, shape.heads, *size, generator=generator, dtype=torch.float64)

    drawn = rule.draw(normal, shape.key_dim, shape.value_dim)
    types = dict.fromkeys(rule.low, dtype) | dict.fromkeys(rule.wide, torch.float32)
    low = {name: value.to(device, types[name]) for name, value in drawn.items()}
    wide = {name: value.double().requires_grad_(shape.gradients) for name, value in low.items()}
    low = {name: value.requires_grad_(shape.gradients) for name, value in low.items()}
    filled = torch.randn(1, shape.heads, shape.key_dim, shape.value_dim, generator=generator).to(device)
    state = None if shape.gradients else filled
    segments = None
    if shape.packed:
        segments = (torch.arange(tokens, device=device) >= tokens // 3 + 3).int()[None]
    given: dict[str, Any] = dict.fromkeys(rule.absent)
    expected, last = _named(rule.plain)(
        **wide, **given, segments=segments, state=None if state is None else filled.double()
    )
    got, end = _call(rule, low | given, state, segments)
    errors = {"o": _relative(got, expected), "state": _relative(end, last)}
    if shape.gradients:
        along = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(device)
        expected.backward(along)
        got.backward(along.to(got.dtype))
        errors |= {f"d{name}": _relative(low[name].grad, wide[name].grad) for name in wide}
    return errors


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _named(name: str) -> Any:
    """The function that module:function names; imported here, since fla is not everywhere and operators import us."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def run(
    rule: str, *, state: Tensor | None = None, segments: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    """fla's chunk kernel with the keywords of the rule's operator, and its results: o [B, T, H, V] in v's type, and
    the state [B, H, K, V] in float32. For tensors of which `usable` said that a kernel takes them."""
    shape = _shape(rule, given[RULES[rule].low[0]], given["v"], segments)
    return _call(RULES[asked.get(shape) or rule], given, state, segments)


def _call(rule: Rule, given: dict[str, Any], state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    given, kernel = dict(given), _named(rule.kernel)
    wrong = [name for name in rule.absent if given.pop(name, None) is not None]
    assert not wrong, f"{rule.kernel} has no {wrong}"
    v, q = given["v"], given[rule.low[0]]
    settings = {"scale": given.pop("scale", rule.scale or q.shape[-1] ** -0.5), "output_final_state": True}
    inputs: dict[str, Tensor] = {name: given.pop(name).to(v.dtype) for name in rule.low}
    for name in rule.wide:
        value = given.pop(name)
        value = value[..., None].expand_as(q) if name in rule.spread else value
        inputs[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    assert not given, f"{rule.kernel} has no {list(given)}"
    settings |= rule.settings
    if segments is None:
        tokens, short = v.shape[1], -v.shape[1] % CHUNK
        if short:
            inputs = {n: F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) for n, x in inputs.items()}
        o, last = kernel(**inputs, initial_state=state, **settings)
        return o[:, :tokens], last
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
    flat = {name: x.flatten(0, 1)[None] for name, x in inputs.items()}
    o, last = kernel(**flat, initial_state=initial, cu_seqlens=borders, **settings)
    ends = torch.cat([first[1:], first.new_ones(1)])  # the last sequence of each row
    return o[0].unflatten(0, (batch, tokens)), last[ends]


if __name__ == "__main__":
    torch.cuda.set_device(int(sys.argv[2]))
    print(json.dumps(compare(Shape(**json.loads(sys.argv[1])))))

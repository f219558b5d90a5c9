"""A whole JetBlock layer of the 2B shape on one GPU, beside a Gated DeltaNet layer from flash-linear-attention.

    python benchmarks/jet_layer_h100.py             # needs fla-core, flash-linear-attention and tilelang
    python benchmarks/jet_layer_h100.py --tiny      # every line on a CPU, at a toy size

First the gated norm by itself, its kernels beside plain PyTorch; it has no flops that count, so its share is that of
copying as many bytes. Then forward and backward of 8 x 4,096 tokens, the forward alone, and decode steps at batch 1 and
128: launched, and as one CUDA graph that goes round several layers, so that the L2 cache does not flatter them. fla's
kernels are used where the record of its trials says that they are right, with gradients and without; a shape that the
record does not hold is tried first, and --trial compares both in this process, for the errors themselves.

Rows go to $OUT/jetblock-h100.json (else benchmarks/results), with the ceilings measured here; where $OUT has no such
file, the rows of benchmarks/results go along. An operation that is measured again replaces its old rows; a case that
fails leaves a row with its error. flops: of products and of the chunked rule, three times the forward's for forward and
backward; `roofline_share` is the time that they or the bytes of weights, input and output take at the ceilings, over
the time taken. On a CPU (--tiny writes jetblock-tiny.json) the times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.blocks import make_block
from postnas.blocks.dims import Dims
from postnas.blocks.inherit import plain_step
from postnas.blocks.state import LinearState
from postnas.files import read_json, write_json
from postnas.ops import fla
from postnas.ops.gated_norm import gated_norm, plain_gated_norm
from postnas.search.sizes import expansion
from postnas.search.speed import device_name

parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU too")
parser.add_argument("--trial", action="store_true", help="compare fla's kernels here, whatever the record says")
GIVEN = parser.parse_args()

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAME = f"jetblock-{'tiny' if GIVEN.tiny else 'h100'}.json"
PUBLISHED = Path("benchmarks/results") / NAME
RESULT = Path(os.environ.get("OUT", PUBLISHED.parent)) / NAME
HIDDEN, HEADS, KEY, VALUE, KV_HEADS = (64, 2, 8, 16, 1) if GIVEN.tiny else (1536, 12, 96, 256, 2)
BATCH, TOKENS = (2, 70) if GIVEN.tiny else (8, 4096)
BATCHES = (1, 3) if GIVEN.tiny else (1, 128)
COPIES = 2 if GIVEN.tiny else 6
"""Layers that a graph goes round: of the 2B shape 280 MB of weights, several times what the L2 cache holds."""
ELEMENTS, SIDE = (2**12, 64) if GIVEN.tiny else (2**28, 8192)
"""Floats that are copied, and the side of the matrices that are multiplied, for the ceilings."""
REPEATS = 3 if GIVEN.tiny else 20
KIND = torch.bfloat16
THEIRS = "fla_gated_deltanet"
CEILINGS: dict[str, float] = {}
BEGUN: set[str] = set()
"""Operations that have rows of this process."""

FLOPS: dict[int, int] = {}
"""Of a row of so many tokens in our layer, which both layers are held to."""
TIMES: dict[tuple[str, int, str], float] = {}
"""Milliseconds by phase, batch (0: whole rows) and block."""


def add(**row: Any) -> None:
    """Keep a row; the first one of an operation takes the place of those from before."""
    path = RESULT if RESULT.exists() else PUBLISHED
    found = read_json(path) if path.exists() else {"rows": []}
    if "ms" in row and CEILINGS:
        least = max(row["flops"] / CEILINGS["matmul_tflop_s"] / 1e12, row["bytes"] / CEILINGS["copy_tb_s"] / 1e12)
        row |= {"roofline_share": least / row["ms"] * 1e3} | CEILINGS
    print(row, flush=True)
    stamp = {"command": "python benchmarks/jetblock_h100.py; python benchmarks/jet_layer_h100.py"}
    stamp |= {"device": device_name(DEVICE), "torch": torch.__version__, "date": date.today().isoformat()}
    row |= {name: value for name, value in stamp.items() if name != "command" and found.get(name, value) != value}
    stale = () if row["op"] in BEGUN else (row["op"], f"{row['op']}_ratio")
    rows = [old for old in found["rows"] if old["op"] not in stale]
    BEGUN.add(row["op"])
    write_json(RESULT, stamp | found | {"rows": [*rows, row]})


@contextmanager
def case(op: str, **row: Any) -> Iterator[None]:
    """What fails is a row with its error, and the rest goes on."""
    try:
        yield
    except Exception as error:
        add(op=op, **row, error=f"{type(error).__name__}: {error}"[:300])
    if CUDA:
        torch.cuda.empty_cache()


def timed(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median milliseconds of a call, after three that warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if not CUDA:
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def timed_many(work: Callable[[], Any], calls: int = 10) -> float:
    """As `timed`, of one of ten calls in a row: a short one would else be the time that Python takes to launch it."""
    return timed(lambda: [work() for _ in range(calls)], repeats=min(10, REPEATS)) / calls


def graphed(works: list[Callable[[], Any]]) -> float:
    """Milliseconds of one of these calls, all captured one after the other into one CUDA graph; without a GPU as is."""

    def all_of_them() -> None:
        for work in works:
            work()

    if not CUDA:
        return timed(all_of_them) / len(works)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            all_of_them()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return timed(graph.replay) / len(works)


def ceilings() -> None:
    source, target = torch.empty(2, ELEMENTS, device=DEVICE)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e9
    left, right = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=KIND) for _ in range(2))
    product = 2 * SIDE**3 / timed(lambda: left @ right) / 1e9
    CEILINGS.update(copy_tb_s=copy, matmul_tflop_s=product)
    add(op="ceilings", **CEILINGS)


def norms() -> None:
    """Bytes are those of the large tensors: x, gate and y; and backward x, gate, dy, dx and dgate."""
    x, gate, along = torch.randn(3, BATCH * TOKENS, HEADS, VALUE, device=DEVICE, dtype=KIND)
    weight = torch.ones(VALUE, device=DEVICE)
    leaves = x.requires_grad_(), gate.requires_grad_(), weight.requires_grad_()
    times: dict[tuple[str, str], float] = {}
    for name, form in (("kernels", gated_norm), ("plain", plain_gated_norm)):
        with torch.no_grad():
            times["forward", name] = timed_many(lambda form=form: form(*leaves, 1e-5))
        y = form(*leaves, 1e-5)
        times["backward", name] = timed_many(
            lambda y=y: torch.autograd.grad(y, leaves, along.to(y.dtype), retain_graph=True)
        )
        del y
    for phase, tensors in (("forward", 3), ("backward", 5)):
        row: dict[str, Any] = {"op": f"gated_norm_{phase}", "shape": "2B", "batch": BATCH, "tokens": BATCH * TOKENS}
        row |= {"dtype": "bfloat16", "ms": times[phase, "kernels"]}
        row |= {"baseline": "plain", "baseline_ms": times[phase, "plain"]}
        add(**row, flops=0, bytes=tensors * x.nbytes)


def trial(gradients: bool) -> None:
    """A row that says what is known of fla's kernels at this shape, and where from; layers then go by it."""
    shape = fla.Shape("gated_delta_rule", HEADS, KEY, VALUE, "bfloat16", packed=False, gradients=gradients)
    row = {"op": "fla_trial", "shape": "2B", "gradients": gradients, "versions": fla.versions(), "bound": fla.CLOSE}
    absent = fla.missing() or (None if CUDA else "there is no GPU")
    begin, before = time.monotonic(), recorded()
    if absent is not None:
        row |= {"source": "none", "problem": absent}
    elif GIVEN.trial:
        errors = fla.compare(shape)
        problem = None if max(errors.values()) < fla.CLOSE else f"{fla.WRONG}: the errors of this row"
        row |= {"source": "this process", "seconds": time.monotonic() - begin, "problem": problem, **errors}
    else:
        problem = fla.trial(shape)
        source = "the record of trials" if recorded() == before else "a process of its own, now on record"
        row |= {"source": source, "seconds": time.monotonic() - begin, "problem": problem}
    fla.asked[shape] = None if row["problem"] else shape.rule
    add(**row)


def recorded() -> Any:
    return read_json(fla.record()) if fla.record().exists() else {}


def ours() -> Any:
    dims = Dims(hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HIDDEN // HEADS, qkv_bias=False)
    options = {"num_heads": HEADS, "head_dim": KEY, "expand_v": expansion(KEY, VALUE)}
    return make_block("jet", dims, options).to(DEVICE, KIND)


def theirs() -> Any:
    from fla.layers import GatedDeltaNet

    layer = GatedDeltaNet(HIDDEN, expand_v=VALUE / KEY, head_dim=KEY, num_heads=HEADS, conv_size=4, layer_idx=0)
    return layer.to(DEVICE, KIND)


def forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """Of whole rows x [B, T, hidden]."""
    y: Tensor = layer(x, plain_step(x))[0] if name == "jet" else layer(x)[0]
    return y


def whole(layer: Any, name: str, phase: str) -> None:
    """Forward and backward (`train`), or the forward alone (`prefill`), of whole rows."""
    x = torch.randn(BATCH, TOKENS, HIDDEN, device=DEVICE, dtype=KIND, requires_grad=True)
    along = torch.randn_like(x)

    def work() -> None:
        y = forward(layer, name, x)
        if phase == "train":
            y.backward(along)

    layer.train(phase == "train")
    row: dict[str, Any] = {"op": f"jet_layer_{phase}", "block": name, "shape": "2B", "batch": BATCH}
    row |= {"tokens": BATCH * TOKENS, "dtype": "bfloat16"}
    with case(**row), torch.set_grad_enabled(phase == "train"):
        begin = time.monotonic()
        work()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        row["first_seconds"] = time.monotonic() - begin
        TIMES[phase, 0, name] = row["ms"] = timed(work)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if CUDA else 0
        count = 3 if phase == "train" else 1
        row["bytes"] = count * (sum(p.nbytes for p in layer.parameters()) + 2 * x.nbytes)
        add(**row, flops=count * BATCH * FLOPS[TOKENS], parameters=sum(p.numel() for p in layer.parameters()))
    layer.zero_grad()


@torch.no_grad()
def decode(layer: Any, name: str) -> None:
    """A token a row on filled states: launched, and as a graph."""
    layer.eval()  # in which fla's layer takes its recurrent kernel
    for batch in BATCHES:
        x = torch.randn(batch, 1, HIDDEN, device=DEVICE, dtype=KIND)
        for phase, way in (("decode_launched", launched), ("decode_graph", captured)):
            row: dict[str, Any] = {"op": f"jet_layer_{phase}", "block": name, "shape": "2B", "batch": batch}
            row |= {"dtype": "bfloat16", "state_dtype": "float32"}
            with case(**row):
                TIMES[phase, batch, name] = row["ms"] = way(layer, name, x)
                moved = sum(p.nbytes for p in layer.parameters()) + 2 * batch * HEADS * KEY * VALUE * 4
                add(**row, flops=batch * FLOPS[1], bytes=moved)


def launched(layer: Any, name: str, x: Tensor) -> float:
    return timed(step(layer, name, x), 5 * REPEATS)


def captured(layer: Any, name: str, x: Tensor) -> float:
    copies = [layer, *(deepcopy(layer) for _ in range(COPIES - 1))]
    return graphed([step(one, name, x) for one in copies])


def step(layer: Any, name: str, x: Tensor) -> Callable[[], Any]:
    """A decode step of x [B, 1, hidden] on a state of its own, which is filled."""
    if name == "jet":
        state = LinearState()
        layer(x, plain_step(x), state)
        return lambda: layer(x, plain_step(x), state)
    from fla.models.utils import Cache

    cache = Cache()
    layer(x, past_key_values=cache, use_cache=True)
    return lambda: layer(x, past_key_values=cache, use_cache=True)


def ratios() -> None:
    """Our time over fla's, where both are there."""
    for phase, batch in dict.fromkeys(key[:2] for key in TIMES):
        found = {name: TIMES[phase, batch, name] for name in ("jet", THEIRS) if (phase, batch, name) in TIMES}
        if len(found) == 2:
            row = {"op": f"jet_layer_{phase}_ratio", "shape": "2B", "batch": batch or BATCH, "baseline": THEIRS}
            add(**row, ratio=found["jet"] / found[THEIRS])


def main() -> None:
    torch.manual_seed(0)
    with case("ceilings"):
        ceilings()
    with case("gated_norm_forward"):
        norms()
    for gradients in (True, False):
        with case("fla_trial", gradients=gradients):
            trial(gradients)
    layer = ours()
    FLOPS.update({tokens: layer.flops(tokens) for tokens in (TOKENS, 1)})
    whole(layer, "jet", "train")
    whole(layer, "jet", "prefill")
    decode(layer, "jet")
    del layer
    if GIVEN.tiny and importlib.util.find_spec("fla") is None:
        return
    # last, its training at the very end: on some cards fla's layer does not come back
    with case("jet_layer_train", block=THEIRS):
        other = theirs()
        whole(other, THEIRS, "prefill")
        decode(other, THEIRS)
        whole(other, THEIRS, "train")
    ratios()


if __name__ == "__main__":
    main()

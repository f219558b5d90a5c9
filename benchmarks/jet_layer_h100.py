"""A whole JetBlock layer of the 2B shape on one GPU, beside a Gated DeltaNet layer from flash-linear-attention.

    python benchmarks/jet_layer_h100.py     # needs fla-core, flash-linear-attention and tilelang

First the gated norm by itself, its kernels beside plain PyTorch; it has no flops that count, so its share is that of
copying as many bytes. Then forward and backward of 8 x 4,096 tokens, and launched decode steps at batch 1 and 128. The
trial that decides whether fla's kernels may be used runs before them, in this process; its errors and seconds are a
row. Rows are added to $OUT/jetblock-h100.json (else benchmarks/results), each with the ceilings measured here. flops:
of products and of the chunked rule, three times the forward's for forward and backward; `roofline_share` is the time
that they or the bytes of weights, input and output take at the ceilings, over the time taken.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
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

RESULT = Path(os.environ.get("OUT", "benchmarks/results")) / "jetblock-h100.json"
HIDDEN, HEADS, KEY, VALUE = 1536, 12, 96, 256
BATCH, TOKENS = 8, 4096
KIND = torch.bfloat16
CEILINGS: dict[str, float] = {}


def add(**row: Any) -> None:
    found = read_json(RESULT) if RESULT.exists() else {"rows": []}
    if "ms" in row and CEILINGS:
        least = max(row["flops"] / CEILINGS["matmul_tflop_s"] / 1e12, row["bytes"] / CEILINGS["copy_tb_s"] / 1e12)
        row |= {"roofline_share": least / row["ms"] * 1e3} | CEILINGS
    print(row, flush=True)
    stamp = {"command": "python benchmarks/jetblock_h100.py; python benchmarks/jet_layer_h100.py"}
    stamp |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": date.today().isoformat()}
    write_json(RESULT, found | stamp | {"rows": [*found["rows"], row]})


def timed(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of a call, after three that warm up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> None:
    source, target = torch.empty(2, 2**28, device="cuda")
    CEILINGS["copy_tb_s"] = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e9
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=KIND) for _ in range(2))
    CEILINGS["matmul_tflop_s"] = 2 * 8192**3 / timed(lambda: left @ right) / 1e9
    add(op="ceilings", **CEILINGS)


def norms() -> None:
    """Bytes are those of the large tensors: x, gate and y; and backward x, gate, dy, dx and dgate."""
    x, gate, along = torch.randn(3, BATCH * TOKENS, HEADS, VALUE, device="cuda", dtype=KIND)
    weight = torch.ones(VALUE, device="cuda")
    leaves = x.requires_grad_(), gate.requires_grad_(), weight.requires_grad_()
    times: dict[tuple[str, str], float] = {}
    for name, form in (("kernels", gated_norm), ("plain", plain_gated_norm)):
        with torch.no_grad():
            times["forward", name] = timed_many(lambda form=form: form(*leaves, 1e-5))
        y = form(*leaves, 1e-5)
        times["backward", name] = timed_many(lambda y=y: torch.autograd.grad(y, leaves, along, retain_graph=True))
        del y
    for phase, tensors in (("forward", 3), ("backward", 5)):
        row = {
            "op": f"gated_norm_{phase}",
            "shape": "2B",
            "batch": BATCH,
            "tokens": BATCH * TOKENS,
            "dtype": "bfloat16",
        }
        row |= {"ms": times[phase, "kernels"], "baseline": "plain", "baseline_ms": times[phase, "plain"]}
        add(**row, flops=0, bytes=tensors * x.nbytes)


def timed_many(work: Callable[[], Any], calls: int = 10) -> float:
    """As `timed`, of one of ten calls in a row: a short one would else be the time that Python takes to launch it."""
    return timed(lambda: [work() for _ in range(calls)], repeats=10) / calls


def trial() -> None:
    shape = fla.Shape(HEADS, KEY, VALUE, "bfloat16", packed=False, gradients=True)
    begin = time.monotonic()
    errors = fla.compare(shape)
    add(op="fla_trial", shape="2B", seconds=time.monotonic() - begin, versions=fla.versions(), **errors)
    assert max(errors.values()) < fla.CLOSE
    fla.works = lambda shape: True  # type: ignore[assignment]  # the trial has just been made, here


def layers() -> dict[str, tuple[Any, Callable[[Tensor], Tensor]]]:
    """Each layer and its forward of whole rows [B, T, hidden]."""
    from fla.layers import GatedDeltaNet

    dims = Dims(hidden=HIDDEN, heads=HEADS, kv_heads=2, head_dim=128, qkv_bias=False)
    options = {"num_heads": HEADS, "head_dim": KEY, "expand_v": VALUE / KEY + 1e-9}
    ours = make_block("jet", dims, options).to("cuda", KIND)
    theirs = GatedDeltaNet(HIDDEN, expand_v=VALUE / KEY, head_dim=KEY, num_heads=HEADS, conv_size=4, layer_idx=0)
    theirs = theirs.to("cuda", KIND)
    return {
        "jet": (ours, lambda x: ours(x, plain_step(x))[0]),
        "fla_gated_deltanet": (theirs, lambda x: theirs(x)[0]),
    }


def train(found: dict[str, tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
    x = torch.randn(BATCH, TOKENS, HIDDEN, device="cuda", dtype=KIND, requires_grad=True)
    along, times = torch.randn_like(x), {}
    for name, (layer, forward) in found.items():
        begin = time.monotonic()
        forward(x).backward(along)
        torch.cuda.synchronize()
        print(f"{name}: first forward and backward {time.monotonic() - begin:.1f} s", flush=True)
        for phase, work in (
            ("train", lambda forward=forward: forward(x).backward(along)),
            ("prefill", lambda forward=forward: forward(x)),
        ):
            with torch.set_grad_enabled(phase == "train"):
                torch.cuda.reset_peak_memory_stats()
                times[phase, name] = timed(work)
            count = 3 if phase == "train" else 1
            moved = count * (sum(p.nbytes for p in layer.parameters()) + 2 * x.nbytes)
            flops = count * BATCH * found["jet"][0].flops(TOKENS)
            add(
                op=f"jet_layer_{phase}",
                block=name,
                shape="2B",
                batch=BATCH,
                tokens=BATCH * TOKENS,
                dtype="bfloat16",
                ms=times[phase, name],
                flops=flops,
                bytes=moved,
                peak_bytes=torch.cuda.max_memory_allocated(),
                parameters=sum(p.numel() for p in layer.parameters()),
            )
    for phase in ("train", "prefill"):
        ratio = times[phase, "jet"] / times[phase, "fla_gated_deltanet"]
        add(op=f"jet_layer_{phase}_ratio", shape="2B", baseline="fla_gated_deltanet", ratio=ratio)


@torch.no_grad()
def decode(found: dict[str, tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
    from fla.models.utils import Cache

    ours, theirs = found["jet"][0], found["fla_gated_deltanet"][0]
    for batch in (1, 128):
        x = torch.randn(batch, 1, HIDDEN, device="cuda", dtype=KIND)
        state, cache = LinearState(), Cache()
        ours(x, plain_step(x), state)
        ways = {
            "jet": lambda x=x, state=state: ours(x, plain_step(x), state),
            "fla_gated_deltanet": lambda x=x, cache=cache: theirs(x, past_key_values=cache, use_cache=True),
        }
        times = {name: timed(work, 100) for name, work in ways.items()}
        for name, ms in times.items():
            weights = sum(p.nbytes for p in found[name][0].parameters())
            moved = weights + 2 * batch * (HEADS * KEY * VALUE * 4)
            row = {"op": "jet_layer_decode_launched", "block": name, "shape": "2B", "batch": batch, "ms": ms}
            add(**row, flops=batch * ours.flops(1), bytes=moved, baseline_ms=times["fla_gated_deltanet"])


def main() -> None:
    torch.manual_seed(0)
    ceilings()
    norms()
    trial()
    found = layers()
    train(found)
    decode(found)


if __name__ == "__main__":
    main()

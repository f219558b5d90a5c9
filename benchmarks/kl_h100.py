"""The distillation loss on one GPU: the Triton kernel against the plain form, in the same run, and against a copy.

    python benchmarks/kl_h100.py           # under two minutes on an H100
    TRITON_INTERPRET=1 python benchmarks/kl_h100.py --tiny     # every line, on a CPU, at toy sizes; times mean nothing

- `check`: errors against float64 as shares of its size, and the largest number for a model against itself, should be 0.
- `kl_rows`: loss and gradient of 1,024 rows of logits. `bytes`: both logits read twice, the gradient written once.
- `chunked_kl`: forward with gradients, 8,192 tokens from hidden states, the same for both forms. `bytes`: the products
  also write both logits and read the gradient, twice with the head's; `flops` are theirs.
- `graph`: its loss out of a CUDA graph, which should be `loss`.

`roofline_share`: the time of `bytes` at the measured copy speed over the median time taken. Writes kl-h100.json
(kl-tiny.json) to $OUT, else to benchmarks/results, after each row; a case that fails is a row.
"""

import faulthandler
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from postnas.files import write_json
from postnas.ops import chunked_loss, chunked_loss_triton
from postnas.ops.chunked_loss import chunked_kl, kl_rows, plain_kl_rows

TINY = "--tiny" in sys.argv
DEVICE, KIND = ("cpu", torch.float32) if TINY else ("cuda", torch.bfloat16)
RESULT = Path(os.environ.get("OUT", "benchmarks/results")) / f"kl-{'tiny' if TINY else 'h100'}.json"
WIDTHS = {50: 8, 67: 8, 90: 8} if TINY else {49_152: 576, 151_936: 1536, 262_144: 1152}  # by vocabulary
TOKENS, CHUNK, RUNS = (40, 10, 1) if TINY else (8192, 1024, 10)
TILES = [(16, 4), (32, 8)] if TINY else [(2048, 8), (1024, 4), (4096, 8), (4096, 16)]  # words, warps
LIMIT, BEGIN = 90, time.monotonic()
COPY = [0.0]  # bytes a second, once measured
ROWS: list[dict[str, Any]] = []


def add(**row: Any) -> None:
    if "bytes" in row and COPY[0]:
        row |= {"roofline_share": row["bytes"] / COPY[0] / (row["ms"] / 1e3), "copy_tb_s": COPY[0] / 1e12}
    ROWS.append({name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in row.items()})
    print(f"{time.monotonic() - BEGIN:6.1f} s", ROWS[-1], flush=True)
    stamp = {"command": " ".join(["python", "benchmarks/kl_h100.py", *sys.argv[1:]]), "torch": torch.__version__}
    stamp |= {"device": "cpu" if TINY else torch.cuda.get_device_name(), "date": date.today().isoformat()}
    write_json(RESULT, stamp | {"rows": ROWS})


def case(work: Callable[..., None], *given: Any) -> None:
    try:
        if time.monotonic() - BEGIN > LIMIT:
            raise TimeoutError(f"not begun: {LIMIT} s were over")
        with patch.object(chunked_loss, "_has_kernels", lambda *parts: given[0] == "kernel"):
            work(*given)
    except Exception as error:
        add(op=work.__name__, given=[str(x) for x in given], error=f"{type(error).__name__}: {error}"[:400])


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of a run, and the most bytes it has at a time."""
    if TINY:
        begin = time.perf_counter()
        work()
        return {"ms": (time.perf_counter() - begin) * 1e3, "peak_bytes": 0}
    work()  # compiles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    marks: Any = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS + 2)]
    for start, stop in marks:  # no waiting between, or a launch would count
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in marks[2:]]
    return {"ms": statistics.median(times), "peak_bytes": torch.cuda.max_memory_allocated() - before}


def logits(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    teacher = 3 * torch.randn(rows, vocab, device=DEVICE)
    return (0.7 * teacher + torch.randn_like(teacher)).to(KIND), teacher.to(KIND)


def copy(form: str) -> None:
    source, target = torch.empty(2, 2**18 if TINY else 2**28, device=DEVICE)
    found = measured(lambda: target.copy_(source))
    COPY[0] = 2 * source.nbytes / (found["ms"] / 1e3)
    add(op=form, ms=found["ms"], bytes=2 * source.nbytes)


def check(form: str, vocab: int, softcap: float | None) -> None:
    student, teacher = logits(4 if TINY else 64, vocab)
    exact: Any = plain_kl_rows(student.double(), teacher.double(), softcap, True)
    itself: Any = kl_rows(teacher.clone(), teacher, softcap, True)
    found: Any = kl_rows(student, teacher, softcap, True)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact)]
    row = {"op": "check", "form": form, "vocab": vocab, "softcap": softcap, "dtype": str(KIND)}
    add(**row, loss_error=errors[0], gradient_error=errors[1], itself=max(float(x.abs().max()) for x in itself))


def rows(form: str, vocab: int, softcap: float | None, tile: int, warps: int) -> None:
    """The gradient overwrites the student's logits, so later runs read other numbers, which take no other time."""
    student, teacher = logits(CHUNK, vocab)
    with patch.multiple(chunked_loss_triton, TILE=tile, WARPS=warps):
        found = measured(lambda: kl_rows(student, teacher, softcap, True))
    row = {"op": "kl_rows", "form": form, "vocab": vocab, "rows": CHUNK, "softcap": softcap}
    add(**row, **found, bytes=5 * student.nbytes, **({"tile": tile, "warps": warps} if form == "kernel" else {}))


def whole(form: str, vocab: int, head: bool, chunk: int = 0) -> None:
    """chunk: tokens at a time for the kernel, else as many as have room."""
    width, once = WIDTHS[vocab], TOKENS * vocab
    torch.manual_seed(1)
    student, teacher = torch.randn(2, TOKENS, width, device=DEVICE).to(KIND)
    weight = (2 * width**-0.5 * torch.randn(vocab, width, device=DEVICE)).to(KIND).requires_grad_(head)
    student.requires_grad_()
    row = {"form": form, "vocab": vocab, "hidden": width, "tokens": TOKENS, "head_gradient": head}
    with patch.object(chunked_loss, "ROOM", 2 * chunk * vocab * KIND.itemsize or chunked_loss.ROOM):
        row |= {"chunk": chunked_loss._kl_chunk(student, teacher, vocab)}
        found = measured(lambda: chunked_kl(student, weight, teacher, weight))
        loss = replayed = chunked_kl(student, weight, teacher, weight).detach()
        counted = {"bytes": (8 + head) * once * KIND.itemsize, "flops": (6 + 2 * head) * once * width}
        add(op="chunked_kl", **row, **found, **counted, loss=float(loss))
        if not TINY:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                replayed = chunked_kl(student, weight, teacher, weight).detach()
            captured.replay()
    add(op="graph", **row, loss=float(loss), replayed=float(replayed))


def main() -> None:
    if not TINY and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --tiny runs under Triton's interpreter")
    faulthandler.dump_traceback_later(LIMIT + 25, exit=True)
    torch.manual_seed(0)
    case(copy, "copy")
    for vocab, softcap, form in product(WIDTHS, (None, 30.0), ("plain", "kernel")):
        case(check, form, vocab, softcap)
    for vocab, head, form in product(WIDTHS, (False, True), ("plain", "kernel")):
        case(whole, form, vocab, head)
    case(whole, "kernel", min(WIDTHS), False, CHUNK)
    for vocab, softcap in [*((vocab, None) for vocab in WIDTHS), (max(WIDTHS), 30.0)]:
        case(rows, "plain", vocab, softcap, *TILES[0])
        for tile in TILES:
            case(rows, "kernel", vocab, softcap, *tile)


if __name__ == "__main__":
    main()

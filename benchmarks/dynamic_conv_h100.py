"""The JetBlock's dynamic convolution on a GPU: right, how fast, and against what the chip can do.

    python benchmarks/dynamic_conv_h100.py           # on a GPU, about two minutes
    TRITON_INTERPRET=1 python benchmarks/dynamic_conv_h100.py --tiny      # the same lines at toy sizes, without a GPU

Writes dynamic-conv-h100.json under $OUT, else benchmarks/results, anew after each row. Rows of the op:

- `copy`, `matmul`: the ceilings, measured first: bytes read and written, and operations, a second.
- `check`: the largest relative error of outputs and gradients against float64, of the kernels and of the plain form.
- `fused_kernel`: the fused kernel by itself at several tiles; the fastest is used from there on.
- `fused_generator_conv`: hidden states to y, generator included. Its baseline makes the taps by torch's products and
  gives them to our own Triton convolution, whose last SiLU it is spared.
- `fused_generator_conv_train`: the same forward and backward.
- `dynamic_conv_train`: the convolution alone, taps given; `_forward` and `_backward` are its parts. The baseline is the
  plain PyTorch form.

`bytes` and `flops` count what must move and be multiplied: each input once, each output once. `roofline_share` is the
time that the ceilings allow for them, by whichever binds, over the time taken. Times are medians of `n` runs. Every
tensor of a timed case is far larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postnas.files import write_json
from postnas.ops import dynamic_conv_triton as kernels
from postnas.ops.dynamic_conv import plain_causal_conv, plain_dynamic_conv

WIDTH = 4
SHAPES = {"2B": (1536, 384, 3072), "4B": (2048, 512, 4096), "135M": (576, 144, 1152)}
"""Hidden width, the generator's inner width, channels."""
TILES = [
    kernels.Tile(128, 64, 64, 8, 4),
    kernels.Tile(128, 64, 64, 8, 3),
    kernels.Tile(128, 32, 64, 4, 3),
    kernels.Tile(128, 32, 64, 8, 3),
    kernels.Tile(256, 32, 64, 8, 3),
    kernels.Tile(64, 64, 64, 4, 2),
]
LIMIT = 120.0
"""Seconds after which no further case begins."""


class Bench:
    """Sizes, the clock, the ceilings, and the rows so far."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.dtype = torch.float32 if tiny else torch.bfloat16  # the interpreter's bfloat16 products are wrong
        self.shapes = {name: (32, 18, 24) for name in SHAPES} if tiny else SHAPES
        self.long = [(1, 40), (2, 20)] if tiny else [(1, 65536), (8, 8192)]
        self.train = (2, 20) if tiny else (8, 4096)
        self.runs = 2 if tiny else 20
        self.copy, self.matmul = float("nan"), float("nan")
        self.begin = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        name = "dynamic-conv-tiny.json" if tiny else "dynamic-conv-h100.json"
        self.path = Path(os.environ.get("OUT", "benchmarks/results")) / name

    def case(self, name: str, work: Callable[[], None]) -> None:
        """Runs a case; what goes wrong becomes a row, and the next case has its turn."""
        seconds = time.monotonic() - self.begin
        if seconds > LIMIT:
            self.row(op=name, error=f"not begun: {seconds:.0f} s were over")
            return
        try:
            work()
        except Exception as error:
            self.row(op=name, error=f"{type(error).__name__}: {error}"[:500])
        if not self.tiny:
            torch.cuda.empty_cache()

    def row(self, **fields: Any) -> None:
        if "bytes" in fields:
            allowed = max(fields["bytes"] / self.copy / 1e9, fields["flops"] / self.matmul / 1e9)  # ms
            fields["roofline_share"] = allowed / fields["ms"]
            fields |= {"copy_tb_s": self.copy, "matmul_tflop_s": self.matmul}
        self.rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()})
        print(f"{time.monotonic() - self.begin:6.1f} s", self.rows[-1], flush=True)
        device = "cpu, interpreted" if self.tiny else torch.cuda.get_device_name()
        result = {"command": "python benchmarks/dynamic_conv_h100.py" + " --tiny" * self.tiny, "device": device}
        result |= {"torch": torch.__version__, "triton": kernels.triton.__version__, "date": date.today().isoformat()}
        write_json(self.path, result | {"rows": self.rows})

    def ms(self, work: Callable[[], Any]) -> float:
        """Median milliseconds of one run."""
        for _ in range(1 if self.tiny else 3):
            work()
        if self.tiny:
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.runs)]
        for start, stop in marks:
            start.record()
            work()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in marks)

    def peak(self, work: Callable[[], Any]) -> int:
        """Bytes allocated at most by one run, above what was there before."""
        if self.tiny:
            work()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def arguments(self, shape: str, batch: int, tokens: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Of `dynamic_conv`, each a leaf that wants a gradient."""
        _, inner, channels = self.shapes[shape]
        drawn = {
            "x": self.draw(batch, tokens, channels, dtype=dtype),
            "inner": self.draw(batch, tokens, inner, dtype=dtype),
            "weight": self.draw(channels * WIDTH, inner, scale=inner**-0.5, dtype=dtype),
            "bias": self.draw(channels * WIDTH, dtype=dtype),
        }
        return {name: value.requires_grad_() for name, value in drawn.items()}

    # The cases

    def ceilings(self) -> None:
        source = self.draw(1000 if self.tiny else 1 << 29, dtype=self.dtype)
        target = torch.empty_like(source)
        ms = self.ms(lambda: target.copy_(source))
        self.copy = 2 * source.numel() * source.element_size() / ms / 1e9
        self.row(op="copy", ms=ms, copy_tb_s=self.copy, n=self.runs)
        side = 16 if self.tiny else 8192
        a, b = self.draw(side, side), self.draw(side, side)
        ms = self.ms(lambda: a @ b)
        self.matmul = 2 * side**3 / ms / 1e9
        self.row(op="matmul", ms=ms, matmul_tflop_s=self.matmul, n=self.runs)

    def check(self, shape: str, dtype: torch.dtype) -> None:
        """Two rows of packed sequences on a filled history, with SiLU; every output and gradient."""
        tokens = 9 if self.tiny else 520
        taken = self.arguments(shape, 2, tokens, dtype)
        context = {
            "history": self.draw(2, WIDTH - 1, taken["x"].shape[2], dtype=dtype),
            "segments": (torch.arange(tokens, device=self.device) // 7).expand(2, -1).contiguous(),
        }
        wide = {name: value.detach().double().requires_grad_() for name, value in taken.items()}
        names = ["y", *taken]
        exact = outputs(plain_dynamic_conv, wide, context)
        ours = outputs(kernels.dynamic_conv, taken, context)
        plain = outputs(plain_dynamic_conv, taken, context)
        ours_error = {f"{name}_error": relative(a, b) for name, a, b in zip(names, ours, exact, strict=True)}
        plain_error = {f"plain_{name}_error": relative(a, b) for name, a, b in zip(names, plain, exact, strict=True)}
        case = {"op": "check", "shape": shape, "batch": 2, "tokens": tokens, "dtype": name_of(dtype)}
        self.row(**case, **ours_error, **plain_error, error_of_plain=relative(ours[0], plain[0]))

    def check_given(self, shape: str) -> None:
        batch, tokens = (2, 9) if self.tiny else (2, 520)
        x, taps = self.given(shape, batch, tokens)
        wide = [value.detach().double().requires_grad_() for value in (x, taps)]
        ours, exact = kernels.causal_conv(x, taps)[0], plain_causal_conv(*wide)[0]
        seed = torch.randn_like(ours)
        found = [ours, *torch.autograd.grad(ours, [x, taps], seed)]
        expected = [exact, *torch.autograd.grad(exact, wide, seed.double())]
        errors = {f"{n}_error": relative(a, b) for n, a, b in zip(["y", "x", "taps"], found, expected, strict=True)}
        self.row(op="check", shape=shape, batch=batch, tokens=tokens, dtype=name_of(self.dtype), given=True, **errors)

    def check_long(self) -> None:
        """The last tokens of the longest case, where addresses are largest."""
        batch, tokens = self.long[0]
        last = 5 if self.tiny else 256
        taken = {name: value.detach() for name, value in self.arguments("2B", batch, tokens).items()}
        y = kernels.dynamic_conv(**taken, silu=True)[0][:, -last:]
        part = {n: v[:, -last - WIDTH :] if n in ("x", "inner") else v for n, v in taken.items()}
        exact = plain_dynamic_conv(**{n: v.double() for n, v in part.items()}, silu=True)[0][:, -last:]
        case = {"op": "check", "shape": "2B", "batch": batch, "tokens": tokens, "dtype": name_of(self.dtype)}
        self.row(**case, y_error=relative(y, exact))

    def sweep(self) -> None:
        """The fused kernel at each tile; the fastest becomes the default from here on."""
        batch, tokens = self.long[0]
        x, inner, weight, bias = (value.detach() for value in self.arguments("2B", batch, tokens).values())
        counted = self.counted(x, inner, weight)
        times: dict[kernels.Tile, float] = {}

        def measure(tile: kernels.Tile) -> None:
            ms = self.ms(lambda: kernels.fused_forward(x, inner, weight, bias, None, None, True, tile=tile))
            times[tile] = ms
            case = {"op": "fused_kernel", "shape": "2B", "batch": batch, "tokens": tokens}
            self.row(**case, dtype=name_of(self.dtype), tile=list(tile), ms=ms, n=self.runs, **counted)

        for tile in TILES:
            self.case("fused_kernel", lambda tile=tile: measure(tile))  # type: ignore[misc]
        if times:
            kernels.FUSED = min(times, key=lambda tile: times[tile])
            print(f"fastest: {kernels.FUSED}", flush=True)

    def fused(self, shape: str, batch: int, tokens: int) -> None:
        """Hidden states to y without gradients, as in prefill."""
        hidden, _, _ = self.shapes[shape]
        taken = {name: value.detach() for name, value in self.arguments(shape, batch, tokens).items()}
        x, inner, weight, bias = taken.values()
        h = self.draw(batch, tokens, hidden)
        w1 = self.draw(inner.shape[2], hidden, scale=hidden**-0.5)
        counted = self.counted(x, inner, weight)
        counted["bytes"] += sum(t.numel() * t.element_size() for t in (h, w1)) - inner.numel() * inner.element_size()
        counted["flops"] += 2 * batch * tokens * w1.numel()
        del inner, taken

        def ours() -> Tensor:
            return kernels.dynamic_conv(x, F.silu(F.linear(h, w1)), weight, bias, silu=True)[0]

        def unfused() -> Tensor:
            return generated_then_given(x, F.silu(F.linear(h, w1)), weight, bias)

        with torch.no_grad():
            error = relative(ours(), F.silu(unfused()))
            memory = {"peak_bytes": self.peak(ours), "baseline_peak_bytes": self.peak(unfused)}
            ms, baseline_ms = self.ms(ours), self.ms(unfused)
        case = {"op": "fused_generator_conv", "shape": shape, "batch": batch, "tokens": tokens}
        case |= {"dtype": name_of(self.dtype), "ms": ms, "baseline": "torch products, Triton convolution, no SiLU"}
        self.row(
            **case, baseline_ms=baseline_ms, n=self.runs, error=error, tile=list(kernels.FUSED), **counted, **memory
        )

    def fused_train(self, shape: str) -> None:
        """Inner activations to y and back, all four gradients."""
        batch, tokens = self.train
        taken = self.arguments(shape, batch, tokens)
        dy = self.draw(batch, tokens, taken["x"].shape[2])

        def ours() -> Any:
            return torch.autograd.grad(kernels.dynamic_conv(**taken, silu=True)[0], list(taken.values()), dy)

        def unfused() -> Any:
            return torch.autograd.grad(generated_then_given(**taken), list(taken.values()), dy)

        memory = {"peak_bytes": self.peak(ours), "baseline_peak_bytes": self.peak(unfused)}
        ms, baseline_ms = self.ms(ours), self.ms(unfused)
        once = self.counted(*(taken[name] for name in ("x", "inner", "weight")))
        counted = {"bytes": 3 * once["bytes"], "flops": 3 * once["flops"]}  # that taps are made twice is our choice
        case = {"op": "fused_generator_conv_train", "shape": shape, "batch": batch, "tokens": tokens}
        case |= {"dtype": name_of(self.dtype), "ms": ms, "baseline": "torch products, Triton convolution, no SiLU"}
        self.row(**case, baseline_ms=baseline_ms, n=self.runs, **counted, **memory)

    def given_train(self, shape: str) -> None:
        """The convolution alone, with taps given: forward reads x and taps and writes y; backward reads x, taps and dy
        and writes both gradients."""
        batch, tokens = self.train
        x, taps = self.given(shape, batch, tokens)
        dy = torch.randn_like(x)
        y = kernels.causal_conv(x, taps)[0]
        slow = plain_causal_conv(x, taps)[0]
        unit = x.numel() * x.element_size()
        parts: list[tuple[str, int, Callable[[], Any], Callable[[], Any]]] = [
            ("_forward", 2 + WIDTH, lambda: kernels.causal_conv(x, taps)[0], lambda: plain_causal_conv(x, taps)[0]),
            ("_backward", 3 + 2 * WIDTH, lambda: back(y, x, taps, dy), lambda: back(slow, x, taps, dy)),
            (
                "",
                5 + 3 * WIDTH,
                lambda: back(kernels.causal_conv(x, taps)[0], x, taps, dy),
                lambda: back(plain_causal_conv(x, taps)[0], x, taps, dy),
            ),
        ]
        for part, units, ours, plain in parts:
            case = {"op": "dynamic_conv_train" + part, "shape": shape, "batch": batch, "tokens": tokens}
            case |= {"dtype": name_of(self.dtype), "ms": self.ms(ours), "baseline": "plain PyTorch"}
            self.row(**case, baseline_ms=self.ms(plain), n=self.runs, bytes=units * unit, flops=0)

    def given(self, shape: str, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and taps [W, B, T, D] as a view of [B, T, W, D]."""
        channels = self.shapes[shape][2]
        taps = self.draw(batch, tokens, WIDTH, channels).permute(2, 0, 1, 3)
        return self.draw(batch, tokens, channels).requires_grad_(), taps.requires_grad_()

    def counted(self, x: Tensor, inner: Tensor, weight: Tensor) -> dict[str, int]:
        """Of the forward from `inner`: reads x, inner and weight, writes y."""
        moved = sum(t.numel() * t.element_size() for t in (x, x, inner, weight))
        return {"bytes": moved, "flops": 2 * x.shape[0] * x.shape[1] * weight.numel()}

    def all(self) -> None:
        self.case("ceilings", self.ceilings)
        for dtype in dict.fromkeys([self.dtype, torch.float32]):
            for shape in self.shapes:
                self.case("check", lambda shape=shape, dtype=dtype: self.check(shape, dtype))  # type: ignore[misc]
        for shape in self.shapes:
            self.case("check", lambda shape=shape: self.check_given(shape))  # type: ignore[misc]
        self.case("check", self.check_long)
        self.case("fused_kernel", self.sweep)
        self.case("fused_generator_conv", lambda: self.fused("2B", *self.long[0]))
        self.case("fused_generator_conv", lambda: self.fused("2B", *self.long[1]))
        self.case("dynamic_conv_train", lambda: self.given_train("2B"))
        self.case("fused_generator_conv_train", lambda: self.fused_train("2B"))
        for shape in ("4B", "135M"):
            self.case("fused_generator_conv", lambda shape=shape: self.fused(shape, *self.long[0]))  # type: ignore[misc]
            self.case("dynamic_conv_train", lambda shape=shape: self.given_train(shape))  # type: ignore[misc]


def generated_then_given(x: Tensor, inner: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The best way without fusion: one product makes [B, T, W, D] taps, which the Triton convolution reads as they are.

    The weight's rows are put in that order first, which a model would do once; it takes about 10 us.
    """
    channels = x.shape[2]
    by_tap = weight.unflatten(0, (channels, WIDTH)).transpose(0, 1).flatten(0, 1)
    start = bias.unflatten(0, (channels, WIDTH)).T.flatten()
    taps = F.linear(inner, by_tap, start).unflatten(-1, (WIDTH, channels)).permute(2, 0, 1, 3)
    return kernels.causal_conv(x, taps)[0]


def back(y: Tensor, x: Tensor, taps: Tensor, dy: Tensor) -> Any:
    return torch.autograd.grad(y, [x, taps], dy, retain_graph=True)


def outputs(form: Callable[..., Any], taken: dict[str, Tensor], context: dict[str, Tensor]) -> list[Tensor]:
    """y and the gradients of a fixed weighting of it."""
    y = form(**taken, **context, silu=True)[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y, *torch.autograd.grad(y, list(taken.values()), weights)]


def relative(found: Tensor, expected: Tensor) -> float:
    """Size of the difference over size."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description="The dynamic convolution on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="toy sizes under Triton's interpreter")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny runs under Triton's interpreter")
    faulthandler.dump_traceback_later(LIMIT + 40, exit=True)  # a kernel that hangs; the rows so far are written
    torch.manual_seed(0)
    Bench(options.tiny).all()


if __name__ == "__main__":
    main()

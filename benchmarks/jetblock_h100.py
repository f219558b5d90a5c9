"""The JetBlock's decode step on one GPU: the kernel, a layer, and the whole 2B model, against the copy ceiling.

    python benchmarks/jetblock_h100.py           # about two minutes on an H100
    python benchmarks/jetblock_h100.py --decode-only     # the kernel alone, to $OUT: see jetblock_sweep.py
    TRITON_INTERPRET=1 python benchmarks/jetblock_h100.py --tiny     # every line, on a CPU, at toy sizes

Weights, inputs and states are random. Kernels go round the states of 24 layers, so that the L2 cache does not flatter
them, inside one CUDA graph, so that launches cost nothing; a time is the median over the graph's replays. `bytes` are
those that a step must move, each once; `roofline_share` is their time at the measured copy speed over the time taken.
Writes jetblock-h100.json to $OUT, else to benchmarks/results, after every case; a case that fails leaves a row with
its error. On a CPU (--tiny writes jetblock-tiny.json) the times mean nothing.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jet_nemotron_2b import OFFICIAL
from jetblock_sweep import SWEEP
from torch import Tensor

from postnas.blocks.step import Ledger
from postnas.files import write_json
from postnas.generate.step import Decoder
from postnas.models import JetNemotronConfig, JetNemotronForCausalLM
from postnas.models.cache import HybridCache
from postnas.ops.jet_decode import conv_step_plain, jet_decode_plain
from postnas.ops.jet_decode_triton import TILES, Tile, conv_step_triton, jet_decode_triton

TINY, DECODE_ONLY = (word in sys.argv for word in ("--tiny", "--decode-only"))
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RESULT = Path(os.environ.get("OUT", "benchmarks/results")) / f"jetblock-{'tiny' if TINY else 'h100'}.json"
LIMIT, SOFT = 170, 135
"""Seconds after which the process ends, whatever it does, and after which no new case begins."""
BEGIN = time.monotonic()
LAYERS, REPEATS, STEPS, CONTEXT = (2, 2, 6, 16) if TINY else (24, 20, 4096, 4096)
KIND = torch.bfloat16 if CUDA else torch.float32  # the interpreter's products are wrong in bfloat16
SHAPES = {"2B": (12, 96, 256, 384), "4B": (16, 128, 256, 512), "135M": (9, 64, 128, 144)}
"""Heads, key dim, value dim, the generator's inner width."""
if TINY:
    SHAPES = {name: (2, 24, 48, 20) for name in SHAPES}
TAPS = 4
CONFIGS = {
    torch.float32: [Tile(32, 1), Tile(64, 2), Tile(64, 4), Tile(64, 8), Tile(128, 4)],
    torch.bfloat16: [Tile(64, 1), Tile(64, 2), Tile(64, 4), Tile(128, 2), Tile(128, 4), Tile(256, 4)],
}
COPY = [0.0]
"""Bytes a second, read and written, once measured."""
ROWS: list[dict[str, Any]] = []


def add(**row: Any) -> None:
    """Keep a row, print it and write the file."""
    if COPY[0] and "bytes" in row and "ms" in row:
        row["roofline_share"] = row["bytes"] / COPY[0] / (row["ms"] / 1e3)
        row["copy_tb_s"] = COPY[0] / 1e12
    ROWS.append({name: str(x) if isinstance(x, float) and not isfinite(x) else x for name, x in row.items()})
    print(f"{time.monotonic() - BEGIN:6.1f} s", row, flush=True)
    stamp = {"command": " ".join(["python", "benchmarks/jetblock_h100.py", *sys.argv[1:]])}
    stamp |= {"device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__}
    write_json(RESULT, stamp | {"date": date.today().isoformat(), "rows": ROWS})


@contextmanager
def case(name: str) -> Iterator[None]:
    """A case that fails is a row with its error, and the rest goes on."""
    try:
        if time.monotonic() - BEGIN > SOFT:
            raise TimeoutError(f"not begun: {SOFT} s are over")
        yield
    except Exception as error:
        add(op=name, error=f"{type(error).__name__}: {error}"[:300])
    if CUDA:
        torch.cuda.empty_cache()


def timed(work: Callable[[], Any], repeats: int = REPEATS, graph: bool = True) -> float:
    """Milliseconds of `work`, the median; on a GPU replayed as one graph, so that launches cost nothing."""
    if not CUDA:
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    again = work
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        again = captured.replay
    again()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        again()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> None:
    """What the card gives: a copy of 1 GB, and a product of two 8192 x 8192 matrices."""
    source, target = torch.empty(2, 2**18 if TINY else 2**28, dtype=torch.float32, device=DEVICE)
    # Not as a graph, which would take the copy engine, and that is slower than a kernel.
    COPY[0] = 2 * source.nbytes / (timed(lambda: target.copy_(source), graph=False) / 1e3)
    size = 64 if TINY else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = timed(lambda: left @ right)
    add(op="ceilings", copy_tb_s=COPY[0] / 1e12, matmul_tflop_s=2 * size**3 / ms / 1e9, dtype="bfloat16")


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = KIND) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).to(dtype)


def arguments(shape: str, batch: int, dtype: torch.dtype = KIND) -> dict[str, Any]:
    """One layer's inputs of `jet_decode` but v, kernels, conv and state; decay as a block starts."""
    heads, key_dim, value_dim, _ = SHAPES[shape]
    step = torch.empty(heads, device=DEVICE).uniform_(-6.9, -2.3).exp()
    return {
        **{name: draw(batch, heads * key_dim, dtype=dtype) for name in ("q", "k")},
        **{name: draw(batch, heads, dtype=dtype) for name in ("a", "b")},
        "gate": draw(batch, heads * value_dim, dtype=dtype),
        "A_log": torch.empty(heads, device=DEVICE).uniform_(0.1, 16.0).log(),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
        "norm_weight": torch.ones(value_dim, device=DEVICE, dtype=dtype),
        "eps": 1e-5,
    }


def layer_inputs(shape: str, batch: int, state_dtype: torch.dtype, dtype: torch.dtype = KIND) -> dict[str, Any]:
    """All inputs of one layer, its convolution and generator included."""
    heads, key_dim, value_dim, inner = SHAPES[shape]
    width = heads * value_dim
    return {
        "rest": arguments(shape, batch, dtype),
        "v": draw(batch, width, dtype=dtype),
        "kernels": draw(batch, width, TAPS, scale=0.5, dtype=dtype),
        "conv": draw(batch, TAPS - 1, width, dtype=dtype),
        "state": torch.randn(batch, heads, key_dim, value_dim, device=DEVICE).mul_(0.1).to(state_dtype),
        "inner": draw(batch, inner, dtype=dtype),
        "weight": draw(width * TAPS, inner, scale=inner**-0.5, dtype=dtype),
        "bias": draw(width * TAPS, scale=0.5, dtype=dtype),
    }


def moved(layer: dict[str, Any], names: tuple[str, ...]) -> int:
    """Bytes of one layer's step: states in and out, the named inputs, q, k, gate, a, b, and the output."""
    batch, width = layer["v"].shape
    small = sum(layer["rest"][name].nbytes for name in ("q", "k", "gate", "a", "b"))
    once = sum(layer[name].nbytes for name in names) + small + batch * width * layer["v"].element_size()
    return once + 2 * layer["state"].nbytes + 2 * layer["conv"].nbytes


def named(x: torch.dtype) -> str:
    return str(x).removeprefix("torch.")


def kinds(state_dtype: torch.dtype) -> dict[str, str]:
    return {"dtype": named(KIND), "state_dtype": named(state_dtype)}


def with_kernels(layer: dict[str, Any], step: Callable[..., Tensor], **settings: Any) -> Tensor:
    parts = {name: layer[name] for name in ("v", "kernels", "conv", "state")}
    return step(**layer["rest"], **parts, **settings)


def with_w2(layer: dict[str, Any], fused: bool, conv_settings: dict[str, int], **settings: Any) -> Tensor:
    """From w1's product on: the taps in the convolution's epilogue, or as a product of their own."""
    weights = {name: layer[name] for name in ("inner", "weight", "bias")}
    if fused:
        v = conv_step_triton(x=layer["v"], conv=layer["conv"], **weights, **conv_settings)
        return jet_decode_triton(**layer["rest"], v=v, kernels=None, conv=None, state=layer["state"], **settings)
    kernels = F.linear(F.silu(layer["inner"]), layer["weight"], layer["bias"]).unflatten(-1, (-1, TAPS))
    return with_kernels(layer | {"kernels": kernels}, jet_decode_triton, **settings)


def changed(given: dict[str, Any], how: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: how(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def correctness(shape: str, state_dtype: torch.dtype) -> None:
    """Relative errors against the plain form in float64, both ways to the taps."""
    layer = layer_inputs(shape, 3, state_dtype)
    for fused in (False, True):
        ours, exact = changed(layer, Tensor.clone), changed(layer, Tensor.double)
        exact["rest"] = changed(layer["rest"], Tensor.double)
        if fused:
            got = with_w2(ours, True, {})
            weights = {name: exact[name] for name in ("inner", "weight", "bias")}
            v = conv_step_plain(x=exact["v"], conv=exact["conv"], **weights)
            wanted = jet_decode_plain(**exact["rest"], v=v, kernels=None, conv=None, state=exact["state"])
        else:
            got = with_kernels(ours, jet_decode_triton)
            wanted = with_kernels(exact, jet_decode_plain)
        pairs = {"error_out": (got, wanted), "error_state": (ours["state"], exact["state"])}
        errors = {name: float((x.double() - y).norm() / y.norm()) for name, (x, y) in pairs.items()}
        same = bool(torch.equal(ours["conv"].double(), exact["conv"]))
        add(op="jet_decode_error", shape=shape, batch=3, fused=fused, **kinds(state_dtype), **errors, conv_equal=same)


def kernel(shape: str, batch: int, state_dtype: torch.dtype, configs: list[Tile]) -> list[Tile]:
    """The kernel with given taps by each tile; the tiles, the fastest first. That one is in use from here on: TILES
    in `jet_decode_triton` should say the same. The baseline is the plain form, in a graph too."""
    count = LAYERS if TINY or batch > 8 else 4 * LAYERS  # 24 layers' states of one row would fit into the L2 cache
    layers = [layer_inputs(shape, batch, state_dtype) for _ in range(count)]

    def work(step: Callable[..., Tensor], settings: dict[str, Any]) -> float:
        return timed(lambda: [with_kernels(layer, step, **settings) for layer in layers]) / count

    def compiled(config: Tile) -> None:
        with suppress(Exception):  # it fails once more below, and leaves its row
            with_kernels(layers[0], jet_decode_triton, settings=config)

    with ThreadPoolExecutor(8 if CUDA else 1) as pool:  # leaving it waits for all
        pool.map(compiled, configs)
    found: dict[Tile, float] = {}
    shared = {"shape": shape, "batch": batch, "tokens": batch, "bytes": moved(layers[0], ("v", "kernels"))}
    shared |= kinds(state_dtype)
    for config in configs:
        with case("jet_decode_tile"):
            found[config] = work(jet_decode_triton, {"settings": config})
            add(op="jet_decode_tile", ms=found[config], **config._asdict(), **shared)
    ranked = sorted(found, key=lambda config: found[config])
    if ranked:
        TILES[state_dtype] = best = ranked[0]
        row: dict[str, Any] = {"ms": found[best], "config": list(best)}
        if batch < 384:
            row |= {"baseline": "plain PyTorch in a CUDA graph", "baseline_ms": work(jet_decode_plain, {})}
        add(op="jet_decode", **row, **shared)
    return ranked


def sweep(state_dtype: torch.dtype) -> None:
    """Every tile at batch 128; the best three at others too, and the best against the plain form."""
    first, *others = (2, 3, 1) if TINY else (128, 384, 1)
    with case("jet_decode"):
        best = kernel("2B", first, state_dtype, [Tile(*config) for config in SWEEP[named(state_dtype)]])
        for batch in others:
            kernel("2B", batch, state_dtype, best[:3])
        TILES[state_dtype] = best[0]
        correctness("2B", state_dtype)


def taps(batch: int) -> None:
    """w2, convolution and rule: the convolution as w2's epilogue, against taps that reach memory."""
    layers = [layer_inputs("2B", batch, torch.float32) for _ in range(LAYERS)]
    ways: list[tuple[bool, dict[str, int]]] = [(False, {}), (True, {"channels": 16}), (True, {"channels": 32})]
    for fused, channels in ways:
        with case("jet_decode_w2"):

            def work(fused: bool = fused, channels: dict[str, int] = channels) -> None:
                for layer in layers:
                    with_w2(layer, fused, channels)

            used = moved(layers[0], ("v", "inner", "weight", "bias"))
            row = {"fused": fused, **channels, "bytes": used, **kinds(torch.float32)}
            add(op="jet_decode_w2", shape="2B", batch=batch, tokens=batch, ms=timed(work) / LAYERS, **row)


def drift() -> None:
    """The same tokens through float32 and bfloat16 states; inputs in float32, so that only the states differ."""
    batch, shape = 4, "2B"
    heads, key_dim, value_dim, _ = SHAPES[shape]
    fixed = arguments(shape, batch, torch.float32)
    states = {kind: torch.zeros(batch, heads, key_dim, value_dim, device=DEVICE, dtype=kind) for kind in CONFIGS}
    marks = {2**n for n in range(0, 13, 2)} | {STEPS}
    for step in range(1, STEPS + 1):
        inputs = {name: torch.randn_like(fixed[name]) for name in ("q", "k", "gate", "a", "b")}
        inputs["v"] = F.silu(draw(batch, heads * value_dim, dtype=torch.float32))
        out = {
            kind: jet_decode_triton(**fixed | inputs, kernels=None, conv=None, state=state)
            for kind, state in states.items()
        }
        if step in marks:
            errors = {}
            for name, (exact, small) in (("out", tuple(out.values())), ("state", tuple(states.values()))):
                errors[f"error_{name}"] = float((small.float() - exact).norm() / exact.norm())
            add(op="jet_decode_drift", shape=shape, batch=batch, tokens=step, state_dtype="bfloat16", **errors)


def make_model() -> Any:
    """The 2B shape with random weights."""
    changes: dict[str, Any] = {}
    if TINY:
        changes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
        changes |= {"num_attention_heads": 4, "layer_types": ["jet", "attn", "swa", "jet"]}
        jet = OFFICIAL["efficient_attention_config"]["jet"] | {"num_heads": 2, "head_dim": 24, "expand_v": 2.0}
        changes["efficient_attention_config"] = {"jet": jet, "swa": {"window_size": 8}}
    torch.set_default_dtype(KIND)
    with torch.device(DEVICE):
        model = JetNemotronForCausalLM(JetNemotronConfig(**OFFICIAL | changes)).to(DEVICE).eval()
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "kernel_generator.w2.weight" in name:  # it starts at zero, and then makes no taps of its own
            parameter.normal_(0.0, 0.02)
    return model


def jet_layer(model: Any, batch: int, fused: bool) -> None:
    """JetBlocks one after the other, projections included; the baseline is the block's own forward, launched."""
    decoder = Decoder(model, batch, CONTEXT, fused=fused, fixed=True)
    decoder.fill_random()
    step, x = decoder._step(), draw(batch, 1, model.config.hidden_size)
    jets = [(decoder.layers[i].self_attn, product, decoder.states[i]) for i, product in decoder.products.items()]

    def work() -> None:
        for mixer, product, state in jets:
            mixer.finish_decode(**product(x[:, 0]), state=state, fused=fused)

    def plain() -> None:
        for mixer, _, state in jets:
            mixer(x, step, state)

    mixer, _, state = jets[0]
    used = sum(p.nbytes for p in mixer.parameters()) + 2 * state.nbytes + 2 * x.nbytes
    row: dict[str, Any] = {"ms": timed(work) / len(jets), "fused": fused, "bytes": used}
    row |= {"baseline": "Jet.forward, launched", "baseline_ms": timed(plain, 5, graph=False) / len(jets)}
    add(op="jet_layer_decode", shape="2B", batch=batch, tokens=batch, **row, **kinds(torch.float32))


def filled_cache(model: Any, decoder: Decoder) -> HybridCache:
    """A growing cache after CONTEXT - 16 random tokens (the linear states' size does not depend on them)."""
    cache, past = HybridCache(model.config), max(CONTEXT - 16, 8)
    for layer, state in zip(model.model.layers, cache.states, strict=True):
        mixer = layer.self_attn
        if hasattr(mixer, "window"):
            kept = past if mixer.window is None else min(past, mixer.window - 1)
            cache.ledgers[mixer.window] = Ledger(mixer.window, kept)
            part = draw(decoder.batch, mixer.dims.kv_heads, kept, mixer.dims.head_dim, scale=0.1)
            state.append(part, part, None if mixer.window is None else kept)
        else:
            mixer(draw(decoder.batch, 1, model.config.hidden_size), decoder._step(), state)
    cache.seen = cache.next_position = cache.slots = past
    return cache


def whole_model(model: Any, batch: int, fused: bool, state_dtype: torch.dtype, baseline: bool) -> None:
    """A step of the whole model at a full context; the baseline is the plain class with its growing cache."""
    decoder = Decoder(model, batch, CONTEXT, dtype=state_dtype, fused=fused, fixed=True)
    decoder.fill_random()
    token = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    ms = timed(lambda: decoder.step(token), graph=False)
    used = sum(p.nbytes for p in model.parameters()) + decoder.logits.nbytes
    for state in decoder.states:  # keys and values are read; a recurrent state and a convolution's inputs also written
        used += state.k.nbytes + state.v.nbytes if hasattr(state, "slot") else 2 * state.nbytes
    row: dict[str, Any] = {"ms": ms, "tokens_per_s": batch / ms * 1e3, "bytes": used}
    if baseline:
        cache = filled_cache(model, decoder)
        row |= {"baseline": "the plain class with its growing cache"}
        row |= {"baseline_ms": timed(lambda: model(token[:, None], past_key_values=cache), 6, graph=False)}
    row |= {"fused": fused, "context": CONTEXT} | kinds(state_dtype)
    add(op="model_decode", shape="2B", batch=batch, tokens=batch, **row)


@torch.no_grad()
def main() -> None:
    assert not DECODE_ONLY or "OUT" in os.environ, "--decode-only needs $OUT: it would write over a whole run's rows"
    signal.signal(signal.SIGALRM, lambda *_: os._exit(3))
    signal.alarm(LIMIT)
    torch.manual_seed(0)
    wide, small = CONFIGS
    with case("ceilings"):
        ceilings()
    if DECODE_ONLY:
        sweep(small)
        sweep(wide)
        return
    for batch in (3, 2, 1) if TINY else (384, 1, 128):  # what is in use afterwards is the best of the last two
        for state_dtype, configs in CONFIGS.items():
            with case("jet_decode"):
                kernel("2B", batch, state_dtype, configs)
    for state_dtype in CONFIGS:
        with case("jet_decode_error"):
            correctness("2B", state_dtype)
    many = (1, 2, 3) if TINY else (1, 32, 128)
    for batch in many[::2]:
        with case("jet_decode_w2"):
            taps(batch)
    with case("model"):
        model = make_model()
        for batch in many[::2]:
            for fused in (True, False):
                with case("jet_layer_decode"):
                    jet_layer(model, batch, fused)
        for batch in many:
            for fused, state_dtype in ((True, wide), (False, wide), (True, small)):
                with case("model_decode"):
                    whole_model(model, batch, fused, state_dtype, baseline=fused and state_dtype == wide)
        del model
    with case("jet_decode_drift"):
        drift()
    for shape in ("4B", "135M"):
        with case("jet_decode"):
            correctness(shape, wide)
            kernel(shape, many[2], wide, [TILES[wide]])


if __name__ == "__main__":
    main()

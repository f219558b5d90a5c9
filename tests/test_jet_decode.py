"""The JetBlock's decode step: the plain form is the block's own forward, and the Triton forms are the plain form."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import benchmark
from torch import Tensor

from postnas.blocks.dims import Dims
from postnas.blocks.jet import Jet, JetOptions
from postnas.blocks.state import LinearState
from postnas.blocks.step import Step
from postnas.ops import jet_decode as jet_decode_module
from postnas.ops.jet_decode import conv_step, conv_step_plain, jet_decode, jet_decode_plain

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1 in the environment",
)
gpu = pytest.mark.gpu
SHAPES = {"2B": (12, 96, 256, 384), "4B": (16, 128, 256, 512), "135M": (9, 64, 128, 144)}
"""Heads, key dim, value dim, the generator's inner width."""


def inputs(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    taps: int,
    inner: int = 20,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of both functions. The rows of the products stand apart, as columns of one product do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    width, keys = heads * value_dim, heads * key_dim
    v, gate, q, k, low, a, b, _ = draw(batch, 2 * width + 2 * keys + inner + 2 * heads + 5).split(
        [width, width, keys, keys, inner, heads, heads, 5], dim=-1
    )
    return {
        "q": q,
        "k": k,
        "v": v,
        "gate": gate,
        "a": a,
        "b": b,
        "inner": low,
        "weight": draw(width * taps, inner, scale=inner**-0.5),
        "bias": draw(width * taps, scale=0.5),
        "conv": draw(batch, taps - 1, width),
        "state": draw(batch, heads, key_dim, value_dim, scale=0.3, dtype=state_dtype or dtype),
        "A_log": draw(heads),
        "dt_bias": draw(heads, scale=3.0),
        "norm_weight": 1.0 + draw(value_dim, scale=0.1),
        "eps": 1e-5,
    }


def run(given: dict[str, Any], step: Any, conv: Any, fused: bool, **settings: Any) -> dict[str, Tensor]:
    """The output and the states after one token, on copies; outputs are written over NaN.

    fused: the taps are made in the convolution's step, else beforehand by a product of their own.
    """
    state, past = given["state"].clone(), given["conv"].clone()
    out = torch.full_like(given["v"], torch.nan, memory_format=torch.contiguous_format)
    rest = {name: given[name] for name in ("q", "k", "gate", "a", "b", "A_log", "dt_bias", "norm_weight", "eps")}
    if fused:
        made = conv(
            x=given["v"],
            inner=given["inner"],
            weight=given["weight"],
            bias=given["bias"],
            conv=past,
            out=torch.full_like(out, torch.nan),
        )
        given_conv = {"v": made, "kernels": None, "conv": None}
    else:
        product = torch.nn.functional.linear(torch.nn.functional.silu(given["inner"]), given["weight"], given["bias"])
        given_conv = {"v": given["v"], "kernels": product.unflatten(-1, (out.shape[1], -1)), "conv": past}
    result = step(**rest, **given_conv, state=state, out=out, **settings)
    assert result.data_ptr() == out.data_ptr()
    return {"out": out, "state": state, "conv": past}


def compare(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor to a share of its largest entry; the convolution's inputs are copies, so they are exact."""
    for name in ("out", "state"):
        error = (got[name].double() - wanted[name].double()).abs().max() / wanted[name].double().abs().max()
        assert error < tolerance, (name, float(error))  # NaN is not below it either
    assert torch.equal(got["conv"], wanted["conv"].to(got["conv"].dtype))


def jet_block(taps: int = 4, bias: bool = True) -> Jet:
    block = Jet(
        Dims(hidden=32, heads=4, kv_heads=2, head_dim=8, qkv_bias=bias),
        JetOptions(head_dim=6, expand_v=1.5, conv_size=taps).resolve(
            Dims(hidden=32, heads=4, kv_heads=2, head_dim=8, qkv_bias=bias)
        ),
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return block


def no_rope(kind: str) -> Any:
    raise AssertionError(f"a linear block asked for the RoPE of {kind}")


def by_parts(block: Jet, x: Tensor, state: LinearState, fused: bool) -> Tensor:
    """One token [B, hidden] through the block's projections and the decode step."""
    generator = block.dynamic_conv1d.kernel_generator
    assert state.conv is not None and state.recurrent is not None
    v, kernels, conv = block.v_proj(x), None, None
    if fused:
        w2 = generator.w2
        v = conv_step(x=v, inner=generator.w1(x), weight=w2.weight, bias=w2.bias, conv=state.conv)
    else:
        kernels = generator.w2(F.silu(generator.w1(x))).unflatten(-1, (block.conv_channels, -1))
        conv = state.conv
    o = jet_decode(
        q=block.q_proj(x),
        k=block.k_proj(x),
        v=v,
        gate=block.g_proj(x),
        a=block.a_proj(x),
        b=block.b_proj(x),
        kernels=kernels,
        conv=conv,
        state=state.recurrent,
        A_log=block.A_log,
        dt_bias=block.dt_bias,
        norm_weight=block.o_norm.weight,
        eps=block.o_norm.eps,
    )
    return block.o_proj(o)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("taps", "bias"), [(2, True), (3, False), (4, True)])
def test_plain_form_is_the_blocks_forward(taps: int, bias: bool, fused: bool) -> None:
    """After a chunked prefill of 70 tokens, and over several tokens: the states move on as the block's own do."""
    block, (ours, theirs) = jet_block(taps, bias), (LinearState(), LinearState())
    x = torch.randn(3, 75, 32, dtype=torch.float64)
    for state in (ours, theirs):
        block(x[:, :70], Step(3, 70, x.device, no_rope), state)
    whole = block(x, Step(3, 75, x.device, no_rope))[0]
    for t in range(70, 75):
        with torch.enable_grad():  # a token that may be learnt from takes the forms of training
            wanted = block(x[:, t : t + 1], Step(3, 1, x.device, no_rope), theirs)[0][:, 0].detach()
        got = by_parts(block, x[:, t], ours, fused)
        assert (got - wanted).abs().max() < 1e-12
        assert (got - whole[:, t]).abs().max() < 1e-10  # the chunked form sums in another order
        for name in ("conv", "recurrent"):
            assert (getattr(ours, name) - getattr(theirs, name)).abs().max() < 1e-12


def test_plain_form_keeps_a_bfloat16_state_in_place() -> None:
    given = inputs(2, 2, 6, 8, 4, state_dtype=torch.bfloat16)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    compare(
        run(given, jet_decode_plain, conv_step_plain, True), run(exact, jet_decode_plain, conv_step_plain, True), 8e-3
    )


class Elsewhere(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_a_gpu_without_triton_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jet_decode_module, "has_triton", lambda: False)
    given = inputs(2, 2, 6, 8, 4)
    far = given | {name: given[name].as_subclass(Elsewhere) for name in ("state", "conv")}
    for fused in (False, True):
        got, wanted = run(far, jet_decode, conv_step, fused), run(given, jet_decode_plain, conv_step_plain, fused)
        compare({name: x.as_subclass(Tensor) for name, x in got.items()}, wanted, 1e-7)
    assert jet_decode_module._has_kernels(far["state"], given["v"]) is False
    monkeypatch.setattr(jet_decode_module, "has_triton", lambda: True)
    assert jet_decode_module._has_kernels(far["state"], given["v"])
    assert not jet_decode_module._has_kernels(given["state"], given["v"])


def test_autocast_changes_nothing() -> None:
    """Its products would be in bfloat16; the taps are given, since their product is the model's to cast."""
    given = inputs(2, 2, 6, 8, 4)
    taps = F.linear(F.silu(given["inner"]), given["weight"], given["bias"]).unflatten(-1, (16, 4))
    rest = {name: x for name, x in given.items() if name not in ("inner", "weight", "bias", "state", "conv")}
    states = [(given["state"].clone(), given["conv"].clone()) for _ in range(2)]
    wanted = jet_decode(**rest, kernels=taps, state=states[0][0], conv=states[0][1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = jet_decode(**rest, kernels=taps, state=states[1][0], conv=states[1][1])
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@interpreted
@pytest.mark.parametrize("fused", [False, True])
def test_triton_is_launched_on_the_device_of_its_tensors(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from postnas.ops.jet_decode_triton import conv_step_triton, jet_decode_triton

    entered: list[Tensor] = []

    def device_of(x: Tensor) -> Any:
        entered.append(x)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    run(inputs(2, 2, 6, 8, 4), jet_decode_triton, conv_step_triton, fused)
    assert len(entered) == (2 if fused else 1)


@interpreted
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "taps", "settings"),
    [
        (24, 48, 4, (32, 1, 1)),
        (24, 64, 3, (16, 4, 2)),
        (96, 64, 2, None),
        (96, 256, 4, None),
        (16, 16, 4, (64, 4)),
        (24, 80, 4, (16, 4)),
    ],
)
def test_triton_is_the_plain_form(
    key_dim: int, value_dim: int, taps: int, settings: tuple[int, int] | None, fused: bool
) -> None:
    from postnas.ops.jet_decode_triton import Tile, conv_step_triton, jet_decode_triton

    given = inputs(2, 3, key_dim, value_dim, taps)
    wanted = run(given, jet_decode_plain, conv_step_plain, fused)
    tile = settings and Tile(*settings)
    compare(run(given, jet_decode_triton, conv_step_triton, fused, settings=tile), wanted, 1e-5)


@interpreted
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "tile"), [(24, 80, 32), (96, 48, 32), (96, 64, 64), (64, 40, 16), (23, 33, 16)]
)
def test_triton_tiles_end_where_the_state_does(
    key_dim: int, value_dim: int, tile: int, joined: bool, state_dtype: torch.dtype
) -> None:
    """The last tile is cut by the values' end at 80, 48, 40 and 33, the last keys by theirs at 23; a step past an end
    would change the next head. States in bfloat16 may part by a rounding, outputs may not."""
    from postnas.ops.jet_decode_triton import Tile, conv_step_triton, jet_decode_triton

    given = inputs(2, 3, key_dim, value_dim, 4, state_dtype=state_dtype)
    wanted = run(given, jet_decode_plain, conv_step_plain, False)
    settings = Tile(tile, 1, joined)
    got = run(given, jet_decode_triton, conv_step_triton, False, settings=settings)
    compare(got, wanted, 1e-5 if state_dtype == torch.float32 else 8e-3)
    assert (got["out"] - wanted["out"]).abs().max() < 1e-5 * wanted["out"].abs().max()


@interpreted
@pytest.mark.parametrize(("batch", "inner", "channels"), [(1, 6, 16), (17, 144, 32), (70, 20, 16)])
def test_triton_convolution_step_is_the_plain_form(batch: int, inner: int, channels: int) -> None:
    from postnas.ops.jet_decode_triton import conv_step_triton

    given = inputs(batch, 1, 4, 40, 4, inner=inner)
    named = {name: given[name] for name in ("inner", "weight", "bias")}
    pasts = [given["conv"].clone() for _ in range(2)]
    out = torch.full((batch, 40), torch.nan)
    conv_step_triton(x=given["v"], conv=pasts[0], out=out, channels=channels, **named)
    assert (out - conv_step_plain(x=given["v"], conv=pasts[1], **named)).abs().max() < 1e-5
    assert torch.equal(*pasts)


@interpreted
@pytest.mark.parametrize("a", [-40.0, -8.0, -0.3, 0.0, 2.0, 30.0])
def test_triton_decay_is_exact_for_small_and_large_steps(a: float) -> None:
    """With beta near 0 the state only decays, so it shows softplus to float32's rounding."""
    from postnas.ops.jet_decode_triton import jet_decode_triton

    given = inputs(1, 1, 16, 16, 4)
    given |= {"a": torch.full((1, 1), a), "b": torch.full((1, 1), -80.0), "dt_bias": torch.zeros(1)}
    given |= {"A_log": torch.zeros(1), "state": torch.ones(1, 1, 16, 16)}
    state = given["state"].clone()
    names = ("q", "k", "gate", "a", "b", "A_log", "dt_bias", "norm_weight", "eps")
    jet_decode_triton(**{name: given[name] for name in names}, v=given["v"], kernels=None, conv=None, state=state)
    step = torch.nn.functional.softplus(torch.tensor(a, dtype=torch.float64))
    assert (state.double() - (-step).exp()).abs().max() < 2e-7


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "batch"), [("2B", 1), ("2B", 384), ("4B", 128), ("135M", 1), ("135M", 33)])
def test_cuda_is_the_plain_form_in_float64(shape: str, batch: int, dtype: torch.dtype) -> None:
    heads, key_dim, value_dim, inner = SHAPES[shape]
    for state_dtype in (torch.float32, torch.bfloat16):
        given = inputs(batch, heads, key_dim, value_dim, 4, inner, dtype, state_dtype, "cuda")
        exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
        close = 1e-5 if dtype == state_dtype == torch.float32 else 1e-2
        for fused in (False, True):
            compare(run(given, jet_decode, conv_step, fused), run(exact, jet_decode, conv_step, fused), close)


@gpu
def test_cuda_step_is_the_same_every_time() -> None:
    """Programs share no sums, and a race in a state's change would show here."""
    heads, key_dim, value_dim, inner = SHAPES["135M"]
    given = inputs(64, heads, key_dim, value_dim, 4, inner, torch.bfloat16, torch.float32, "cuda")
    first = run(given, jet_decode, conv_step, True)
    for fused in (True, True, True):
        again = run(given, jet_decode, conv_step, fused)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_merged_rows_take_the_place_of_their_kind_alone() -> None:
    sweep = benchmark("jetblock_sweep")

    def row(ms: float, op: str = "jet_decode_tile", batch: int = 1, **more: Any) -> dict[str, Any]:
        return {"op": op, "shape": "2B", "batch": batch, "state_dtype": "float32", "ms": ms} | more

    ceilings = {"op": "ceilings", "copy_tb_s": 3.0}
    rows = [row(1), row(2), row(3, batch=2), row(4, "jet_decode"), row(5, state_dtype="bfloat16"), ceilings]
    old = {"command": "a; b", "device": "H100", "torch": "2", "date": "1", "rows": rows}
    new = {"command": "c", "device": "H100", "torch": "2", "date": "2"}
    new["rows"] = [{"op": "ceilings", "copy_tb_s": 2.0}, row(6), row(7, batch=9), {"op": "jet_decode", "error": "no"}]
    merged = sweep.merge(old, new)
    assert merged == old | {"command": "a; b; c", "date": "2", "rows": [row(6), *rows[2:], row(7, batch=9)]}
    assert sweep.merge(merged, new) == merged
    with pytest.raises(SystemExit):
        sweep.merge(old, new | {"device": "H200"})

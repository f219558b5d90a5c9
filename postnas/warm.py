"""What `postnas warm` does: layers ask for the GPU kernels of a recipe, so that its run begins at once."""

from __future__ import annotations

import time
from typing import Any

import torch

from postnas.blocks import make_block
from postnas.blocks.step import Step
from postnas.models.checkpoint import base_config
from postnas.ops import fla
from postnas.recipe import Recipe
from postnas.train.loop import autocast


def warm_layers(recipe: Recipe, device: str) -> None:
    """One layer of each linear block of the recipe learns, reads and decodes; prints what that took and found."""
    config = base_config(recipe.base.model, recipe.base.sha256)
    options = recipe.align.options | recipe.select.options
    for name in dict.fromkeys([*recipe.align.blocks, *recipe.select.blocks]):
        with torch.device(device):
            block = make_block(name, config.dims(), options.get(name))
        seconds = training(block, getattr(torch, recipe.compute), recipe.data.borders)
        borders = " with a border" if recipe.data.borders else ""
        print(f"warm: {name}: one layer learnt from 128 tokens{borders} in {recipe.compute}: {seconds:.1f} s")
        for dtype in sorted({recipe.compute, recipe.base.dtype}):
            seconds = reading(block.to(getattr(torch, dtype)))
            print(f"warm: {name}: one layer in {dtype} read 128 tokens and made one: {seconds:.1f} s")
    # The layers themselves asked for the rules they need, at the shapes that the run will ask for.
    for shape, kernel in fla.asked.items():
        use = f"{'training' if shape.gradients else 'prefill'}{' with borders' if shape.packed else ''}"
        sizes = f"{shape.heads} heads of {shape.key_dim} x {shape.value_dim}"
        found = "the plain form" if kernel is None else "fla is right" if kernel == shape.rule else f"fla as {kernel}"
        print(f"warm: {shape.rule}: {use} in {shape.dtype}, {sizes}: {found}")
    if not fla.asked:
        print("warm: no layer asked for fla's kernels, which take 16-bit types only")
    print("warm: all at batch 1; kernels that other batch sizes need differently are compiled at their first use")


def training(block: Any, compute: Any, borders: bool) -> float:
    """Seconds of a pass and its backward over 128 tokens, in two sequences or one, as training does them."""
    weight, begin = block.o_proj.weight, time.monotonic()
    segments = (torch.arange(128, device=weight.device) >= 70).int()[None] if borders else None
    with autocast(weight.device, compute):
        y, _ = block(torch.randn(1, 128, block.dims.hidden).to(weight), plain(128, weight.device, segments))
    y.float().square().mean().backward()
    block.zero_grad()
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    return time.monotonic() - begin


def reading(block: Any) -> float:
    """Seconds of a prefill of 128 tokens and a decode step by the block, in its own type on its own device."""
    weight = block.o_proj.weight
    x, state, begin = torch.randn(1, 128, block.dims.hidden).to(weight), block.State(), time.monotonic()
    with torch.no_grad():
        for part in (x, x[:, :1]):
            block(part, plain(part.shape[1], weight.device), state)
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    return time.monotonic() - begin


def plain(tokens: int, device: Any, segments: Any = None) -> Step:
    """The step of one unpadded row."""

    def no_rope(kind: str) -> Any:
        raise AssertionError(f"a linear block asked for the RoPE of {kind}")

    return Step(1, tokens, device, no_rope, segments=segments)

"""What of a recipe can be wrong and be told before an hour of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from postnas.blocks import linear_blocks, make_block
from postnas.data import Tokens
from postnas.errors import UserError
from postnas.evaluate import groups, suite
from postnas.evaluate.task import load_task
from postnas.evaluate.verdict import check_text
from postnas.recipe import Recipe
from postnas.search import objectives
from postnas.search.blocks import MEASURES
from postnas.search.placement import check_blocks
from postnas.search.sizes import asked_grid
from postnas.search.strategies import STRATEGIES
from postnas.search.variants import SCORED
from postnas.search.windows import check_window
from postnas.train import parallel
from postnas.trials import TRIALS, Trials


def check(recipe: Recipe) -> None:
    """What can be seen before anything is loaded. Raises UserError."""
    for field, names in (("align.blocks", recipe.align.blocks), ("select.blocks", recipe.select.blocks)):
        for name in names:
            if name not in linear_blocks():
                raise UserError(f"{field}: {name!r} is not a linear block; choose from {', '.join(linear_blocks())}")
    if recipe.place.strategy not in (*STRATEGIES, "gates"):
        known = ", ".join([*STRATEGIES, "gates"])
        raise UserError(f"place.strategy: {recipe.place.strategy!r} is unknown; choose from {known}")
    check_blocks(recipe.place)
    suite.check(recipe.evaluate.tasks, recipe.evaluate.allow_code)
    for stage in filter(recipe.has, TRIALS):
        _check_weights(recipe, stage)
        if stage != "select" and not recipe.has("select") and len(recipe.place.choices) > 1:
            raise UserError(f"{stage}: place.blocks may place several blocks; name select.blocks, which chooses one")


def _check_weights(recipe: Recipe, stage: str) -> None:
    """Raises UserError for a weight of what is not measured."""
    settings, evaluated = getattr(recipe, stage), recipe.evaluate
    assert isinstance(settings, Trials)
    left_out = {"perplexity"} if not evaluated.perplexity_tokens else set()
    left_out |= {"copy"} if not evaluated.copy_passages else set()
    tasks = [load_task(name).name for name in evaluated.tasks if name not in groups.group_names()]
    known = [name for name in (*MEASURES, *tasks) if name not in left_out]
    for name in settings.weights:
        if name not in known:
            raise UserError(f"{stage}.weights: {name!r} is not measured; choose from {', '.join(known)}")


def check_base(recipe: Recipe, config: Any, tokens: tuple[Tokens, Tokens], tokenizer: Any) -> None:
    """What about a recipe does not fit its base (config: a HybridConfig) or its tokens (training, held out).

    Raises UserError.
    """
    layers, heldout = config.num_hidden_layers, tokens[1].half(0)
    if "place" in recipe.stages and recipe.place.budget > layers:
        raise UserError(f"place.budget: {recipe.place.budget} is more than the base's {layers} layers; give fewer")
    if "place" in recipe.stages and recipe.place.windows:
        linear = layers - recipe.place.budget
        if recipe.place.windows > linear:
            raise UserError(
                f"place.windows: {recipe.place.windows} is not possible with {linear} linear layers; give 0 to {linear}"
            )
        check_window(config, recipe.place.window)
    with torch.device("meta"):
        for block in recipe.align.blocks:
            make_block(block, config.dims(), recipe.align.options.get(block))
    tokens[0].batch(0, recipe.align.batch, recipe.align.length, recipe.seed)
    trials = any(map(recipe.has, TRIALS))
    for train, stage in ((recipe.paths, "align"), (recipe.train, "train"), (recipe.stage2, "train")):
        if (train.tokens and stage in recipe.stages) or (trials and train is recipe.train):
            tokens[0].batch(0, train.batch, train.length, recipe.seed, world=parallel.world())
    if trials:
        _check_variants(recipe, config)
        objectives.make(SCORED, tokens[1].half(1), tokenizer, 1, recipe.seed)
        _check_text(recipe, tokens[1].half(1))
    if "evaluate" in recipe.stages:
        _check_text(recipe, heldout)


def _check_text(recipe: Recipe, heldout: Tokens) -> None:
    settings = recipe.evaluate
    check_text(
        heldout.stream(),
        settings.perplexity_tokens,
        settings.length,
        settings.copy_passages,
        settings.copy_tokens,
        settings.copy_filler,
        recipe.seed,
    )


def _check_variants(recipe: Recipe, config: Any) -> None:
    """Raises UserError for a block, options or sizes that no block which may be chosen can have."""
    dims, blocks = config.dims(), dict.fromkeys(recipe.place.choices)
    options = dict(recipe.align.options)
    if recipe.has("select"):
        blocks, options = dict.fromkeys(recipe.select.blocks), options | recipe.select.options
        with torch.device("meta"):
            for block in blocks:
                make_block(block, dims, options.get(block))

    def some(field: str, make: Callable[[str, dict[str, Any]], Any]) -> None:
        errors = []
        for block in blocks:
            try:
                with torch.device("meta"):
                    make(block, options.get(block, {}))
            except UserError as error:
                errors.append(error)
        if len(errors) == len(blocks):
            raise UserError(f"{field}{errors[0]}") from errors[0]

    for name, changed in recipe.design.variants.items() if recipe.has("design") else ():

        def designed(block: str, own: dict[str, Any], changed: dict[str, Any] = changed) -> None:
            make_block(block, dims, own | changed)

        some(f"design.variants.{name}: ", designed)
    if recipe.has("size"):
        dtype = getattr(torch, recipe.base.dtype)
        some("", lambda block, own: asked_grid(recipe.size, block, make_block(block, dims, own), own, dtype))

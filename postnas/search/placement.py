"""PostNAS 1 as a stage: score, solve, and write what was found for every budget."""

from __future__ import annotations

import gc
from math import comb
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.errors import UserError
from postnas.models.supernet import Placement
from postnas.progress import Progress
from postnas.recipe import Place
from postnas.search.gates import Gates, Relaxed, SoftNet, gates, keep, kept, minibatches, solve
from postnas.search.objectives import weights
from postnas.search.scores import NOTHING, Scored, Scorer, combine, shared, swaps
from postnas.search.strategies import STRATEGIES, Score, beam_blocks, with_linear
from postnas.search.windows import windows
from postnas.train import parallel
from postnas.train.align import digest

ROWS = 4
"""Sequences of a step of `gates`, for each objective."""
MIXING = ("gates", "beam")
"""The strategies that give each linear layer a block of its own."""
KEPT_EVERY = 5
"""Steps of `gates` between two writes of their state, which is small."""


def place(
    scorer: Scored, attention: Placement, settings: Place, seed: int, folder: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of scores.json and placement.json.

    Strategies see the weighted objective only. The table holds, for every budget, the placement that
    the single swaps suggest with the sum of their scores, which costs nothing once those are known.
    Several ranks search alike, and share what each has to score. folder: where `gates` keeps its state,
    to go on from after a kill; None keeps nothing.
    Raises UserError for a budget above the number of layers, several blocks for a strategy that places one, and as
    `scorer` does.
    """
    layers = len(attention)
    check_blocks(settings)
    if settings.budget > layers:
        raise UserError(
            f"place.budget: {settings.budget} is more than the base's {layers} layers; give at most {layers}"
        )
    objective = weights(settings.objective)
    with Progress("place", evaluations(settings, layers), unit="placements", quiet=parallel.rank() > 0) as bar:
        score = _scored_by(objective, scorer, attention, bar)
        placement = _solved(scorer, score, attention, settings, seed, folder)
        windowed: list[dict[str, Any]] = []
        if settings.windows:  # the second pass has an objective of its own
            score = _scored_by(weights(settings.windows_objective), scorer, attention, bar)
            placement, windowed = windows(score, placement, settings.windows)
        base, values = scorer.several([attention, placement])
    scores: dict[str, Any] = {"objective": settings.objective, "base": base}
    found: dict[str, Any] = {
        "placement": placement,
        "strategy": settings.strategy,
        "budget": settings.budget,
        "block": settings.choices[0],
        "objective": settings.objective,
        "seed": seed,
        "scores": values | {"score": combine(values, base, objective)},
    }
    if settings.blocks:
        found["blocks"] = settings.blocks
    if settings.windows:
        found["windows"] = {"window": settings.window, "objective": settings.windows_objective, "chosen": windowed}
    if settings.strategy in ("swap", "greedy"):
        scores["swap"] = swaps(scorer, attention, settings.choices[0], objective)
        found["table"] = _table(scores["swap"], attention, settings.choices[0])
    return scores, found


def check_blocks(settings: Place) -> None:
    """Raises UserError where several blocks are to be placed by a strategy that knows one."""
    if len(settings.choices) > 1 and settings.strategy not in MIXING:
        raise UserError(
            f"place.blocks: {settings.strategy} places one block, not {', '.join(settings.blocks)}; "
            f"choose place.strategy from {', '.join(MIXING)}, or name place.block alone"
        )


def _scored_by(shares: dict[str, float], scorer: Scored, attention: Placement, bar: Progress) -> Score:
    """What placements lose against the base by the weighted objectives; the base is scored with the first of them."""

    def score(placements: list[Placement]) -> list[float]:
        base, *values = scorer.several([attention, *placements], bar.advance)
        found = [combine(one, base, shares) for one in values]
        bar.advance(-1, score=min(found))  # the base is none of those that the strategy asked for
        return found

    return score


def _solved(
    scorer: Scored, score: Score, attention: Placement, settings: Place, seed: int, folder: Path | None
) -> Placement:
    """The placement that the strategy finds."""
    if settings.strategy == "gates":
        return _gated(scorer, score, attention, settings, seed, folder)
    if settings.strategy == "beam":
        return beam_blocks(score, attention, settings.choices, settings.budget, settings.width)
    return STRATEGIES[settings.strategy](score, attention, settings.choices[0], settings.budget, seed)


def _gated(
    scorer: Scored, score: Score, attention: Placement, settings: Place, seed: int, folder: Path | None
) -> Placement:
    """Logits trained on the sequences that placements are scored on, rounded, and mended by exchanges."""
    blocks, budget, steps, lr = settings.choices, settings.budget, settings.steps, settings.lr
    shares = {name: share for name, share in sorted(weights(settings.objective).items()) if share > 0}
    key = digest(scorer.key, attention, blocks, budget, seed, steps, lr, ROWS, shares)
    state = None if folder is None else kept(folder, key)
    relaxed = _relaxed(scorer, shares, blocks, seed) if isinstance(scorer, Scorer) else _refused
    done, lead = 0 if state is None else state["step"], parallel.rank() == 0

    def after(made: Gates, loss: float) -> None:
        bar.advance(1, loss=loss)
        if folder is not None and lead and (made.step % KEPT_EVERY == 0 or made.step == steps):
            keep(folder, key, made)

    with Progress("gates", steps, unit="steps", done=done, quiet=not lead) as bar:
        made = gates(relaxed, attention, blocks, budget, seed, steps=steps, lr=lr, state=state, after=after)
    del relaxed
    gc.collect()  # graphs of layers refer to themselves, and hold what the layers need on a GPU
    return solve(score, made.probabilities().detach(), attention, blocks, budget)


def _relaxed(scorer: Scorer, shares: dict[str, float], blocks: list[str], seed: int) -> Relaxed:
    """The weighted sum of the objectives' relaxed losses.

    Ranks share the objectives, and each sums all losses and gradients in the objectives' order in float64,
    so the bits do not depend on how many ranks there are.
    """
    nets = []
    for name in shares:
        one = scorer.objectives[name]
        # Rows of text are whole; those of tasks are padded, and only their answers count.
        batches = minibatches(one.tokens, one.scored if one.kind == "nll" else None, ROWS, seed)
        nets.append(SoftNet(scorer.supernet, blocks, batches, one.kind, scorer.compute))

    def relaxed(probabilities: Tensor, step: int) -> Tensor:
        leaf = probabilities.detach().requires_grad_()
        rows = torch.full((len(nets), 1 + leaf.numel()), NOTHING, dtype=torch.float64)  # a loss and its gradient
        for number in range(parallel.rank(), len(nets), parallel.world()):
            loss = nets[number](leaf, step)
            (gradient,) = torch.autograd.grad(loss, leaf)
            rows[number] = torch.cat([loss.detach().view(1), gradient.flatten()])
        total = torch.zeros(1 + leaf.numel(), dtype=torch.float64)
        for share, row in zip(shares.values(), shared(rows, scorer.supernet), strict=True):
            total += share * row
        slopes = total[1:].view_as(leaf).to(leaf.dtype)
        return total[0].to(leaf.dtype) + ((probabilities - leaf.detach()) * slopes).sum()

    return relaxed


def _refused(probabilities: Tensor, step: int) -> Tensor:
    raise UserError("solve: `gates` has to train on the model first; leave --solve out, or change place.strategy")


def evaluations(settings: Place, layers: int) -> int:
    """Placements that a strategy asks the score of, at most; `gates` may go on exchanging for some rounds, as may
    whatever chooses among several blocks."""
    budget, width, more = settings.budget, settings.width, len(settings.choices) - 1
    changes = min(budget, layers - budget)
    grown = 1 if 2 * budget <= layers else 1 + more
    levels = (min(width, comb(layers, level) * grown**level) * (layers - level) * grown for level in range(changes))
    settled = more * (layers - budget + layers * (2 * budget <= layers))
    asked = {
        "swap": layers,
        "greedy": sum(range(budget + 1, layers + 1)),
        "beam": 1 + (2 * budget <= layers) + sum(levels) + settled,
        "gates": 1 + budget * (layers - budget) * (1 + more) + more * (layers - budget),
    }.get(settings.strategy, 0)
    passed = settings.windows and 1 + sum(layers - budget - chosen for chosen in range(settings.windows))
    return asked + passed


def _table(swapped: list[dict[str, Any]], attention: Placement, block: str) -> list[dict[str, Any]]:
    order = sorted(swapped, key=lambda entry: (entry["score"], entry["layer"]))
    rows = []
    for budget in range(len(attention) + 1):
        linear = {entry["layer"] for entry in order[: len(attention) - budget]}
        predicted = sum(entry["score"] for entry in swapped if entry["layer"] in linear)
        rows.append({"budget": budget, "placement": with_linear(attention, block, linear), "predicted": predicted})
    return rows

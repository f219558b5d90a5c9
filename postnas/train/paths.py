"""The paper's supernet: candidates trained together, inside random paths of the whole network.

Alignment shows a candidate the base's own hidden states only. Here each step draws a placement, runs it
beside the base on the same tokens and trains the candidates that are on it, so that they meet what other
candidates leave behind. With the KL loss and the budgets that are searched, the same few steps are a remedy
for scores of merely aligned candidates. The aligned candidates stay as they are; these are copies of them.

The paper (its first stage, in words only) trains "by feature distillation". Which features is not said, so ours
is a choice, see `path_loss`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postnas.blocks.step import Step
from postnas.data import Tokens
from postnas.errors import UserError
from postnas.models.checkpoint import read_tensors
from postnas.models.supernet import MixedLayer, Placement, Supernet
from postnas.ops.chunked_loss import chunked_kl
from postnas.ops.cuda_graph import Differentiable
from postnas.recipe import Paths
from postnas.train import parallel
from postnas.train.align import Keys, digest, write_candidate
from postnas.train.loop import Plan, autocast, fit


def draw_path(attention: Placement, blocks: Sequence[str], budgets: Sequence[int], seed: int, step: int) -> Placement:
    """The path of a step: it follows from seed and step alone, so all ranks draw the same one.

    The number of layers that keep attention is uniform over `budgets`, which layers these are is uniform,
    and each other layer draws its block from `blocks`.
    """
    draw = Random(f"{seed}:{step}")
    kept = set(draw.sample(range(len(attention)), draw.choice(budgets)))
    return [name if layer in kept else draw.choice(blocks) for layer, name in enumerate(attention)]


Student = Callable[[int, str, Tensor, Step], Tensor]
"""student(layer, mixer's name, h, step) -> h after the layer, with gradients."""


def path_loss(
    supernet: Supernet,
    path: Placement,
    tokens: Tensor,
    positions: Tensor | None,
    kind: str,
    student_layer: Student | None = None,
) -> Tensor:
    """What a path loses against the base on tokens [B, T], a scalar with gradients to the candidates on it.

    feature: the relative squared error of each token's hidden state after a layer, as the mean over tokens and
    over the layers that differ from the base. After every such layer rather than after the last one, so that
    each candidate has a target of its own. By token, because the first token's state may be larger than all
    others' together; and then a batch's loss is the mean of its ranks' losses.
    kl: mean forward KL from the base at the head, in nats a token.
    Both walk the layers side by side from the first change on: only the path keeps a graph, and of the base
    no more than one hidden state. `path` differs from the base in one layer or more. student_layer: runs a layer
    of the path; the supernet itself where None.
    """
    changed = [layer for layer, name in enumerate(path) if name != supernet.attention[layer]]
    with torch.no_grad():
        h, step = supernet.embed(tokens, positions)
        teacher = supernet.run(h, step, supernet.attention, stop=changed[0])
    student, errors = teacher, []
    for layer in range(changed[0], supernet.layers if kind == "kl" else changed[-1] + 1):
        with torch.no_grad():
            teacher = supernet.run(teacher, step, supernet.attention, layer, layer + 1)
        if student_layer is None:
            student = supernet.run(student, step, path, layer, layer + 1)
        else:
            student = student_layer(layer, path[layer], student, step)
        if kind == "feature" and layer in changed:
            errors.append(token_error(student, teacher))
    if kind == "feature":
        return torch.stack(errors).mean()
    with torch.no_grad():
        target = supernet.norm(teacher).flatten(0, 1)
    head = supernet.head
    return chunked_kl(supernet.norm(student).flatten(0, 1), head, target, head, supernet.softcap)


class PathLayers:
    """The layers that paths are made of, each with one mixer; on a GPU their passes are CUDA graphs.

    All batches have one shape and no borders, so the first one's step serves them all.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        self.step: Step | None = None
        self.made: dict[tuple[int, str], Differentiable] = {}

    def __call__(self, layer: int, name: str, h: Tensor, step: Step) -> Tensor:
        self.step = self.step or step
        if (layer, name) not in self.made:
            mixer = self.supernet.mixer(layer, name)
            self.made[layer, name] = Differentiable(
                MixedLayer(self.supernet.base.model.layers[layer], [mixer], self.step)
            )
        return self.made[layer, name](h)


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token as a share of its target's squared size, mean over tokens; both [B, T, hidden]."""
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


def path_keys(keys: Keys, settings: Paths, seed: int, compute: torch.dtype, borders: bool = False) -> Keys:
    """What each candidate is made from here: the aligned one's key, all the others', and how they were trained.

    keys: those of the aligned candidates, as `candidate_keys` gives them.
    """
    training = {name: value for name, value in asdict(settings).items() if name != "checkpoint_every"}
    training |= {"seed": seed, "compute": str(compute), "borders": borders, "aligned": digest(keys)}
    return {block: [key | {"paths": training} for key in wanted] for block, wanted in keys.items()}


def train_paths(
    supernet: Supernet,
    settings: Paths,
    tokens: Tokens,
    folder: Path,
    seed: int,
    compute: torch.dtype,
    keys: Keys,
    borders: bool = False,
) -> None:
    """Copies of the candidates learn inside random paths; written to folder/candidates-paths unless they fit already.

    supernet: the frozen base with its aligned candidates, which stay as they are. keys: what these were made
    from; its blocks are those that are trained, each in every layer. Only the candidates on a step's path get a
    gradient; one without is left alone by the optimizer, its moments too. Each candidate is clipped by itself, since
    a path of many makes larger gradients than a path of one. Resumes from folder/checkpoints/paths; the stage is
    called `paths` in metrics.jsonl. Ranks share each batch. Raises UserError for budgets that leave no layer to train.
    """
    made = path_keys(keys, settings, seed, compute, borders)
    if all(_fits(folder, key) for wanted in made.values() for key in wanted):
        return
    layers, device = supernet.layers, supernet.head.device
    for budget in settings.budgets:
        if budget >= layers:
            raise UserError(f"paths.budgets: {budget} leaves none of the {layers} layers to train; give fewer")
    budgets = settings.budgets or range(layers)  # a path of attention alone would teach nothing
    blocks = sorted(keys)
    net = _copied(supernet, blocks)
    groups = [
        {f"{block}.{layer}.{name}": p for name, p in mixer.named_parameters()}
        for block in blocks
        for layer, mixer in net.candidates[block].items()
    ]

    student_layers = PathLayers(net)

    def backward(number: int) -> dict[str, Any]:
        path = draw_path(net.attention, blocks, budgets, seed, number)
        share = parallel.rank(), parallel.world()
        batch = tokens.batch(number, settings.batch, settings.length, seed + 41, borders, *share)
        positions = None if batch.positions is None else batch.positions.to(device)
        with autocast(device, compute):
            student = student_layers if positions is None else None
            loss = path_loss(net, path, batch.tokens.to(device), positions, settings.loss, student)
        loss.backward()
        return {"loss": loss.item(), "path": path}

    per_step = settings.batch * settings.length
    plan = Plan(
        stage="paths",
        steps=-(-settings.tokens // per_step),
        tokens_per_step=per_step,
        lr=settings.lr,
        key=digest(made),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        checkpoint_every=settings.checkpoint_every,
    )
    fit(plan, groups, backward, folder)
    student_layers.made.clear()
    gc.collect()  # graphs of layers refer to themselves, and hold what the layers need on a GPU
    if parallel.rank() == 0:
        for block, wanted in made.items():
            for key in wanted:
                layer = key["layer"]
                write_candidate(path_candidate(folder, block, layer), net.candidates[block][layer], key)
    parallel.barrier()  # nobody reads before all are written


def load_paths(supernet: Supernet, folder: Path, keys: Keys) -> Supernet:
    """The supernet with the candidates of folder/candidates-paths in place of the aligned ones.

    keys: as `path_keys` gives them. Raises UserError for a candidate that is missing, cut off, or made otherwise.
    """
    net = _copied(supernet, keys)
    for block, wanted in keys.items():
        for key in wanted:
            path = path_candidate(folder, block, key["layer"])
            if not _fits(folder, key):
                raise UserError(f"{path}: is not there, or not made as the recipe says; train the paths again")
            net.candidates[block][key["layer"]].load_state_dict(read_tensors(path))
    return net


def path_candidate(folder: Path, block: str, layer: int) -> Path:
    """Where a candidate that was trained in paths is kept."""
    return folder / "candidates-paths" / block / f"{layer:02d}.safetensors"


def _copied(supernet: Supernet, blocks: Iterable[str]) -> Supernet:
    """The same base with copies of these blocks' candidates, so that training leaves the aligned ones alone."""
    candidates = dict(supernet.candidates)
    for block in blocks:
        mixers = candidates[block]
        candidates[block] = {layer: deepcopy(mixer).requires_grad_(True) for layer, mixer in mixers.items()}
    return Supernet(supernet.base, candidates)


def _fits(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the candidate's file is there, whole, and made from just this."""
    path = path_candidate(folder, key["block"], key["layer"])
    try:
        with safe_open(path, framework="pt") as handle:
            stored = json.loads((handle.metadata() or {}).get("key", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError):
        return False
    return stored == json.loads(json.dumps(key))

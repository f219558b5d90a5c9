"""Stage 0: every candidate learns to give its layer's attention output from the attention's input.

One forward of the base serves every layer and block. Nothing is back-propagated across layers, so
the memory of a backward is one mixer's. Candidates are files that say what they were made from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from postnas.blocks import make_block
from postnas.blocks.inherit import inherit, relative_error
from postnas.data import Tokens
from postnas.errors import UserError
from postnas.files import replacing
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.recipe import Align
from postnas.train.loop import Plan, autocast, fit

SAMPLE = (8, 256)
"""Sequences and their length that the start of gates and norms is fitted on."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def candidate_keys(base: HybridForCausalLM, align: Align, data: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What each candidate is made from, {block: [a key a layer]}; two runs with equal keys may share files.

    data: a hash of the training tokens.
    """
    own = fingerprint(base)
    training = {name: getattr(align, name) for name in ("tokens", "length", "batch", "lr")}
    keys = {}
    for block in align.blocks:
        with torch.device("meta"):
            options = make_block(block, base.config.dims(), align.options.get(block)).options
        described = {name: getattr(options, name) for name in options.__dataclass_fields__}
        shared = {"base": own, "block": block, "options": described, "start": align.start, "data": data, "seed": seed}
        keys[block] = [shared | training | {"layer": layer} for layer in range(base.config.num_hidden_layers)]
    return keys


def candidate_path(run: Path, block: str, layer: int) -> Path:
    return run / "candidates" / block / f"{layer:02d}.safetensors"


def new_candidates(
    base: HybridForCausalLM, align: Align, tokens: Tokens, seed: int, device: torch.device, compute: torch.dtype
) -> dict[str, list[nn.Module]]:
    """Candidates in float32 that start from the attention they stand beside, not yet trained."""
    supernet = Supernet(base, {})
    sample = tokens.batch(0, *SAMPLE, seed=seed + 1).tokens.to(device) if len(tokens) >= SAMPLE[1] else None
    candidates: dict[str, list[nn.Module]] = {block: [] for block in align.blocks}
    with torch.no_grad(), autocast(device, compute):
        h, step = supernet.embed(sample if sample is not None else tokens.sequences(1, len(tokens)).to(device))
        walked = supernet.walk(h, step)
        for layer, x, y in walked:
            for block in align.blocks:
                torch.manual_seed(seed * 1_000_003 + layer)
                mixer = make_block(block, base.config.dims(), align.options.get(block)).to(device)
                attention = base.model.layers[layer].self_attn
                with torch.autocast(device.type, enabled=False):
                    inherit(mixer, attention, (x.float(), y.float()), align.start, seed=seed + layer)
                candidates[block].append(mixer)
    return candidates


def align_candidates(
    base: HybridForCausalLM,
    align: Align,
    tokens: Tokens,
    run: Path,
    keys: dict[str, list[dict[str, Any]]],
    seed: int,
    compute: torch.dtype,
    borders: bool = False,
) -> dict[str, list[nn.Module]]:
    """Candidates for every layer and block: read from run/candidates where their keys fit, else trained and written.

    base: the model on its device, frozen. The loss of each candidate is its squared error as a share of
    the output's squared size, so that all layers weigh alike. Raises UserError for a candidate of another base.
    """
    device = next(base.parameters()).device
    if all(
        stored_key_fits(run, block, layer, key) for block, wanted in keys.items() for layer, key in enumerate(wanted)
    ):
        return load_candidates(base, align, run, device)
    candidates = new_candidates(base, align, tokens, seed, device, compute)
    supernet = Supernet(base, candidates)
    groups = [
        {f"{block}.{layer}.{name}": p for name, p in mixer.named_parameters()}
        for block, mixers in candidates.items()
        for layer, mixer in enumerate(mixers)
    ]

    def backward(number: int) -> dict[str, Any]:
        batch = tokens.batch(number, align.batch, align.length, seed, borders)
        losses: dict[str, list[float]] = {block: [] for block in candidates}
        with torch.no_grad(), autocast(device, compute):
            positions = None if batch.positions is None else batch.positions.to(device)
            h, step = supernet.embed(batch.tokens.to(device), positions)
            for layer, x, y in supernet.walk(h, step):
                for block, mixers in candidates.items():
                    with torch.enable_grad():
                        loss = relative_error(mixers[layer](x, step)[0], y)
                    loss.backward()
                    losses[block].append(loss.item())
        everything = [loss for block in losses.values() for loss in block]
        return {"loss": sum(everything) / len(everything), "losses": losses}

    per_step = align.batch * align.length
    plan = Plan("align", -(-align.tokens // per_step), per_step, align.lr, checkpoint_every=align.checkpoint_every)
    fit(plan, groups, backward, run)
    for block, mixers in candidates.items():
        for layer, mixer in enumerate(mixers):
            write_candidate(candidate_path(run, block, layer), mixer, keys[block][layer])
    return candidates


def write_candidate(path: Path, mixer: nn.Module, key: dict[str, Any]) -> None:
    """One mixer's float32 weights, with its key in the file's metadata."""
    weights = {name: value.detach().cpu().contiguous() for name, value in mixer.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"key": json.dumps(key, sort_keys=True)})


def stored_key_fits(run: Path, block: str, layer: int, key: dict[str, Any]) -> bool:
    """Whether the candidate's file is there and was made from just this. Raises UserError for another base's."""
    path = candidate_path(run, block, layer)
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as handle:
            stored = json.loads((handle.metadata() or {}).get("key", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not a whole candidate ({error}); remove it, and it is made again") from error
    if stored.get("base") != key["base"]:
        raise UserError(f"{path}: is a candidate of another base; choose another `out`, or remove {path.parent}")
    return stored == json.loads(json.dumps(key))


def load_candidates(
    base: HybridForCausalLM, align: Align, run: Path, device: torch.device
) -> dict[str, list[nn.Module]]:
    """The candidates in run/candidates, in float32 on `device`."""
    candidates: dict[str, list[nn.Module]] = {}
    for block in align.blocks:
        candidates[block] = []
        for layer in range(base.config.num_hidden_layers):
            mixer = make_block(block, base.config.dims(), align.options.get(block))
            mixer.load_state_dict(load_file(candidate_path(run, block, layer)))
            candidates[block].append(mixer.to(device))
    return candidates

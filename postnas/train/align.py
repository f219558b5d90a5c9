"""Stage 0: every candidate learns to give its layer's attention output from the attention's input.

One forward of the base serves every layer and block. Nothing is back-propagated across layers, so
the memory of a backward is one mixer's. Candidates are files that say what they were made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from postnas.blocks import make_block
from postnas.blocks.inherit import inherit, relative_error
from postnas.data import Tokens
from postnas.errors import UserError
from postnas.files import replacing
from postnas.models.checkpoint import read_tensors
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Supernet
from postnas.ops.cuda_graph import Replayed
from postnas.recipe import Align
from postnas.train import parallel
from postnas.train.loop import Plan, autocast, fit

Keys = dict[str, list[dict[str, Any]]]

SAMPLE = (8, 256)
"""Sequences and their length that the start of gates and norms is fitted on."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def candidate_keys(
    base: HybridForCausalLM, align: Align, data: str, seed: int, compute: torch.dtype, borders: bool = False
) -> Keys:
    """What each candidate is made from, {block: [a key a layer]}; two runs with equal keys may share files.

    data: a hash of the training tokens.
    """
    own = fingerprint(base)
    training = {name: getattr(align, name) for name in ("tokens", "length", "batch", "lr")}
    training |= {"compute": str(compute), "borders": borders}
    keys = {}
    for block in align.blocks:
        with torch.device("meta"):
            options = make_block(block, base.config.dims(), align.options.get(block)).options
        described = {name: getattr(options, name) for name in options.__dataclass_fields__}
        shared = {"base": own, "block": block, "options": described, "start": align.start, "data": data, "seed": seed}
        keys[block] = [shared | training | {"layer": layer} for layer in range(base.config.num_hidden_layers)]
    return keys


def digest(*values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def candidate_path(run: Path, block: str, layer: int) -> Path:
    return run / "candidates" / block / f"{layer:02d}.safetensors"


def new_candidates(
    base: HybridForCausalLM,
    align: Align,
    tokens: Tokens,
    seed: int,
    compute: torch.dtype,
    layers: Sequence[int] | None = None,
) -> dict[str, dict[int, nn.Module]]:
    """Candidates in float32 that start from the attention they stand beside, not yet trained.

    layers: those wanted, all where None. Returns {block: {layer: mixer}}.
    """
    device, supernet = base.lm_head.weight.device, Supernet(base, {})
    wanted = range(supernet.layers) if layers is None else layers
    rows, length = SAMPLE
    sample = tokens.batch(0, rows, min(length, len(tokens)), seed=seed + 1).tokens.to(device)
    candidates: dict[str, dict[int, nn.Module]] = {block: {} for block in align.blocks}
    with torch.no_grad(), autocast(device, compute):
        for layer, x, y in supernet.walk(*supernet.embed(sample)):
            for block in align.blocks if layer in wanted else ():
                torch.manual_seed(seed * 1_000_003 + layer)
                mixer = make_block(block, base.config.dims(), align.options.get(block)).to(device)
                attention = base.model.layers[layer].self_attn
                with torch.autocast(device.type, enabled=False):
                    inherit(mixer, attention, (x.float(), y.float()), align.start, seed=seed + layer)
                candidates[block][layer] = mixer
    return candidates


def align_candidates(
    base: HybridForCausalLM,
    align: Align,
    tokens: Tokens,
    run: Path,
    keys: Keys,
    seed: int,
    compute: torch.dtype,
    borders: bool = False,
) -> None:
    """Candidates for every layer and block in run/candidates: trained and written unless their keys fit already.

    base: the model on its device, frozen. The loss of each candidate is its squared error as a share of
    the output's squared size, so that all layers weigh alike. On several ranks each trains every n-th
    layer. Raises UserError for a candidate of another base.
    """
    if all([stored_key_fits(run, key) for wanted in keys.values() for key in wanted]):
        return
    count = base.config.num_hidden_layers
    if parallel.world() > count:
        raise UserError(f"nproc-per-node: {parallel.world()} ranks for {count} layers; start at most {count}")
    layers = range(parallel.rank(), count, parallel.world())
    candidates = new_candidates(base, align, tokens, seed, compute, layers)
    learn(base, candidates, align, tokens, run, digest(keys), seed, compute, borders, spread=True)
    for block, mixers in candidates.items():
        for layer, mixer in mixers.items():
            write_candidate(candidate_path(run, block, layer), mixer, keys[block][layer])
    parallel.barrier()  # nobody reads before all are written


def learn(
    base: HybridForCausalLM,
    candidates: dict[str, dict[int, nn.Module]],
    align: Align,
    tokens: Tokens,
    run: Path,
    key: str,
    seed: int,
    compute: torch.dtype,
    borders: bool,
    spread: bool,
) -> None:
    """Train candidates {block: {layer: mixer}}, each block in the same layers, in place for align.tokens tokens.

    Resumes from run/checkpoints/align where that has the same `key`. spread: every rank has layers of its own;
    else all have the same, and share each batch where they can.
    """
    device, supernet = base.lm_head.weight.device, Supernet(base, {})
    layers = list(next(iter(candidates.values())))
    groups = [
        {f"{block}.{layer}.{name}": p for name, p in mixer.named_parameters()}
        for block, mixers in candidates.items()
        for layer, mixer in mixers.items()
    ]
    alone = spread or align.batch % parallel.world() != 0
    share = (0, 1) if alone else (parallel.rank(), parallel.world())

    def work(ids: Tensor, positions: Tensor | None = None) -> Tensor:
        losses = torch.zeros(len(candidates), supernet.layers, device=device)
        with torch.no_grad(), autocast(device, compute):
            h, step = supernet.embed(ids, positions)
            for layer, x, y in supernet.walk(h, step):
                for row, mixers in enumerate(candidates.values() if layer in layers else ()):
                    with torch.enable_grad():
                        loss = relative_error(mixers[layer](x, step)[0], y)
                    loss.backward()
                    losses[row, layer] = loss.detach()
        return losses

    replayed = Replayed(work, [p for group in groups for p in group.values()])

    def backward(number: int) -> dict[str, Any]:
        batch = tokens.batch(number, align.batch, align.length, seed, borders, *share)
        ids = batch.tokens.to(device)
        losses = replayed(ids) if batch.positions is None else work(ids, batch.positions.to(device))
        if not spread:
            return {"loss": float(losses[:, layers].mean())}
        named = dict(zip(candidates, parallel.total(losses).tolist(), strict=True))
        return {"loss": float(losses.mean()), "losses": named}

    per_step = align.batch * align.length
    steps = -(-align.tokens // per_step)
    fit(
        Plan("align", steps, per_step, align.lr, key, checkpoint_every=align.checkpoint_every, spread=spread),
        groups,
        backward,
        run,
    )


def write_candidate(path: Path, mixer: nn.Module, key: dict[str, Any]) -> None:
    """One mixer's float32 weights, with its key in the file's metadata."""
    weights = {name: value.detach().cpu().contiguous() for name, value in mixer.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"key": json.dumps(key, sort_keys=True)})


def stored_key_fits(run: Path, key: dict[str, Any]) -> bool:
    """Whether the candidate's file is there and was made from just this. Raises UserError for another base's."""
    path = candidate_path(run, key["block"], key["layer"])
    return path.exists() and _stored_key(path, key["base"]) == json.loads(json.dumps(key))


def _stored_key(path: Path, base: str) -> dict[str, Any]:
    """The key in a candidate's file. Raises UserError for a cut-off file, or one of another base than `base`."""
    try:
        with safe_open(path, framework="pt") as handle:
            stored = json.loads((handle.metadata() or {}).get("key", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not a whole candidate ({error}); remove it and align again") from error
    if stored.get("base") != base:
        raise UserError(f"{path}: is a candidate of another base; choose another `out`, or remove {path.parent}")
    return stored


def load_candidates(base: HybridForCausalLM, align: Align, run: Path, keys: Keys) -> dict[str, dict[int, nn.Module]]:
    """The candidates in run/candidates, in float32 on the base's device.

    Raises UserError for one that is missing, cut off, aligned to another base, or made otherwise than its key says.
    """
    device = base.lm_head.weight.device
    candidates: dict[str, dict[int, nn.Module]] = {block: {} for block in keys}
    for block, wanted in keys.items():
        for layer, key in enumerate(wanted):
            mixer = make_block(block, base.config.dims(), align.options.get(block))
            path = candidate_path(run, block, layer)
            if not path.exists():
                raise UserError(f"{path}: is not there; align again")
            if not stored_key_fits(run, key):
                raise UserError(f"{path}: was made by another recipe; align again")
            mixer.load_state_dict(read_tensors(path))
            candidates[block][layer] = mixer.to(device)
    return candidates

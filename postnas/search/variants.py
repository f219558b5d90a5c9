"""Variants of one placement's linear layers, each trained and measured alike; what is done is kept in a file.

What they are measured on belongs to the search: the half of the held-out text that placements are scored on, and of
each task a third of its rows, by a hash. Nothing of it is evaluated later.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postnas.blocks import linear_blocks, make_block
from postnas.data import Tokens
from postnas.errors import Diverged, UserError
from postnas.evaluate import suite
from postnas.evaluate.measure import Outputs
from postnas.evaluate.task import load_task
from postnas.evaluate.verdict import evaluate
from postnas.files import append_jsonl, read_jsonl, write_jsonl
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.recipe import Align, Evaluate, Train
from postnas.search import objectives
from postnas.search.scores import BATCH
from postnas.search.speed import decode_speed, device_name
from postnas.train import parallel
from postnas.train.align import digest, learn, new_candidates
from postnas.train.distill import train_mixers
from postnas.train.loop import autocast
from postnas.trials import Trials

Row = dict[str, Any]
SCORED = ("kl", "needle")
"""Objectives of the search that every variant is measured by."""
LEAST = 2048
"""Tokens that these have at least; as many as perplexity has where that has more."""
WARM_UP = 2
"""Steps that do not count for the speed of training: kernels are compiled in them."""


@dataclass(frozen=True)
class Variant:
    """What stands in all linear layers."""

    name: str
    block: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """What all variants of a comparison share."""

    base: HybridForCausalLM
    """On its device, frozen."""
    placement: Placement
    """Its linear layers take the variants."""
    windows: dict[int, Any]
    """Candidates of its `swa` layers, where it has any that the base has not; never changed."""
    tokenizer: Any
    tokens: Tokens
    """To train on."""
    heldout: Tokens
    """The search's half of what is held out."""
    align: Align
    train: Train
    """Both for everything but blocks, tokens and the learning rate of the distillation."""
    evaluate: Evaluate
    seed: int
    compute: torch.dtype
    borders: bool
    folder: Path
    """The run directory."""
    key: str
    """Says what base and text are, and which rows are taken."""
    evaluated: bool = False
    """Measure on the rows of tasks that evaluation keeps, not on the search's: to report, not to choose by."""

    @property
    def linear(self) -> list[int]:
        return [layer for layer, name in enumerate(self.placement) if name in linear_blocks()]

    @property
    def dtype(self) -> torch.dtype:
        """The type that hybrids are measured in, the base's."""
        return self.base.lm_head.weight.dtype

    def placed(self, block: str) -> Placement:
        """The placement with `block` in its linear layers."""
        return [block if name in linear_blocks() else name for name in self.placement]

    def supernet(self, block: str, mixers: dict[int, Any]) -> Supernet:
        return Supernet(self.base, {block: mixers} | ({"swa": self.windows} if self.windows else {}))

    def mixer(self, variant: Variant) -> Any:
        """A new mixer. Raises UserError for options that cannot be."""
        return make_block(variant.block, self.base.config.dims(), variant.options)

    def meta(self, variant: Variant) -> Any:
        """A mixer without storage, for its sizes."""
        with torch.device("meta"):
            return self.mixer(variant)


class Kept:
    """Records of a JSON-lines file by their keys. Rank 0 makes and writes them, all ranks know them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if parallel.rank() == 0 and path.exists():
            write_jsonl(path, read_jsonl(path))  # drops a line that a killed run left unfinished
        parallel.barrier()
        self.known = self._read()

    def get(self, key: str, make: Callable[[], Row]) -> Row:
        """The record of this key, made where the file does not hold it."""
        if key not in self.known:
            if parallel.rank() == 0:
                append_jsonl(self.path, {"key": key} | make())
            parallel.barrier()
            self.known = self._read()
        return self.known[key]

    def _read(self) -> dict[str, Row]:
        records = read_jsonl(self.path)
        if not all(isinstance(record, dict) and "key" in record for record in records):
            raise UserError(f"{self.path}: holds a line that is no trial; remove the line, or the file")
        return {record["key"]: record for record in records}


class Comparison:
    """Speeds and trainings of variants, kept in trials.jsonl; a training under way lies in checkpoints/trials/KEY."""

    def __init__(self, stage: str, settings: Trials, terms: Terms) -> None:
        """stage: for messages. Raises UserError for a placement without linear layers."""
        if not terms.linear:
            raise UserError(f"{stage}: the placement has no linear layer to compare variants in; lower place.budget")
        self.stage, self.settings, self.terms = stage, settings, terms
        self.device = terms.base.lm_head.weight.device
        self.kept = Kept(terms.folder / "trials.jsonl")

    def speed(self, variant: Variant) -> Row:
        """What `decode_speed` gives, and params of the hybrid; of random weights, which are as fast as any."""
        terms, settings = self.terms, self.settings

        def measured() -> Row:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(terms.seed)
                net = terms.supernet(variant.block, {layer: terms.mixer(variant) for layer in terms.linear})
            model = net.build(terms.placed(variant.block), terms.dtype)
            try:
                found = decode_speed(model, settings.context, settings.batch)
            except UserError as error:
                raise UserError(f"{self.stage}.{error}") from error
            return found | {"params": sum(p.numel() for p in model.parameters())}

        return self.kept.get(self._key(variant, "speed", settings.context, settings.batch), measured)

    def trained(self, variant: Variant) -> Row:
        """lr; rates, {lr, kl} of each that was tried; tokens that it learnt from in all; train_tokens_per_s; and
        outputs, {measure: one record a row}. Raises UserError where no learning rate trains it."""
        settings, terms = self.settings, self.terms
        asked = {name: getattr(settings, name) for name in ("tokens", "align_tokens", "lrs", "lr_tokens", "limit")}
        training = [
            asdict(terms.align) | {"blocks": [], "options": {}, "tokens": 0},
            asdict(terms.train) | {"tokens": 0},
        ]
        training = [one | {"checkpoint_every": 0} for one in training]
        key = self._key(variant, "trained", asked, training, asdict(replace(terms.evaluate, limit=None)))
        if key in self.kept.known:
            return self.kept.known[key]
        folder = terms.folder / "checkpoints" / "trials" / key
        net = self._aligned(variant, folder, key)
        rates = self._rates(variant, net, folder, key)
        lr = _best(rates) if rates else settings.lrs[0]
        if lr is None:
            raise UserError(f"{self.stage}.lrs: none of {settings.lrs} trains {variant.name}; give lower ones")
        try:
            net = self._distilled(variant, net, lr, settings.tokens, folder / "whole", key)
        except Diverged as error:
            raise UserError(f"{self.stage}.lrs: {lr} fails {variant.name} after all; give a lower one") from error
        made = {"lr": lr, "rates": rates}
        made["tokens"] = settings.align_tokens + settings.tokens + settings.lr_tokens * len(rates)

        def measured() -> Row:
            return made | {
                "train_tokens_per_s": training_speed(folder / "whole"),
                "outputs": self._outputs(variant, net),
            }

        record = self.kept.get(key, measured)
        if parallel.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return record

    def _key(self, variant: Variant, *more: Any) -> str:
        """Of all that a record is made from. The device is a part of it: speeds are compared."""
        terms, options = self.terms, self.terms.meta(variant).options
        described = {name: getattr(options, name) for name in options.__dataclass_fields__}
        windows = [mixer.window for mixer in terms.windows.values()]
        device, compute = device_name(self.device), str(terms.compute)
        setting = (terms.seed, terms.borders, windows, device, compute)
        return digest(terms.key, terms.placed(variant.block), described, *setting, *more)

    def _aligned(self, variant: Variant, folder: Path, key: str) -> Supernet:
        """The base with the variant in the linear layers, inherited and aligned. Ranks share batches where they can."""
        terms = self.terms
        align = replace(terms.align, blocks=[variant.block], options={variant.block: variant.options})
        align = replace(align, tokens=self.settings.align_tokens)
        mixers = new_candidates(terms.base, align, terms.tokens, terms.seed, terms.compute, terms.linear)[variant.block]
        made = {variant.block: mixers}
        how = terms.seed, terms.compute, terms.borders
        learn(terms.base, made, align, terms.tokens, folder, key, *how, spread=False)
        return terms.supernet(variant.block, mixers)

    def _rates(self, variant: Variant, net: Supernet, folder: Path, key: str) -> list[Row]:
        """{lr, kl} of each learning rate on its share of the tokens, kl None where it diverges; empty for one rate."""
        settings, found = self.settings, []
        for number, lr in enumerate(settings.lrs if len(settings.lrs) > 1 else ()):
            name, own = digest(key, "rate", lr), folder / f"rate-{number}"
            learnt = None if name in self.kept.known else self._tried(variant, net, lr, own, key)

            def measured(lr: float = lr, learnt: Supernet | None = learnt) -> Row:
                losses = [] if learnt is None else self._losses(variant, learnt, "kl")
                kl = statistics.fmean(row["nll"] for row in losses) if losses else math.nan
                return {"lr": lr, "kl": kl if math.isfinite(kl) else None}

            found.append({key: value for key, value in self.kept.get(name, measured).items() if key != "key"})
        return found

    def _tried(self, variant: Variant, net: Supernet, lr: float, folder: Path, key: str) -> Supernet | None:
        """The variant after a rate's share of the tokens; None where the rate is too high to train it at all."""
        try:
            return self._distilled(variant, net, lr, self.settings.lr_tokens, folder, key)
        except Diverged:
            return None

    def _distilled(self, variant: Variant, net: Supernet, lr: float, tokens: int, folder: Path, key: str) -> Supernet:
        """A copy of the aligned variant after `tokens` tokens of KL from the base."""
        terms, own = self.terms, Supernet(self.terms.base, deepcopy(net.candidates))
        train = replace(terms.train, tokens=tokens, lr=lr)
        placement, key = terms.placed(variant.block), digest(key, lr, tokens)
        train_mixers(own, placement, train, terms.tokens, folder, terms.seed, terms.compute, key, terms.borders)
        return own

    @cached_property
    def _objectives(self) -> dict[str, objectives.Objective]:
        terms = self.terms
        tokens = max(LEAST, terms.evaluate.perplexity_tokens)
        return objectives.make(SCORED, terms.heldout, terms.tokenizer, tokens, terms.seed)

    @torch.no_grad()
    def _losses(self, variant: Variant, net: Supernet, name: str) -> Outputs:
        """{id, nll} of each row of an objective, in nats a token."""
        objective, placement = self._objectives[name].to(self.device), self.terms.placed(variant.block)

        def run(part: objectives.Objective) -> tuple[Tensor, Tensor | None]:
            h, step = net.embed(part.tokens)
            hidden = net.norm(net.run(h, step, placement))
            return hidden, net.norm(net.run(h, step, net.attention)) if part.kind == "kl" else None

        with autocast(self.device, self.terms.compute):
            losses = objectives.measure_all(objective, run, net.head, net.softcap, BATCH).tolist()
        return [{"id": row, "nll": loss} for row, loss in zip(objective.ids, losses, strict=True)]

    def _outputs(self, variant: Variant, net: Supernet) -> dict[str, Outputs]:
        """What the hybrid gives to every row of every measure."""
        terms, asked = self.terms, self.terms.evaluate
        found = {name: self._losses(variant, net, name) for name in SCORED}
        result = evaluate(
            {"hybrid": net.build(terms.placed(variant.block), terms.dtype)},
            terms.tokenizer,
            terms.heldout.stream(),
            tasks=asked.tasks,
            limit=self.settings.limit,
            perplexity_tokens=asked.perplexity_tokens,
            length=asked.length,
            copy_passages=asked.copy_passages,
            copy_tokens=asked.copy_tokens,
            copy_filler=asked.copy_filler,
            seed=terms.seed + objectives.RECALL_SEED,  # so that no prompt that is made is one of the evaluation's
            allow_code=asked.allow_code,
            excluded=lambda task: _rows_of(task)[0 if terms.evaluated else 1],
        )
        return found | result["outputs"]["hybrid"]


def _best(rates: list[Row]) -> float | None:
    """The rate of the lowest KL, the lower of equal ones; None where all diverge."""
    return min(((rate["kl"], rate["lr"]) for rate in rates if rate["kl"] is not None), default=(0.0, None))[1]


def training_speed(folder: Path) -> float:
    """Tokens/s of a distillation by its own log, the median over steps."""
    rates = [record["tokens_per_s"] for record in read_jsonl(folder / "metrics.jsonl") if record["stage"] == "train"]
    return statistics.median(rates[WARM_UP:] or rates)


def searched_rows(task: str) -> frozenset[str]:
    """Ids of the task's rows that variants are measured on; a run that compares variants does not evaluate on them."""
    return _rows_of(task)[0]


@cache
def _rows_of(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Ids of the rows that the search has, and of those that evaluation keeps; both empty where rows are made."""
    task = replace(load_task(name), shots=None)
    if task.kind == "long":
        return frozenset(), frozenset()
    ids = [row.id for row in suite.rows(task, None, None, 0)]
    ours = frozenset(row for row in ids if objectives.apart(name, row))
    if len(ours) in (0, len(ids)):
        raise UserError(f"evaluate.tasks: {name} has {len(ids)} rows, too few to compare variants by; leave it out")
    return ours, frozenset(ids) - ours

"""One run directory: what it holds, and what its stages share, loaded when first asked for."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from postnas.blocks import linear_blocks, make_block
from postnas.data import Tokens, load_tokenizer, prepare
from postnas.errors import UserError
from postnas.files import read_json, write_json
from postnas.models.checkpoint import base_folder, load_base
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement, Supernet
from postnas.recipe import Recipe
from postnas.search import objectives
from postnas.search.placement import place
from postnas.search.scores import Scored, Scorer
from postnas.search.variants import Terms
from postnas.search.windows import window_candidates
from postnas.train import parallel
from postnas.train.align import Keys, candidate_keys, digest, load_candidates
from postnas.train.paths import load_paths, path_keys
from postnas.trials import TRIALS

MADE = "made.json"
GATES = "checkpoints/gates"
CHOSEN = "chosen"
"""Files and folders of a run directory that more than one function names."""


@dataclass
class Run:
    """One run directory and what its stages share, loaded when first asked for."""

    recipe: Recipe
    solve: bool = False
    """Placements are found from the scores that are there, without a model."""

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)

    @cached_property
    def device(self) -> torch.device:
        if self.recipe.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: 'cuda' is not there on this machine; choose cpu or auto")
        if self.recipe.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @cached_property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.recipe.compute)

    @cached_property
    def base_path(self) -> Path:
        return base_folder(self.recipe.base.model, self.recipe.base.sha256)

    @cached_property
    def base(self) -> HybridForCausalLM:
        base: Any = load_base(str(self.base_path), dtype=getattr(torch, self.recipe.base.dtype))
        return base.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base_path)

    @cached_property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Training and held-out tokens. The first half of those held out is measured on, the second searched on."""
        return prepare(self.recipe.data, self.tokenizer, self.folder / "data")

    @cached_property
    def keys(self) -> Keys:
        """What each candidate is made from."""
        recipe, data = self.recipe, hashlib.sha256(self.tokens[0].ids.tobytes()).hexdigest()
        if recipe.data.repeat:
            data = digest(data, recipe.data.repeat)
        return candidate_keys(self.base, recipe.align, data, recipe.seed, self.compute, recipe.data.borders)

    @cached_property
    def supernet(self) -> Supernet:
        """The base with its candidates: the aligned ones, or where there are such, those that learnt inside paths."""
        net = load_paths(self.aligned(), self.folder, self.made) if self.recipe.paths.tokens else self.aligned()
        if self.recipe.place.windows:
            net.candidates["swa"] = window_candidates(self.base, self.recipe.place.window)
        return net

    def aligned(self) -> Supernet:
        """The base with its aligned candidates."""
        return Supernet(self.base, load_candidates(self.base, self.recipe.align, self.folder, self.keys))

    @cached_property
    def made(self) -> Keys:
        """What the candidates that are placed are made from."""
        recipe = self.recipe
        if not recipe.paths.tokens:
            return self.keys
        return path_keys(self.keys, recipe.paths, recipe.seed, self.compute, recipe.data.borders)

    @cached_property
    def described(self) -> dict[str, Any]:
        """What made.json holds: by this scores are told apart, also where no model is loaded."""
        return {"attention": self.base.config.placement, "candidates": self.made}

    def describe(self) -> None:
        """Keep what the candidates are made from."""
        path = self.folder / MADE
        if parallel.rank() == 0 and not (path.exists() and read_json(path) == self.described):
            write_json(path, self.described)

    @cached_property
    def placed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `place` finds: the contents of scores.json and placement.json."""
        recipe, settings, path = self.recipe, self.recipe.place, self.folder / MADE
        if self.solve and not path.exists():
            raise UserError(f"{path}: is not there; leave --solve out once")
        made = read_json(path) if self.solve else self.described
        if not isinstance(made, dict) or not made.keys() >= {"attention", "candidates"}:
            raise UserError(f"{path}: does not say what the candidates are made from; leave --solve out once")
        key = digest(made["candidates"], settings.tokens, recipe.seed)
        window = settings.window if settings.windows else None
        scores = self.folder / "scored.jsonl"
        if self.solve:
            scorer = Scored(objectives.members(settings.objectives), scores, key, window)
        else:
            scorer = Scorer(self.supernet, self.scored_on, scores, self.compute, key, window)
        return place(scorer, made["attention"], settings, recipe.seed, self.folder / GATES)

    @cached_property
    def scored_on(self) -> dict[str, objectives.Objective]:
        """The rows of each objective; those of text are from the held-out half that nothing else is measured on."""
        place = self.recipe.place
        return objectives.make(place.objectives, self.tokens[1].half(1), self.tokenizer, place.tokens, self.recipe.seed)

    def choice(self, before: str = "train") -> tuple[Placement, dict[str, dict[str, Any]]]:
        """The placement and its blocks' options, as `place` and the comparisons before a stage have left them."""
        placement: Placement = read_json(self.folder / "placement.json")["placement"]
        options = dict(self.recipe.align.options)
        for stage, name in TRIALS.items():
            if stage == before:
                break
            if self.recipe.has(stage):
                found = read_json(self.folder / name)
                placement = found["placement"]
                options[found["chosen"]["block"]] = found["chosen"]["options"]
        return placement, options

    def linear_block(self, stage: str) -> tuple[str, dict[str, Any]]:
        """The one block of the linear layers before a stage, and its options. Raises UserError where there are more."""
        placement, options = self.choice(stage)
        found = list(dict.fromkeys(name for name in placement if name in linear_blocks()))
        if len(found) != 1:
            mend = "name select.blocks, which chooses one" if found else "lower place.budget"
            raise UserError(f"{stage}: the placement's linear layers hold {', '.join(found) or 'no block'}; {mend}")
        return found[0], options.get(found[0], {})

    def final(self) -> Run:
        """The run whose candidates are distilled: this one, or one in the folder `chosen`, where a block or options
        were chosen that this one has no candidates of."""
        placement, options = self.choice()
        names = list(dict.fromkeys(name for name in placement if name in linear_blocks()))
        if all(self._aligns(name, options.get(name, {})) for name in names):
            return self
        align = replace(self.recipe.align, blocks=names, options={n: options[n] for n in names if n in options})
        place = replace(self.recipe.place, block=names[0], blocks=[])
        run = Run(replace(self.recipe, align=align, place=place, out=str(self.folder / CHOSEN)))
        vars(run).update(base=self.base, tokenizer=self.tokenizer, tokens=self.tokens)  # loaded once
        return run

    def _aligns(self, block: str, options: dict[str, Any]) -> bool:
        """Whether candidates of this block with these options are what `align` makes."""
        align, dims = self.recipe.align, self.base.config.dims()
        with torch.device("meta"):
            made = [make_block(block, dims, given).options for given in (options, align.options.get(block))]
        return block in align.blocks and made[0] == made[1]

    def terms(self, stage: str) -> Terms:
        """What the variants of a stage share."""
        recipe, heldout = self.recipe, self.tokens[1].half(1)
        made = next(iter(self.keys.values()))[0]
        return Terms(
            base=self.base,
            placement=self.choice(stage)[0],
            windows=window_candidates(self.base, recipe.place.window) if recipe.place.windows else {},
            tokenizer=self.tokenizer,
            tokens=self.tokens[0],
            heldout=heldout,
            align=recipe.align,
            train=recipe.train,
            evaluate=recipe.evaluate,
            seed=recipe.seed,
            compute=self.compute,
            borders=recipe.data.borders,
            folder=self.folder,
            key=digest(made["base"], made["data"], hashlib.sha256(heldout.ids.tobytes()).hexdigest()),
        )

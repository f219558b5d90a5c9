"""The sections of a recipe that compare variants of the linear layers, and the checks that all its sections share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from postnas.errors import UserError

TRIALS = {"select": "select.json", "design": "design.json", "size": "sizes.json"}
"""The stages that compare variants of the linear layers, in their order, and their files in the run directory. Each is
left out where its section names none."""


def need(condition: bool, name: str, value: Any, mend: str) -> None:
    if not condition:
        raise UserError(f"{name}: {value!r} is not possible; {mend}")


def positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        need(value > 0, f"{type(section).__name__.lower()}.{name}", value, "give a number above 0")


@dataclass(frozen=True)
class Trials:
    """Variants of the placement's linear layers on equal terms: each is aligned, distilled and measured alike."""

    tokens: int = 100_000
    """Tokens of the distillation that each variant goes through, mixers only."""
    align_tokens: int = 100_000
    """Tokens that its layers are aligned on before."""
    lrs: list[float] = field(default_factory=lambda: [3.5e-4, 7e-4, 1.4e-3])
    """Learning rates that each variant tries; the best by KL on the search's text goes through all tokens."""
    lr_tokens: int = 20_000
    """Tokens that a rate is tried on."""
    context: int = 4096
    """Tokens in the caches when decoding is timed."""
    batch: int = 1
    """Sequences that are decoded together."""
    limit: int | None = 100
    """Rows of each of evaluate.tasks, none of which is evaluated later; all that are kept for this where null."""
    weights: dict[str, float] = field(default_factory=lambda: {"kl": 1.0, "tasks": 1.0, "train": 0.1, "decode": 0.1})
    """What a gain on the first variant is worth: nats of `kl`, `needle` or log `perplexity`, shares of `copy`, a task
    or `tasks` (their mean), and the logarithms of `train` and `decode` (speeds), `params` and `cache`."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        positive(self, "tokens", "align_tokens", "lr_tokens", "context", "batch")
        need(len(self.lrs) > 0, f"{name}.lrs", self.lrs, "give one learning rate or more")
        for rate in self.lrs:
            need(0 < rate < float("inf"), f"{name}.lrs", rate, "give a number above 0")
        need(self.limit is None or self.limit > 0, f"{name}.limit", self.limit, "give a number above 0, or null")
        for measure, weight in self.weights.items():
            need(0 <= weight < float("inf"), f"{name}.weights.{measure}", weight, "give a weight of 0 or more")
        need(sum(self.weights.values()) > 0, f"{name}.weights", self.weights, "give one measure a weight above 0")


@dataclass(frozen=True)
class Select(Trials):
    """PostNAS 2: which block; off while no block is named."""

    blocks: list[str] = field(default_factory=list)
    """Linear blocks that are compared."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a block, as in align.options, which stand where a block is not named here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need(len(set(self.blocks)) == len(self.blocks), "select.blocks", self.blocks, "name each block once")
        for block in self.options if self.blocks else ():
            need(block in self.blocks, "select.options", block, "add it to select.blocks")


@dataclass(frozen=True)
class Design(Trials):
    """PostNAS 3: which options of the block; off while no variant is named."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options that differ from the block's own, as {name: {option: value}}; the block as it is stands before them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            "base" not in self.variants, "design.variants", "base", "give it another name, the block as it is has this"
        )


@dataclass(frozen=True)
class Size(Trials):
    """PostNAS 4: which sizes at one size of the cache; off while neither heads nor key dims are named."""

    heads: list[int] = field(default_factory=list)
    """Numbers of heads; the block's own where empty."""
    key_dims: list[int] = field(default_factory=list)
    """Key dims; the block's own where empty. The value dim follows from the cache."""
    cache_bytes: int | None = None
    """Bytes of one linear layer's state, one sequence; what the block has where null."""
    tolerance: float = 0.02
    """Share of these bytes by which a size may miss them."""
    weights: dict[str, float] = field(default_factory=lambda: {"kl": 1.0, "tasks": 1.0, "decode": 0.1})
    """As everywhere; what is neither a speed nor a size is the accuracy, which is set against the speed of decoding."""
    trained: int | None = None
    """Sizes that are trained, those that decode fastest; all where null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "key_dims"):
            for value in getattr(self, name):
                need(value > 0, f"size.{name}", value, "give numbers above 0")
        for name in ("cache_bytes", "trained"):
            value = getattr(self, name)
            need(value is None or value > 0, f"size.{name}", value, "give a number above 0, or null")
        need(0 < self.tolerance < 1, "size.tolerance", self.tolerance, "give a share between 0 and 1")

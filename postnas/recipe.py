"""The recipe: one complete, typed value that says what a run does. Read from YAML, saved resolved.

Every field has its meaning in the line under it; checks that need one field only stand in
`__post_init__`, so a recipe that exists is sound by itself. Names of blocks, strategies and tasks are checked
against their own tables when a run begins (check.py), so that those stand in one place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from postnas.trials import Design, Select, Size
from postnas.trials import need as _need
from postnas.trials import positive as _positive

STAGES = ("align", "place", "select", "design", "size", "train", "evaluate", "bench", "report")
DTYPES = ("float32", "bfloat16")
OBJECTIVES = (
    "kl",
    "copy",
    "needle",
    "key_value",
    "phone_book",
    "squad",
    "arc",
    "mmlu",
    "gsm8k",
    "retrieval",
    "knowledge",
    "math",
)
STARTS = ("random", "plus_minus")
PATH_LOSSES = ("feature", "kl")


@dataclass(frozen=True)
class Base:
    """The pretrained full-attention model."""

    model: str = ""
    """A hub id, a folder of safetensors, a .gguf file, or `package:NAME==VERSION/PATH`."""
    sha256: str | None = None
    """SHA-256 of the file (of the GGUF, of the package's member); checked when given."""
    dtype: str = "bfloat16"
    """Type of the frozen weights: bfloat16 or float32."""
    licence: str = "see the base model"
    """Licence of the base, for the model card."""

    def __post_init__(self) -> None:
        _need(
            bool(self.model), "base.model", self.model, "name a hub id, a folder, a .gguf or package:NAME==VERSION/PATH"
        )
        _need(self.dtype in DTYPES, "base.dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Text:
    """One source of text."""

    source: str
    """A path or glob, `hf:NAME`, or `package:NAME==VERSION/PATH`."""
    sha256: str | None = None
    """SHA-256 of the file; checked when given."""
    field: str = "text"
    """The column or key that holds the text, where the format has any."""

    def __post_init__(self) -> None:
        _need(bool(self.source), "data.text.source", self.source, "name a file, hf:NAME or package:NAME==VERSION/PATH")


@dataclass(frozen=True)
class Data:
    """What is trained on. One pass of every source is tokenised once, into one file."""

    text: list[Text] = field(default_factory=list)
    """The sources, read one after the other."""
    tokens: int = 2_000_000
    """Tokens of training text that are kept; a stage that needs more passes over them again."""
    heldout: float = 0.05
    """Share of the documents held out, chosen by a hash of the document before anything else."""
    heldout_tokens: int = 65_536
    """Tokens of held-out text that are kept."""
    borders: bool = False
    """Whether attention and states stop at a document's border in training."""
    repeat: float = 0.0
    """Share of training sequences whose end repeats their beginning, so that there is something to find again."""

    def __post_init__(self) -> None:
        _need(0 <= self.repeat <= 1, "data.repeat", self.repeat, "give a share from 0 to 1")
        _need(
            not (self.repeat and self.borders), "data.repeat", self.repeat, "with borders it would be cut off; give 0"
        )
        _need(len(self.text) > 0, "data.text", [], "name at least one source of text")
        _need(0 < self.heldout < 1, "data.heldout", self.heldout, "give a share between 0 and 1")
        _positive(self, "tokens", "heldout_tokens")


@dataclass(frozen=True)
class Align:
    """Stage 0: candidates are trained to give the attention's output from its input."""

    blocks: list[str] = field(default_factory=lambda: ["jet"])
    """Linear blocks that every layer gets a candidate of."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of a block that differ from its own, as {block: {option: value}}."""
    start: str = "random"
    """How value channels beyond the attention's start: `random` (small) or `plus_minus`."""
    tokens: int = 100_000
    """Tokens each candidate sees."""
    length: int = 256
    """Tokens a sequence."""
    batch: int = 4
    """Sequences a step."""
    lr: float = 2e-3
    """Peak learning rate (AdamW, cosine to a tenth, 5% warm-up)."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _need(len(self.blocks) > 0, "align.blocks", [], "name at least one linear block")
        _need(self.start in STARTS, "align.start", self.start, f"choose one of {', '.join(STARTS)}")
        for block in self.options:
            _need(block in self.blocks, "align.options", block, "add it to align.blocks")
        _positive(self, "tokens", "length", "batch", "lr", "checkpoint_every")


@dataclass(frozen=True)
class Place:
    """PostNAS 1: which layers keep full attention."""

    strategy: str = "swap"
    """`swap`, `greedy`, `beam`, `gates`, `uniform` or `random`."""
    budget: int = 15
    """Layers that keep the base's attention, full or windowed."""
    block: str = "jet"
    """The linear block of all other layers."""
    blocks: list[str] = field(default_factory=list)
    """Blocks of which each other layer takes its own, by `gates` or `beam`; `block` alone where empty."""
    objective: dict[str, float] = field(default_factory=lambda: {"kl": 1.0, "copy": 1.0})
    """Weights of the objectives, in nats a token: `kl` (to the base), `copy` (a repeated passage), `needle`,
    `key_value`, `phone_book`, `squad`, `arc`, `mmlu`, `gsm8k` (the right answer), or the groups `retrieval`,
    `knowledge`, `math`."""
    tokens: int = 2048
    """Tokens that each placement is scored on, for each objective."""
    width: int = 8
    """Placements that `beam` keeps at each level."""
    steps: int = 100
    """Steps that `gates` trains its logits for."""
    lr: float = 0.1
    """Learning rate of `gates`."""
    windows: int = 0
    """The second pass: linear layers that become sliding-window attention; 0 leaves it out."""
    window: int = 256
    """Tokens that such a layer sees, itself included."""
    windows_objective: dict[str, float] = field(default_factory=lambda: {"kl": 1.0})
    """Weights of the second pass's objectives."""

    def __post_init__(self) -> None:
        _need(self.budget >= 0, "place.budget", self.budget, "give 0 or more layers")
        for field_name in ("objective", "windows_objective"):
            weights = getattr(self, field_name)
            for name, weight in weights.items():
                _need(name in OBJECTIVES, f"place.{field_name}", name, f"choose from {', '.join(OBJECTIVES)}")
                _need(0 <= weight < float("inf"), f"place.{field_name}.{name}", weight, "give a weight of 0 or more")
            _need(sum(weights.values()) > 0, f"place.{field_name}", weights, "give one objective a weight above 0")
        _need(self.windows >= 0, "place.windows", self.windows, "give 0 or more layers")
        _need(len(set(self.blocks)) == len(self.blocks), "place.blocks", self.blocks, "name each block once")
        _need(self.window >= 2, "place.window", self.window, "give 2 or more tokens")
        _positive(self, "tokens", "width", "steps", "lr")

    @property
    def choices(self) -> list[str]:
        """The blocks that linear layers may take."""
        return self.blocks or [self.block]

    @property
    def objectives(self) -> list[str]:
        """All that placements are scored on, by either pass."""
        weights = [*self.objective.items(), *(self.windows_objective.items() if self.windows else ())]
        return list(dict.fromkeys(name for name, weight in weights if weight > 0))


@dataclass(frozen=True)
class Train:
    """Stage 1 of the distillation: mixers only, forward KL from the base."""

    tokens: int = 100_000
    """Tokens; 0 leaves the stage out."""
    length: int = 256
    """Tokens a sequence."""
    batch: int = 4
    """Sequences a step."""
    lr: float = 7e-4
    """Peak learning rate (AdamW, cosine to a tenth, 5% warm-up)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        _need(self.tokens >= 0, f"{name}.tokens", self.tokens, "give 0 or more tokens")
        _need(self.weight_decay >= 0, f"{name}.weight_decay", self.weight_decay, "give 0 or more")
        _positive(self, "length", "batch", "lr", "clip", "checkpoint_every")


@dataclass(frozen=True)
class Paths(Train):
    """The paper's supernet: candidates learn inside random paths of the whole network, before they are scored."""

    tokens: int = 0
    """Tokens that all paths see together; 0 leaves it out."""
    clip: float = 1.0
    """Largest norm of the gradient of one candidate."""
    budgets: list[int] = field(default_factory=list)
    """Layers that keep attention on a path, drawn evenly from these; from 0 to one below all layers where empty."""
    loss: str = "kl"
    """`feature` (relative squared error of hidden states, as in the paper) or `kl` (nats a token at the head)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.loss in PATH_LOSSES, "paths.loss", self.loss, f"choose one of {', '.join(PATH_LOSSES)}")
        for budget in self.budgets:
            _need(budget >= 0, "paths.budgets", budget, "give 0 or more layers")


@dataclass(frozen=True)
class Stage2(Train):
    """Stage 2 of the distillation: all weights, forward KL from a frozen copy of the base."""

    tokens: int = 0
    """Tokens; 0 leaves the stage out."""
    lr: float = 1e-5
    """Peak learning rate (AdamW, cosine to a tenth, 5% warm-up)."""


@dataclass(frozen=True)
class Evaluate:
    """What was kept."""

    tasks: list[str] = field(default_factory=lambda: ["arc_easy", "piqa"])
    """Tasks by the name of their file in evaluate/tasks, long-context tasks with their length (needle@4096), groups
    (commonsense, paper)."""
    limit: int | None = 400
    """Rows a task; all where null."""
    perplexity_tokens: int = 16_384
    """Held-out tokens that perplexity is measured on; 0 leaves it out."""
    length: int = 512
    """Tokens a sequence for perplexity."""
    copy_passages: int = 32
    """Passages of the copy test; 0 leaves it out."""
    copy_tokens: int = 200
    """Tokens of a passage, which stands twice."""
    copy_filler: int = 300
    """Tokens between the two."""
    allow_code: bool = False
    """Run programs that a model wrote, as humaneval and mbpp do; each in a sandbox."""

    def __post_init__(self) -> None:
        _need(
            self.limit is None or self.limit > 0,
            "evaluate.limit",
            self.limit,
            "give a number above 0, or null for all rows",
        )
        _need(self.copy_passages >= 0, "evaluate.copy_passages", self.copy_passages, "give 0 or more")
        _need(self.perplexity_tokens >= 0, "evaluate.perplexity_tokens", self.perplexity_tokens, "give 0 or more")
        _positive(self, "length", "copy_tokens", "copy_filler")


@dataclass(frozen=True)
class Bench:
    """What was won: prefill and decode of base and hybrid in one process."""

    contexts: list[int] = field(default_factory=lambda: [1024, 8192])
    """Tokens in the cache when decoding starts, and tokens of the prefill."""
    batch: int = 1
    """Sequences."""
    decode_tokens: int = 16
    """Decode steps that are timed at each context."""

    def __post_init__(self) -> None:
        _need(
            len(self.contexts) > 0 and all(c > 0 for c in self.contexts),
            "bench.contexts",
            self.contexts,
            "give numbers above 0",
        )
        _positive(self, "batch", "decode_tokens")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `postnas run FILE --section.field VALUE` changes single fields."""

    base: Base
    """The pretrained model."""
    data: Data
    """The text."""
    align: Align = field(default_factory=Align)
    """Stage 0: candidates learn to stand in for the attention of their layer."""
    paths: Paths = field(default_factory=Paths)
    """After alignment: candidates learn inside random paths; off while its tokens are 0."""
    place: Place = field(default_factory=Place)
    """PostNAS 1: which layers keep full attention."""
    select: Select = field(default_factory=Select)
    """PostNAS 2: which block."""
    design: Design = field(default_factory=Design)
    """PostNAS 3: which options of it."""
    size: Size = field(default_factory=Size)
    """PostNAS 4: which sizes of it."""
    train: Train = field(default_factory=Train)
    """Stage 1 of the distillation: mixers only."""
    stage2: Stage2 = field(default_factory=Stage2)
    """Stage 2 of the distillation: all weights; off while its tokens are 0."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """What was kept."""
    bench: Bench = field(default_factory=Bench)
    """What was won."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """The stages that run, always in this order: align, place, select, design, size, train, evaluate, bench, report."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 2
    """CPU threads; the promise of equal bits holds for equal threads."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda where there is one."""
    compute: str = "bfloat16"
    """Type that matrix products run in; master weights are float32 in any case."""
    out: str = "runs/run"
    """The run directory."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            _need(stage in STAGES, "stages", stage, f"choose from {', '.join(STAGES)}")
        _need(self.compute in DTYPES, "compute", self.compute, f"choose one of {', '.join(DTYPES)}")
        _need(self.device in ("auto", "cpu", "cuda"), "device", self.device, "choose auto, cpu or cuda")
        low = self.compute == "float32" and self.base.dtype == "bfloat16"
        _need(not low, "compute", self.compute, "with base.dtype bfloat16; set base.dtype to float32 too")
        for block in self.place.choices:
            name = "place.blocks" if self.place.blocks else "place.block"
            _need(block in self.align.blocks, name, block, "add it to align.blocks")
        _need(0 <= self.seed < 2**32, "seed", self.seed, "give a number from 0 to 4294967295")
        _need(0 < self.threads <= 1024, "threads", self.threads, "give a number from 1 to 1024")

    def has(self, stage: str) -> bool:
        """Whether a stage runs: it is among `stages`, and its section names something where it compares variants."""
        named = {
            "select": bool(self.select.blocks),
            "design": bool(self.design.variants),
            "size": bool(self.size.heads or self.size.key_dims),
        }
        return stage in self.stages and named.get(stage, True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in recipe.yaml."""
        return dataclasses.asdict(self)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields in which two resolved recipes differ: {dotted name: both values in words}."""
    found: dict[str, str] = {}
    for name in sorted(old.keys() | new.keys()):
        left, right = old.get(name), new.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[f"{prefix}{name}"] = f"was {left!r} and is {right!r}"
    return found

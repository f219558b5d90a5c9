"""Placement by gates: one logit a layer and mixer, found by gradients; base and candidates are frozen.

Each layer gives the mean of its mixers, weighted by probabilities, and the loss of the whole model says how these
must change. Temperature falls until nearly every probability is 0 or 1; then the likeliest layers keep attention,
and exchanges that lower the true score end the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.files import read_json, recover, replacing, write_json
from postnas.models.checkpoint import read_tensors
from postnas.models.supernet import MixedLayer, Supernet
from postnas.ops.chunked_loss import CHUNK, CHUNK_CUDA, capped, chunked_kl
from postnas.ops.cuda_graph import Differentiable
from postnas.search.strategies import Placement, Score, descend, exchanges, reblocked
from postnas.train import parallel
from postnas.train.loop import autocast
from postnas.train.optimizer import learning_rate, make_optimizer

Relaxed = Callable[[Tensor, int], Tensor]
"""relaxed(probabilities [layers, mixers], step) -> loss, a scalar that is differentiable in the probabilities."""
Batches = Callable[[int], tuple[Tensor, Tensor | None]]
"""batches(step) -> token ids [B, T] int64, and [B, T] bool that is True where a token's prediction counts (column 0
is never predicted), or None where all count."""

TEMPERATURE = (1.0, 0.1)
"""From the first step to the last."""
NOISE = 1e-2
"""Standard deviation of the first logits, so that equal layers part."""
THRESHOLD = 1e-3
"""A mixer with a smaller probability is not run: it would add nothing that is seen, and the softmax at such a
probability gives next to no gradient either."""


class Gates:
    """The logits with their optimizer: `step` steps of `steps` are done. Everything follows from the seed.

    Column 0 of logits and probabilities [layers, 1 + blocks] is the layer's own attention, then one column a
    block, in their order. The expected number of attention layers is `budget` at every step, by a projection
    (see `project`): that has no weight to tune as a penalty has and no multiplier that must settle first, and it
    stays exact while the temperature falls. Logits are on the CPU, where their few numbers cost nothing.
    """

    def __init__(
        self,
        layers: int,
        blocks: Sequence[str],
        budget: int,
        seed: int,
        *,
        steps: int,
        lr: float,
        temperature: tuple[float, float] = TEMPERATURE,
    ) -> None:
        self.blocks, self.budget, self.steps, self.lr = list(blocks), budget, steps, lr
        self.temperature = temperature
        noise = torch.randn(layers, 1 + len(blocks), generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(NOISE * noise)
        self.optimizer = make_optimizer([self.logits], lr, weight_decay=0.0)
        self.step = 0

    def probabilities(self) -> Tensor:
        """[layers, 1 + blocks] float32 at the present step's temperature; differentiable in the logits."""
        start, end = self.temperature
        done = min(1.0, self.step / max(1, self.steps - 1))
        return project(self.logits, self.budget, start * (end / start) ** done)

    def advance(self, relaxed: Relaxed) -> float:
        """One step down the relaxed loss, which is returned. Raises UserError where it is not finite."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = learning_rate(self.step, self.steps, self.lr)
        loss = relaxed(self.probabilities(), self.step)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"place: the loss of gates is {value} at step {self.step}; lower align.lr")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on to the same bits: copies of tensors, and `step`."""
        state = self.optimizer.state.get(self.logits, {})
        moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq") if name in state}
        return {"step": self.step, "logits": self.logits.detach().clone()} | moments

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in gates that were made with the same arguments.

        Raises ValueError for logits of another shape.
        """
        if state["logits"].shape != self.logits.shape:
            raise ValueError(f"logits of shape {tuple(state['logits'].shape)} do not fit {tuple(self.logits.shape)}")
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.step = state["step"]
        self.optimizer.state.clear()
        if "exp_avg" in state:
            self.optimizer.state[self.logits] = {
                "step": torch.tensor(self.step, dtype=torch.float32),
                "exp_avg": state["exp_avg"].clone(),
                "exp_avg_sq": state["exp_avg_sq"].clone(),
            }


def gates(
    relaxed: Relaxed,
    attention: Placement,
    blocks: Sequence[str],
    budget: int,
    seed: int,
    *,
    steps: int,
    lr: float,
    temperature: tuple[float, float] = TEMPERATURE,
    state: dict[str, Any] | None = None,
    after: Callable[[Gates, float], None] = lambda made, loss: None,
) -> Gates:
    """The gates after `steps` steps; `solve` makes a placement of their probabilities.

    state: what `Gates.state_dict` gave in a run that was stopped. after(gates, loss): called after each step,
    to log and to save. Raises UserError for a loss that is not finite.
    """
    made = Gates(len(attention), blocks, budget, seed, steps=steps, lr=lr, temperature=temperature)
    if state is not None:
        made.load_state_dict(state)
    while made.step < steps:
        loss = made.advance(relaxed)
        after(made, loss)
    return made


def keep(folder: Path, key: str, made: Gates) -> None:
    """Write the state of the gates; `folder` holds the old or the new, whole.

    key: says what they are trained on and how; `kept` gives nothing for another.
    """
    state = made.state_dict()
    step = state.pop("step")
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(state, temporary / "gates.safetensors")
        write_json(temporary / "state.json", {"key": key, "step": step})


def kept(folder: Path, key: str) -> dict[str, Any] | None:
    """What `Gates.state_dict` gave when `folder` was written; None where there is none of this key."""
    if parallel.rank() == 0:
        recover(folder)
    parallel.barrier()
    stored = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
    fits = stored.get("key") == key
    state = {"step": stored["step"]} | read_tensors(folder / "gates.safetensors") if fits else None
    parallel.barrier()  # nobody writes before everybody has read
    return state


def solve(score: Score, probabilities: Tensor, attention: Placement, blocks: Sequence[str], budget: int) -> Placement:
    """The rounded placement, then exchanges of an attention layer with a linear one while the true score falls.

    With several blocks a linear layer may change to another one too.
    """

    def near(placement: Placement) -> list[Placement]:
        return exchanges(placement, attention, blocks) + reblocked(placement, attention, blocks)

    return descend(score, rounded(probabilities, attention, blocks, budget), near)


def rounded(probabilities: Tensor, attention: Placement, blocks: Sequence[str], budget: int) -> Placement:
    """Attention in the `budget` likeliest layers, the earlier of equal ones; the likeliest block in the others."""
    rows = probabilities.tolist()
    order = sorted(range(len(rows)), key=lambda layer: (-rows[layer][0], layer))
    placement = [blocks[max(range(len(blocks)), key=row[1:].__getitem__)] for row in rows]
    for layer in order[:budget]:
        placement[layer] = attention[layer]
    return placement


def project(logits: Tensor, budget: int, temperature: float) -> Tensor:
    """Softmax over each layer's mixers [layers, mixers] whose first column sums to `budget` over the layers.

    One scalar is added to all logits of column 0, found by bisection in float64. Its gradient is that of the
    equation which it solves. A budget of 0 or of all layers leaves nothing to choose between attention and not.
    """
    scaled = logits.double() / temperature
    odds, layers = scaled[:, 0] - scaled[:, 1:].logsumexp(-1), len(logits)
    if 0 < budget < layers:
        kept = torch.sigmoid(odds + _Shift.apply(odds, budget))
    else:
        kept = torch.full_like(odds, budget / layers)
    linear = scaled[:, 1:].softmax(-1) * (1 - kept)[:, None]
    return torch.cat([kept[:, None], linear], dim=1).to(logits.dtype)


class _Shift(torch.autograd.Function):
    """The scalar s with sum(sigmoid(odds + s)) = budget, for odds [layers] float64 and 0 < budget < layers."""

    @staticmethod
    def forward(ctx: Any, odds: Tensor, budget: int) -> Tensor:
        middle = math.log(budget / (len(odds) - budget))
        low, high = middle - float(odds.max()), middle - float(odds.min())
        for _ in range(100):  # the bracket is as wide as the odds are apart; float64 ends before
            shift = (low + high) / 2
            if float(torch.sigmoid(odds + shift).sum()) < budget:
                low = shift
            else:
                high = shift
        slopes = torch.sigmoid(odds + high) * torch.sigmoid(-odds - high)
        ctx.save_for_backward(slopes / slopes.sum().clamp_min(torch.finfo(slopes.dtype).tiny))
        return odds.new_tensor(high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.saved_tensors[0] * grads[0], None


class SoftNet:
    """The supernet as a relaxed loss: a layer's mixer gives sum over m of p[layer, m] * mixer_m(x).

    Gradients reach the probabilities alone. They are worked out at once, inside the call, where all weights are
    frozen for that time. On a CPU mixers of a probability up to THRESHOLD are not run, and each layer is run again in
    the backward pass, so that the memory is one layer's activations and the hidden states between the layers.
    """

    def __init__(
        self,
        supernet: Supernet,
        blocks: Sequence[str],
        batches: Batches,
        objective: Literal["kl", "nll"],
        compute: torch.dtype,
    ) -> None:
        """objective: `kl`, the mean forward KL from the base, or `nll`, the mean negative log-likelihood; both in
        nats a token, over the tokens that count."""
        self.supernet, self.blocks, self.batches = supernet, list(blocks), batches
        self.objective, self.compute = objective, compute
        self.layers: dict[tuple[int, tuple[int, ...]], Differentiable] = {}

    def __call__(self, probabilities: Tensor, step: int) -> Tensor:
        """The loss of the step's batch, on the device of the probabilities [layers, 1 + blocks]."""
        net = self.supernet
        tokens, scored = self.batches(step)
        device = net.head.device
        wanted = probabilities.requires_grad and torch.is_grad_enabled()
        leaf = probabilities.detach().to(device).requires_grad_(wanted)
        candidates = [net.mixer(layer, block) for layer in range(net.layers) for block in self.blocks]
        with _frozen([net.base, *candidates]), autocast(device, self.compute):
            loss = self._loss(leaf, tokens.to(device), None if scored is None else scored.to(device))
            gradient = torch.autograd.grad(loss, leaf)[0] if wanted else torch.zeros_like(leaf)
        inward = (probabilities - probabilities.detach()) * gradient.to(probabilities.device)  # zeros with a gradient
        return loss.detach().to(probabilities.device) + inward.sum()

    def _loss(self, probabilities: Tensor, tokens: Tensor, scored: Tensor | None) -> Tensor:
        net = self.supernet
        h, step = net.embed(tokens)
        with torch.no_grad():
            teacher = net.norm(net.run(h, step, net.attention)) if self.objective == "kl" else None
        if h.is_cuda:
            h = self._graphs(h, step, probabilities)
        else:
            h = self._again_by_layer(h, step, probabilities)
        hidden = net.norm(h)
        if teacher is not None:
            if scored is None:
                hidden, teacher = hidden.flatten(0, 1), teacher.flatten(0, 1)
            else:
                hidden, teacher = hidden[:, :-1][scored[:, 1:]], teacher[:, :-1][scored[:, 1:]]
            return chunked_kl(hidden, net.head, teacher, net.head, net.softcap)
        counted = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
        return _nll(hidden[:, :-1][counted[:, 1:]], net.head, tokens[:, 1:][counted[:, 1:]], net.softcap)

    def _again_by_layer(self, h: Tensor, step: Step, probabilities: Tensor) -> Tensor:
        for layer, row in enumerate(probabilities.tolist()):
            used = [column for column, p in enumerate(row) if p > THRESHOLD]
            mixed = MixedLayer(self.supernet.base.model.layers[layer], [self._mixers(layer)[c] for c in used], step)
            h = _again(mixed, h, probabilities[layer, used])
        return h

    def _graphs(self, h: Tensor, step: Step, probabilities: Tensor) -> Tensor:
        """All mixers of each layer as CUDA graphs, which hold all layers' activations: that of few rows."""
        for layer in range(self.supernet.layers):
            key = layer, tuple(h.shape)
            if key not in self.layers:
                mixed = MixedLayer(self.supernet.base.model.layers[layer], self._mixers(layer), step)
                self.layers[key] = Differentiable(mixed)
            h = self.layers[key](h, probabilities[layer])
        return h

    def _mixers(self, layer: int) -> list[nn.Module]:
        return [self.supernet.mixer(layer, name) for name in (self.supernet.attention[layer], *self.blocks)]


def minibatches(tokens: Tensor, scored: Tensor | None, rows: int, seed: int) -> Batches:
    """Batches of `rows` of the sequences [N, T], drawn by seed and step; all of them where there are no more."""

    def batches(step: int) -> tuple[Tensor, Tensor | None]:
        if rows >= len(tokens):
            return tokens, scored
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randperm(len(tokens), generator=generator)[:rows].to(tokens.device)
        return tokens[chosen], None if scored is None else scored[chosen]

    return batches


def _nll(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Mean negative log-likelihood of targets [N] by hidden [N, hidden], with a gradient and without all logits."""

    def total(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = rows @ head.to(rows.dtype).T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(capped(wide, softcap), wanted, reduction="sum")

    size = CHUNK_CUDA if hidden.is_cuda else CHUNK
    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    sums = [_again(total, rows, wanted) for rows, wanted in pairs]
    return torch.stack(sums).sum() / len(targets)


def _again(function: Callable[..., Tensor], *values: Any) -> Tensor:
    """function(*values), which is run again in the backward pass; nothing here is random."""
    return checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _frozen(modules: list[nn.Module]) -> Iterator[None]:
    """No gradients for the weights of these modules while it lasts; afterwards they are as they were.

    No mixer has dropout or anything else that differs in training, so `eval()` has nothing to change.
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)

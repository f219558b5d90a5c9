"""One decode step of the whole model on states that never move, so that on a GPU one CUDA graph holds it.

The plain class is bound by kernel launches at decode. Here a step is one launch, and what stays is the memory it
moves, so the decode speeds of blocks can be compared. A `Decoder` serves one batch size and one largest context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postnas.blocks.attention import Attention
from postnas.blocks.jet import Jet
from postnas.blocks.norm import RMSNorm
from postnas.blocks.state import KVState
from postnas.blocks.step import Keys, Ledger, Step
from postnas.errors import UserError
from postnas.models.cache import HybridCache
from postnas.models.model import DecoderLayer, HybridForCausalLM
from postnas.ops.chunked_loss import capped

WARM_UP = 3
"""Steps before a graph is captured: kernels are compiled and libraries set up in them."""
ALIGNED = 64
"""A fused product has a multiple of this many outputs, so that its rows begin on a border that fast loads need."""


@dataclass
class StaticKV:
    """Keys and values [B, kv_heads, slots, head_dim] whose new token goes to each row's `slot` [B] (int64).

    A window of W is a ring of W slots: the token that falls out of it is the one that is written over.
    """

    k: Tensor
    v: Tensor
    slot: Tensor

    def append(self, k: Tensor, v: Tensor, keep: object) -> tuple[Tensor, Tensor]:
        """Write one token's k, v [B, kv_heads, 1, head_dim]; return all slots."""
        index = self.slot[:, None, None, None].expand_as(k)
        self.k.scatter_(2, index, k)
        self.v.scatter_(2, index, v)
        return self.k, self.v


@dataclass
class StaticStep(Step):
    """A step of one token whose masks are given, not worked out from ledgers."""

    met: dict[int | None, Keys] = field(default_factory=dict)

    def keys(self, window: int | None) -> Keys:
        return self.met[window]


class JetProduct:
    """The projections of a JetBlock's input as one product: v, gate, q, k, w1, a, b from one matrix.

    The modules' own weights become views of that matrix, so they are not held twice and the model saves as before;
    moving the model to another device or type parts them again. Biases are copied.
    """

    def __init__(self, mixer: Jet) -> None:
        generator = mixer.dynamic_conv1d.kernel_generator
        parts = [mixer.v_proj, mixer.g_proj, mixer.q_proj, mixer.k_proj, generator.w1, mixer.a_proj, mixer.b_proj]
        self.sizes = [part.out_features for part in parts]
        self.sizes.append(-sum(self.sizes) % ALIGNED)
        self.weight = _joined([part.weight for part in parts], sum(self.sizes))
        self.bias = None
        if any(part.bias is not None for part in parts):
            self.bias = self.weight.new_zeros(sum(self.sizes))
            for part, share in zip(parts, self.bias.split(self.sizes), strict=False):
                if part.bias is not None:
                    share.copy_(part.bias)
        for part, view in zip(parts, self.weight.split(self.sizes), strict=False):
            part.weight = nn.Parameter(view, requires_grad=part.weight.requires_grad)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, hidden] -> what `Jet.finish_decode` takes, by its names: v, gate [B, H * V], q, k [B, H * K],
        inner [B, R], a, b [B, H]."""
        names = ("v", "gate", "q", "k", "inner", "a", "b")  # the rest is padding
        return dict(zip(names, F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)))


def _joined(weights: list[Tensor], rows: int) -> Tensor:
    """The weights one under another as one [rows, hidden], zeros below; that matrix itself where they are its views."""
    first, width, offset = weights[0], weights[0].shape[1], 0
    for weight in weights:
        storage = weight.untyped_storage()
        ours = storage.data_ptr() == first.untyped_storage().data_ptr() and weight.storage_offset() == offset
        if not ours or storage.nbytes() != rows * width * weight.element_size():
            return torch.cat([*weights, first.new_zeros(rows - sum(map(len, weights)), width)]).detach()
        offset += weight.numel()
    return first.detach().as_strided((rows, width), (width, 1), 0)


class Decoder:
    """Decode steps of `batch` rows, each with at most `context` tokens, by a hybrid that is in eval mode.

    dtype: of the recurrent states of JetBlocks as released, float32 where None (float64 for a float64 model). fused:
    their w2 with the convolution as its epilogue, else a product whose taps reach memory. fixed: for benchmarks; every
    step stands at token `context`, so the caches are full and need no mask.

    All rows begin empty; `load` takes over a prefilled cache. Changes the model only as `JetProduct` says.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        batch: int,
        context: int,
        dtype: torch.dtype | None = None,
        fused: bool = False,
        fixed: bool = False,
    ) -> None:
        for name, value in (("batch", batch), ("context", context)):
            if value < 1:
                raise UserError(f"{name}: {value} is too small; give 1 or more")
        self.model, self.batch, self.context, self.fused, self.fixed = model, batch, context, fused, fixed
        weight = model.lm_head.weight
        self.device, self.kind = weight.device, weight.dtype
        self.wide = torch.float64 if self.kind == torch.float64 else torch.float32
        self.dtype = dtype or self.wide
        if self.dtype not in (torch.float32, torch.bfloat16, self.wide):
            raise UserError(f"dtype: {self.dtype} is no type of a state here; give torch.float32 or torch.bfloat16")
        self.tokens = self._zeros(batch, dtype=torch.int64)
        self.length = self._zeros(batch, dtype=torch.int64)
        """Tokens whose keys each row's caches hold."""
        self.position = self._zeros(batch, dtype=torch.int64)
        """The next token's position for RoPE."""
        self.logits = self._zeros(batch, model.config.vocab_size)
        self.layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
        windows = {layer.self_attn.window for layer in self.layers if isinstance(layer.self_attn, Attention)}
        self.bounded = any(window is None or window > context for window in windows)
        """Whether a row of more than `context` tokens would lose keys that it needs."""
        self.slots = {window: context if window is None else min(window, context) for window in windows}
        self.slot = {window: self._zeros(batch, dtype=torch.int64) for window in windows}
        self.used = 0
        """The longest row's tokens, known without asking the device."""
        with torch.no_grad():
            self.products = {
                index: JetProduct(layer.self_attn) for index, layer in enumerate(self.layers) if _fuses(layer.self_attn)
            }
            self.states = [self._state(layer.self_attn) for layer in self.layers]
            self.graph = self._capture() if self.device.type == "cuda" else None
        self.reset()

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype or self.kind, device=self.device)

    def _state(self, mixer: Any) -> Any:
        """A layer's state at its final size."""
        if isinstance(mixer, Attention):
            shape = (self.batch, mixer.dims.kv_heads, self.slots[mixer.window], mixer.dims.head_dim)
            return StaticKV(self._zeros(*shape), self._zeros(*shape), self.slot[mixer.window])
        state = mixer.State()
        # Each block knows its own sizes: one token of a fresh state shows them, and is forgotten by `reset`.
        mixer(self._zeros(self.batch, 1, mixer.dims.hidden), self._step(), state)
        if _fuses(mixer):
            state.recurrent = state.recurrent.to(self.dtype)
        return state

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. Nothing in it is allocated anew, so what it holds stays where it is."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward()
                self.length.zero_()  # a warm-up must not run past the caches' end
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
        return graph

    @torch.no_grad()
    def reset(self) -> None:
        """Every row is empty; in `fixed` mode its caches hold `context` - 1 tokens of zeros."""
        for tensor in self._tensors():
            tensor.zero_()
        self._stand_at(self.context - 1 if self.fixed else 0)

    def _tensors(self) -> list[Tensor]:
        """All that the states hold."""
        held: list[Tensor] = []
        for state in self.states:
            held += [state.k, state.v] if isinstance(state, StaticKV) else list(state.tensors().values())
        return held

    def _stand_at(self, tokens: int) -> None:
        self.length.fill_(tokens)
        self.position.fill_(tokens)
        self.used = tokens

    @torch.no_grad()
    def fill_random(self, tokens: int | None = None, seed: int = 0) -> None:
        """States of `tokens` random tokens, `context` - 1 where None: for timing, not for text.

        Raises UserError where they are more than `context`.
        """
        if tokens is not None and not 0 <= tokens <= self.context:
            raise UserError(f"tokens: {tokens} is not possible; give 0 to the context's {self.context}")
        generator = torch.Generator(self.device).manual_seed(seed)
        for tensor in self._tensors():
            tensor.normal_(0.0, 0.1, generator=generator)
        self._stand_at(self.context - 1 if tokens is None or self.fixed else tokens)

    @torch.no_grad()
    def load(self, cache: HybridCache) -> None:
        """Go on from what `cache` holds, padded batches included; the cache is copied and stays as it is.

        Raises UserError where it has other rows or layers, or more tokens than `context` leaves room for.
        """
        if self.fixed:
            raise UserError("fixed: True stands at one length for ever; make a Decoder without it to load a cache")
        if len(cache) != len(self.layers) or cache.batch_size not in (-1, self.batch):
            raise UserError(
                f"cache: holds {cache.batch_size} rows of {len(cache)} layers, not {self.batch} of {len(self.layers)}; "
                "make a Decoder of its batch size"
            )
        seen = torch.as_tensor(cache.seen, device=self.device).expand(self.batch)
        ranks = {window: _ranks(ledger, seen) for window, ledger in cache.ledgers.items() if ledger.length}
        length = torch.zeros_like(self.length)
        for rank in ranks.values():
            length = torch.maximum(length, (rank >= 0).sum(1))
        used = int(length.max())
        if self.bounded and used > self.context:
            raise UserError(f"context: {self.context} slots do not hold the cache's {used} tokens; give more")
        self.reset()
        self.length.copy_(length)
        self.position.copy_(torch.as_tensor(cache.next_position, device=self.device).expand(self.batch))
        self.used = used
        for layer, state, given in zip(self.layers, self.states, cache.states, strict=True):
            if isinstance(given, KVState):
                if given.k is not None and given.v is not None:
                    window = layer.self_attn.window
                    # A row's live tokens are numbered from 0; whatever is dead goes to a slot that is cut off.
                    number = ranks[window] - (seen - length)[:, None]
                    size = self.slots[window]
                    slot = torch.where(ranks[window] >= 0, number % size, size)
                    _place(state.k, given.k[:, :, : given.length], slot)
                    _place(state.v, given.v[:, :, : given.length], slot)
            else:
                for name, value in given.tensors().items():
                    getattr(state, name).copy_(value)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read tokens [B] (int64); the logits of the next ones, [B, vocab], valid until the next step.

        Raises UserError where the caches have no room left, or tokens are no [B] whole numbers.
        """
        if tokens.shape != self.tokens.shape or tokens.is_floating_point():
            raise UserError(
                f"tokens: {tokens.dtype} of shape {tuple(tokens.shape)} is not possible; "
                f"give one whole number for each of {self.batch} rows"
            )
        if self.bounded and self.used + (not self.fixed) > self.context:
            raise UserError(f"context: {self.context} tokens are full; make a Decoder with a larger context")
        self.tokens.copy_(tokens)
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()
        self.used += not self.fixed
        return self.logits

    def generate(self, tokens: Tensor, steps: int) -> Tensor:
        """Greedy: [B, steps], what follows after tokens [B]."""
        made = self._zeros(self.batch, steps, dtype=torch.int64)
        for index in range(steps):
            tokens = self.step(tokens).argmax(-1)
            made[:, index] = tokens
        return made

    def _step(self) -> StaticStep:
        """Positions, masks and slots of the token at hand, all from tensors on the device."""
        model = self.model.model
        ropes = {"attn": model.rotary_emb(self.position[:, None], self.wide)}
        own = self.model.config.swa_rope_parameters is not None
        ropes["swa"] = model.swa_rotary_emb(self.position[:, None], self.wide) if own else ropes["attn"]
        step = StaticStep(self.batch, 1, self.device, ropes.__getitem__)
        for window, size in self.slots.items():
            self.slot[window].copy_(self.length % size)
            mask = None
            if not self.fixed:
                mask = (torch.arange(size, device=self.device) <= self.length[:, None])[:, None, None]
            step.met[window] = Keys(mask, False, None)
        return step

    def _forward(self) -> None:
        """One token of every row, from `tokens` to `logits`; every state moves on."""
        model = self.model.model
        step, h = self._step(), model.embed_tokens(self.tokens[:, None])
        for index, (layer, state) in enumerate(zip(self.layers, self.states, strict=True)):
            x = _normalise(layer.input_layernorm, h)
            if index in self.products:
                y = layer.self_attn.finish_decode(**self.products[index](x[:, 0]), state=state, fused=self.fused)
            else:
                y = layer.self_attn(x, step, state)[0]
            h = _finish(layer, h, y)
        logits = self.model.lm_head(_normalise(model.norm, h)[:, 0])
        self.logits.copy_(capped(logits, self.model.config.final_logit_softcapping))
        if not self.fixed:
            self.length += 1
            self.position += 1


def _fuses(mixer: nn.Module) -> bool:
    """Has `ops.jet_decode` this block's step? A JetBlock of another design goes the way of all other blocks."""
    return isinstance(mixer, Jet) and mixer.released


def _ranks(ledger: Ledger, seen: Tensor) -> Tensor:
    """[B, slots] running number of the token in each slot, -1 where there is none to see."""
    if ledger.rank is not None:
        return ledger.rank
    return seen[:, None] - ledger.length + torch.arange(ledger.length, device=seen.device)


def _place(target: Tensor, source: Tensor, slot: Tensor) -> None:
    """source [B, heads, n, size] into target's slots [B, n]; the slot behind target's last is thrown away."""
    batch, heads, slots, size = target.shape
    roomy = target.new_zeros(batch, heads, slots + 1, size)
    roomy.scatter_(2, slot[:, None, :, None].expand(source.shape), source.to(target.dtype))
    target.copy_(roomy[:, :, :slots])


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm as one kernel; Gemma's rounds its product elsewhere, so it stays the module's own."""
    return norm(x) if norm.offset else F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _finish(layer: DecoderLayer, h: Tensor, y: Tensor) -> Tensor:
    """What `DecoderLayer.finish` computes, with norms of one kernel each."""
    if layer.sandwich:
        return layer.finish(h, y)
    h = h + y
    return h + layer.mlp(_normalise(layer.post_attention_layernorm, h))

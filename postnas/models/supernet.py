"""The base with candidates beside its attention; a placement selects one mixer a layer.

With every layer on attention the supernet is the teacher, so no second model is held. Nothing here
changes the base: its weights stay frozen, and a test hashes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from postnas.blocks.step import Step
from postnas.errors import UserError
from postnas.models.checkpoint import model_from_weights
from postnas.models.config import HybridConfig, check_placement
from postnas.models.model import HybridForCausalLM

Placement = list[str]


class MixedLayer(nn.Module):
    """A layer of the base with the mixers that are given in place of its own, for one step."""

    def __init__(self, decoder: nn.Module, mixers: Sequence[nn.Module], step: Step) -> None:
        super().__init__()
        self.decoder, self.mixers, self.step = decoder, nn.ModuleList(mixers), step

    def forward(self, h: Tensor, weights: Tensor | None = None) -> Tensor:
        """h [B, T, hidden] after the layer, whose mixers' outputs are added up by `weights` [mixers]; evenly by 1
        where None."""
        decoder: Any = self.decoder
        x = decoder.input_layernorm(h)
        outputs = [mixer(x, self.step)[0] for mixer in self.mixers]
        if weights is not None:
            outputs = [weight * output for weight, output in zip(weights, outputs, strict=True)]
        return decoder.finish(h, sum(outputs[1:], outputs[0]))


class Supernet:
    """base: a model with attention in every layer, frozen. candidates: {block: {layer: mixer}}."""

    def __init__(self, base: HybridForCausalLM, candidates: dict[str, dict[int, Any]]) -> None:
        self.base, self.candidates = base, candidates
        self.config = cast(HybridConfig, base.config)
        assert self.config.placement is not None
        self.attention: Placement = list(self.config.placement)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def head(self) -> Tensor:
        """[vocab, hidden], shared by teacher and student."""
        return self.base.lm_head.weight

    @property
    def softcap(self) -> float | None:
        """The cap on the logits that the head gives."""
        return self.config.final_logit_softcapping

    def mixer(self, layer: int, block: str) -> nn.Module:
        """The base's own attention, or the layer's candidate of this block."""
        if block == self.attention[layer]:
            return self.base.model.layers[layer].self_attn
        if layer not in self.candidates.get(block, {}):
            raise UserError(f"placement[{layer}]: no candidate of {block!r}; align it first")
        return self.candidates[block][layer]

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Step]:
        """tokens [B, T] -> hidden states before the first layer, and the step for all layers."""
        h = self.base.model.embed_tokens(tokens)
        step, _ = self.base.model.make_step(h, position_ids=positions)
        return h, step

    def run(self, h: Tensor, step: Step, placement: Placement, start: int = 0, stop: int | None = None) -> Tensor:
        """Hidden states after the layers from `start` up to `stop`, not yet normed."""
        for index in range(start, self.layers if stop is None else stop):
            h = self.base.model.layers[index](h, step, mixer=self.mixer(index, placement[index]))
        return h

    def walk(self, h: Tensor, step: Step) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each layer's attention input and output in the base: (layer, x [B, T, hidden], y [B, T, hidden])."""
        for index, layer in enumerate(self.base.model.layers):
            x = layer.input_layernorm(h)
            y, _ = layer.self_attn(x, step)
            yield index, x, y
            h = layer.finish(h, y)

    def norm(self, h: Tensor) -> Tensor:
        """The final norm, before the head."""
        return self.base.model.norm(h)

    def first_change(self, placement: Placement) -> int:
        """The first layer that differs from the base; all layers before it need to run once only."""
        return next((i for i, block in enumerate(placement) if block != self.attention[i]), self.layers)

    def build(self, placement: Placement, dtype: torch.dtype) -> HybridForCausalLM:
        """The hybrid by itself: the base's weights, the chosen candidates', everything in `dtype`."""
        check_placement(placement, self.layers)
        fields = self.config.to_dict() | {"placement": placement, "blocks": self.options(), "dtype": dtype}
        for name in ("model_type", "architectures", "transformers_version"):
            fields.pop(name, None)
        weights = {k: v for k, v in self.base.state_dict().items() if ".self_attn." not in k}
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        for index, block in enumerate(placement):
            for name, value in self.mixer(index, block).state_dict().items():
                weights[f"model.layers.{index}.self_attn.{name}"] = value
        # A hybrid of its own must not share storage with the base: training it would train the base.
        own = {name: value.detach().to(dtype, copy=True) for name, value in weights.items()}
        hybrid: Any = model_from_weights(HybridConfig(**fields), own, dtype)
        return hybrid.to(self.head.device)

    def options(self) -> dict[str, dict[str, object]]:
        """The options of every block in use, for the hybrid's config."""
        found = dict(self.config.blocks or {})
        for block, mixers in self.candidates.items():
            options = next(iter(mixers.values())).options
            found[block] = {name: getattr(options, name) for name in options.__dataclass_fields__}
        return found

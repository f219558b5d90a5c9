"""One model for every family: a pre-norm decoder whose layers take any mixer.

Weights have Hugging Face names; a layer's mixer is its `self_attn`, whatever block it is.
"""

from __future__ import annotations

from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from postnas.blocks import make_block
from postnas.blocks.inherit import start_module
from postnas.blocks.norm import RMSNorm
from postnas.blocks.step import Rope, Step
from postnas.errors import UserError
from postnas.models.cache import HybridCache
from postnas.models.config import HybridConfig
from postnas.models.jet_nemotron import JetNemotronConfig
from postnas.models.outputs import CACHE, HybridCausalOutput, HybridOutput, given_cache, named
from postnas.ops.chunked_loss import capped

SCALED_ROPE = ("linear", "llama3", "yarn")
"""Scaled kinds whose frequencies are constants. Those of `dynamic` and `longrope` change with the length, so that
chunks, packs and rows of one batch would not agree."""


class MLP(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a factor, which is rounded to their type first."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        h = super().forward(ids)
        return h if self.scale == 1.0 else h * torch.tensor(self.scale, dtype=h.dtype).item()


class DecoderLayer(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h)); with sandwich norms each sum takes norm(...) of what is added."""

    def __init__(self, config: HybridConfig, index: int) -> None:
        super().__init__()
        assert config.placement is not None and config.blocks is not None
        name = config.placement[index]
        self.self_attn = make_block(name, config.dims(), config.blocks.get(name))
        self.mlp = MLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        self.sandwich = config.sandwich_norm
        if self.sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = _norm(config), _norm(config)

    def forward(self, h: Tensor, step: Step, state: Any = None, mixer: nn.Module | None = None) -> Tensor:
        """h: [B, T, hidden]. mixer: stands in for the layer's own (a candidate of the supernet)."""
        y, _ = (mixer or self.self_attn)(self.input_layernorm(h), step, state)
        return self.finish(h, y)

    def finish(self, h: Tensor, y: Tensor) -> Tensor:
        """What the layer gives for its input h and its mixer's output y, both [B, T, hidden]."""
        if self.sandwich:
            h = h + self.post_attention_layernorm(y)
            return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        h = h + y
        return h + self.mlp(self.post_attention_layernorm(h))


def _norm(config: HybridConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class RotaryEmbedding(nn.Module):
    """cos and sin of RoPE; scaled kinds come from transformers' own formulas."""

    inv_freq: Tensor

    def __init__(self, config: HybridConfig, parameters: dict[str, Any] | None = None) -> None:
        """parameters: the config's `rope_parameters` where None."""
        super().__init__()
        if parameters is not None:
            config = copy(config)
            config.rope_parameters = parameters
        self.config = config
        frequencies, self.scaling = self.frequencies(torch.device("cpu"))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.inv_freq.copy_(self.frequencies(self.inv_freq.device)[0])

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Inverse frequencies [head_dim / 2] in float32, and the factor on cos and sin."""
        parameters = self.config.rope_parameters
        assert parameters is not None and self.config.head_dim is not None
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            exponent = (
                torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
            )
            return parameters["rope_theta"] ** -exponent, 1.0
        if kind not in SCALED_ROPE:
            raise UserError(
                f"rope_parameters.rope_type: {kind!r} is not supported; choose from default, {', '.join(SCALED_ROPE)}"
            )
        with device:  # models are built on the meta device, and these formulas name no device of their own
            return ROPE_INIT_FUNCTIONS[kind](self.config, device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """positions: [B, T] -> cos, sin [B, T, head_dim] in dtype."""
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True
    _is_stateful = True  # recurrent states cannot give tokens back, so assisted decoding must refuse

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases; what is special to a block it starts itself, after its parts."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        else:
            start_module(module)


class HybridModel(HybridPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = _norm(config)
        self.make_rope()
        self.post_init()

    def make_rope(self) -> None:
        """RoPE for all attention layers, and for the windowed ones where they have another."""
        config = cast(HybridConfig, self.config)
        self.rotary_emb = RotaryEmbedding(config)
        if config.swa_rope_parameters is not None:
            self.swa_rotary_emb = RotaryEmbedding(config, config.swa_rope_parameters)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> HybridOutput:
        """Hidden states after the last norm, [B, T, hidden].

        input_ids: [B, T] int64, or inputs_embeds [B, T, hidden]. attention_mask: [B, T] or
        [B, cached + T], 0 at padding, on any side. position_ids: [B, T]; where they do not rise by one, or
        start at 0 on a filled cache, a packed sequence begins, which sees nothing of the one before.
        past_key_values, cache: two names of one thing, of which one may be given; it changes in place.
        use_cache: return states. output_hidden_states: return the embeddings and what each layer gives, the
        last one after the norm. Attention weights are never returned.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids: give either input_ids or inputs_embeds, not both or none")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = given_cache(past_key_values, cache)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = HybridCache(cast(HybridConfig, self.config))
        step, order = self.make_step(h, attention_mask, position_ids, cache)
        if order is not None:
            h = _gather(h, order)
        back = None if order is None else order.argsort(dim=1)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen = [h] if wanted else []
        for index, layer in enumerate(self.layers):
            h = layer(h, step, None if cache is None else cache.states[index])
            if wanted:
                seen.append(h)
        h = self.norm(h)
        seen = [*seen[:-1], h] if wanted else [h]
        if back is not None:
            seen = [_gather(state, back) for state in seen]
        states = tuple(seen) if wanted else None
        return HybridOutput(last_hidden_state=seen[-1], hidden_states=states, **named(cache))

    def make_step(
        self,
        h: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: HybridCache | None = None,
    ) -> tuple[Step, Tensor | None]:
        """The Step for tokens h [B, T, hidden], and the order [B, T] that puts real tokens first.

        The order is None where no token is padding.
        """
        batch, tokens = h.shape[:2]
        valid, order = None, None
        if attention_mask is not None:
            valid = _valid(attention_mask, batch, tokens)
            if valid.all():
                valid = None
            else:
                order = (~valid).int().argsort(dim=1, stable=True)
                valid = valid.gather(1, order)
        seen, start = (0, 0) if cache is None else (cache.seen, cache.next_position)
        segments = None
        if position_ids is None:
            if isinstance(start, int):  # which waits for no copy to the device
                positions = torch.arange(start, start + tokens, device=h.device)[None]
            else:
                positions = start.view(-1, 1) + torch.arange(tokens, device=h.device)
        else:
            positions = position_ids.to(h.device).expand(batch, tokens)
            if order is not None:
                positions = positions.gather(1, order)
            segments = _segments(positions, valid, filled=cache is not None and cache.slots > 0)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        ropes = {"attn": self.rotary_emb(positions, wide)}
        own = self.config.swa_rope_parameters is not None
        ropes["swa"] = self.swa_rotary_emb(positions, wide) if own else ropes["attn"]
        step = Step(batch, tokens, h.device, ropes.__getitem__, valid=valid, segments=segments, seen=seen)
        if cache is not None:
            step.ledgers = cache.ledgers
            cache.slots += tokens
            if valid is None:
                cache.seen = seen + tokens
                cache.next_position = start + tokens if position_ids is None else positions[:, -1] + 1
            else:
                lengths = valid.sum(1)
                cache.seen = step.counts() + lengths
                last = positions.expand(batch, -1).gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] + 1
                cache.next_position = torch.where(lengths > 0, last, torch.as_tensor(start, device=h.device))
        return step, order


def _valid(attention_mask: Tensor, batch: int, tokens: int) -> Tensor:
    """[B, T] bool of this chunk. A mask may cover the cached tokens too; those the cache knows itself."""
    if attention_mask.ndim != 2:
        raise UserError(
            f"attention_mask: {attention_mask.ndim} dimensions; give a mask of [batch, tokens] with 0 at padding"
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise UserError(
            f"attention_mask: shape {tuple(attention_mask.shape)} does not cover {batch} rows of {tokens} tokens"
        )
    return attention_mask[:, attention_mask.shape[1] - tokens :] != 0


def _segments(positions: Tensor, valid: Tensor | None, filled: bool) -> Tensor | None:
    """[B, T] running number of the packed sequence of each token; None where no row begins one.

    0 is the sequence that the cache holds. On a `filled` one a chunk may begin with another: at position 0.
    """
    begins = torch.cat([(positions[:, :1] == 0) & filled, positions[:, 1:] != positions[:, :-1] + 1], dim=1)
    if valid is not None:
        begins = begins & valid
    return begins.cumsum(1) if begins.any() else None


def _gather(h: Tensor, order: Tensor) -> Tensor:
    return h.gather(1, order[..., None].expand(-1, -1, h.shape[-1]))


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The cache is our own."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """An empty cache where none is given: `prefill_chunk_size` wants one before the first forward."""
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = HybridCache(cast(HybridConfig, self.config))

    def generate(self, *args: Any, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        """transformers' own `generate`; the cache to go on from may have either of its names in any version."""
        given = given_cache(past_key_values, cache)
        parent: Any = super()
        return parent.generate(*args, **kwargs, **({} if given is None else named(given)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> HybridCausalOutput:
        """Logits [B, T, vocab], and with labels [B, T] (-100 ignored) the mean next-token loss.

        logits_to_keep: the last n positions only, all where 0, or an index tensor. The rest is as in HybridModel.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        h = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Contiguous, since a product of a slice of rows would copy the head once for each row of the batch.
        logits = capped(self.lm_head(h[:, kept].contiguous()), self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return HybridCausalOutput(loss=loss, logits=logits, hidden_states=output.hidden_states, **named(output.cache))


class JetNemotronModel(HybridModel):
    """HybridModel under the official config."""

    config_class = JetNemotronConfig


class JetNemotronForCausalLM(HybridForCausalLM):
    """HybridForCausalLM under the official config."""

    config_class = JetNemotronConfig

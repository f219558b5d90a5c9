"""What the models return, and the two names of a cache.

transformers 5.24 renamed `past_key_values` to `cache`, in its outputs and in what generation hands to a model. Which of
the two the installed version says is known here alone. Our own models take either name and answer to either.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from postnas.errors import UserError
from postnas.models.cache import HybridCache

_RENAMED = "cache" in {field.name for field in fields(BaseModelOutputWithPast)}
CACHE, OTHER = ("cache", "past_key_values") if _RENAMED else ("past_key_values", "cache")
"""The name that the installed version uses, and the one that it does not."""


class HybridOutput(BaseModelOutputWithPast):
    """What HybridModel returns: `last_hidden_state` [B, T, hidden], the cache, `hidden_states`."""

    if TYPE_CHECKING:
        past_key_values: HybridCache | None
        cache: HybridCache | None


class HybridCausalOutput(CausalLMOutputWithPast):
    """What HybridForCausalLM returns: `loss`, `logits` [B, T, vocab], the cache, `hidden_states`."""

    if TYPE_CHECKING:
        past_key_values: HybridCache | None
        cache: HybridCache | None


# One name is a field of the parent. The version says which, so the other cannot be written into the bodies above.
for _kind in (HybridOutput, HybridCausalOutput):
    setattr(_kind, OTHER, property(attrgetter(CACHE)))


def named(cache: Any) -> dict[str, Any]:
    """The cache as a keyword, under the name of the installed version."""
    return {CACHE: cache}


def given_cache(past_key_values: Any, cache: Any) -> HybridCache | None:
    """The cache that a caller gave under one of its names, None where under neither.

    Raises UserError where both are given, or what cannot hold a hybrid's states.
    """
    if past_key_values is not None and cache is not None:
        raise UserError("past_key_values, cache: two names of one thing; give the cache under one of them")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, HybridCache):
        raise UserError(f"{name}: {type(given).__name__} cannot hold a hybrid's states; pass None or a HybridCache")
    return given

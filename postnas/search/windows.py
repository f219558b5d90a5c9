"""The second pass: with full attention where it is, which linear layers become sliding-window attention.

The paper finds that the layers that carry retrieval and those that carry knowledge differ. So full attention is
placed by one objective and the windows by another; the function here knows no more than score(placements).
"""

from __future__ import annotations

from typing import Any, cast

import torch

from postnas.blocks import linear_blocks, make_block
from postnas.blocks.attention import WindowAttention
from postnas.errors import UserError
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM
from postnas.models.supernet import Placement
from postnas.search.strategies import Score


def windows(score: Score, placement: Placement, count: int) -> tuple[Placement, list[dict[str, Any]]]:
    """`count` linear layers of `placement` turned to `swa`, one after the other, always the one that helps most.

    score: lower is better. Returns the placement and a record a step in the order of choice: the `layer`, the
    `score` of the placement with it, and the `gain`, what it took off the score; below 0 where even the best hurts.
    Of equal layers the first is taken. Raises UserError where there are fewer than `count` linear layers.
    """
    linear = [layer for layer, name in enumerate(placement) if name in linear_blocks()]
    if not 0 <= count <= len(linear):
        raise UserError(
            f"place.windows: {count} is not possible with {len(linear)} linear layers; give 0 to {len(linear)}"
        )
    chosen: Placement = list(placement)
    found: list[dict[str, Any]] = []
    before = score([chosen])[0] if count else 0.0
    for _ in range(count):
        value, best = min(zip(score([_turned(chosen, layer) for layer in linear]), linear))
        linear.remove(best)
        chosen = _turned(chosen, best)
        found.append({"layer": best, "score": value, "gain": before - value})
        before = value
    return chosen, found


def _turned(placement: Placement, layer: int) -> Placement:
    return ["swa" if index == layer else name for index, name in enumerate(placement)]


def check_window(config: HybridConfig, window: int) -> None:
    """Raises UserError where layers of a base cannot become windows of this size."""
    if config.swa_rope_parameters is not None:
        raise UserError(
            "place.windows: this base has another RoPE for windows, so attention cannot become `swa`; give 0"
        )
    held = (config.blocks or {}).get("swa", {}).get("window_size", window)
    if "swa" in (config.placement or []) and window != held:
        raise UserError(f"place.window: {window} is not the {held} that the base's own windows have; give {held}")


def window_candidates(base: HybridForCausalLM, window: int) -> dict[int, WindowAttention]:
    """For each layer on full attention a copy of it that sees `window` tokens; the Supernet's candidates for `swa`.

    Nothing is trained. The copies are float32 on the base's device, as all candidates are, with storage of their
    own. Raises UserError for a base whose windows have a RoPE of their own, which full attention was not trained
    with, for another window than the base's own layers have, and for a window below 2.
    """
    config = cast(HybridConfig, base.config)
    check_window(config, window)
    found: dict[int, WindowAttention] = {}
    for layer, name in enumerate(config.placement or []):
        if name != "attn":
            continue
        with torch.device("meta"):  # draws nothing, since every weight is given
            mixer = make_block("swa", config.dims(), {"window_size": window})
        weights = base.model.layers[layer].self_attn.state_dict()
        own = {name: value.detach().to(torch.float32, copy=True) for name, value in weights.items()}
        mixer.load_state_dict(own, assign=True)
        found[layer] = mixer
    return found

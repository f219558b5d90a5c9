"""Token mixers, one a file, one contract:

    mixer = Mixer(dims, Options(...).resolve(dims))
    y, state = mixer(x, step, state)        # x, y [B, T, hidden]; state None, or Mixer.State() changed in place
    mixer.state_bytes(context, dtype), mixer.flops(tokens, past)

`Options` is a frozen dataclass whose `resolve` fills in what the base decides and refuses what cannot be.
"""

from __future__ import annotations

from typing import Any

from postnas.blocks.attention import Attention, WindowAttention
from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import GatedDeltaNet
from postnas.blocks.jet import Jet
from postnas.blocks.state import LinearState
from postnas.errors import UserError

BLOCKS: dict[str, Any] = {
    "attn": Attention,
    "swa": WindowAttention,
    "jet": Jet,
    "gated_deltanet": GatedDeltaNet,
}
"""Every mixer by the name that a placement uses. Adding one is one file and one line here."""


def linear_blocks() -> list[str]:
    """The mixers whose memory does not grow with the context."""
    return [name for name, block in BLOCKS.items() if block.State is LinearState]


def make_block(name: str, dims: Dims, options: dict[str, Any] | None = None) -> Any:
    """A new mixer. Raises UserError for an unknown block, an unknown option or sizes that cannot be."""
    block = BLOCKS.get(name)
    if block is None:
        raise UserError(f"block: {name!r} is unknown; choose from {', '.join(BLOCKS)}")
    try:
        chosen = block.Options(**(options or {}))
    except TypeError:
        known = list(block.Options.__dataclass_fields__)
        wrong = sorted(set(options or {}) - set(known))
        raise UserError(f"blocks.{name}.{wrong[0]}: no such option; choose from {', '.join(known) or 'none'}") from None
    return block(dims, chosen.resolve(dims))

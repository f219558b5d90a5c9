"""Token mixers, one a file, one contract:

    mixer = Mixer(dims, Options(...).resolve(dims))
    y, state = mixer(x, step, state)        # x, y [B, T, hidden]; state None, or Mixer.State() changed in place
    mixer.state_bytes(context, dtype), mixer.flops(tokens, past)

`Options` is a frozen dataclass whose `resolve` fills in what the base decides and refuses what cannot be.
"""

from __future__ import annotations

from contextlib import suppress
from math import isfinite
from typing import Any, get_args, get_type_hints

from postnas.blocks.attention import Attention, WindowAttention
from postnas.blocks.delta_net import DeltaNet
from postnas.blocks.dims import Dims
from postnas.blocks.gated_deltanet import GatedDeltaNet
from postnas.blocks.gla import GLA
from postnas.blocks.jet import Jet
from postnas.blocks.kda import KDA
from postnas.blocks.mamba2 import Mamba2
from postnas.blocks.mamba3 import Mamba3
from postnas.blocks.retnet import RetNet
from postnas.blocks.rwkv7 import RWKV7
from postnas.blocks.state import LinearState
from postnas.errors import UserError

BLOCKS: dict[str, Any] = {
    "attn": Attention,
    "swa": WindowAttention,
    "jet": Jet,
    "gated_deltanet": GatedDeltaNet,
    "gla": GLA,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "delta_net": DeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
    "mamba3": Mamba3,
}
"""Every mixer by the name that a placement uses. Adding one is one file and one line here."""


def linear_blocks() -> list[str]:
    """The mixers whose memory does not grow with the context."""
    return [name for name, block in BLOCKS.items() if block.State is LinearState]


def make_block(name: str, dims: Dims, options: dict[str, Any] | None = None) -> Any:
    """A new mixer. Raises UserError for an unknown block, an unknown option, a wrong type or sizes that cannot be."""
    block = BLOCKS.get(name)
    if block is None:
        raise UserError(f"block: {name!r} is unknown; choose from {', '.join(BLOCKS)}")
    known, given = get_type_hints(block.Options), {}
    for option, value in (options or {}).items():
        if option not in known:
            raise UserError(f"blocks.{name}.{option}: no such option; choose from {', '.join(known) or 'none'}")
        given[option] = _typed(f"blocks.{name}.{option}", value, get_args(known[option]) or (known[option],))
    return block(dims, block.Options(**given).resolve(dims))


def _typed(field: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """The value if it is of one of these types. Raises UserError where it is not, or is no finite number."""
    if float in kinds and type(value) in (int, str):  # YAML reads 1e-5 as text, and the official files hold it so
        with suppress(ValueError):
            value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not isfinite(value)):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{field}: {value!r} is no {wanted}; give one")
    return value

"""The cache of a hybrid: one state a layer, behind transformers' cache protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from postnas.blocks import BLOCKS
from postnas.blocks.step import Ledger
from postnas.errors import UserError
from postnas.models.config import HybridConfig


class HybridCache(Cache):
    """KV caches and recurrent states of one batch. It changes in place with every forward.

    Rows can be picked, reordered and repeated; tokens cannot be taken back, since a recurrent state
    does not hold them: `crop` says so in one line.
    """

    def __init__(self, config: HybridConfig) -> None:
        assert config.placement is not None
        self.states: list[Any] = [BLOCKS[name].State() for name in config.placement]
        self.ledgers: dict[int | None, Ledger] = {}
        self.seen: int | Tensor = 0
        """Real tokens of each row: one number while all rows agree, else [B]."""
        self.next_position: int | Tensor = 0
        """Position of the token that comes next: one number, or [B]."""
        self.slots = 0
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included: what transformers lengthens its masks by."""
        return self.slots

    def _select(self, rows: Tensor) -> None:
        for state in self.states:
            state.select(rows)
        for ledger in self.ledgers.values():
            if ledger.rank is not None:
                ledger.rank = ledger.rank.index_select(0, rows.to(ledger.rank.device))
        if isinstance(self.seen, Tensor):
            self.seen = self.seen.index_select(0, rows.to(self.seen.device))
        if isinstance(self.next_position, Tensor):
            self.next_position = self.next_position.index_select(0, rows.to(self.next_position.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; rows may repeat."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, in a row."""
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first forward."""
        for state in self.states:
            for value in state.tensors().values():
                return int(value.shape[0])
        return -1

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "cache.crop: a recurrent state cannot give tokens back; generate without assisted decoding, "
            "or start again from the prompt"
        )

    def reset(self) -> None:
        """Forget everything."""
        self.states = [type(state)() for state in self.states]
        self.ledgers, self.seen, self.next_position, self.slots = {}, 0, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes that the states hold now."""
        return sum(state.nbytes for state in self.states)

    def __len__(self) -> int:
        return len(self.states)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.slots > 0

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: where all say True, `generate` takes the length for unknown and reads all ids anew."""
        return [False] * len(self.states)

"""Batches of tokens: what of a window is repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from postnas.data import Tokens


def test_repeated_windows_find_their_beginning_again(tmp_path: Path) -> None:
    np.arange(64 * 40, dtype="uint16").tofile(tmp_path / "t.bin")
    plain = Tokens(tmp_path / "t.bin", "uint16", 0)
    share = Tokens(tmp_path / "t.bin", "uint16", 0, repeat=0.5)
    rows, same = share.batch(0, 40, 64, seed=3).tokens, plain.batch(0, 40, 64, seed=3).tokens
    changed = [row for row in range(40) if not torch.equal(rows[row], same[row])]
    assert 10 <= len(changed) <= 30
    for row in changed:
        assert torch.equal(rows[row, :40], same[row, :40]) and torch.equal(rows[row, 40:], rows[row, :24])
    by_rank = [share.batch(0, 40, 64, seed=3, rank=rank, world=2).tokens for rank in range(2)]
    assert torch.equal(rows[0::2], by_rank[0]) and torch.equal(rows[1::2], by_rank[1])

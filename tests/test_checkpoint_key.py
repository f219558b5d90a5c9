"""A training checkpoint is found again under the key that it was saved with, and under no other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from postnas.files import read_jsonl
from postnas.train import checkpoint
from postnas.train.loop import Plan, fit


def trained(step: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    parameters = {"w": nn.Parameter(torch.ones(4)), "v": nn.Parameter(torch.ones(2, 3))}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1)
    for _ in range(step):
        sum(p.square().sum() for p in parameters.values()).backward()
        optimizer.step()
    return parameters, optimizer


def test_step_is_found_under_its_own_key(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", "mine", 3, *trained())
    assert checkpoint.step_of(tmp_path / "c", "mine") == 3
    for other in ("another", "exp_avg", "exp_avg_sq"):
        assert checkpoint.step_of(tmp_path / "c", other) == 0


def test_a_stopped_stage_does_not_begin_anew(tmp_path: Path) -> None:
    done: list[int] = []

    def run(stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(3))

        def backward(step: int) -> dict[str, float]:
            if step == stop:
                raise KeyboardInterrupt
            done.append(step)
            loss = (p * (step + 1)).square().sum()
            loss.backward()
            return {"loss": loss.item()}

        fit(Plan("train", 6, 1, 0.1, "key", checkpoint_every=2), [{"p": p}], backward, tmp_path / str(stop is None))
        return p.detach()

    whole = run(None)
    done.clear()
    (tmp_path / "True").rename(tmp_path / "whole")
    try:
        run(5)
    except KeyboardInterrupt:
        (tmp_path / "False").rename(tmp_path / "True")
    again = run(None)
    assert done == [0, 1, 2, 3, 4, 4, 5]  # step 4 was not kept yet
    assert torch.equal(whole, again)
    assert [record["step"] for record in read_jsonl(tmp_path / "True" / "metrics.jsonl")] == list(range(6))

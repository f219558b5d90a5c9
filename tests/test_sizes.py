"""The stage size: heads and dims at one size of the state, timed on the device at hand and trained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_base, make_hybrid, make_text
from trial_runs import TRIAL, timeless, written

from postnas.__main__ import main
from postnas.blocks import linear_blocks, make_block
from postnas.blocks.dims import Dims
from postnas.errors import UserError
from postnas.files import read_json, read_jsonl
from postnas.models.load import load
from postnas.report.html import write_report
from postnas.search.sizes import expansion, front, grid, state_bytes
from postnas.search.speed import decode_speed, graphed

QWEN = Dims(hidden=1536, heads=12, kv_heads=2, head_dim=128, qkv_bias=True)
PAPER = {(256, 288, 4), (192, 384, 4), (128, 576, 4), (256, 144, 8), (192, 192, 8), (128, 288, 8)}
PAPER |= {(128, 192, 12), (96, 256, 12), (64, 384, 12)}
"""Key dim, value dim and heads of the paper's table of sizes, each of 294,912 numbers."""


def sizes(block: str, options: dict[str, Any], dims: Dims = QWEN) -> tuple[int, int, int]:
    with torch.device("meta"):
        mixer = make_block(block, dims, options)
    return mixer.key_dim, mixer.value_dim, mixer.heads


def test_the_grid_holds_the_sizes_of_the_paper() -> None:
    start = {"num_heads": 4, "head_dim": 192, "expand_v": 2.0}
    budget = state_bytes("gated_deltanet", QWEN, start, torch.bfloat16)
    found, refused = grid("gated_deltanet", QWEN, budget, [4, 8, 12], [64, 96, 128, 192, 256], start)
    assert {sizes("gated_deltanet", one) for one in found} >= PAPER
    for one in found:
        assert state_bytes("gated_deltanet", QWEN, one, torch.bfloat16) == pytest.approx(budget, rel=0.02)
    assert len(found) + len(refused) == 15


@pytest.mark.parametrize("block", linear_blocks())
def test_every_block_has_a_grid_at_its_own_size(block: str) -> None:
    own = sizes(block, {})
    budget = state_bytes(block, QWEN, {}, torch.bfloat16)
    found, _ = grid(block, QWEN, budget, [own[2], own[2] // 2], [own[0], own[0] // 2])
    assert own in {sizes(block, one) for one in found}
    for one in found:
        assert state_bytes(block, QWEN, one, torch.bfloat16) == pytest.approx(budget, rel=0.02)


def test_other_options_are_kept() -> None:
    found, _ = grid("jet", QWEN, 600_000, [12], [96], {"conv_size": 3, "expand_v": 9.0})
    assert found[0]["conv_size"] == 3 and found[0]["expand_v"] < 9


def test_value_dims_are_whole_for_every_key_dim() -> None:
    wrong = [(k, v) for k in range(1, 260) for v in range(1, 400) if int(k * expansion(k, v)) != v]
    assert wrong == []


def test_what_cannot_be_is_told_apart() -> None:
    found, refused = grid("gated_deltanet", QWEN, 20_000, [1, 12], [64, 512])
    assert [(one["num_heads"], one["head_dim"]) for one in found] == [(1, 64)]
    assert {(one["heads"], one["key_dim"]) for one in refused} == {(1, 512), (12, 64), (12, 512)}
    assert all("size.cache_bytes: 20000 is missed by" in one["reason"] for one in refused)
    with pytest.raises(UserError, match="size: none of the sizes can be"):
        grid("gated_deltanet", QWEN, 100, [12], [64, 512])
    with pytest.raises(UserError, match=r"none of the sizes can be.*too small"):
        grid("gated_deltanet", QWEN, 20_000, [0], [64])
    with pytest.raises(UserError, match="is more than heads of 1 can take"):
        grid("gla", QWEN, 10**9, [1], [1])


def test_the_front_is_what_no_other_beats() -> None:
    points = {"good": (1.0, 10), "fast": (0.0, 30), "both": (0.5, 20), "beaten": (0.4, 20), "slow": (0.9, 9)}
    points |= {"equal": (0.5, 20)}
    rows = [{"name": name, "decode_tokens_per_s": speed} for name, (_, speed) in points.items()]
    assert front(rows, {name: worth for name, (worth, _) in points.items()}) == ["good", "fast", "both", "equal"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_base(folder / "base"), make_text(folder / "text.jsonl")


SIZE = TRIAL | {"heads": [2, 4, 8], "key_dims": [4, 8], "tolerance": 0.1, "lrs": [1e-3]}
OFF: dict[str, Any] = {
    "select": {"blocks": []},
    "design": {"variants": {}},
    "align": {"options": {"jet": {"expand_v": 1.0}}},
}


@pytest.fixture(scope="module")
def done(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages; as many points are trained as decode fastest."""
    folder = tmp_path_factory.mktemp("done")
    assert main(["run", written(folder, inputs, **OFF, size=SIZE | {"trained": 3})]) == 0
    return folder / "run"


def test_every_point_is_timed_and_the_fastest_are_trained(done: Path) -> None:
    found = read_json(done / "sizes.json")
    points = {(row["key_dim"], row["value_dim"], row["heads"]) for row in found["grid"]}
    assert points == {(8, 8, 4), (4, 24, 2), (8, 16, 2), (4, 12, 4), (4, 6, 8), (8, 4, 8)}
    assert found["cache_bytes"] == 4 * 8 * 8 * 4 + 3 * 32 * 4
    for row in found["grid"]:
        assert row["state_bytes"] == pytest.approx(found["cache_bytes"], rel=0.1)
        assert row["decode_tokens_per_s"] > 0 and row["params"] > 0
    start, *others = found["grid"]
    assert start["name"] == "8x8x4"  # what the block has stands first, and is trained in any case
    fastest = sorted(others, key=lambda row: -row["decode_tokens_per_s"])[:2]
    assert {row["name"] for row in found["rows"]} == {"8x8x4", *(row["name"] for row in fastest)}
    assert found["rows"][0]["name"] == "8x8x4" and found["device"]
    speeds = {row["name"]: row["decode_tokens_per_s"] for row in found["grid"]}
    assert all(row["decode_tokens_per_s"] == speeds[row["name"]] for row in found["rows"])
    trained = [record for record in read_jsonl(done / "trials.jsonl") if "outputs" in record]
    assert len(trained) == 3


def test_the_choice_is_on_the_front_and_in_the_hybrid(done: Path) -> None:
    found = read_json(done / "sizes.json")
    chosen = found["chosen"]
    assert chosen["name"] in found["front"]
    by_score = [one["name"] for one in found["ranking"] if one["name"] in found["front"]]
    assert by_score[0] == chosen["name"]
    hybrid, _ = load(done / "model")
    mixer = next(layer.self_attn for layer in hybrid.model.layers if hasattr(layer.self_attn, "value_dim"))
    assert f"{mixer.key_dim}x{mixer.value_dim}x{mixer.heads}" == chosen["name"]
    page = write_report(done).read_text()
    assert "<h3>Sizes of the block</h3>" in page and "3 were not trained" in page


def test_measured_speeds_are_kept(done: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, nothing is timed and nothing trained: the same table, to the bit."""

    def timed(*_: object) -> None:
        raise AssertionError("something was measured again")

    before = read_json(done / "sizes.json")
    monkeypatch.setattr("postnas.search.variants.decode_speed", timed)
    monkeypatch.setattr("postnas.search.variants.train_mixers", timed)
    assert main(["size", written(done.parent, inputs, **OFF, size=SIZE | {"trained": 3})]) == 0
    assert read_json(done / "sizes.json") == before
    assert timeless(before) != before


def test_a_budget_of_its_own(inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the block's own sizes among the rows, where these do not fit."""
    size = SIZE | {"cache_bytes": 3000, "heads": [2], "key_dims": []}
    recipe = written(tmp_path, inputs, **OFF, size=size, stages=["align", "place", "size"])
    assert main(["run", recipe]) == 0
    found = read_json(tmp_path / "run" / "sizes.json")
    [row] = found["rows"]
    assert (row["key_dim"], row["heads"]) == (8, 2)
    assert row["state_bytes"] == pytest.approx(3000, rel=0.1)
    assert main(["run", written(tmp_path / "b", inputs, **OFF, size=size | {"cache_bytes": 7})]) == 2
    assert "size: none of the sizes can be" in capsys.readouterr().err
    assert not (tmp_path / "b" / "run" / "candidates").exists()


BAD: list[tuple[list[str], str]] = [
    (["--size.heads", "[0]"], "size.heads: 0 is not possible"),
    (["--size.tolerance", "1.5"], "size.tolerance: 1.5 is not possible"),
    (["--size.cache_bytes", "0"], "size.cache_bytes: 0 is not possible"),
    (["--size.trained", "0"], "size.trained: 0 is not possible"),
    (["--size.context", "0"], "size.context: 0 is not possible"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_wrong_settings_are_one_line(
    flags: list[str], message: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", written(tmp_path, inputs, **OFF, size=SIZE), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"postnas: {message}")


def test_a_placement_without_linear_layers_has_nothing_to_compare(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, inputs, place={"budget": 4}, stages=["align", "place", "select"])
    assert main(["run", recipe]) == 2
    assert "select: the placement has no linear layer" in capsys.readouterr().err


def test_both_ways_of_timing_count_the_same_cache() -> None:
    """The decoder of a GPU, here without its graph, and the plain calls of a CPU; a context that fills its blocks."""
    model = make_hybrid(["jet", "attn", "gla", "swa"]).requires_grad_(False)
    plain, fixed = decode_speed(model, 512, 2), graphed(model, 512, 2)
    assert plain.keys() == fixed.keys()
    assert min(fixed["decode_tokens_per_s"], plain["decode_tokens_per_s"]) > 0
    window = model.model.layers[3].self_attn
    # Both hold 512 slots of full attention; a window keeps W - 1 tokens as it is called, W as a ring.
    one = 2 * window.dims.kv_heads * window.dims.head_dim * 4
    assert fixed["cache_bytes"] - plain["cache_bytes"] == one


def test_what_does_not_fit_into_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("postnas.search.speed.measure", full)
    with pytest.raises(UserError, match="batch: 9 sequences of 7 tokens do not fit into the memory of"):
        decode_speed(make_hybrid(["jet"]), 7, 9)

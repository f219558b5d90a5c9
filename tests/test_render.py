"""The tables of the documents are those that benchmarks/render.py makes of benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modules import benchmark

from postnas.errors import UserError
from postnas.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


render = benchmark("render")


def row(model: str, metric: str, value: float, stderr: float | None = None) -> dict[str, Any]:
    return {"model": model, "metric": metric, "value": value, "stderr": stderr}


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {"command": "postnas run x.yaml", "device": "2 cores", "torch": "2.13.0", "date": "2026-11-24"}
    return about | {"rows": list(rows)}


@pytest.mark.parametrize("name", render.TABLES)
def test_document_holds_what_render_makes(name: str) -> None:
    """Where a file of results is missing, no figure may stand in its place."""
    text = (ROOT / render.TABLES[name].document).read_text(encoding="utf-8")
    assert render.rendered(text, name, RESULTS) == text


def test_render_keeps_everything_but_the_block() -> None:
    text = "before\n<!-- demo-cpu -->\nold\n<!-- /demo-cpu -->\nafter\n"
    new = render.replaced(text, "demo-cpu", "| new |")
    assert new == "before\n<!-- demo-cpu -->\n| new |\n<!-- /demo-cpu -->\nafter\n"
    assert render.block(new, "demo-cpu") == "| new |"


def test_render_without_markers_is_one_line() -> None:
    with pytest.raises(UserError, match="demo-cpu"):
        render.replaced("no markers", "demo-cpu", "x")


def test_a_missing_file_leaves_a_note_and_the_other_part(tmp_path: Path) -> None:
    text = "<!-- jet-nemotron-2b -->\nold 12.5\n<!-- /jet-nemotron-2b -->\n"
    note = render.rendered(text, "jet-nemotron-2b", tmp_path)
    assert "`jet-nemotron-2b-cpu.json`" in note and "`jet-nemotron-2b-cuda.json`" in note and "12.5" not in note
    write_json(tmp_path / "jet-nemotron-2b-cpu.json", result(CPU))
    half = render.rendered(text, "jet-nemotron-2b", tmp_path)
    assert "`jet-nemotron-2b-cuda.json`" in half and "| 1.08× |" in half and "`jet-nemotron-2b-cpu.json`" not in half


def test_render_writes_values_in_their_units() -> None:
    table = render.demo(
        result(
            row("base", "perplexity", 15.904, 0.51),
            row("hybrid", "perplexity", 18.2),
            row("base", "copy_accuracy", 0.812, 0.011),
            row("base", "decode_tokens_per_s@8192", 12.34),
            row("base", "cache_bytes@8192", 180 * 2**20),
            row("hybrid", "linear_layers", 15.0),
            row("hybrid", "seconds", 1234.4),
            row("hybrid", "peak_bytes", 3 * 2**30),
        )
    )
    lines = table.splitlines()
    assert lines[0] == "| | base | hybrid |"
    assert "| perplexity | 15.90 ± 0.51 | 18.20 |" in lines
    assert "| copy accuracy | 81.2% ± 1.1 | – |" in lines
    assert "| decode tokens/s at 8K | 12.3 | – |" in lines
    assert "| cache a sequence at 8K | 180.0 MiB | – |" in lines
    assert "| linear layers | – | 15 |" in lines
    assert "| seconds, all stages | – | 1,234 |" in lines
    assert "| peak memory | – | 3.00 GiB |" in lines
    assert lines[-1] == "`postnas run x.yaml`; 2 cores, torch 2.13.0, 2026-11-24; ± is one standard error."


def test_render_shows_what_it_knows_and_signs_differences() -> None:
    rows = [row("base", "copy_nll", 0.8), row("hybrid", "piqa_accuracy_difference", -0.015, 0.012)]
    lines = render.demo(result(*rows)).splitlines()
    assert "| PIQA, points against the base | – | -1.5 ± 1.2 |" in lines
    assert not any("0.8" in line for line in lines)


def scored(model: str, task: str, metric: str, score: float, stderr: float | None, **more: Any) -> dict[str, Any]:
    about = {"model": model, "task": task, "metric": metric, "score": score, "stderr": stderr, "n": 1000}
    return about | {"form": None} | more


BASE = [
    scored("base", "lambada", "accuracy", 0.3, 0.02, chance=0.0, form="the passage"),
    scored("base", "lambada", "nll", 2.5, 0.1, form="the passage"),
    scored("base", "piqa", "accuracy", 0.6, 0.021, chance=0.5),
    scored("base", "boolq", "accuracy", 0.4, 0.01, chance=0.62),
    scored("base", "gsm8k", "exact", 1.0, None, chance=0.0),
]


def test_offline_suite_says_what_the_base_can_do() -> None:
    lines = render.offline(result(*BASE)).splitlines()
    assert lines[0] == "| task | prompt | n | metric | chance | base | can the base do it |"
    assert "| `lambada` | the passage | 1,000 | accuracy | 0.0% | 30.0% ± 2.0 | yes |" in lines
    assert "|  |  |  | nll | – | 2.50 ± 0.1 | – |" in lines
    assert "| `piqa` | no examples | 1,000 | accuracy | 50.0% | 60.0% ± 2.1 | no |" in lines  # 4.8 standard errors
    assert "| `boolq` | no examples | 1,000 | accuracy | 62.0% | 40.0% ± 1.0 | no |" in lines  # below chance
    assert "| `gsm8k` | no examples | 1,000 | exact | 0.0% | 100.0% | – |" in lines  # an error is not known


def test_offline_suite_puts_the_hybrid_beside_the_base() -> None:
    pair = {"chance": 0.0, "difference": -0.06, "difference_stderr": 0.013, "kept": 0.8}
    hybrid = [
        scored("hybrid", "lambada", "accuracy", 0.24, 0.02, **pair),
        scored("hybrid", "drop", "f1", 0.1, 0.02, chance=0.0),
    ]
    lines = render.offline(result(*BASE, *hybrid)).splitlines()
    assert lines[0].endswith("| can the base do it | hybrid | difference | kept |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any(line.endswith("| yes | 24.0% ± 2.0 | -6.0 ± 1.3 | 80.0% |") for line in lines)
    assert any(line.endswith("| f1 | 0.0% | – | – | 10.0% ± 2.0 | – | – |") for line in lines)
    assert any(line.endswith("| no | – | – | – |") for line in lines)


CPU = {
    "weight_bytes": 4 * 2**30,
    "peak_over_weights": 1.081,
    "load_seconds": 12.34,
    "prefill_tokens_per_s": 9.0,
    "decode_tokens_per_s": 1.234,
}


def test_jet_nemotron_tables_have_a_column_a_batch() -> None:
    lines = render.jet_cpu(result(CPU)).splitlines()
    assert "| weights | 4.00 GiB |" in lines and "| decode, tokens/s | 1.23 |" in lines
    rows = [{"phase": "logits", "batch": 1, "tokens": 4096, "relative_error": 0.1352, "same_argmax": 0.706}]
    for batch in (1, 32):
        rows.append({"phase": "prefill", "batch": batch, "tokens": 4096, "tokens_per_s": 18000.0 * batch})
        sizes = {"cache_bytes": 2**20 * batch, "peak_bytes": 2**30 * batch}
        rows.append({"phase": "decode", "batch": batch, "tokens": 128, "tokens_per_s": 10.5 * batch} | sizes)
    lines = render.jet_cuda(result(*rows)).splitlines()
    assert lines[0] == "| 2 cores | batch 1 | batch 32 |"
    assert "| prefill of 4,096 tokens, tokens/s | 18,000 | 576,000 |" in lines
    assert "| decode of 128 steps behind them, tokens/s | 10.5 | 336 |" in lines
    assert "| peak memory, weights included | 1.00 GiB | 32.00 GiB |" in lines
    assert any("relative error 0.135, the same likeliest token at 70.6% of the places" in line for line in lines)

"""benchmarks/offline_suite.py: what is kept between calls, and what its table takes of that. No model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modules import benchmark

from postnas.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark, with a folder of one file as its model and made-up answers; `asked` tells what was worked on."""
    module = benchmark("offline_suite")
    module.asked = []

    def outputs(task: Any, model: Any, tokenizer: Any, rows: Any, label: str) -> list[dict[str, Any]]:
        module.asked.append(task.name)
        if task.name == "boolq":
            raise RuntimeError("out of memory")
        text = {"output": "x", "recall": 1.0, "exact": 1.0} if task.kind == "long" else {"gold": 0}
        same = {"choice": 0, "choice_norm": 1, "nll": 0.5, "loglikelihoods": [-1.0, -2.0]}
        return [{"id": str(number)} | text | same for number in rows]

    monkeypatch.setattr(module, "load_any", lambda *given: (None, lambda texts: {"input_ids": [[1] for _ in texts]}))
    monkeypatch.setattr(module, "base_folder", lambda name: Path(name))
    monkeypatch.setattr(module, "BASE", str(tmp_path / "model"))
    monkeypatch.setattr(module.suite, "rows", lambda task, tokenizer, limit, seed: range(limit))
    monkeypatch.setattr(module.suite, "outputs", outputs)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
    write_json(tmp_path / "model" / "model.json", {"weights": 1})
    (tmp_path / "model" / "README.md").write_text("a model")

    def call(*given: str) -> int:
        module.asked.clear()
        monkeypatch.setattr("sys.argv", ["offline_suite.py", *given, "--device", "cpu"])
        return module.main()

    module.call = call
    return module


def tasks_of(folder: Path) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in read_json(folder / "offline-suite.json")["rows"]))


def test_what_is_kept_is_not_made_again(bench: Any, tmp_path: Path) -> None:
    given = ("base", "--limit", "4", "--tasks", "piqa,needle@1k,needle@1024")
    assert bench.call(*given) == 0 and bench.asked == ["piqa", "needle@1024"]
    (tmp_path / "model" / "README.md").write_text("another text about it")
    assert bench.call(*given) == 0 and bench.asked == []
    assert tasks_of(tmp_path) == ["piqa", "needle@1024"]


@pytest.mark.parametrize("what", ["limit", "model", "no key"])
def test_what_was_made_otherwise_is_made_again(
    bench: Any, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.call("base", "--limit", "4", "--tasks", "piqa,sciq")
    path = tmp_path / "kept" / "base-piqa.json"
    if what == "model":
        write_json(tmp_path / "model" / "model.json", {"weights": 2})
    if what == "no key":
        write_json(path, {name: value for name, value in read_json(path).items() if name != "key"})
    bench.call("base", "--limit", "5" if what == "limit" else "4", "--tasks", "piqa")
    assert bench.asked == ["piqa"]
    assert tasks_of(tmp_path) == (["piqa", "sciq"] if what == "no key" else ["piqa"])
    assert ("base-sciq.json: was made with another" in capsys.readouterr().err) == (what != "no key")


def test_base_and_hybrid_meet_only_on_the_same_rows(bench: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "hybrid" / "model.json", {"weights": 3})
    bench.call("base", "--limit", "4", "--tasks", "piqa")
    bench.call("hybrid", str(tmp_path / "hybrid"), "--limit", "4", "--tasks", "piqa")
    rows = read_json(tmp_path / "offline-suite.json")["rows"]
    assert {row["model"] for row in rows} == {"base", "hybrid"}
    assert [row["difference"] for row in rows if row["model"] == "hybrid"] == [0.0, 0.0]
    bench.call("hybrid", str(tmp_path / "hybrid"), "--limit", "5", "--tasks", "piqa")
    rows = read_json(tmp_path / "offline-suite.json")["rows"]
    assert {row["model"] for row in rows} == {"hybrid"} and not any("difference" in row for row in rows)


def test_a_failed_task_is_told_at_the_end(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.call("base", "--limit", "4", "--tasks", "boolq,piqa") == 1
    assert tasks_of(tmp_path) == ["piqa"]
    assert capsys.readouterr().err.endswith("boolq: RuntimeError: out of memory\nfailed: boolq\n")


def test_tasks_outside_the_list_stand_behind_it(bench: Any, tmp_path: Path) -> None:
    assert "needle@2048" not in bench.TASKS
    assert bench.call("base", "--limit", "4", "--tasks", "needle@2k,mmlu,piqa") == 0
    assert tasks_of(tmp_path) == ["piqa", "mmlu", "needle@2048"]


@pytest.mark.parametrize(
    ("given", "words"),
    [(("base", "--tasks", "nosuch"), "'nosuch' is unknown"), (("hybrid",), "hybrid needs its model folder")],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    bench: Any, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "load_any", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        bench.call(*given)
    assert ended.value.code == 2 and words in capsys.readouterr().err

"""`postnas eval MODEL` without a run directory: by itself, beside a base, again, after a stop, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base, make_hybrid, make_text, make_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from postnas.data import load_tokenizer
from postnas.errors import UserError
from postnas.evaluate import code, sandbox, standalone
from postnas.evaluate.standalone import Settings, evaluate_alone, files_sha256, table
from postnas.evaluate.verdict import evaluate
from postnas.files import read_json, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a hybrid and a text."""
    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base", layers=2)
    hybrid = make_hybrid(["jet", "attn"], vocab_size=300, eos_token_id=0, pad_token_id=1)
    hybrid.save_pretrained(folder / "hybrid")
    make_tokenizer().save_pretrained(folder / "hybrid")
    make_text(folder / "text.jsonl", count=60)
    return folder


def settings(made: Path, **changes: Any) -> Settings:
    found = Settings(
        model=str(made / "hybrid"),
        base=None,
        tasks=["needle@320"],
        limit=3,
        text=None,
        perplexity_tokens=256,
        length=64,
        copy_passages=2,
        copy_tokens=16,
        copy_filler=16,
        allow_code=False,
        seed=1,
        dtype=None,
        threads=1,
    )
    return replace(found, **changes)


def copied(made: Path, tmp_path: Path) -> Path:
    """The same files, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def negate(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if "v_proj" in name)
    save_file(weights | {name: -weights[name]}, folder / "model.safetensors", metadata={"format": "pt"})


def refused(asked: Settings, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        evaluate_alone(asked, out, "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_alone_has_rows_and_a_file(made: Path, tmp_path: Path) -> None:
    result = evaluate_alone(settings(made), tmp_path / "out", "cpu")
    assert {row["model"] for row in result["rows"]} == {"model"}
    assert {row["metric"] for row in result["rows"]} == {"recall", "exact", "nll"}
    stored = read_json(tmp_path / "out" / "eval.json")
    assert stored["rows"] == result["rows"]
    assert stored["settings"]["model_files"] == files_sha256(made / "hybrid")
    assert not (tmp_path / "out" / "eval.partial.json").exists()
    lines = table(result).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("needle@320") and line.endswith("n 3") for line in lines)


def test_a_base_beside_it_and_a_text(made: Path, tmp_path: Path) -> None:
    asked = settings(made, base=str(made / "base"), text=str(made / "text.jsonl"), tasks=[])
    result = evaluate_alone(asked, tmp_path / "out", "cpu")
    values = {(row["task"], row["metric"], row["model"]): row["value"] for row in result["rows"]}
    assert {task for task, *_ in values} == {"perplexity", "copy"}
    for pair in result["paired"]:
        base, hybrid = (values[pair["task"], pair["metric"], name] for name in ("base", "hybrid"))
        assert pair["difference"] == pytest.approx(hybrid - base)
    (line,) = [line for line in table(result).splitlines() if line.startswith("perplexity") and " hybrid " in line]
    difference = next(pair["difference"] for pair in result["paired"] if pair["task"] == "perplexity")
    assert f"{difference:+.4f}" in line


def test_a_base_takes_the_type_of_the_model(made: Path, tmp_path: Path) -> None:
    """Without --dtype the base takes the model's own type: a base alone would be bfloat16, this hybrid is float32."""
    asked = settings(made, base=str(made / "base"))
    models = standalone._models(asked, "cpu")
    assert models["base"].dtype == models["hybrid"].dtype == torch.float32
    models = standalone._models(replace(asked, dtype="bfloat16"), "cpu")
    assert models["base"].dtype == models["hybrid"].dtype == torch.bfloat16


def test_a_finished_one_is_told_and_not_run_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate_alone(settings(made), tmp_path, "cpu")
    assert "done already" not in capsys.readouterr().out

    def load(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(standalone, "load_any", load)
    again = evaluate_alone(settings(made), tmp_path, "cpu")
    assert "eval.json is done already" in capsys.readouterr().out
    assert table(again) == table(first)


def test_a_stopped_one_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(made, tasks=["needle@320", "key_value@320"])
    whole = evaluate_alone(asked, tmp_path / "whole", "cpu")

    def stopped(*arguments: Any, save: Any, **options: Any) -> Any:
        def once(value: Any) -> None:
            save(value)
            raise KeyboardInterrupt

        return evaluate(*arguments, save=once, **options)

    monkeypatch.setattr(standalone, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_alone(asked, tmp_path / "part", "cpu")
    partial = tmp_path / "part" / "eval.partial.json"
    kept = read_json(partial)
    assert list(kept["outputs"]["model"]) == ["needle@320"]
    kept["outputs"]["model"]["needle@320"][0]["nll"] = 77.0  # a mark: what is kept is not made anew
    write_json(partial, kept)
    monkeypatch.setattr(standalone, "evaluate", evaluate)
    result = evaluate_alone(asked, tmp_path / "part", "cpu")
    assert result["outputs"]["model"]["needle@320"][0]["nll"] == 77.0
    assert result["outputs"]["model"]["key_value@320"] == whole["outputs"]["model"]["key_value@320"]
    assert not partial.exists()


def test_other_settings_are_refused_by_name(made: Path, tmp_path: Path) -> None:
    evaluate_alone(settings(made), tmp_path, "cpu")
    assert "another limit; choose another --out" in refused(settings(made, limit=2), tmp_path)
    assert "another seed" in refused(settings(made, seed=2), tmp_path)
    path = tmp_path / "eval.json"
    stored = read_json(path)
    write_json(path, stored | {"settings": stored["settings"] | {"of_another_version": 1}})
    assert "another of_another_version" in refused(settings(made), tmp_path)
    write_json(path, stored | {"settings": stored["settings"] | {"device": "cuda"}})
    assert "another device" in refused(settings(made), tmp_path)
    write_json(path, {"rows": []})
    assert "does not tell its settings" in refused(settings(made), tmp_path)


@pytest.mark.parametrize(
    ("change", "named"), [("weights", "model_files"), ("ends", "model_files"), ("base", "base_files")]
)
def test_files_that_changed_are_another_evaluation(made: Path, tmp_path: Path, change: str, named: str) -> None:
    folder = copied(made, tmp_path)
    asked = settings(folder, base=str(folder / "base"), tasks=["needle@320"], limit=1)
    evaluate_alone(asked, tmp_path / "out", "cpu")
    if change == "ends":
        path = folder / "hybrid" / "generation_config.json"
        path.write_text(json.dumps(read_json(path) | {"eos_token_id": 5}))
    else:
        negate(folder / ("base" if change == "base" else "hybrid"))
    assert f"another {named}" in refused(asked, tmp_path / "out")


def test_a_text_that_changed_is_another_evaluation(made: Path, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.jsonl", count=60)
    asked = settings(made, text=str(text), tasks=[])
    evaluate_alone(asked, tmp_path / "out", "cpu")
    make_text(text, count=60, seed=5)
    assert "another text_tokens" in refused(asked, tmp_path / "out")


def test_results_beside_the_weights_do_not_change_the_model(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path) / "hybrid"
    before = files_sha256(folder)
    write_json(folder / "eval.json", {})
    (folder / "README.md").write_text("A card.")
    assert files_sha256(folder) == before
    (folder / "tokenizer.json").rename(folder / "tokenizer_old.json")
    assert files_sha256(folder) != before


def test_a_base_with_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    path = folder / "base" / "tokenizer.json"
    asked = settings(folder, base=str(folder / "base"))
    values = read_json(path)
    values["model"]["merges"] = values["model"]["merges"][::-1]
    path.write_text(json.dumps(values))
    assert "--base: " in refused(asked, tmp_path / "out")
    assert "another tokenizer" in refused(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The same tokenizer in another form is the same.
    Tokenizer.from_file(str(made / "base" / "tokenizer.json")).save(str(path), pretty=False)
    evaluate_alone(replace(asked, tasks=["needle@320"], limit=1), tmp_path / "out", "cpu")


def test_a_base_with_another_vocabulary_is_refused(made: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "wide", layers=2, vocab_size=320)
    assert "has 320 tokens, the model 300" in refused(settings(made, base=str(base)), tmp_path / "out")


def test_mistakes_leave_nothing_behind(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no_such_task" in refused(settings(made, tasks=["no_such_task"]), out)
    assert "humaneval" in refused(settings(made, tasks=["humaneval"]), out)
    assert "perplexity_tokens" in refused(settings(made, text=str(made / "text.jsonl"), perplexity_tokens=10**6), out)
    assert not out.exists()


@pytest.mark.parametrize("jail", ["raise OSError('no process to spare')", "", None])
def test_a_launcher_that_fails_is_a_failed_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jail: str | None
) -> None:
    """One program is lost, not all that a model wrote."""
    monkeypatch.setattr(sandbox, "available", lambda: None)
    if jail is None:
        monkeypatch.setattr(sandbox.sys, "executable", str(tmp_path / "no_python"))
    else:
        (tmp_path / "jail.py").write_text(jail)
        monkeypatch.setattr(sandbox, "JAIL", tmp_path / "jail.py")
    problem = code.Problem("1", "def f():\n", "def f():\n", "assert f()", (), "    return 1")
    row = code.check(problem, problem.solution)
    assert row["passed"] == 0
    assert row["reason"].startswith("killed" if jail == "" else "not run: ")
    assert "\n" not in row["reason"]
    if jail:
        assert "no process to spare" in row["reason"]


def test_a_tokenizers_own_code_is_not_run_whatever_is_answered(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at the terminal, and a yes would run a Python file that came with the tokenizer."""
    folder, mark = copied(made, tmp_path) / "hybrid", tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    names = {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "Own"}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | names))
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(UserError):
        load_tokenizer(folder)
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017
        AutoTokenizer.from_pretrained(folder)
    assert mark.exists(), "the test must notice what it looks for"

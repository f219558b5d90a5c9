"""Which tasks names of tasks and groups stand for, and which of their rows are taken."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from suite_tasks import task, tokenizer

from postnas.commands import evaluate_model
from postnas.errors import UserError
from postnas.evaluate import groups, sandbox, suite
from postnas.evaluate.groups import Member
from postnas.evaluate.task import drawn, load_task, task_names


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks the hub or looks for the harness."""
    monkeypatch.setattr(groups, "runnable", lambda member: member.needs)


def test_names_stand_for_themselves_in_their_order(everything_runs: None) -> None:
    found, skipped = suite.wanted(["piqa", "needle@4096", "arc_easy", "piqa"], allow_code=False)
    assert [one.task.name for one in found] == ["piqa", "needle@4096", "arc_easy"]
    assert [one.group for one in found] == [None] * 3 and skipped == []


def test_no_task_has_a_groups_name() -> None:
    assert set(task_names()) & set(groups.group_names()) == set()


def test_a_long_task_has_one_name_however_its_length_is_written(everything_runs: None) -> None:
    found, _ = suite.wanted(["needle@4k", "needle@04096", "needle@4096", "needle@4K"], allow_code=False)
    assert [one.task.name for one in found] == ["needle@4096"]


@pytest.mark.parametrize("name", task_names())
def test_every_task_that_has_a_file_is_wanted_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: None)
    monkeypatch.setattr(groups, "runnable", lambda member: "a group was taken for the task")
    found, skipped = suite.wanted([name], allow_code=True)
    assert [(one.task.name, one.group) for one in found] == [(name, None)] and skipped == []
    chief, *others = suite.measures(found[0].task)
    assert chief.chance is not None, "what is kept is a share above chance"
    assert chief.metric not in [measure.metric for measure in others]


@pytest.mark.parametrize("group", ["commonsense", "retrieval", "paper"])
def test_a_group_is_its_tasks_and_what_is_skipped(everything_runs: None, group: str) -> None:
    found, skipped = suite.wanted([group], allow_code=False)
    members = groups.resolve(group)
    ours = list(dict.fromkeys(member.ours for member in members if member.ours))
    assert [one.task.name for one in found] == ours and len(ours) > 0
    assert {one.group for one in found} == {group}
    others = [member for member in members if member.ours is None]
    assert [one["task"] for one in skipped] == [member.name for member in others]
    for member, one in zip(others, skipped, strict=True):
        command = f"postnas eval --harness --tasks {member.harness} --num_fewshot {member.shots}"
        assert (member.needs or command) in one["reason"] and "\n" not in one["reason"]


def test_a_group_says_why_the_harness_cannot_run_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "runnable", lambda member: f"{member.name} is on the moon")
    _, skipped = suite.wanted(["commonsense"], allow_code=False)
    assert skipped == [{"task": "TruthfulQA", "reason": "TruthfulQA is on the moon"}]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["arc_easy", "commonsense"], None),
        (["commonsense", "arc_easy"], None),
        (["commonsense", "paper"], "commonsense"),
        (["paper", "commonsense"], "paper"),
    ],
)
def test_each_task_is_done_once_and_its_own_name_counts_most(
    everything_runs: None, names: list[str], group: str | None
) -> None:
    found, skipped = suite.wanted(names, allow_code=False)
    done = [one.task.name for one in found]
    assert len(done) == len(set(done)) and "arc_easy" in done
    assert [one.group for one in found if one.task.name == "arc_easy"] == [group]
    reasons = [one["task"] for one in skipped]
    assert len(reasons) == len(set(reasons))


def only_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group `code` holds HumanEval as a task of ours, and one of choices."""
    members = [Member("HumanEval", 0, ours="humaneval"), Member("PIQA", 0, ours="piqa")]
    monkeypatch.setattr(groups, "resolve", lambda group: members)


@pytest.mark.parametrize(
    ("allowed", "sandboxed", "reason"),
    [(False, None, "--allow-code"), (True, "this kernel has none", "cannot be confined here: this kernel has none")],
)
def test_code_that_may_not_run(
    monkeypatch: pytest.MonkeyPatch, allowed: bool, sandboxed: str | None, reason: str
) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: sandboxed)
    with pytest.raises(UserError, match=reason) as caught:
        suite.wanted(["piqa", "humaneval"], allow_code=allowed)
    assert str(caught.value).startswith("evaluate.tasks: humaneval ") and "\n" not in str(caught.value)
    only_code(monkeypatch)
    found, skipped = suite.wanted(["code"], allow_code=allowed)
    assert [one.task.name for one in found] == ["piqa"]
    assert [one["task"] for one in skipped] == ["humaneval"] and reason in skipped[0]["reason"]


def test_code_that_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: None)
    only_code(monkeypatch)
    for names, group in ((["humaneval"], None), (["code"], "code")):
        found, skipped = suite.wanted(names, allow_code=True)
        assert (found[0].task.name, found[0].group, skipped) == ("humaneval", group, [])


@pytest.mark.parametrize(
    "name",
    ["needle@", "needle@x", "nadel@4096", "needle@-4", "needle@4kk", "needle@4 k", "@4096", "needle", "Commonsense"],
)
def test_a_wrong_name_is_one_line(name: str) -> None:
    for find in (load_task, lambda name: suite.wanted([name], allow_code=False)):
        with pytest.raises(UserError, match=r"^evaluate\.tasks: ") as caught:
            find(name)
        assert repr(name) in str(caught.value) and "needle" in str(caught.value) and "\n" not in str(caught.value)


def test_a_length_may_be_in_thousands() -> None:
    assert (load_task("needle@4k").length, load_task("needle@64K").length) == (4096, 65_536)
    assert load_task("phone_book@300").length == 300
    one = load_task("variable_tracking@1k")
    assert (one.name, one.kind, one.max_new_tokens) == ("variable_tracking@1024", "long", 48)


def test_a_length_that_no_prompt_has_is_one_line() -> None:
    with pytest.raises(UserError, match="give") as caught:
        suite.rows(load_task("needle@8"), tokenizer(), 2, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("limit", 0), ("length", 0), ("perplexity_tokens", -1), ("copy_passages", -1), ("threads", 0)],
)
def test_a_number_that_eval_cannot_take_is_one_line(tmp_path: Path, setting: str, value: int) -> None:
    options: dict[str, Any] = {"tasks": "piqa", "out": tmp_path / "out", setting: value}
    with pytest.raises(UserError, match=rf"^(evaluate\.)?{setting}: {value} is not possible; give ") as caught:
        evaluate_model("no-such-model", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# ---- which rows ---------------------------------------------------------------------------------


def test_a_larger_limit_holds_the_rows_of_a_smaller_one() -> None:
    items = list(range(50))
    draws = [drawn(items, limit, seed=3) for limit in (0, 1, 7, 20, 50, 99, None)]
    for small, large in pairwise(draws):
        assert set(small) <= set(large) and large == sorted(large)
    assert [len(draw) for draw in draws] == [0, 1, 7, 20, 50, 50, 50]
    assert drawn(items, 7, seed=3) == draws[2] != drawn(items, 7, seed=4)


@pytest.mark.parametrize("kind", ["choice", "last_word", "answer", "code"])
def test_every_kind_draws_its_rows_by_seed(tmp_path: Path, kind: str) -> None:
    one = task(tmp_path, kind, count=30)
    few, more = (suite.rows(one, tokenizer(), limit, seed=2) for limit in (5, 11))
    assert few == suite.rows(one, tokenizer(), 5, seed=2) != suite.rows(one, tokenizer(), 5, seed=3)
    assert [row for row in more if row in few] == few and len(more) == 11
    assert few != suite.rows(one, tokenizer(), None, seed=2)[:5], "the first rows are no sample"


def test_long_rows_are_made_by_seed() -> None:
    one = load_task("needle@256")
    assert suite.rows(one, tokenizer(), 2, seed=2) == suite.rows(one, tokenizer(), 2, seed=2)
    assert suite.rows(one, tokenizer(), 2, seed=2) != suite.rows(one, tokenizer(), 2, seed=3)

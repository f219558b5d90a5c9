"""The suite: a task of every kind from its file to what a model gives and what that is worth, on tiny models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example
from hypothesis import given as over
from hypothesis import strategies as st
from suite_tasks import direct, given, greedy, model, reported, task, tokenizer, words, write_lines
from tiny import WORDS
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from postnas.errors import UserError
from postnas.evaluate import long, sandbox, suite, written
from postnas.evaluate.answers import METRICS, cut
from postnas.evaluate.choice import Row
from postnas.evaluate.task import Task, encoded, load_task

needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=str(sandbox.available()))

# ---- every kind, from its file to the verdict --------------------------------------------------


def test_choice_with_lead_and_shots_of_its_subject(tmp_path: Path) -> None:
    shots = [
        {"q": f"Example {number}", "right": f"yes {number}", "wrong": "no", "label": 0, "subject": subject}
        for number, subject in enumerate(["letters", "stones", "stones", "letters", "stones"])
    ]
    one = task(
        tmp_path, "choice", lead="About {subject}.\n\n", shots=2, shots_by="subject",
        shots_from=write_lines(tmp_path / "shots.jsonl", shots),
    )  # fmt: skip
    rows, outputs = given(one)
    assert [row.id for row in rows] == [str(number) for number in range(7)], "examples of another file cost no row"
    assert rows[1].contexts == (
        "About letters.\n\nQuestion: Example 0\nAnswer: yes 0\n\nQuestion: Example 3\nAnswer: yes 3\n\n"
        f"Question: The {words(5)[0]} and the {words(5)[1]}\nAnswer:",
    ) * 3  # fmt: skip
    assert rows[0].contexts[0].startswith("About stones.\n\nQuestion: Example 1\n")
    for row, got in zip(rows, outputs, strict=True):
        values = [direct(*pair)[0] for pair in zip(row.contexts, row.continuations, strict=True)]
        assert got["loglikelihoods"] == pytest.approx(values, abs=2e-4)
        assert (got["id"], got["gold"]) == (row.id, row.gold)
    got = reported(one, {"base": outputs})
    assert got["rows"][0]["value"] == statistics.fmean(float(row["choice"] == row["gold"]) for row in outputs)


def test_choice_with_its_first_records_as_shots_scores_none_of_them(tmp_path: Path) -> None:
    rows, _ = given(task(tmp_path, "choice", shots=2))
    assert [row.id for row in rows] == ["2", "3", "4", "5", "6"]
    first, second = words(0), words(5)
    assert (
        rows[0]
        .contexts[0]
        .startswith(
            f"Question: {first[0].title()} {first[1]} {' '.join(first[3:])}\nAnswer: {first[2]}\n\n"
            f"Question: The {second[0]} and the {second[1]}\nAnswer: {second[3]} {second[2]}\n\nQuestion: "
        )
    ), "an example shows the right choice of its own row"


def test_choices_of_many_lengths_and_the_chance_of_a_guess(tmp_path: Path) -> None:
    one = task(tmp_path, "choice")
    _, outputs = given(one)
    accuracy, norm = suite.measures(one)
    assert (accuracy.metric, norm.metric) == ("accuracy", "accuracy_norm")
    assert accuracy.chance is not None and accuracy.chance(outputs) == pytest.approx(1 / 3)
    stated = suite.measures(replace(one, chance=0.5))[0].chance
    assert stated is not None and stated(outputs) == 0.5


def test_last_word_is_right_where_all_its_tokens_are_the_most_likely(tmp_path: Path) -> None:
    one = task(tmp_path, "last_word")
    rows = suite.rows(one, tokenizer(), None, seed=1)
    # A random model would get none right: some rows ask for what it says itself, and some for that and a word more.
    said = [greedy(row.prompt, 1) for row in rows]
    ends = ["", " stone", None]
    asked = [row.answers[0] if end is None else text + end for row, text, end in zip(rows, said, ends * 3)]
    rows = [replace(row, answers=(text,)) for row, text in zip(rows, asked, strict=True)]
    outputs = suite.outputs(one, model(), tokenizer(), rows, "words")
    for row, got in zip(rows, outputs, strict=True):
        total, best = direct(row.prompt, row.answers[0])
        assert got == {"id": row.id, "accuracy": float(best), "nll": pytest.approx(-total, abs=2e-4)}
    accuracy, nll = reported(one, {"base": outputs})["rows"]
    assert 0 < accuracy["value"] < 1 and accuracy["metric"] == "accuracy"
    assert nll["value"] == pytest.approx(-statistics.fmean(direct(r.prompt, r.answers[0])[0] for r in rows), abs=2e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_answers_are_what_generate_writes_and_the_metric_gives(tmp_path: Path, metric: str) -> None:
    one = task(tmp_path, "answer", metric=metric)
    rows = suite.rows(one, tokenizer(), None, seed=1)
    written_out = [cut(greedy(row.prompt, 9), ["e", "\n"]) for row in rows]
    assert len(set(written_out)) > 1
    # Half of the rows ask for what the model writes.
    rows = [
        replace(row, answers=(*row.answers, text)) if number % 2 and text.strip() else row
        for number, (row, text) in enumerate(zip(rows, written_out, strict=True))
    ]
    outputs = suite.outputs(one, model(), tokenizer(), rows, "answers")
    for row, got, text in zip(rows, outputs, written_out, strict=True):
        expected = METRICS[metric](text, row.answers)
        assert got == {"id": row.id, "output": text, "answers": list(row.answers)} | expected
    names = [measure.metric for measure in suite.measures(one)]
    assert names == list(METRICS[metric]("", ("",)))
    got = reported(one, {"base": outputs, "hybrid": outputs})
    assert [row["metric"] for row in got["rows"]] == names * 2
    for row in got["rows"]:
        assert row["value"] == statistics.fmean(output[row["metric"]] for output in outputs)
    assert all(pair["difference"] == 0.0 for pair in got["paired"])


def test_an_answer_ends_at_its_stop_text_and_at_the_end_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tokenizer().eos_token_id
    texts = iter(["stone", "window.\nQuestion: and", " The garden"])

    def said(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        assert options["max_new_tokens"] == 9 and options["end_ids"] == {end}
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            assert prompt, "no prompt"
            tokens = tokenizer()([text])["input_ids"][0]
            found.append([*tokens, end])
            assert options["stop"](tokens) == ("\n" in text)
        return found

    monkeypatch.setattr(written, "generate", said)
    one = task(tmp_path, "answer", count=3, metric="exact", answers="right", stop=["\n"])
    rows = [replace(row, answers=(word,)) for row, word in zip(suite.rows(one, None, None, 0), WORDS[1:4], strict=True)]
    outputs = suite.outputs(one, model(), tokenizer(), rows, "answers")
    assert [row["output"] for row in outputs] == ["stone", "window.", " The garden"]
    assert [row["exact"] for row in outputs] == [1.0, 1.0, 1.0], "full stop, article and case do not count"


def wrote(monkeypatch: pytest.MonkeyPatch, completions: Sequence[str], by: Any) -> None:
    """Lets models write these completions, each with an end of text."""

    def said(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        assert len(prompts) == len(completions) and options["end_ids"] == {by.eos_token_id}
        return [[*ids, by.eos_token_id] for ids in by(list(completions), add_special_tokens=False)["input_ids"]]

    monkeypatch.setattr(written, "generate", said)


@needs_sandbox
def test_programs_are_run_with_their_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, unclear = "    y = x\n    return x + y\ndef more(", "    return x + 4\n", "    return 2 * (x\n"
    wrote(monkeypatch, [right, wrong, unclear], tokenizer())
    one = task(tmp_path, "code", count=3)
    rows, outputs = given(one)
    assert [row.prompt for row in rows] == [f"def double{number}(x):\n" for number in range(3)]
    assert [(row["id"], row["passed"]) for row in outputs] == [("T/0", 1), ("T/1", 0), ("T/2", 0)]
    assert outputs[0]["completion"] == "    y = x\n    return x + y" and outputs[0]["reason"] == "passed"
    assert outputs[1]["reason"].startswith("failed: AssertionError") and "SyntaxError" in outputs[2]["reason"]
    (row,) = reported(one, {"base": outputs})["rows"]
    assert (row["metric"], row["value"], row["n"]) == ("passed", pytest.approx(1 / 3), 3)


@cache
def sentencepiece() -> Any:
    """A tokenizer of SentencePiece's kind: a mark for each space, one more before every text, bytes for the rest."""
    pieces = ["<unk>", "</s>", "▁", "\n", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@needs_sandbox
def test_a_program_keeps_its_indentation_where_decoding_a_text_drops_its_first_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by, body = sentencepiece(), "    y = x\n    return x + y"
    (ids,) = by([body])["input_ids"]

    def said(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        return [ids[1:]]  # behind a prompt no mark stands before the text

    monkeypatch.setattr(written, "generate", said)
    one = task(tmp_path, "code", count=1)
    rows = suite.rows(one, by, None, 0)
    (got,) = suite.outputs(one, model(), by, rows, "code")
    assert got == {"id": "T/0", "completion": body, "passed": 1, "reason": "passed"}


LETTERS = "aZ 0.\n\t_é漢🦙"


@pytest.mark.parametrize("make", [tokenizer, sentencepiece])
@example("漢" * 9 + "🦙" * 3, "漢").via("the last tokens of the prompt begin inside a character")
@example("é", "漢")
@over(st.text(LETTERS, min_size=1, max_size=30), st.text(LETTERS, max_size=30))
def test_what_is_written_behind_a_prompt_is_decoded_to_the_letter(make: Any, prompt: str, answer: str) -> None:
    by = make()
    ids, (before,) = by([prompt + answer])["input_ids"][0], by([prompt])["input_ids"]
    if ids[: len(before)] == before:  # else a token reaches over the border
        assert written._behind(by, before)(ids[len(before) :]) == answer


@pytest.mark.parametrize("make", [tokenizer, sentencepiece])
def test_a_stop_text_may_begin_with_the_space_that_an_answer_begins_with(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by, stopped = make(), []

    def said(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        made = []
        for text in (" stone and more", "stone and more", "a  stone", " ston"):
            start = by([f"x{text}"])["input_ids"][0]
            ids = start[len(by(["x"])["input_ids"][0]) :]
            stopped.append(next((n for n in range(len(ids)) if options["stop"](ids[: n + 1])), None) is not None)
            made.append(ids)
        return made

    monkeypatch.setattr(written, "generate", said)
    one = task(tmp_path, "answer", count=4, stop=[" stone"])
    outputs = suite.outputs(one, model(), by, suite.rows(one, by, None, 0), "answers")
    assert stopped == [True, False, True, False]
    assert [row["output"] for row in outputs] == ["", "stone and more", "a ", " ston"]


@pytest.mark.parametrize("name", ["needle@256", "key_value@256", "phone_book@256", "variable_tracking@512"])
def test_long_rows_are_made_answered_and_scored(name: str) -> None:
    one = load_task(name)
    rows, outputs = given(one, limit=2)
    assert len(rows) == 2 and all(row.tokens == one.length for row in rows)
    for row, got in zip(rows, outputs, strict=True):
        assert one.max_new_tokens is not None
        text = greedy(row.prompt, one.max_new_tokens)
        continuation = long.answer_text(row)
        count = len(tokenizer()(row.prompt + continuation)["input_ids"]) - row.tokens
        nll = -direct(row.prompt, continuation)[0] / count
        assert got == {
            "id": row.id, "output": text, "answers": list(row.answers), "depth": row.depth,
            **long.score(row, text), "nll": pytest.approx(nll, abs=2e-4),
        }  # fmt: skip
    assert [row["metric"] for row in reported(one, {"base": outputs})["rows"]] == ["recall", "exact", "nll"]


def test_a_long_answer_that_is_written_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = load_task("needle@256")
    rows = suite.rows(one, tokenizer(), 3, seed=1)
    wrote(
        monkeypatch,
        [f" {rows[0].answers[0]}. And", f" {rows[1].answers[0]}7", f" It is {rows[2].answers[0]}"],
        tokenizer(),
    )
    outputs = suite.outputs(one, model(), tokenizer(), rows, "needle")
    assert [row["exact"] for row in outputs] == [1.0, 0.0, 1.0]
    assert reported(one, {"base": outputs})["rows"][0]["value"] == pytest.approx(2 / 3)


# ---- where a continuation begins ----------------------------------------------------------------


class Pairs:
    """A token a character, but `ab` is one; with `bos`, a 1 stands before every text."""

    def __init__(self, bos: bool = False, specials: tuple[int | None, int | None] = (None, 0)) -> None:
        self.bos, (self.bos_token_id, self.eos_token_id) = bos, specials

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * self.bos + list(map(ord, text.replace("ab", "\x02"))) for text in texts]}


A, B, C = map(ord, "abc")


@pytest.mark.parametrize(
    ("by", "pair", "expected"),
    [
        (Pairs(), ("c", "ba"), ([C], [B, A])),
        (Pairs(), ("ca", "bc"), ([C, 2], [C])),  # the a went into a token with the b
        (Pairs(), ("ca", "b"), ([C], [2])),  # at least one token is left
        (Pairs(), ("a", "b"), ([0], [2])),  # then nothing stands before it but a special token
        (Pairs(), ("", "cb"), ([0], [C, B])),
        (Pairs(specials=(7, 0)), ("", "cb"), ([7], [C, B])),  # that of the beginning first, even where its id is 0
        (Pairs(specials=(0, 7)), ("", "cb"), ([0], [C, B])),
        (Pairs(bos=True, specials=(1, 0)), ("", "cb"), ([1], [C, B])),  # one is there already
        (Pairs(bos=True, specials=(1, 0)), ("c", "b"), ([1, C], [B])),
    ],
)
def test_a_continuation_begins_behind_as_many_tokens_as_its_context_has(
    by: Pairs, pair: tuple[str, str], expected: tuple[list[int], list[int]]
) -> None:
    assert encoded(by, [pair]) == [expected]
    assert encoded(by, [("cc", "b"), pair])[1] == expected, "a pair does not depend on the others"


def test_nothing_to_begin_with_is_one_line() -> None:
    assert encoded(Pairs(), []) == []
    with pytest.raises(UserError, match=r"^context: is empty.*give a context$"):
        encoded(Pairs(specials=(None, None)), [("", "c")])


def test_an_empty_context_is_scored_behind_the_end_token(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "empty.jsonl", [{"a": "river", "b": "stone"}])
    one = Task("empty", source, "none", "test", "", choices=["{a}", "{b}"], gold=0)
    rows, (got,) = given(one)
    assert rows == [Row("0", ("", ""), (" river", " stone"), 0)]
    for text, value in zip(rows[0].continuations, got["loglikelihoods"], strict=True):
        ids = torch.tensor([[tokenizer().eos_token_id, *tokenizer()([text])["input_ids"][0]]])
        logp = model()(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        assert value == pytest.approx(logp.gather(1, ids[0, 1:, None]).sum().item(), abs=2e-4)
        assert math.isfinite(value)

"""Long-context tasks: exact length, one right answer, spread depths, and a reader that gets every row right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer, sentences
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from postnas.errors import UserError
from postnas.evaluate import long
from postnas.evaluate.long import TASKS, WORDS, Case, answer_text, make, score, smallest

HIDDEN = [task for task in TASKS if TASKS[task].line is None]
LENGTHS = (128, 200, 333, 1024, 4096, 32768)


@cache
def tiny() -> Any:
    return make_tokenizer()


@cache
def metaspace() -> Any:
    """Puts a space before every text, merges over words and adds a token at the start: parts do not add up."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    letters = [chr(code) for code in range(32, 127)] + ["\n", "\u2581"]
    specials = ["<unk>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(100), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@cache
def smollm2() -> Any:
    root = os.environ.get("POSTNAS_TEST_CACHE") or Path.home() / ".cache" / "postnas"
    folders = sorted(Path(root).glob("gguf/*-2/tokenizer.json"))
    if not folders:
        pytest.skip("no converted GGUF with its tokenizer in the package cache")
    return AutoTokenizer.from_pretrained(folders[0].parent)


def read(task: str, prompt: str) -> list[str]:
    """What a reader who overlooks nothing answers, found in the prompt alone."""
    body, asked = prompt.split("\n\nQuestion: ")
    if task == "variable_tracking":
        value = re.search(r"variables that hold (\d+) are$", asked)
        assert value
        held: dict[str, str] = {}
        for name, source in re.findall(r"Let (\w+) = (\w+)\.", body):
            assert name not in held
            held[name] = source if source.isdigit() else held[source]  # a source is set before it is used
        return [name for name, what in held.items() if what == value[1]]
    if task == "key_value":
        key = re.search(r'Answer: ("\w+":)$', asked)
        pattern = r"^{} (\d+),$"
    elif task == "phone_book":
        key = re.search(r"Answer: (\w+ \w+:)$", asked)
        pattern = r"^{} ([\d-]+)$"
    else:
        key = re.search(r"Answer: The (?:4 )?secret numbers? (of the \w+ \w+) (?:is|are)$", asked)
        pattern = r"secret numbers? {} is (\d+)\."
    assert key
    return re.findall(pattern.format(re.escape(key[1])), body, flags=re.MULTILINE)


def check(task: str, case: Case, tokenizer: Any, length: int) -> None:
    assert len(tokenizer(case.prompt, verbose=False)["input_ids"]) == case.tokens <= length
    assert read(task, case.prompt) == list(case.answers)
    assert score(case, answer_text(case)) == {"recall": 1.0, "exact": 1.0}
    question = case.prompt[case.prompt.index("Question:") :]
    pads = case.prompt[: case.prompt.index("\n")]
    for answer in case.answers:
        assert answer not in question and answer not in pads
        assert sum(answer in other for other in case.answers) == 1
        if task == "variable_tracking":
            facts = re.findall(r"Let \w+ = \w+\.", case.prompt)
            assert case.prompt.count(answer) == sum(answer in fact for fact in facts) <= 2
        else:
            assert case.prompt.count(answer) == 1
    assert case.prompt == case.prompt.rstrip()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_length_asked_with_the_real_tokenizer(task: str, length: int) -> None:
    if length < smallest(task, smollm2()):
        with pytest.raises(UserError, match="too few"):
            make(task, smollm2(), length, rows=2, seed=0)
        return
    for case in make(task, smollm2(), length, rows=1 if length > 10_000 else 2, seed=0):
        assert case.tokens == length
        check(task, case, smollm2(), length)


@settings(max_examples=25)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 900), st.integers(0, 2**40), st.booleans())
def test_a_perfect_reader_gets_every_row_right(task: str, extra: int, seed: int, merging: bool) -> None:
    tokenizer = metaspace() if merging else tiny()
    length = smallest(task, tokenizer) + extra
    for case in make(task, tokenizer, length, rows=2, seed=seed):
        check(task, case, tokenizer, length)
        if extra > 200:  # below, there may be no sentence to leave out for words that fill the gap
            assert length - case.tokens <= (4 if merging else 0)


@pytest.mark.parametrize("task", TASKS)
def test_parts_that_do_not_add_up_still_give_the_length(task: str) -> None:
    missing = [3000 - case.tokens for case in make(task, metaspace(), 3000, rows=6, seed=1)]
    assert min(missing) == 0 and max(missing) <= 4


@pytest.mark.parametrize("task", TASKS)
def test_the_smallest_length_works_and_one_less_is_refused(task: str) -> None:
    least = smallest(task, tiny())
    for seed in range(5):
        for case in make(task, tiny(), least, rows=4, seed=seed):
            check(task, case, tiny(), least)
    with pytest.raises(UserError, match=rf"^length: {least - 1} tokens .*{task}.* give {least} or more$"):
        make(task, tiny(), least - 1, rows=1, seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_depths_are_spread_evenly(task: str) -> None:
    rows = 10
    for number, case in enumerate(make(task, tiny(), 8192, rows=rows, seed=3)):
        assert abs(case.depth - (number + 0.5) / rows) < 0.03
        body = case.prompt[: case.prompt.index("Question:")]
        assert abs(body.index(case.answers[0]) / len(body) - case.depth) < 0.05
        places = [case.prompt.index(answer) for answer in case.answers]
        assert places == sorted(places)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_give_the_same_rows_and_others_give_others(task: str) -> None:
    rows = make(task, tiny(), 1100, rows=3, seed=5)
    assert rows == make(task, tiny(), 1100, rows=3, seed=5)
    others = make(task, tiny(), 1100, rows=3, seed=6) + make(task, tiny(), 1200, rows=3, seed=5)
    answers = [case.answers for case in rows + others]
    assert len(set(answers)) == len(answers)
    assert len({case.id for case in rows + others}) == len(answers)
    tables = [set(case.prompt.splitlines()) for case in rows]
    assert tables[0] != tables[1]  # rows differ in more than their question and order


def test_rows_are_the_same_in_every_process() -> None:
    code = """
import hashlib
from postnas.evaluate.long import TASKS, make
def letters(texts, **kwargs):
    return {"input_ids": [list(text) for text in texts]}
rows = [case for task in TASKS for case in make(task, letters, 2000, 2, 0)]
print(hashlib.sha256("".join(case.prompt for case in rows).encode()).hexdigest())
"""
    hashes = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert hashes[0] == hashes[1] != b""


@pytest.mark.parametrize("tokenizer", [tiny, smollm2], ids=["tiny", "smollm2"])
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_the_prompt_and_fits_the_new_tokens(task: str, tokenizer: Any) -> None:
    tokenizer = tokenizer()
    for case in make(task, tokenizer, 1100, rows=3, seed=2):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (case.prompt, case.prompt + answer_text(case)))
        assert whole[: len(prompt)] == prompt
        assert 0 < len(whole) - len(prompt) <= TASKS[task].max_new_tokens


def test_made_up_text_is_varied_and_holds_no_digit_and_no_key_word() -> None:
    case = make("needle", tiny(), 32768, rows=1, seed=0)[0]
    body = case.prompt[: case.prompt.index("\n\nQuestion")].split("\n", 1)[1]
    found = [sentence for sentence in re.split(r"(?<=\.)\s", body) if case.answers[0] not in sentence]
    assert len(found) > 400 and len(set(found)) > 0.99 * len(found)
    words = set(re.findall(r"\w+", " ".join(found).lower()))
    assert len(words) > 200
    assert not words & {*WORDS["colour"], *WORDS["animal"]} and not any(word.isdigit() for word in words)
    lists = [word for name in WORDS if name not in ("colour", "animal") for word in WORDS[name]]
    assert not {*lists} & {*WORDS["colour"], *WORDS["animal"]}


@pytest.mark.parametrize("task", HIDDEN)
def test_real_text_stays_in_its_order_and_holds_no_key(task: str) -> None:
    some = [f"A {colour} {animal} came by." for colour, animal in product(WORDS["colour"][::8], WORDS["animal"])]
    documents = [" ".join(some), *sentences(60), "word " * 900]
    joined = " ".join(" ".join(documents).split())
    for case in make(task, tiny(), 4096, rows=4, seed=0, filler=documents):
        check(task, case, tiny(), 4096)
        assert 4096 - case.tokens <= 2
        for colour, animal in re.findall(r"secret numbers? of the (\w+) (\w+)", case.prompt):
            assert f"{colour} {animal}" not in joined
        body = case.prompt[: case.prompt.index("\n\nQuestion")].split("\n", 1)[1]
        for part in re.split(r"[^.\n]*(?:secret number|Let [A-Z]{5} = )[^.]*\.|\n", body):
            assert " ".join(part.split()) in joined


def test_text_without_stops_or_spaces_can_be_filler() -> None:
    for case in make("needle", tiny(), 2000, rows=2, seed=0, filler=["x" * 9000, "", "\u6cb3" * 3000]):
        check("needle", case, tiny(), 2000)
        assert 2000 - case.tokens <= 2


def test_tables_take_no_filler() -> None:
    assert make("phone_book", tiny(), 700, 1, 0, filler=["a few words"]) == make("phone_book", tiny(), 700, 1, 0)


def test_score_counts_whole_answers() -> None:
    case = Case("x", "prompt", 1, ("1234567", "555-0134"), 0.5)
    assert score(case, " 1234567, 555-0134.") == {"recall": 1.0, "exact": 1.0}
    assert score(case, "555-0134\n1234567") == {"recall": 1.0, "exact": 1.0}
    assert score(case, "It is 1234567!") == {"recall": 0.5, "exact": 0.0}
    assert score(case, "12345678 and 91234567 and 555-01345") == {"recall": 0.0, "exact": 0.0}
    assert score(case, "") == {"recall": 0.0, "exact": 0.0}
    assert answer_text(case) == " 1234567, 555-0134"


def test_a_case_goes_through_json() -> None:
    case = make("needle_multi_value", tiny(), 700, rows=1, seed=0)[0]
    fields = json.loads(json.dumps(asdict(case)))
    assert Case(**fields | {"answers": tuple(fields["answers"])}) == case


def test_every_task_says_what_it_is_in_one_line() -> None:
    assert all(task.about and "\n" not in task.about for task in TASKS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "haystack"}, r"^task: 'haystack' is unknown; choose from needle, .*variable_tracking$"),
        ({"rows": 0}, r"^rows: 0 is too few; give 1 or more$"),
        (
            {"filler": ["too little text"]},
            r"^filler: \d+ tokens of text are fewer than the length, 700; give more text$",
        ),
        ({"filler": []}, r"^filler: 0 tokens"),
        (
            {"filler": [f"{colour} {animal}." for colour, animal in product(WORDS["colour"], WORDS["animal"])]},
            r"^filler: its text holds the keys or answers .*; give other text$",
        ),
    ],
)
def test_mistakes_end_in_one_line(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "_documents", lambda documents, draw: map(long.Piece, documents))  # all, in one go
    arguments: dict[str, Any] = {"task": "needle", "tokenizer": tiny(), "length": 700, "rows": 1, "seed": 0}
    with pytest.raises(UserError, match=message) as error:
        make(**arguments | changes)
    assert "\n" not in str(error.value)

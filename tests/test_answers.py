"""Written answers: what a metric gives, how a prompt is built, and the tasks' own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from postnas import sources
from postnas.errors import UserError
from postnas.evaluate.answers import METRICS, Question, cut, examples, filled, grade, normal, questions

TASKS = resources.files("postnas.evaluate").joinpath("tasks")


def task_of(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(TASKS.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return fields


# ---- metrics ---------------------------------------------------------------------------------


def test_text_is_cut_at_the_first_stop() -> None:
    assert cut("one\n\ntwo Question: three", ["Question:", "\n\n"]) == "one"
    assert cut("one", ["Question:", "\n\n"]) == "one"
    assert cut("one", []) == "one"
    assert cut("\nlate", ["\n"]) == ""
    assert grade({"metric": "exact", "stop": ["\n"]}, " Paris\nQuestion: next", ["Paris"]) == {"exact": 1.0}
    assert grade({"metric": "exact", "stop": None}, " Paris\nQuestion: next", ["Paris"]) == {"exact": 0.0}


def test_normal_form_drops_case_punctuation_articles_and_space() -> None:
    assert normal("  The  U.S.A., an   Island of a 'King' ") == "usa island of king"
    assert normal("Theatre and another analysis") == "theatre and another analysis", "an article is a whole word"
    assert normal("“Ça va”") == "ça va"


def test_exact_takes_any_answer_and_nothing_more() -> None:
    assert METRICS["exact"]("the Eiffel Tower!", ["Louvre", "Eiffel tower"]) == {"exact": 1.0}
    assert METRICS["exact"]("Eiffel Tower in Paris", ["Eiffel Tower"]) == {"exact": 0.0}


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the broncos of Denver", ["Denver Broncos"], 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it stands in both
        ("green", ["blue", "dark green"], 0, 2 / 3),
        ("blue", ["dark green"], 0, 0),
        ("", ["blue"], 0, 0),
        ("blue red", ["blue", "blue red green", "red"], 0, 0.8),
    ],
)
def test_f1_is_squads(text: str, answers: list[str], exact: float, f1: float) -> None:
    assert METRICS["f1"](text, answers) == pytest.approx({"exact": exact, "f1": f1})


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("7,791 people", ["7791 people"], 1, 1),
        ("7791.0", ["7791"], 1, 1),
        ("16%", ["16"], 1, 1),
        ("17 yards", ["16 yards"], 0, 0),  # the number differs, so the shared word is worth nothing
        ("16", ["16 yards"], 0, 2 / 3),
        ("16 yards", ["yards"], 0, 2 / 3),  # no number is asked for
        ("a 23-yard field goal", ["23 yard field goal"], 1, 1),
        ("Spain, Italy", ["Italy, Spain, the Netherlands"], 0, 0.8),
        ("June 1344", ["1344", "June 1344"], 1, 1),
        ("ten", ["10"], 0, 0),
    ],
)
def test_drop_is_words_with_a_check_of_numbers(text: str, answers: list[str], exact: float, f1: float) -> None:
    assert METRICS["drop"](text, answers) == pytest.approx({"exact": exact, "f1": f1})


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 16 - 3 - 4 = 9. 9 * 2 = $18. So the answer is 18.", "18", True),
        ("She makes 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "18", True),
        ("So she has 18", "18", True),
        ("The answer is 18. That is less than 20.", "18", True),
        ("The answer is 17. Or is it 18?", "18", False),
        ("9 * 2 = 18. The answer is clear", "18", True),  # no number behind the words: the last of all
        ("The answer is $2,125.00.", "2,125", True),
        ("that is 114,200", "114200", True),
        ("#### -10", "-10", True),
        ("So the answer is - 10.", "-10", True),
        ("It is −3 degrees", "-3", True),
        ("20-12", "12", True),  # a minus between numbers is no sign
        ("20-12", "-12", False),
        ("-$5", "-5", True),
        (".5", "0.50", True),
        ("1.5", "15", False),
        ("none", "18", False),
        ("", "0", False),
    ],
)
def test_number_is_the_marked_or_the_last_one(text: str, answer: str, right: bool) -> None:
    assert METRICS["number"](text, [answer]) == {"exact": float(right)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so we get $\boxed{\dfrac{1}{2}}$.", r"\frac12"),
        (r"$\boxed{3}$, no, $\boxed{4}$", "4"),
        (r"Final Answer: The final answer is $[2,5)$. I hope it is correct.", r"\boxed{[2, 5)}"),
        (r"The final answer is: 12" + "\nand more text", "12"),
        (r"\boxed{24}." + "\nFinal Answer: The final answer is $24$. I hope it is correct.", "24"),
        (r"\boxed 7$", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})"),
        (r"\boxed{\frac \pi4}", r"\frac{\pi}{4}"),
        (r"\boxed{\frac{\sqrt6}3}", r"\frac{\sqrt{6}}{3}"),
        (r"\boxed{0.50}", r"\frac{1}{2}"),
        (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}"),
        (r"\boxed{3/4}", ".75"),
        (r"\boxed{5.0}", "5"),
        (r"\boxed{\$1{,}234}", "1234"),
        (r"\boxed{5,\!525}", "5,525"),
        (r"\boxed{\frac{12}{5,\!525}}", r"\frac{12}{5525}"),
        (r"\boxed{76^\circ}", "76"),
        (r"\boxed{75\%}", "75"),
        (r"\boxed{12\text{ cm}^2}", "12"),
        (r"\boxed{8 \mbox{ inches}.}", "8"),
        ("8 square units", "8"),
        (r"\boxed{\text{Sunday}}", "Sunday"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{x \leq 3}", r"x\le3"),
        (r"\boxed{x^{2}+a_{1}}", "x^2+a_1"),
        (r"\boxed{\begin{pmatrix} -7 \\ 16 \end{pmatrix}}", r"\begin{pmatrix}-7\\16\end{pmatrix}"),
    ],
)
def test_math_takes_what_is_the_same_in_another_form(text: str, answer: str) -> None:
    assert METRICS["math"](text, ["something else", answer]) == {"exact": 1.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4}, as \boxed{3} is wrong", "4"),
        (r"\boxed{3,5,7}", "357"),
        (r"\boxed{(1,2)}", "(1,3)"),
        (r"\boxed{\frac{1}{3}}", "0.33"),
        (r"\boxed{\frac{1}{0}}", "0"),
        (r"\boxed{2516_8}", "2516"),
        (r"\boxed{3x}", "3"),
        (r"\boxed{5", "5"),
        ("It might be 5.", "5"),
        ("", "0"),
    ],
)
def test_math_refuses_what_differs(text: str, answer: str) -> None:
    assert METRICS["math"](text, [answer]) == {"exact": 0.0}


def test_contains_looks_in_normal_form() -> None:
    assert METRICS["contains"](" K-123,456 (cleared)", ["none", "k123456"]) == {"contains": 1.0}
    assert METRICS["contains"]("the director is Jane Doe.", ["Jane doe"]) == {"contains": 1.0}
    assert METRICS["contains"]("Jane", ["Jane Doe"]) == {"contains": 0.0}
    assert METRICS["contains"]("anything", ["The"]) == {"contains": 0.0}, "nothing is left of it, and that is no hit"
    assert METRICS["contains"]("", ["x"]) == {"contains": 0.0}


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=30)
@given(
    text=st.text(st.sampled_from("ab 019.,-$%\\{}()/^_=\nboxedfracanswer is#"), max_size=60),
    answer=st.text(max_size=20),
)
def test_any_text_has_a_value_and_an_answer_equals_itself(metric: str, text: str, answer: str) -> None:
    values = METRICS[metric](text, [answer, "7"])
    assert values and all(0 <= value <= 1 for value in values.values())
    assert set(METRICS[metric]("7", [answer, "7"]).values()) == {1.0}


# ---- questions -------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"source": "made-up", "context": "Q: {question}\nA:", "answers": "right"}
ROWS = [{"question": f"q{number}", "right": [f"r{number}", f"s{number}"], "topic": number % 2} for number in range(6)]


def test_questions_without_examples() -> None:
    found = list(questions(PLAIN | {"shots": None}, ROWS))
    assert found[1] == Question(id="1", prompt="Q: q1\nA:", answers=("r1", "s1"))
    assert len(found) == 6


def test_first_rows_become_examples_and_are_not_asked() -> None:
    found = list(questions(PLAIN | {"shots": 2, "lead": "About {topic}.\n"}, ROWS))
    assert [question.id for question in found] == ["2", "3", "4", "5"]
    assert found[1].prompt == "About 1.\nQ: q0\nA: r0\n\nQ: q1\nA: r1\n\nQ: q3\nA:"


def test_examples_of_the_files_prompt_are_kept_up_to_their_number() -> None:
    task = PLAIN | {"shots": 1, "shots_in": "request.context", "shots_begin": "Q: "}
    for instruction in ("", "Read.\n\n"):
        prompt = f"{instruction}Q: a\nA: b\n\nQ: c\nA: d\n\nQ: q0\nA:"
        row = ROWS[0] | {"request": {"context": prompt}}
        assert [q.prompt for q in questions(task, [row])] == [f"{instruction}Q: a\nA: b\n\nQ: q0\nA:"]
        assert [q.prompt for q in questions(task | {"shots": 2}, [row])] == [prompt]
        with pytest.raises(UserError, match=r"shots: 3 examples are wanted and made-up gives 2"):
            list(questions(task | {"shots": 3}, [row]))


def test_examples_of_a_file_of_their_own_fit_the_question(tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = PLAIN | {"shots": 2, "shots_from": str(dev), "shots_by": "topic"}
    asked = {"question": "new", "right": "x", "topic": 1}
    assert [q.prompt for q in questions(task, [asked])] == ["Q: q1\nA: r1\n\nQ: q3\nA: r3\n\nQ: new\nA:"]
    with pytest.raises(UserError, match="shots: 2 examples are wanted"):
        list(questions(task, [asked | {"topic": 7}]))


def test_examples_serve_multiple_choice_too() -> None:
    rows = iter(ROWS)
    before = examples(PLAIN | {"shots": 1}, rows, lambda record: f"{record['question']} A")
    assert before(ROWS[3]) == "q0 A\n\n"
    assert next(rows) == ROWS[1]


def test_answers_come_from_several_paths_once_each_and_spans_are_joined() -> None:
    task = PLAIN | {"answers": ["answer.value", "answer.others"]}
    row = {"question": "q", "answer": {"value": "b", "others": ["a", "b", "", ["c", "d"]]}}
    assert next(questions(task, [row])).answers == ("b", "a", "c, d")


def test_prompt_ends_without_space() -> None:
    assert (
        next(questions(PLAIN | {"context": "{question}"}, [{"question": "about: \n", "right": "x"}])).prompt == "about:"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": "wrong.path"}, "made-up: has no field 'wrong.path'; choose one of: question, right, topic"),
        ({"answers": "right.deeper"}, "'right.deeper'"),
        ({"context": "{nothing}"}, "made-up: has no field 'nothing'"),
    ],
)
def test_wrong_field_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        list(questions(PLAIN | changes, ROWS))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_row_without_an_answer_is_one_line() -> None:
    with pytest.raises(UserError, match="made-up: a record has no answer in right"):
        list(questions(PLAIN, [{"question": "q", "right": [" "]}]))


# ---- the tasks' own files ----------------------------------------------------------------------

WRITTEN = {
    "gsm8k": 1319,
    "minerva_math_500": 500,
    "minerva_math": 5000,
    "squad": 1000,
    "drop": 1000,
    "triviaqa": 7988,
    "nq_open": 1000,
    "lambada": 5153,
}
SHOTS = {"gsm8k": 4, "minerva_math_500": 4, "minerva_math": 4, "drop": 3, "triviaqa": 5, "nq_open": 5}
SKILLS = {
    "arithmetic": 1047,
    "coding": 1012,
    "common_knowledge": 1037,
    "logical_reasoning": 1118,
    "pattern": 534,
    "string_operations": 1219,
}


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the cache has is read: POSTNAS_TEST_CACHE names one that is kept."""

    def refuse(name: str, *_: Any) -> Path:
        pytest.skip(f"{name} is not in the cache; set POSTNAS_TEST_CACHE to one that has it")

    monkeypatch.setattr("postnas.sources.wheel._download", refuse)


def records(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return sources.records(task["source"], task["sha256"])


@pytest.mark.parametrize("name", WRITTEN)
def test_written_task_reads_its_file(cached: None, name: str) -> None:
    task = task_of(name)
    found = list(questions(task, records(task)))
    assert len(found) == WRITTEN[name]
    assert len({question.id for question in found}) == len(found)
    assert all(question.prompt == question.prompt.rstrip() != "" for question in found)
    assert all(answer.strip() for question in found for answer in question.answers)
    if name == "lambada":
        assert all(len(q.answers) == 1 and q.answers[0] == " " + q.answers[0].strip() for q in found)
        return
    worth = [grade(task, " " + question.answers[0], question.answers) for question in found]
    assert all(set(values.values()) == {1.0} for values in worth if name not in ("minerva_math", "minerva_math_500"))
    # A solution may have blank lines, where an answer would end: most have none.
    assert sum(values["exact"] for values in worth if "exact" in values) > 0.5 * len(found)


@pytest.mark.parametrize("name", SHOTS)
def test_written_task_has_its_examples(cached: None, name: str) -> None:
    task = task_of(name)
    first = next(questions(task, records(task)))
    assert ("\n\n" + first.prompt).count("\n\n" + task.get("shots_begin", "Question: ")) == SHOTS[name] + 1


@pytest.mark.parametrize("name", ["minerva_math", "minerva_math_500"])
def test_every_solution_has_its_own_answer(cached: None, name: str) -> None:
    task = task_of(name)
    for question in questions(task, records(task)):
        assert METRICS["math"](question.answers[0], question.answers) == {"exact": 1.0}


def test_worked_steps_of_gsm8k_lead_to_the_answer(cached: None) -> None:
    task = task_of("gsm8k")
    rows = list(records(task))
    for row, question in zip(rows, questions(task, rows), strict=True):
        assert METRICS["number"](row["doc"]["answer"], question.answers) == {"exact": 1.0}
        assert METRICS["number"](row["request"]["continuation"], question.answers) == {"exact": 1.0}


def test_mmlu_has_all_subjects_with_examples_of_their_own(cached: None) -> None:
    for name, shots in (("mmlu", 0), ("mmlu_5shot", 5)):
        task = task_of(name)
        rows = list(records(task))
        assert len(rows) == 14_042 and len({row["subject"] for row in rows}) == 57
        assert all(len(row["choices"]) == 4 and 0 <= row["answer"] < 4 for row in rows)

        def solved(record: Any, task: dict[str, Any] = task) -> str:
            return f"{filled(task, task['context'], record)} {task['choices'][record[task['gold']]]}"

        before = examples(task, iter(rows), solved)
        for row in rows[:: len(rows) // 50]:
            text = before(row)
            assert text.startswith("The following are multiple choice questions (with answers) about " + row["subject"])
            assert text.count("\nAnswer: ") == shots and row["question"] not in text


@pytest.mark.parametrize("skill", SKILLS)
def test_basic_skills_have_their_questions_and_examples(cached: None, skill: str) -> None:
    task = task_of(f"basic_skills_{skill}")
    rows = [row for row in records(task) if row["doc_id"] < 1_000_000]
    assert len({row["doc_id"] for row in rows}) == SKILLS[skill]
    for row in rows[:50]:
        examples_text = filled(task, task["context"], row).removesuffix(row["doc"]["question"])
        assert examples_text.count("\n\n") == 5


NEW = [
    *WRITTEN,
    "mmlu",
    "mmlu_5shot",
    *(f"basic_skills_{skill}" for skill in SKILLS),
    "fda",
    "swde",
    "squad_completion",
]


@pytest.mark.parametrize("name", NEW)
def test_task_says_what_it_is(name: str) -> None:
    task = task_of(name)
    kind = task.get("kind", "choice")
    assert kind in ("choice", "last_word", "answer")
    assert task["licence"] and task["split"] in ("test", "validation") and task["form"]
    assert task["context"] == task["context"].rstrip()
    assert "sha256" in task or task["source"].startswith("hf:")
    if kind == "answer":
        assert task["metric"] in METRICS and task["stop"] and task["max_new_tokens"] > 0

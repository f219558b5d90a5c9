"""Tasks whose answer is written: the questions, the examples before them, and what a written answer is worth.

A YAML of tasks/ with `kind: answer` has, beside source, sha256, licence and split:

- context: template (str.format) of the question, over a record's fields; no space at its end.
- answers: dotted path of the right answer or of a list of them, or a list of such paths. Within a list
  of answers, an answer that is itself a list is one of several spans.
- metric: one of METRICS. stop: texts that end an answer. max_new_tokens: where it ends at the latest.
- form: the prompt in one line, for the table of tasks.
- shots: how many solved examples stand before the question, none where it is left out. They come from
  `shots_in`, the dotted path of a prompt of the file that has examples, each of which begins with
  `shots_begin` (an instruction before the first one is kept); or from `shots_from`, a source of its own
  (`shots_sha256`), the first of those that have the question's value in the field `shots_by`; else from
  the first records, which are then no questions. No example is ever scored.
- lead: template of what stands before the examples, where it is not part of `shots_in`.

`kind: last_word` has context, and in answers the path of the continuation, with its leading space. Multiple
choice may have shots and lead too; `examples` then is told how a solved record reads.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

from postnas import sources
from postnas.errors import UserError
from postnas.sources.formats import no_field

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked, and every answer that is right."""

    id: str
    """Place of the record in the source, from 0."""
    prompt: str
    """Examples and question; no white space at its end."""
    answers: tuple[str, ...]
    """At least one. The first stands in examples."""


def questions(task: Mapping[str, Any], records: Iterable[Record]) -> Iterator[Question]:
    """The questions of a task of kind `answer` or `last_word`, in the order of `records`.

    task: the YAML's fields; None stands for a field that is left out. Raises UserError where a record
    lacks a field, has no answer, or where there are too few examples.
    """
    numbered = iter(enumerate(records))

    def solved(record: Record) -> str:
        return f"{filled(task, task['context'], record).rstrip()} {_answers(task, record)[0].strip()}"

    before = examples(task, (record for _, record in numbered), solved)
    for number, record in numbered:
        prompt = before(record) + filled(task, task["context"], record)
        yield Question(id=str(number), prompt=prompt.rstrip(), answers=_answers(task, record))


def examples(
    task: Mapping[str, Any], records: Iterator[Record], solved: Callable[[Record], str]
) -> Callable[[Record], str]:
    """A function that gives what stands before a record's question: lead and examples, or "".

    records: where the examples are the first ones, they are taken off it. solved: a record as an example.
    """
    shots = task.get("shots") or 0
    if shots and task.get("shots_in"):
        return lambda record: _examples_in(task, record, shots)
    by = task.get("shots_by")
    groups: dict[Any, list[str]] = {}
    source = task["source"]
    if shots and task.get("shots_from"):
        source = task["shots_from"]
        for record in sources.records(source, task.get("shots_sha256")):
            groups.setdefault(_value(source, record, by) if by else None, []).append(solved(record))
    elif shots:
        groups[None] = [solved(record) for record in islice(records, shots)]

    def before(record: Record) -> str:
        found = groups.get(_value(task["source"], record, by) if by else None, [])[:shots]
        if len(found) < shots:
            raise _too_few(source, shots, len(found))
        lead = filled(task, task.get("lead") or "", record)
        return lead + "".join(example + "\n\n" for example in found)

    return before


def _examples_in(task: Mapping[str, Any], record: Record, shots: int) -> str:
    begin = "\n\n" + task["shots_begin"]
    text = "\n\n" + _value(task["source"], record, task["shots_in"])
    parts = text.split(begin)  # an instruction or nothing, the examples, and the question
    if len(parts) - 2 < shots:
        raise _too_few(task["source"], shots, max(0, len(parts) - 2))
    return str(begin.join(parts[: shots + 1])).removeprefix("\n\n") + "\n\n"


def _too_few(source: str, shots: int, found: int) -> UserError:
    return UserError(f"shots: {shots} examples are wanted and {source} gives {found}; ask for fewer")


def filled(task: Mapping[str, Any], template: str, record: Record) -> str:
    """The template over the record's fields. Raises UserError where it names a field that is not there."""
    try:
        return template.format(**record)
    except KeyError as error:
        raise no_field(task["source"], str(error.args[0]), record) from error


def _value(source: str, record: Record, path: str) -> Any:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise no_field(source, path, record)
        value = value[part]
    return value


def _answers(task: Mapping[str, Any], record: Record) -> tuple[str, ...]:
    paths = [task["answers"]] if isinstance(task["answers"], str) else task["answers"]
    values = [_value(task["source"], record, path) for path in paths]
    several = [value if isinstance(value, list) else [value] for value in values]
    texts = [", ".join(answer) if isinstance(answer, list) else answer for value in several for answer in value]
    found = tuple(dict.fromkeys(text for text in texts if text.strip()))
    if not found:
        raise UserError(f"{task['source']}: a record has no answer in {', '.join(paths)}; leave the record out")
    return found


# ---- what an answer is worth ----------------------------------------------------------------


def grade(task: Mapping[str, Any], text: str, answers: Sequence[str]) -> dict[str, float]:
    """What the task's metric gives for the generated text, cut at the first of the task's stop texts."""
    return METRICS[task["metric"]](cut(text, task.get("stop") or ()), answers)


def cut(text: str, stop: Iterable[str]) -> str:
    """The text before the first of the stop texts in it."""
    return text[: min((place for end in stop if (place := text.find(end)) >= 0), default=len(text))]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”´")


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the form in which SQuAD and TriviaQA compare."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(text: str, answers: Sequence[str]) -> dict[str, float]:
    """exact: 1 where the text is one of the answers, both in normal form."""
    return {"exact": float(normal(text) in map(normal, answers))}


def f1(text: str, answers: Sequence[str]) -> dict[str, float]:
    """exact, and f1: the harmonic mean of precision and recall of words, the best over the answers (SQuAD)."""
    words = normal(text).split()
    return exact(text, answers) | {"f1": max(_bag_f1(words, normal(answer).split()) for answer in answers)}


def _bag_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words. An empty bag fits an empty one alone."""
    if not found or not wanted:
        return float(not found and not wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def drop(text: str, answers: Sequence[str]) -> dict[str, float]:
    """exact and f1 as DROP defines them, the best over the answers, each by itself.

    Words part at spaces and hyphens too, numbers compare by value, and f1 is 0 where the answer has
    numbers and the text none of them. The paper aligns the spans of an answer one by one; here the
    spans of one answer are one bag, since generated text does not say where a span ends.
    """
    found = _drop_words(text)
    wanted = [_drop_words(answer) for answer in answers]
    return {
        "exact": float(found in wanted),
        "f1": max(_bag_f1(found, words) if _numbers_fit(found, words) else 0.0 for words in wanted),
    }


def _drop_words(text: str) -> list[str]:
    words = []
    for word in re.split(r"[\s-]+", text.lower()):
        word = word.strip(string.punctuation)
        number = word.replace(",", "")
        words += [_number_word(number)] if _NUMBER.fullmatch(number) else normal(word).split()
    return words


def _number_word(text: str) -> str:
    return format(Decimal(text).normalize(), "f")


def _numbers_fit(found: Sequence[str], wanted: Sequence[str]) -> bool:
    numbers = set(filter(_NUMBER.fullmatch, wanted))
    return not numbers or not numbers.isdisjoint(found)


_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")
# A minus sign counts where nothing stands before it that it could be subtracted from.
_IN_TEXT = re.compile(r"((?<![\w)])-)?\$?(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def number(text: str, answers: Sequence[str]) -> dict[str, float]:
    """exact: 1 where the number is an answer's (GSM8K): the one behind "####" or "answer is", else the last."""
    found = _final_number(text)
    return {"exact": float(found is not None and found in map(_final_number, answers))}


def _final_number(text: str) -> Decimal | None:
    text = text.replace("−", "-")
    *before, behind = re.split(r"####|answer is", text, flags=re.IGNORECASE)
    marked = _IN_TEXT.search(re.sub(r"^\s*-\s+", "-", behind)) if before else None
    match = marked or next(reversed(list(_IN_TEXT.finditer(text))), None)
    return None if match is None else Decimal((match[1] or "") + match[2].replace(",", ""))


def contains(text: str, answers: Sequence[str]) -> dict[str, float]:
    """contains: 1 where one of the answers stands in the text, both in normal form.

    An answer of which nothing is left in that form is looked for as it stands.
    """
    return {
        "contains": float(
            any(normal(answer) in normal(text) if normal(answer) else answer in text for answer in answers)
        )
    }


def math(text: str, answers: Sequence[str]) -> dict[str, float]:
    r"""exact: 1 where the final answer is one of the answers' (MATH), as LaTeX in one form, or as a number.

    The final answer stands in the last \boxed{}, else behind the last "final answer is", else it is the
    whole text.
    """
    found = _final_latex(text)
    return {"exact": float(any(_equal(found, _final_latex(answer)) for answer in answers))}


def _final_latex(text: str) -> str:
    boxed = _boxed(text)
    if boxed is not None:
        return _one_form(boxed)
    *before, behind = re.split(r"final answer is:?", text, flags=re.IGNORECASE)
    answer, *politeness = behind.split("I hope it is correct")
    return _one_form(answer.strip().partition("\n")[0] if before and not politeness else answer)


def _boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} or behind a \boxed without braces; None where none is whole."""
    *before, behind = re.split(r"\\(?:boxed|fbox)\s*", text)
    if not before:
        return None
    if not behind.startswith("{"):
        return re.split(r"[\s$]", behind)[0]
    depth = 0
    for place, sign in enumerate(behind):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return behind[1:place]
    return None


_BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_FORMS: tuple[tuple[str, str], ...] = (
    (r",\\!|\{,\}", ""),  # between thousands
    (r"(?<!\\)\\(?:[!,;: ]|q?quad(?![a-z]))|~", " "),  # spaces
    (r"\\(?:left|right|displaystyle|limits)(?![a-z])", ""),
    (r"\\?[$%]|\^\{?\\circ\}?|\\degrees?(?![a-z])", ""),  # dollars, per cent, degrees
    (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\(le|ge|ne)q(?![a-z])", r"\\\1"),
    (r"(?<=[^\s({,])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(\^\{?\d\}?)?\s*\.?\s*$", ""),  # a unit behind the value
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"^(\s*-?[\d.,/]*\d)\s+[A-Za-z]{2}[A-Za-z .]*(\^\{?\d\}?)?$", r"\1"),  # a unit in plain letters
    (r"\s+", ""),
    (r"\.$", ""),
    (r"^[A-Za-z]{1,2}=(?!.*=)", ""),  # "x = 5"
    (r"\\frac(\\pi|[^{}\\])", r"\\frac{\1}"),
    (rf"(\\frac{_BRACED})(\\pi|[^{{}}\\])", r"\1{\2}"),
    (r"\\sqrt([^{}\[\\])", r"\\sqrt{\1}"),
    (r"([\^_])\{(\w)\}", r"\1\2"),
)
"""What is written in several ways in LaTeX, and the one that is compared, in this order."""


def _one_form(text: str) -> str:
    for pattern, form in _FORMS:
        text = re.sub(pattern, form, text)
    return text


_DECIMAL = r"(-?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40}))"
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_FRACTION = re.compile(rf"(-?)(?:{_DECIMAL}|{_DECIMAL}/{_DECIMAL}|\\frac\{{{_DECIMAL}\}}\{{{_DECIMAL}\}})")


def _equal(found: str, wanted: str) -> bool:
    value = _plain_number(found)
    return found == wanted or (value is not None and value == _plain_number(wanted))


def _plain_number(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text.replace(",", "") if _THOUSANDS.fullmatch(text) else text)
    if match is None:
        return None
    sign, *parts = match.groups()
    over, under = ([Fraction(part) for part in parts if part is not None] + [Fraction(1)])[:2]
    return None if under == 0 else (-over if sign else over) / under


METRICS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "exact": exact,
    "f1": f1,
    "drop": drop,
    "number": number,
    "math": math,
    "contains": contains,
}
"""By name: (text, answers) -> named values from 0 to 1. The text is cut at a stop text before."""

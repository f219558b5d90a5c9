"""Recall in a long context: facts in a haystack or a table, asked at the end, at any length in tokens.

Every prompt ends with an answer prefix that repeats the wording of the fact, so that a base model, which
was never taught to answer, goes on with the answer itself. The prefix is part of the task and the same
for every model: giving it to one model and not to the other moves a score more than any model does.
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from random import Random
from typing import Any, NamedTuple

from postnas.errors import UserError

KEYS = 8  # of needle_multi_key, the asked one among them; the same at all lengths, so that only the length differs
VALUES = 4  # of needle_multi_value
CHAINS, HOPS = 3, 4  # of variable_tracking; a chain is one more variable than hops
LINES = 4  # fewest lines of a table
TRIALS = 32  # draws of which the longest says how short a prompt may be
ROUNDS = 16  # of writing a prompt, counting its tokens and mending its length; three or four do for most tokenizers
TRIES = 100  # draws of a question that fits the length and does not stand in the filler

_LISTS = """
a: old quiet narrow bright heavy broken distant wooden gentle crowded empty patient ragged familiar pale hollow curious
slow warm restless hidden dusty steep shallow cheerful foreign painted tired wide modest damp careful plain sturdy
silent northern crooked early lonely noble rusty polished swift tall yellow frozen brave clumsy;
n: river window garden letter bridge farmer kitchen teacher market captain village forest sailor library mountain baker
harbour doctor street painter valley orchard station cousin lantern engine clerk meadow tower merchant ladder journal
neighbour cellar wagon widow theatre basket island driver chapel mirror shepherd museum kettle corner tailor blanket
stranger fence violin courtyard miller drawer staircase gardener curtain pocket roof traveller barn bottle piano soldier
lake carpet poet crowd road nephew chimney table ferry winter teapot printer hill;
p: waited slept rested stood vanished wandered lingered arrived trembled gathered returned paused shivered whispered
laughed stumbled marched leaned drifted stayed hurried listened;
h: carried followed repaired painted remembered crossed ignored sold borrowed admired emptied measured described covered
watched lifted found cleaned visited guarded blamed copied praised moved rescued answered;
w: beside behind under near above beyond around outside before across inside past;
d: slowly again often quietly twice together alone later early gladly suddenly carefully rarely somehow already proudly;
t: morning evening autumn spring afternoon night summer storm harvest holiday war flood concert journey silence;
colour: amber azure cobalt coral crimson emerald golden indigo ivory jade lilac maroon olive opal pearl purple ruby
saffron scarlet silver turquoise velvet violet copper bronze;
animal: badger beaver camel cheetah condor cougar dolphin falcon ferret gazelle heron jackal kestrel leopard lobster
magpie marmot octopus otter panther pelican penguin rabbit raven salmon spider tiger turtle walrus weasel"""
# By their letter in SENTENCES; m and o are other nouns. Keys are colours and animals, which no sentence has.
WORDS = {name.strip(): words.split() for name, words in (line.split(":") for line in _LISTS.split(";"))}
SENTENCES = (
    "The {a} {n} {p} {w} the {m}.",
    "Every {t} the {n} {h} the {a} {m}.",
    "Nobody knew why the {n} {p} so {d}.",
    "When the {n} {p} {w} the {m}, the {o} {h} it {d}.",
    "During the {t}, another {n} {h} the {m} {w} the {a} {o}.",
    "The {n} and the {m} {p} {d} {w} the {a} {o}.",
    "That {t} the {a} {n} {p}, and the {m} {h} the {o}.",
    "Somebody {h} the {n} {d}, but the {a} {m} {p} {w} the {o}.",
    "Before the {t} this {n} was {a}, and the {m} {h} it.",
    "Then the {a} {n} {h} the {m} and {p} {w} the {o}.",
)
CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Case:
    """One row of a task. `dataclasses.asdict` of it goes into JSON as it is."""

    id: str
    """Task, length, seed and number of the row."""
    prompt: str
    tokens: int
    """Of the prompt, with the special tokens that the tokenizer adds by itself."""
    answers: tuple[str, ...]
    """What the output must hold, in the order in which it stands in the prompt."""
    depth: float
    """Where the first needed fact stands, by characters: 0 before all other text, 1 behind it. More follow after it."""


@dataclass(frozen=True)
class Ask:
    """A question with its facts. Facts begin with the character that divides them from what stands before."""

    head: str
    opening: str
    """What stands between the first line and the text or table."""
    needed: tuple[str, ...]
    """Facts that the answer needs, in the order of the text."""
    others: tuple[tuple[str, ...], ...]
    """Facts about other things; those of one tuple keep their order."""
    tail: str
    answers: tuple[str, ...]
    marks: tuple[str, ...]
    """What may stand nowhere in the filler: the answers and what they are asked by."""


class Piece(NamedTuple):
    """A sentence, or a line of a table with its key and value. Begins with the character that divides it."""

    text: str
    key: str = ""
    value: str = ""


def _number(draw: Random, digits: int = 7) -> str:
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    """`count` different values. A dict keeps their order, where a set would not on every machine."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _needles(draw: Random, lines: Sequence[Piece], keys: int = 1, values: int = 1) -> Ask:
    """`keys` keys with `values` numbers each; the first key is asked."""
    names = _distinct(lambda: f"{draw.choice(WORDS['colour'])} {draw.choice(WORDS['animal'])}", keys)
    numbers = _distinct(lambda: _number(draw), keys * values)
    begin = "The secret number" if values == 1 else "One of the secret numbers"
    facts = [f" {begin} of the {names[index // values]} is {number}." for index, number in enumerate(numbers)]
    what, verb = ("the secret number", "is") if values == 1 else (f"the {values} secret numbers", "are")
    return Ask(
        head="Secret numbers are hidden in this text. Remember them.",
        opening="\n",
        needed=tuple(facts[:values]),
        others=tuple((fact,) for fact in facts[values:]),
        tail=f"\n\nQuestion: What {verb} {what} of the {names[0]}?\n"
        f"Answer: {what.capitalize()} of the {names[0]} {verb}",
        answers=tuple(numbers[:values]),
        marks=(*names, *numbers),
    )


def _variables(draw: Random, lines: Sequence[Piece]) -> Ask:
    size = HOPS + 1
    names = _distinct(lambda: "".join(draw.choices(CONSONANTS.upper(), k=5)), CHAINS * size)
    values = _distinct(lambda: _number(draw, 5), CHAINS)
    chains = []
    for start, value in zip(range(0, len(names), size), values, strict=True):
        chain = names[start : start + size]
        chains.append(tuple(f" Let {name} = {source}." for name, source in zip(chain, [value, *chain])))
    return Ask(
        head="Variables are set in this text. Remember what they hold.",
        opening="\n",
        needed=chains[0],
        others=tuple(chains[1:]),
        tail=f"\n\nQuestion: Which {size} variables hold {values[0]}, directly or through another variable?\n"
        f"Answer: The {size} variables that hold {values[0]} are",
        answers=tuple(names[:size]),
        marks=(*names, *values),
    )


def _table(draw: Random, lines: Sequence[Piece], head: str, opening: str, tail: str) -> Ask:
    """Asks for the value of the first line. `tail` is a template over its key."""
    facts = [line.text for line in lines]
    others = tuple((fact,) for fact in facts[1:])
    return Ask(head, opening, (facts[0],), others, tail.format(key=lines[0].key), (lines[0].value,), marks=())


_key_value = partial(
    _table,
    head="This table gives each key a value. Remember them.",
    opening="\n{\n",
    tail='\n}}\n\nQuestion: What is the value of "{key}"?\nAnswer: "{key}":',
)
_phone_book = partial(
    _table,
    head="This is a phone book. Remember the numbers.",
    opening="\n",
    tail="\n\nQuestion: What is the phone number of {key}?\nAnswer: {key}:",
)


def _pair(draw: Random) -> Piece:
    key, value = "".join(draw.choices(CONSONANTS + VOWELS, k=8)), _number(draw)
    return Piece(f'\n"{key}": {value},', key, value)


def _person(draw: Random) -> Piece:
    """Made-up names, all of one length, so that none is a part of another."""
    syllables = [draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(5)]
    name, digits = f"{''.join(syllables[:2])} {''.join(syllables[2:])}".title(), _number(draw)
    number = f"{digits[:3]}-{digits[3:]}"
    return Piece(f"\n{name}: {number}", name, number)


def _lines(make: Callable[[Random], Piece], draw: Random) -> Iterator[Piece]:
    """Lines of a table; no key and no value comes twice."""
    seen: set[str] = set()
    while True:
        piece = make(draw)
        if piece.key not in seen and piece.value not in seen:
            seen |= {piece.key, piece.value}
            yield piece


@dataclass(frozen=True)
class Task:
    about: str
    """What is asked, in one line."""
    max_new_tokens: int
    """Enough for the answers where every digit and letter is a token."""
    ask: Callable[[Random, Sequence[Piece]], Ask]
    line: Callable[[Random], Piece] | None = None
    """A line of the table, where the task is one; else the haystack is text."""


TASKS: dict[str, Task] = {
    "needle": Task("one number hidden in text", 16, _needles),
    "needle_multi_key": Task(f"{KEYS} keys with a number each in text, one asked", 16, partial(_needles, keys=KEYS)),
    "needle_multi_value": Task(f"{VALUES} numbers of one key in text", 48, partial(_needles, values=VALUES)),
    "key_value": Task("a table of random keys and numbers, one key asked", 16, _key_value, _pair),
    "phone_book": Task("a list of names and phone numbers, one name asked", 16, _phone_book, _person),
    "variable_tracking": Task(f"{CHAINS} chains of assignments in text; which variables hold a value", 48, _variables),
}


def score(case: Case, text: str) -> dict[str, float]:
    """`recall`: share of the answers that stand in a model's output as whole words; `exact`: 1 where all do.

    What else stands there costs nothing; max_new_tokens keeps a model from listing everything.
    """
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None for answer in case.answers]
    return {"recall": sum(found) / len(found), "exact": float(all(found))}


def answer_text(case: Case) -> str:
    """The right continuation of the prompt, for its NLL; it begins with the space that divides the two.

    Several answers stand in the prompt's order, and the wording of the prompt does not tell a model to keep
    it, so their NLL compares models and is no measure by itself.
    """
    return " " + ", ".join(case.answers)


def smallest(task: str, tokenizer: Any) -> int:
    """The fewest tokens for a prompt of the task: the longest of a fixed sample of questions with their facts."""
    line, prompts = TASKS[task].line, []
    for trial in range(TRIALS):
        draw = Random(f"smallest {task} {trial}")
        lines = list(islice(_lines(line, draw), LINES)) if line else []
        prompts.append(_write(TASKS[task].ask(draw, lines), [], "", 0.5, draw)[0])
    return max(_count(tokenizer, prompts))


def make(
    task: str, tokenizer: Any, length: int, rows: int, seed: int, filler: Sequence[str] | None = None
) -> list[Case]:
    """Rows of one task, each as near to `length` tokens as it can be and never above.

    tokenizer: a Hugging Face tokenizer; its own special tokens count. filler: documents, for the tasks that hide
    facts in text; without it the text is made up. Tables take none. Where no further piece fits, words at the end
    of the first line fill up. Row i of n wants its first needed fact at depth (i + 1/2) / n. The same arguments give
    the same rows on any machine; other lengths and seeds give other rows.
    Raises UserError for an unknown task, no rows, a length that is too short, or too little filler.
    """
    if task not in TASKS:
        raise UserError(f"task: {task!r} is unknown; choose from {', '.join(TASKS)}")
    if rows < 1:
        raise UserError(f"rows: {rows} is too few; give 1 or more")
    least = smallest(task, tokenizer)
    if length < least:
        raise UserError(f"length: {length} tokens are too few for {task} with this tokenizer; give {least} or more")
    pool = _pool(task, tokenizer, length, seed, filler)
    names = [f"{task}-{length}-{seed}-{number}" for number in range(rows)]
    return [_row(name, (number + 0.5) / rows, pool, tokenizer, length) for number, name in enumerate(names)]


@dataclass(frozen=True)
class _Pool:
    """What the rows of one call draw from, its tokens counted once."""

    task: Task
    pieces: list[Piece]
    counts: list[int]
    """Tokens of each piece behind another one."""
    text: str
    """Real text of the pieces, which a row keeps in order; empty where they are made up, and a row shuffles them."""
    pads: list[tuple[str, int]]
    """Single words and their tokens."""


def _count(tokenizer: Any, texts: Sequence[str], specials: bool = True) -> list[int]:
    """Tokens of each text, 64 texts at a time, since the ids of many long prompts would fill the memory."""
    counts: list[int] = []
    for start in range(0, len(texts), 64):
        ids = tokenizer(list(texts[start : start + 64]), add_special_tokens=specials, verbose=False)["input_ids"]
        counts.extend(map(len, ids))
    return counts


def _piece_counts(tokenizer: Any, pieces: Sequence[str], before: str) -> list[int]:
    """Tokens that each piece adds behind `before`."""
    alone, *joined = _count(tokenizer, [before, *(before + piece for piece in pieces)], specials=False)
    return [count - alone for count in joined]


def _sentences(draw: Random) -> Iterator[Piece]:
    while True:
        words = {name: draw.choice(choices) for name, choices in WORDS.items()}
        words |= zip("nmo", draw.sample(WORDS["n"], 3), strict=True)
        mark = draw.choice("     \n")  # a paragraph is 6 sentences or so
        yield Piece(mark + draw.choice(SENTENCES).format(**words))


def _documents(documents: Sequence[str], draw: Random) -> Iterator[Piece]:
    """The sentences of documents that are drawn one after the other, none of them twice."""
    for index in draw.sample(range(len(documents)), len(documents)):
        mark = "\n"
        for sentence in re.split(r"(?<=[.!?。！？])\s+|\n", documents[index]):
            # Text without full stops must not become one long piece.
            for words in textwrap.wrap(sentence, 400, break_on_hyphens=False):
                yield Piece(mark + " ".join(words.split()))
                mark = " "


def _pool(task: str, tokenizer: Any, length: int, seed: int, filler: Sequence[str] | None) -> _Pool:
    """Twice what a row needs, so that rows differ in more than order; all of `filler` where it is less."""
    draw, line = Random(f"pool {task} {length} {seed}"), TASKS[task].line
    real = filler is not None and line is None
    text = _sentences(draw) if filler is None else _documents(filler, draw)
    stream = _lines(line, draw) if line else text
    pieces: list[Piece] = []
    counts: list[int] = []
    while sum(counts) < 2 * length and (more := list(islice(stream, 1024))):
        pieces += more
        counts += _piece_counts(tokenizer, [piece.text for piece in more], before=pieces[0].text[-1])
    if sum(counts) < length:
        raise UserError(f"filler: {sum(counts)} tokens of text are fewer than the length, {length}; give more text")
    words = [" " + word for word in WORDS["n"] + WORDS["d"]]
    counted = zip(words, _piece_counts(tokenizer, words, before="a"), strict=True)
    pads = [(word, count) for word, count in counted if count > 0]
    return _Pool(TASKS[task], pieces, counts, "".join(piece.text for piece in pieces) if real else "", pads)


def _question(name: str, target: float, pool: _Pool, tokenizer: Any, length: int) -> tuple[Ask, list[int]]:
    """A question that fits the length and does not stand in real filler, and the pool's pieces in a row's order."""
    for trial in range(TRIES):
        draw = Random(f"{name} {trial}")
        fill, lines = list(range(len(pool.pieces))), LINES if pool.task.line else 0
        if pool.text:
            start = draw.randrange(len(fill))
            fill = fill[start:] + fill[:start]
        else:
            draw.shuffle(fill)
        ask = pool.task.ask(draw, [pool.pieces[index] for index in fill[:lines]])
        fits = _count(tokenizer, [_write(ask, [], "", target, Random(name))[0]])[0] <= length
        if fits and not any(mark in pool.text for mark in ask.marks):
            return ask, fill[lines:]
    raise UserError("filler: its text holds the keys or answers of the task again and again; give other text")


def _row(name: str, target: float, pool: _Pool, tokenizer: Any, length: int) -> Case:
    """One row: write the prompt, count its tokens, aim better, and again. The best that is not too long is kept.

    Pieces need not count in a prompt as they do alone, so a sum over pieces is no more than an aim.
    """
    ask, fill = _question(name, target, pool, tokenizer, length)
    before = [0, *accumulate(pool.counts[index] for index in fill)]
    best, room, kept = Case(name, "", 0, ask.answers, target), 0, 0  # the first prompt has no filler, and it fits
    for turn in range(ROUNDS):
        draw = Random(f"{name} {turn}")
        # After a few turns only words change: with a piece more or less, the aim can go to and fro over the length.
        most = bisect_right(before, room) - 1 if turn < 4 else max(0, kept - (turn == 4))
        # Words make up the rest. Where they cannot, a piece less may leave a rest that they can.
        pads = {n: _pad(max(0, room - before[n]), pool.pads, draw) for n in range(most, max(-1, most - 4), -1)}
        kept = min(pads, key=lambda n: room - before[n] - sum(count for _, count in pads[n]))
        pad = "".join(word for word, _ in pads[kept])
        text = [pool.pieces[index].text for index in fill[:kept]]
        prompt, depth = _write(ask, text, pad, target, Random(name))
        tokens = _count(tokenizer, [prompt])[0]
        if best.tokens < tokens <= length:
            best = Case(name, prompt, tokens, ask.answers, depth)
        if tokens == length:
            break
        room = max(0, room + length - tokens)
    return best


def _pad(gap: int, words: list[tuple[str, int]], draw: Random) -> list[tuple[str, int]]:
    """Words whose tokens add up to `gap`, or to as near below it as they can."""
    ways = [True] + [False] * gap
    for rest in range(1, gap + 1):
        ways[rest] = any(count <= rest and ways[rest - count] for _, count in words)
    left = max(rest for rest in range(gap + 1) if ways[rest])
    chosen = []
    while left:
        chosen.append(draw.choice([(word, count) for word, count in words if count <= left and ways[left - count]]))
        left -= chosen[-1][1]
    return chosen


def _write(ask: Ask, fill: Sequence[str], pad: str, target: float, draw: Random) -> tuple[str, float]:
    """The prompt, and the depth of its first needed fact: as near to `target` as the pieces allow."""
    rest = list(fill)
    for facts in ask.others:
        _insert(rest, facts, sorted(draw.randrange(len(rest) + 1) for _ in facts))
    before = [0, *accumulate(map(len, rest))]
    depths = [target, *sorted(draw.uniform(target, 1) for _ in ask.needed[1:])]
    middles = [(left + right) / 2 for left, right in pairwise(before)]
    spots = [bisect_left(middles, depth * before[-1]) for depth in depths]
    depth = before[spots[0]] / before[-1] if rest else 0.0
    _insert(rest, ask.needed, spots)
    return ask.head + pad + ask.opening + "".join(rest)[1:] + ask.tail, depth


def _insert(pieces: list[str], facts: Sequence[str], spots: Sequence[int]) -> None:
    """Puts each fact before the piece that its spot, not below the spot before, names; from the end, so spots hold."""
    for spot, fact in zip(reversed(spots), reversed(facts), strict=True):
        pieces.insert(spot, fact)

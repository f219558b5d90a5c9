"""Tasks of every kind on made-up rows, and what a tiny model says to them by other ways than the suite's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny import WORDS, make_hybrid, make_tokenizer

from postnas.evaluate import suite, verdict
from postnas.evaluate.task import Task


@cache
def tokenizer() -> Any:
    return make_tokenizer()


@cache
def model(seed: int = 0) -> Any:
    return make_hybrid(["jet", "attn"], seed=seed, vocab_size=300).requires_grad_(False)


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def words(number: int) -> list[str]:
    """Sixteen words in an order of their own."""
    at = number % len(WORDS)
    return WORDS[at:] + WORDS[:at]


def task(folder: Path, kind: str, count: int = 7, **changes: Any) -> Task:
    """A task of that kind with `count` rows, from a file that this writes."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        one, two, three, *rest = words(5 * number)
        records.append(
            {
                "q": f"The {one} and the {two}" if number % 2 else f"{one.title()} {two} {' '.join(rest)}",
                "right": three,
                "wrong": rest[0],
                "both": [three, f"{three} {two}"],
                "label": number % 2,
                "subject": ("stones", "letters")[number % 2],
                "continuation": f" {three}",
                "doc": {"task_id": f"T/{number}", "prompt": f"def double{number}(x):\n", "name": f"double{number}"},
            }
        )
    fields: dict[str, dict[str, Any]] = {
        "choice": {"context": "Question: {q}\nAnswer:", "choices": ["{right}", "{wrong} {right}", "{wrong}"]},
        "last_word": {"context": "{q}", "answers": "continuation"},
        "answer": {
            "context": "{q}",
            "answers": "both",
            "metric": "f1",
            "stop": ["e", "\n"],
            "max_new_tokens": 9,
        },
        "code": {
            "context": "{doc[prompt]}",
            "before": "{doc[prompt]}",
            "test": "assert {doc[name]}(3) == 6",
            "solution": "    return 2 * x",
            "stop": ["\ndef "],
            "max_new_tokens": 8,
        },
    }
    source = write_lines(folder / f"{kind}.jsonl", records)
    return Task(
        **{"name": kind, "source": source, "licence": "none", "split": "test", "kind": kind} | fields[kind] | changes
    )


def given(one: Task, seed: int = 0, limit: int | None = None) -> tuple[list[Any], list[dict[str, Any]]]:
    """A task's rows and what the model gives to them."""
    rows = suite.rows(one, tokenizer(), limit, seed=1)
    return rows, suite.outputs(one, model(seed), tokenizer(), rows, one.name)


def direct(context: str, continuation: str, seed: int = 0) -> tuple[float, bool]:
    """Log-probability of the continuation, and whether each of its tokens is the most likely: one plain forward."""
    ids = torch.tensor(tokenizer()([context + continuation])["input_ids"])
    begin = len(tokenizer()([context])["input_ids"][0])
    logp = model(seed)(input_ids=ids, use_cache=False).logits[0, begin - 1 : -1].log_softmax(-1)
    wanted = ids[0, begin:]
    return logp.gather(1, wanted[:, None]).sum().item(), bool((logp.argmax(-1) == wanted).all())


def greedy(prompt: str, count: int, seed: int = 0) -> str:
    """What transformers' own generate writes for one prompt."""
    ids = torch.tensor(tokenizer()([prompt])["input_ids"])
    end, pad = tokenizer().eos_token_id, tokenizer().pad_token_id
    made = model(seed).generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=end, pad_token_id=pad)
    return str(tokenizer().decode([token for token in made[0, ids.shape[1] :].tolist() if token != end]))


def reported(one: Task, outputs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The verdict on one task; survives JSON without NaN."""
    found = {name: {one.name: rows} for name, rows in outputs.items()}
    got = verdict.result({one.name: suite.measures(one)}, found, [], seed=1)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    return got

"""Faults planted in a model or a task are caught by the suite, each by the measures that it must move and no other.

The base is set by hand, so that it is known why it can what it can. Layer 0 brings the two tokens before each token
along. Layer 1 looks for the places where the present pair of tokens stood before, and the head adds what followed
there to the bigrams of a sample of text. So words come from the head, and facts from layer 1 alone.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from postnas.evaluate import long, suite, verdict
from postnas.evaluate.task import Task, load_task
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM

CHATTER = " hello"
LENGTH, ROWS = 128, 40
CODE = 128  # channels of a token's random code
TURN = 24  # pairs of a head's channels that RoPE may turn; behind them its angles are too small to matter
HALF = TURN + CODE
HIGH = 30.0  # a constant channel, so large that what the norms divide by is the same everywhere
NEAR, MATCH = 60.0, 6.0  # gains of the scores: of one place before another, and of each token that is the same
HINT, TELL = 2.0, 18.0  # what a found token adds to its logit; digits and the space before them have no other source
ENOUGH = 5.0  # standard errors of a paired difference that is no accident


@cache
def tokenizer() -> Any:
    """A token for each word with the space before it, each digit and each sign of the needle task's prompts."""
    fixed = f"Secret numbers are hidden in this text Remember them number of is What Question Answer {CHATTER}"
    words = {word.strip(".,") for word in " ".join([fixed, *long.SENTENCES]).split() if "{" not in word}
    words = words.union(*long.WORDS.values(), ["secret"])
    pieces = {" " + word for word in words} | {word for word in words if word[0].isupper()} | set(" \n.,?:0123456789")
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<end>", *sorted(pieces)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d|\s|[^\w\s]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")


def text(length: int, seed: int) -> Tensor:
    """Ordinary text with one fact in it, as token ids [length] int64."""
    (case,) = long.make("needle", tokenizer(), length, 1, seed)
    ids = tokenizer()(case.prompt)["input_ids"]
    assert tokenizer().unk_token_id not in ids, "the tokenizer lacks a word"
    return torch.tensor(ids)


def bigrams(ids: Tensor, vocab: int) -> Tensor:
    """Log-probability [vocab, vocab] of each token behind each, counted and smoothed by the single tokens'."""
    counts = torch.zeros(vocab, vocab)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    single = functional.normalize(counts.sum(0) + 0.1, p=1, dim=0)
    return ((counts + 4 * single) / (counts.sum(1, keepdim=True) + 4)).log()


@cache
def reader() -> HybridForCausalLM:
    """The base. Hidden channels: one a token | a constant | code | code one before | two before | what was found."""
    vocab = len(tokenizer())
    hidden, head = vocab + 1 + 4 * CODE, 2 * HALF
    model = HybridForCausalLM(
        HybridConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=head,
            qkv_bias=True,
            attn_scale=1.0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e30},
            placement=["swa", "attn"],
            blocks={"swa": {"window_size": 3}},
        )
    ).eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(HIGH / math.sqrt(hidden) if "norm" in name else 0.0)  # norms change nothing, MLPs do nothing
    codes = functional.normalize(torch.randn(vocab, CODE, generator=torch.Generator().manual_seed(0)), dim=-1)
    this, before, two_before, found = (slice(at, at + CODE) for at in range(vocab + 1, hidden, CODE))
    model.model.embed_tokens.weight[:, :vocab] = torch.eye(vocab)
    model.model.embed_tokens.weight[:, vocab] = HIGH
    model.model.embed_tokens.weight[:, this] = codes
    same = torch.eye(CODE)
    bring, look = (layer.self_attn for layer in model.model.layers)
    for number, place in enumerate((before, two_before)):
        own = slice(number * head, number * head + CODE)
        # RoPE turns the first pair of channels by a radian a token: scores are highest 1 or 2 tokens back.
        bring.k_proj.bias[own.start] = 1.0
        bring.q_proj.bias[own.start] = NEAR * math.cos(number + 1)
        bring.q_proj.bias[own.start + HALF] = -NEAR * math.sin(number + 1)
        bring.v_proj.weight[own, this] = look.v_proj.weight[own, this] = same
        bring.o_proj.weight[place, own] = same
        # The second head sees all alike. Less it, nothing remains of the first where nothing is found.
        look.o_proj.weight[found, own] = same if number == 0 else -same
    for half, asked, kept in ((slice(TURN, HALF), this, before), (slice(HALF + TURN, head), before, two_before)):
        look.q_proj.weight[half, asked], look.k_proj.weight[half, kept] = MATCH * same, same
    strength = torch.full((vocab, 1), HINT)
    strength[tokenizer().convert_tokens_to_ids(list(" 0123456789"))] = TELL
    model.lm_head.weight[:, :vocab] = bigrams(text(16_384, seed=1), vocab).T
    model.lm_head.weight[:, found] = strength * codes
    return model


def without_attention() -> HybridForCausalLM:
    """The reader whose retrieval layer sees three tokens, as any layer that was wrongly made local."""
    fields = reader().config.to_dict() | {"placement": ["swa", "swa"]}
    model = HybridForCausalLM(HybridConfig(**fields)).eval()
    model.load_state_dict(reader().state_dict())
    return model


def without_output() -> HybridForCausalLM:
    """The reader whose retrieval layer's mixer gives nothing."""
    model = deepcopy(reader())
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    return model


def chatty() -> HybridForCausalLM:
    """The reader, but behind " is" it greets before it answers."""
    model = deepcopy(reader())
    ends, chatter, space = tokenizer().convert_tokens_to_ids([" is", CHATTER, " "])
    model.lm_head.weight[chatter, ends] += 40
    model.lm_head.weight[space, chatter] += 40
    return model


def endless() -> HybridForCausalLM:
    """The reader, but it ends no number."""
    model = deepcopy(reader())
    stop, *digits = tokenizer().convert_tokens_to_ids(list(".0123456789"))
    model.lm_head.weight[stop, digits] -= 40
    return model


def write(path: Path, shuffled: bool) -> str:
    """A file of questions with their text, four numbers to choose from, the right one's place, and the answer.

    shuffled: the places and answers are those of other rows.
    """
    draw, records = random.Random(4), []
    for case in long.make("needle", tokenizer(), LENGTH, ROWS, seed=5):
        label = draw.randrange(4)
        numbers = [str(draw.randrange(10**6, 10**7)) for _ in range(4)]
        numbers[label] = case.answers[0]
        record = {"prompt": case.prompt, "label": label, "answer": case.answers[0]}
        records.append(record | dict(zip("abcd", numbers, strict=True)))
    if shuffled:
        keys = [(record["label"], record["answer"]) for record in records]
        draw.shuffle(keys)
        for record, (label, answer) in zip(records, keys, strict=True):
            record |= {"label": label, "answer": answer}
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ways(source: str, suffix: str = "") -> list[Task]:
    """Three ways to ask the same: choose (log-likelihood), say (the answer alone), mention (the answer somewhere)."""
    choose = Task(f"choose{suffix}", source, "none", "test", "{prompt}", choices=["{a}", "{b}", "{c}", "{d}"])
    fields: dict[str, Any] = {"answers": "answer", "stop": ["."], "max_new_tokens": 12}
    say = Task(f"say{suffix}", source, "none", "test", "{prompt}", "answer", metric="exact", **fields)
    return [choose, say, replace(say, name=f"mention{suffix}", metric="contains")]


Fault = Callable[[], HybridForCausalLM]
Run = Callable[[Fault], dict[str, Any]]
NEEDLE = f"needle@{LENGTH}"
ASKED = ("choose", "say", "mention")
ALL = ("copy", *ASKED, NEEDLE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Evaluates the reader against a model with a fault, each model once for the whole file."""
    folder = tmp_path_factory.mktemp("questions")
    right = ways(write(folder / "right.jsonl", shuffled=False))
    wrong = ways(write(folder / "shuffled.jsonl", shuffled=True), suffix=" shuffled")
    own = {task.name: task for task in right + wrong}

    def evaluate(models: dict[str, HybridForCausalLM], done: dict[str, Any] | None = None) -> dict[str, Any]:
        return verdict.evaluate(
            models,
            tokenizer(),
            text(4096, seed=2),
            tasks=[*own, NEEDLE],
            limit=ROWS,
            perplexity_tokens=2048,
            length=64,
            copy_passages=24,
            copy_tokens=32,
            copy_filler=32,
            seed=3,
            done=done,
        )

    @cache
    def of(fault: Fault) -> dict[str, Any]:
        return evaluate({"base": reader(), "hybrid": fault()}, done=base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "load_task", lambda name: own[name] if name in own else load_task(name))
        base = evaluate({"base": reader()})
        yield of


def row(got: dict[str, Any], model: str, task: str, metric: str) -> dict[str, Any]:
    (found,) = [r for r in got["rows"] if (r["model"], r["task"], r["metric"]) == (model, task, metric)]
    return dict(found)


def pair(got: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    (found,) = [p for p in got["paired"] if (p["task"], p["metric"]) == (task, metric)]
    return dict(found)


def falls(found: dict[str, Any], by: float) -> bool:
    """Whether a paired difference is a fall by at least that much, and far more than an accident."""
    return bool(found["difference"] < -max(by, ENOUGH * found["stderr"]))


def unharmed() -> HybridForCausalLM:
    return deepcopy(reader())


def test_without_a_fault_nothing_is_found(run: Run) -> None:
    got = run(unharmed)
    scores = {"choose": "accuracy", "say": "exact", "mention": "contains", NEEDLE: "recall", "copy": "copy_accuracy"}
    for task, metric in scores.items():
        assert row(got, "base", task, metric)["value"] > 0.7, f"{task}: the base cannot do what faults are to break"
    assert 20 < row(got, "base", "perplexity", "perplexity")["value"] < 40, "neither a guess nor learned by heart"
    assert all(found["difference"] == 0.0 for found in got["paired"])
    assert set(ALL) <= set(got["kept"]["tasks"]) and got["kept"]["mean"] == 1.0


@pytest.mark.parametrize("fault", [without_attention, without_output])
def test_attention_removed_from_the_retrieval_layer(run: Run, fault: Fault) -> None:
    got = run(fault)
    assert falls(pair(got, NEEDLE, "recall"), by=0.6)
    assert falls(pair(got, NEEDLE, "exact"), by=0.6)
    assert falls(pair(got, "say", "exact"), by=0.6)
    assert falls(pair(got, "choose", "accuracy"), by=0.5)
    assert falls(pair(got, "copy", "copy_accuracy"), by=0.3)
    for task, metric in ((NEEDLE, "nll"), ("copy", "copy_nll")):
        found = pair(got, task, metric)
        assert found["difference"] > max(1.0, ENOUGH * found["stderr"])
    moved = pair(got, "perplexity", "perplexity")["difference"] / row(got, "base", "perplexity", "perplexity")["value"]
    assert 0 < abs(moved) < 0.05, "ordinary text should hardly show it"
    assert pair(got, NEEDLE, "recall")["kept"] == 0.0 and got["kept"]["mean"] < 0.3
    chosen = row(got, "hybrid", "choose", "accuracy")
    assert abs(chosen["value"] - 0.25) < 3 * chosen["stderr"], "the choices alone give the answer away"


@pytest.mark.parametrize("fault", [chatty, endless])
def test_a_broken_output_format(run: Run, fault: Fault) -> None:
    got = run(fault)
    assert falls(pair(got, "say", "exact"), by=0.6)
    chosen = pair(got, "choose", "accuracy")
    assert (chosen["difference"], chosen["kept"]) == (0.0, 1.0)
    assert not falls(pair(got, "copy", "copy_accuracy"), by=0.0)
    moved = pair(got, "perplexity", "perplexity")["difference"] / row(got, "base", "perplexity", "perplexity")["value"]
    assert abs(moved) < 0.05


def test_chatter_before_an_answer_is_told_from_a_lost_answer(run: Run) -> None:
    got = run(chatty)
    assert all(said["output"].startswith(CHATTER) for said in got["outputs"]["hybrid"]["say"])
    assert row(got, "hybrid", "say", "exact")["value"] == 0.0
    for task, metric in (("mention", "contains"), (NEEDLE, "recall")):
        assert abs(pair(got, task, metric)["difference"]) < 0.1, f"{task}: the answer is still there"
    assert pair(got, NEEDLE, "nll")["difference"] > 1.0, "an answer without a greeting is less likely"
    for base, hybrid in zip(*(got["outputs"][model]["choose"] for model in ("base", "hybrid")), strict=True):
        lost = [old - new for old, new in zip(base["loglikelihoods"], hybrid["loglikelihoods"], strict=True)]
        assert min(lost) > 10 and max(lost) - min(lost) < 1e-2, "all choices lose the same, so their order stays"


def test_a_shuffled_answer_key(run: Run) -> None:
    got = run(unharmed)
    assert row(got, "base", "choose", "accuracy")["value"] == 1.0
    chosen = row(got, "base", "choose shuffled", "accuracy")
    assert abs(chosen["value"] - 0.25) < 2 * chosen["stderr"], "accuracy should be at chance"
    assert row(got, "base", "say shuffled", "exact")["value"] < 0.1
    assert got["kept"]["base_cannot"] == [f"{task} shuffled" for task in ASKED]
    assert pair(got, "choose shuffled", "accuracy")["kept"] is None
    for task, metric in (("choose", "accuracy"), ("say", "exact")):
        keys = {
            name: {task: got["outputs"]["base"][task + key]} for name, key in (("base", ""), ("hybrid", " shuffled"))
        }
        (measure,) = [one for one in suite.measures(suite.load_task(task)) if one.metric == metric]
        assert falls(verdict.paired(measure, keys, task), by=0.6), "the same rows, another key"

"""Batched log-likelihoods and greedy answers, against one prompt at a time on random hybrids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import MIXED, make_hybrid
from torch import Tensor

from postnas.errors import UserError
from postnas.evaluate import batches
from postnas.evaluate.batches import Request, Scored, generate, loglikelihoods, row_bytes
from postnas.models.cache import HybridCache
from postnas.models.model import HybridForCausalLM

PLACEMENTS = {
    "mixed": MIXED,
    "attention": ["attn", "attn"],
    "linear": ["jet", "gated_deltanet"],
    "windows": ["swa", "attn", "jet", "swa"],
}
NEW = 12
WAYS = [("auto", True), ("none", True), ("auto", False), ("none", False)]


@pytest.fixture(scope="module", params=list(PLACEMENTS))
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    return make_hybrid(PLACEMENTS[request.param]).requires_grad_(False)


@pytest.fixture(scope="module")
def hybrid() -> HybridForCausalLM:
    return make_hybrid(PLACEMENTS["windows"]).requires_grad_(False)


def drawn(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def questions(prefix: int = 40) -> list[Request]:
    """Prompts of many lengths behind a common one, with one to four continuations of one to nine tokens."""
    shots, *prompts = drawn(3, prefix, 5, 30, 1, 12, 70, 12)
    lengths = [(3, 1, 6), (1, 1, 1, 1), (2,), (1, 9), (4, 2, 2), (1,)]
    requests = []
    for number, (prompt, wanted) in enumerate(zip(prompts, lengths, strict=True)):
        requests += [Request(shots + prompt, answer) for answer in drawn(10 + number, *wanted)]
    return requests[::2] + requests[1::2]  # those of a question do not stand together


def one_by_one(model: HybridForCausalLM, requests: Sequence[Request]) -> list[Scored]:
    """A full forward for each request, with no padding, cache or batch."""
    results = []
    for request in requests:
        ids = torch.tensor([request.prompt + request.continuation])
        logits = model(ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        target = torch.tensor(request.continuation)
        values = logits.log_softmax(-1)[torch.arange(len(target)), target]
        results.append(Scored(values.double().sum().item(), values.tolist(), bool((logits.argmax(-1) == target).all())))
    return results


def agree(found: Sequence[Scored], expected: Sequence[Scored]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-4, rel=1e-5)
        assert one.total == pytest.approx(other.total, abs=1e-4, rel=1e-5)
        assert one.total == math.fsum(one.values)
        assert one.greedy == other.greedy


@contextmanager
def forwards(model: HybridForCausalLM) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the tokens of each forward pass."""
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(args[0].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize(("prefix", "share"), WAYS)
@pytest.mark.parametrize("batch_tokens", [1, 600, 100_000])
def test_batches_equal_one_request_at_a_time(
    model: HybridForCausalLM, prefix: str, share: bool, batch_tokens: int
) -> None:
    requests = questions()
    found = loglikelihoods(model, requests, batch_tokens=batch_tokens, prefix=prefix, share=share)
    agree(found, one_by_one(model, requests))


@pytest.mark.parametrize(("prefix", "share"), WAYS)
def test_long_rows_run_in_pieces_and_give_the_same(
    model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch, prefix: str, share: bool
) -> None:
    monkeypatch.setattr(batches, "PIECE", 7)
    requests = questions()
    agree(loglikelihoods(model, requests, batch_tokens=5000, prefix=prefix, share=share), one_by_one(model, requests))


def test_greedy_continuations_are_known(hybrid: HybridForCausalLM) -> None:
    prompts = drawn(5, 9, 40, 3)
    answers = [alone(hybrid, prompt)[:4] for prompt in prompts]
    wrong = [[*answer[:3], (answer[3] + 1) % 97] for answer in answers]
    requests = [Request(p, a) for p, pair in zip(prompts, zip(answers, wrong, strict=True), strict=True) for a in pair]
    for share in (True, False):
        found = loglikelihoods(hybrid, requests, batch_tokens=1000, share=share)
        assert [scored.greedy for scored in found] == [True, False] * 3


def test_letters_cost_one_forward_of_each_prompt(hybrid: HybridForCausalLM) -> None:
    prompts = drawn(6, 20, 25, 30)
    requests = [Request(prompt, [letter]) for prompt in prompts for letter in (65, 66, 67, 68)]
    with forwards(hybrid) as shapes:
        found = loglikelihoods(hybrid, requests, batch_tokens=1000, prefix="none")
    assert shapes == [(3, 30)]
    agree(found, one_by_one(hybrid, requests))


def test_a_prompt_runs_once_for_its_choices(hybrid: HybridForCausalLM) -> None:
    (prompt,) = drawn(6, 50)
    requests = [Request(prompt, choice) for choice in drawn(7, 3, 5, 4)]
    with forwards(hybrid) as shapes:
        loglikelihoods(hybrid, requests, batch_tokens=1000)
    assert shapes == [(1, 50), (3, 4)]
    with forwards(hybrid) as shapes:
        loglikelihoods(hybrid, requests, batch_tokens=1000, prefix="none", share=False)
    assert shapes == [(3, 54)]


def test_a_prompt_that_saves_little_is_not_shared(hybrid: HybridForCausalLM) -> None:
    (prompt,) = drawn(6, 4)
    requests = [Request(prompt, choice) for choice in drawn(7, 41, 40)]
    with forwards(hybrid) as shapes:
        found = loglikelihoods(hybrid, requests, batch_tokens=1000)
    assert shapes == [(2, 44)]
    agree(found, one_by_one(hybrid, requests))


def test_a_common_prefix_runs_once(hybrid: HybridForCausalLM) -> None:
    shots, *prompts = drawn(8, 60, 5, 9, 7)
    requests = [Request(shots + prompt, [1]) for prompt in prompts]
    for prefix, expected in (("auto", [(1, 60), (3, 9)]), ("none", [(3, 69)])):
        with forwards(hybrid) as shapes:
            loglikelihoods(hybrid, requests, batch_tokens=5000, prefix=prefix)
        assert shapes == expected
        with forwards(hybrid) as shapes:
            generate(hybrid, [shots + prompt for prompt in prompts], max_new_tokens=1, batch_tokens=5000, prefix=prefix)
        assert shapes == expected
    short = [Request(request.prompt[60 - batches.PREFIX + 1 :], [1]) for request in requests]
    with forwards(hybrid) as shapes:
        loglikelihoods(hybrid, short, batch_tokens=5000)
    assert shapes == [(3, batches.PREFIX - 1 + 9)]


def test_a_prompt_that_begins_another_leaves_a_token_behind_the_prefix(hybrid: HybridForCausalLM) -> None:
    long, *answers = drawn(9, 80, 2, 3)
    requests = [Request(long[:50], answers[0]), Request(long, answers[1])]
    with forwards(hybrid) as shapes:
        found = loglikelihoods(hybrid, requests, batch_tokens=5000)
    assert shapes[0] == (1, 49)
    agree(found, one_by_one(hybrid, requests))


def test_no_batch_is_larger_than_asked(hybrid: HybridForCausalLM) -> None:
    with forwards(hybrid) as shapes:
        loglikelihoods(hybrid, questions(), batch_tokens=300, prefix="none", share=False)
    assert len(shapes) > 2 and all(rows * width <= 300 for rows, width in shapes)


def alone(model: HybridForCausalLM, prompt: list[int], end_ids: set[int] | None = None, count: int = NEW) -> list[int]:
    """The new tokens of transformers' own greedy generate."""
    options: dict[str, Any] = {"eos_token_id": sorted(end_ids)} if end_ids else {}
    ids = torch.tensor([prompt])
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return output[0, len(prompt) :].tolist()


def prompts(prefix: int = 0) -> list[list[int]]:
    shots, *rest = drawn(4, prefix, 9, 33, 1, 64, 9, 17)
    return [shots + prompt for prompt in rest]


@pytest.mark.parametrize("shots", [0, 40])
@pytest.mark.parametrize("batch_tokens", [1, 250, 100_000])
def test_answers_equal_generate_alone(model: HybridForCausalLM, shots: int, batch_tokens: int) -> None:
    asked = prompts(shots)
    expected = [alone(model, prompt) for prompt in asked]
    assert len({tuple(answer) for answer in expected}) > 3, "the rows must say different things"
    for prefix in ("auto", "none"):
        found = generate(model, asked, max_new_tokens=NEW, batch_tokens=batch_tokens, prefix=prefix)
        assert found == expected


def test_answers_in_pieces_equal_generate_alone(model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE", 7)
    for asked in (prompts(), prompts(40)):
        assert generate(model, asked, max_new_tokens=NEW, batch_tokens=5000) == [alone(model, p) for p in asked]


def test_rows_end_at_their_own_end_ids_and_leave_the_batch(model: HybridForCausalLM) -> None:
    asked = prompts()
    free = [alone(model, prompt) for prompt in asked]
    end_ids = {free[0][2], free[3][5]}
    expected = [alone(model, prompt, end_ids) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 1
    with forwards(model) as shapes:
        assert generate(model, asked, max_new_tokens=NEW, batch_tokens=5000, end_ids=end_ids) == expected
    left = [sum(len(answer) > step for answer in expected) for step in range(1, max(map(len, expected)))]
    assert shapes[1:] == [(rows, 1) for rows in left]


def test_stop_is_asked_with_the_new_tokens_after_each(hybrid: HybridForCausalLM) -> None:
    asked = prompts()
    free = [alone(hybrid, prompt) for prompt in asked]
    seen: list[tuple[int, ...]] = []

    def stop(new: list[int]) -> bool:
        seen.append(tuple(new))
        return len(new) >= 2 and sum(new) % 3 == 0

    expected = []
    for answer in free:
        length = next((n for n in range(2, NEW) if sum(answer[:n]) % 3 == 0), NEW)
        expected.append(answer[:length])
    assert len({len(answer) for answer in expected}) > 2
    assert generate(hybrid, asked, max_new_tokens=NEW, batch_tokens=5000, stop=stop) == expected
    assert {tuple(answer[:n]) for answer in expected for n in range(1, min(len(answer), NEW - 1) + 1)} == set(seen)


def test_batches_of_answers_keep_to_the_memory_asked(hybrid: HybridForCausalLM) -> None:
    with forwards(hybrid) as shapes:
        generate(hybrid, prompts(), max_new_tokens=NEW, batch_tokens=100, prefix="none")
    prefills = [shape for shape in shapes if shape[1] > 1 or shape == shapes[0]]
    assert prefills[0] == (1, 64)
    assert all(rows == 1 or rows * (width + NEW) <= 100 for rows, width in prefills)
    assert max(rows for rows, _ in prefills) > 1


def test_bfloat16_is_near_float32() -> None:
    requests = questions()
    wide = loglikelihoods(make_hybrid(MIXED), requests, batch_tokens=2000)
    narrow = loglikelihoods(make_hybrid(MIXED).bfloat16(), requests, batch_tokens=2000)
    difference = [abs(a.total - b.total) / len(a.values) for a, b in zip(wide, narrow, strict=True)]
    assert 0 < sum(difference) / len(difference) < 0.5


def test_nothing_asked_is_nothing_answered(hybrid: HybridForCausalLM) -> None:
    assert loglikelihoods(hybrid, [], batch_tokens=100) == []
    assert generate(hybrid, [], max_new_tokens=3, batch_tokens=100) == []


def test_mistakes_are_one_line(hybrid: HybridForCausalLM) -> None:
    good = Request([1], [2])
    calls = {
        r"prompts\[1\]: .*give": lambda: loglikelihoods(hybrid, [good, Request([], [2])], batch_tokens=9),
        r"requests\[0\].continuation: .*give": lambda: loglikelihoods(hybrid, [Request([1], [])], batch_tokens=9),
        "prefix: 'some' .*choose from": lambda: loglikelihoods(hybrid, [good], batch_tokens=9, prefix="some"),
        r"prompts\[0\]: .*give ": lambda: generate(hybrid, [[]], max_new_tokens=3, batch_tokens=9),
        "max_new_tokens: 0 .*give": lambda: generate(hybrid, [[1]], max_new_tokens=0, batch_tokens=9),
    }
    for line, call in calls.items():
        with pytest.raises(UserError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_batch_holds_no_more_states_than_fit(hybrid: HybridForCausalLM) -> None:
    """Short rows carry whole recurrent states and blocks of slots, so tokens alone do not bound a batch."""
    asked = drawn(20, *[3] * 8)
    expected = [alone(hybrid, prompt) for prompt in asked]
    room = 3 * row_bytes(hybrid, 3 + NEW)
    for given, rows in ((room, [3, 3, 2]), (room - 1, [2] * 4), (1, [1] * 8), (None, [8])):
        with forwards(hybrid) as shapes:
            found = generate(hybrid, asked, max_new_tokens=NEW, batch_tokens=10_000, batch_bytes=given)
        assert found == expected
        assert [shape[0] for shape in shapes if shape[1] == 3] == rows


def test_a_row_counts_all_its_states() -> None:
    model = make_hybrid(["jet", "gated_deltanet", "attn"])
    cache = HybridCache(model.config)
    model(torch.zeros(1, 5, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(value.numel() * value.element_size() for state in cache.states for value in state.tensors().values())
    assert held <= row_bytes(model, 5) <= 1.2 * held + 8 * 97
    assert row_bytes(model, 2000) > row_bytes(model, 5)


def test_likelihoods_that_share_a_cache_keep_to_its_room(hybrid: HybridForCausalLM) -> None:
    requests = [Request(prompt, choice) for prompt in drawn(21, 30, 31) for choice in drawn(22, 3, 4, 5, 6)]
    room = 2 * row_bytes(hybrid, 64)
    with forwards(hybrid) as shapes:
        found = loglikelihoods(hybrid, requests, batch_tokens=10_000, batch_bytes=room, prefix="none")
    assert max(rows for rows, _ in shapes) == 2
    agree(found, one_by_one(hybrid, requests))


def test_no_pass_takes_more_tokens_than_its_activations_may(
    model: HybridForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of equal length need no mask, and are cut all the same."""
    monkeypatch.setattr(batches, "PASS", 60)
    asked = drawn(23, 33, 33, 33, 33)
    with forwards(model) as shapes:
        found = generate(model, asked, max_new_tokens=NEW, batch_tokens=10_000, prefix="none")
    assert found == [alone(model, prompt) for prompt in asked]
    assert shapes[:4] == [(4, 15), (4, 15), (4, 2), (4, 1)]
    with forwards(model) as shapes:
        agree(
            loglikelihoods(model, [Request(prompt, [5, 6]) for prompt in asked], batch_tokens=10_000),
            one_by_one(model, [Request(prompt, [5, 6]) for prompt in asked]),
        )
    assert max(rows * width for rows, width in shapes) <= 60


@contextmanager
def small_memory(model: HybridForCausalLM, rows: int, at: int = 1) -> Iterator[None]:
    """A device that has no room for more than `rows` rows from the `at`-th forward pass on."""
    count = 0

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        if len(args[0]) > rows and count >= at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_batch_that_does_not_fit_is_halved(hybrid: HybridForCausalLM, at: int) -> None:
    asked, end_ids = prompts(), {alone(hybrid, prompts()[0])[2]}
    expected = [alone(hybrid, prompt, end_ids) for prompt in asked]
    requests = questions()
    with small_memory(hybrid, rows=2, at=at):
        assert generate(hybrid, asked, max_new_tokens=NEW, batch_tokens=10_000, end_ids=end_ids) == expected
        found = loglikelihoods(hybrid, requests, batch_tokens=10_000, share=False)
    agree(found, one_by_one(hybrid, requests))


def test_likelihoods_are_not_read_twice_where_a_batch_is_halved(hybrid: HybridForCausalLM) -> None:
    """The trunks fit and are read; their branches, which are more, do not."""
    requests = [Request(prompt, choice) for prompt in drawn(24, 50, 60) for choice in drawn(25, 3, 5)]
    with small_memory(hybrid, rows=2):
        found = loglikelihoods(hybrid, requests, batch_tokens=10_000, prefix="none")
    agree(found, one_by_one(hybrid, requests))


def test_a_row_that_does_not_fit_is_one_line(hybrid: HybridForCausalLM) -> None:
    calls = (
        lambda: generate(hybrid, prompts(), max_new_tokens=2, batch_tokens=99),
        lambda: loglikelihoods(hybrid, questions(), batch_tokens=99),
    )
    for call in calls:
        with small_memory(hybrid, rows=0), pytest.raises(UserError, match=r"--device: .*--dtype") as caught:
            call()
        assert "\n" not in str(caught.value)

"""`generate` in every mode, streaming, and a saved folder in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXED, PAD, make_hybrid, make_tokenizer
from torch import Tensor

from postnas.errors import UserError
from postnas.generate.text import generate
from postnas.generate.throughput import cache_size, measure
from postnas.models.cache import HybridCache
from postnas.models.load import load
from postnas.models.model import HybridForCausalLM
from postnas.models.outputs import CACHE

NEW = 20
PLACEMENTS = {"mixed": MIXED, "attention first": ["swa", "attn", "jet", "gated_deltanet"]}


@pytest.fixture(scope="module", params=list(PLACEMENTS))
def model(request: pytest.FixtureRequest) -> HybridForCausalLM:
    return make_hybrid(PLACEMENTS[request.param]).requires_grad_(False)


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (length,), generator=generator) for length in lengths]


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: HybridForCausalLM, prompt: Tensor, **options: Any) -> Tensor:
    """New tokens of one unpadded prompt."""
    output = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW, **options)
    return output[:, len(prompt) :]


def by_hand(model: HybridForCausalLM, prompt: Tensor, count: int = NEW) -> Tensor:
    """Greedy, with a full forward for each token."""
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, len(prompt) :]


def test_greedy_equals_a_full_forward_for_each_token(model: HybridForCausalLM) -> None:
    for prompt in prompts(1, 2, 9, 70):
        assert torch.equal(alone(model, prompt, do_sample=False), by_hand(model, prompt))


def test_greedy_in_a_padded_batch_equals_alone(model: HybridForCausalLM) -> None:
    rows = prompts(5, 12, 1, 70)
    batch = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False)[:, 70:]
    assert len({tuple(row.tolist()) for row in batch}) == 4  # the rows say different things
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(found, by_hand(model, row)[0])


def test_rows_that_end_early_leave_the_others_alone(model: HybridForCausalLM) -> None:
    rows = prompts(5, 12, 1)
    free = [by_hand(model, row)[0] for row in rows]
    end = int(free[0][2])
    batch = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, eos_token_id=end)[:, 12:]
    for expected, found in zip(free, batch, strict=True):
        stop = (expected == end).nonzero()
        count = int(stop[0]) + 1 if len(stop) else NEW
        count = min(count, len(found))
        assert torch.equal(found[:count], expected[:count])
        assert (found[count:] == PAD).all()


def beam_search(model: HybridForCausalLM, prompt: Tensor, beams: int, count: int) -> Tensor:
    """The best of `beams` sequences of `count` new tokens by summed log-probability, without a cache."""
    ids, scores = prompt[None], torch.zeros(1)
    for _ in range(count):
        log_p = model(ids, use_cache=False).logits[:, -1].log_softmax(-1)
        scores, chosen = (scores[:, None] + log_p).flatten().topk(beams)
        ids = torch.cat([ids[chosen // log_p.shape[1]], (chosen % log_p.shape[1])[:, None]], dim=1)
    return ids[0, len(prompt) :]


def test_beams_in_a_padded_batch_equal_a_beam_search_without_a_cache(model: HybridForCausalLM) -> None:
    rows = prompts(5, 12, 1)
    batch = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, num_beams=4)[:, 12:]
    greedy = 0
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(found, beam_search(model, row, 4, NEW))
        greedy += torch.equal(found, by_hand(model, row)[0])
    assert greedy < 3  # else beams were never reordered


def test_sampling_is_decided_by_the_seed(model: HybridForCausalLM) -> None:
    batch = left_padded(prompts(5, 12))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**batch, max_new_tokens=NEW, do_sample=True, temperature=1.5, top_k=20)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_samples_of_one_prompt_go_their_own_ways(model: HybridForCausalLM) -> None:
    """Each row must be what its own tokens say: the states of one row must not be another's."""
    rows = prompts(5, 12)
    output = model.generate(
        **left_padded(rows),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=2.0,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences.shape == (6, 12 + NEW)
    assert len({tuple(row.tolist()) for row in output.sequences}) == 6
    logits = torch.stack(output.logits, dim=1)
    for index, sequence in enumerate(output.sequences):
        row = rows[index // 3]
        ids = torch.cat([row, sequence[12:]])[None]
        expected = model(ids, use_cache=False).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits[index], expected, rtol=0, atol=5e-4)  # `mixed` has a layer of every block


def test_generate_goes_on_from_a_returned_cache(model: HybridForCausalLM) -> None:
    """A second turn after the first, in a padded batch; with its own padding, too."""
    rows, turns = prompts(5, 12), prompts(3, 6)
    first = model.generate(**left_padded(rows), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first[CACHE], HybridCache)
    # the last new token has not been read yet
    assert first[CACHE].get_seq_length() == 12 + NEW - 1
    more = left_padded(turns)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    mask = torch.cat([left_padded(rows)["attention_mask"], torch.ones(2, NEW), more["attention_mask"]], dim=1)
    second = model.generate(ids, attention_mask=mask, past_key_values=first[CACHE], max_new_tokens=NEW, do_sample=False)
    for index, row in enumerate(rows):
        whole = torch.cat([row, first.sequences[index, 12:], turns[index]])
        assert torch.equal(second[index, ids.shape[1] :], by_hand(model, whole)[0])


def test_one_prompts_cache_serves_many(model: HybridForCausalLM) -> None:
    """The shared start is read once; its cache is copied and grown to a row a question."""
    start, questions = prompts(30)[0], torch.stack(prompts(6, 6, 6))
    cache = model(start[None]).past_key_values
    grown = copy.deepcopy(cache)
    grown.reorder_cache(torch.zeros(3, dtype=torch.int64))
    ids = torch.cat([start.expand(3, -1), questions], dim=1)
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, past_key_values=grown, max_new_tokens=NEW, do_sample=False)
    for row, whole in zip(found, ids, strict=True):
        assert torch.equal(row[36:], by_hand(model, whole)[0])
    assert cache.get_seq_length() == 30


def test_generate_without_a_cache_says_the_same(model: HybridForCausalLM) -> None:
    batch = left_padded(prompts(5, 12))
    with_cache = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=False), with_cache)


def test_a_prompt_read_in_chunks_says_the_same(model: HybridForCausalLM) -> None:
    batch = left_padded(prompts(70, 33))
    whole = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=16), whole)


def test_assisted_decoding_is_one_line(model: HybridForCausalLM) -> None:
    """A hybrid takes no tokens back, neither as the model nor as its assistant."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=PAD))
    calls = [
        (model, {"assistant_model": llama}),
        (model, {"prompt_lookup_num_tokens": 3}),
        (llama, {"assistant_model": model}),
    ]
    for speaker, options in calls:
        with pytest.raises(ValueError) as raised:
            speaker.generate(prompts(9)[0][None], max_new_tokens=NEW, do_sample=False, **options)
        assert "\n" not in str(raised.value).strip()


# Streaming


@pytest.fixture(scope="module")
def speaker() -> tuple[HybridForCausalLM, Any]:
    tokenizer = make_tokenizer()
    model = make_hybrid(vocab_size=300, pad_token_id=1, eos_token_id=0, tie_word_embeddings=True)
    return model.requires_grad_(False), tokenizer


def test_streamed_text_is_that_of_generate(speaker: tuple[HybridForCausalLM, Any]) -> None:
    model, tokenizer = speaker
    prompt = "The quiet river"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    pieces = list(generate(model, tokenizer, prompt, max_new_tokens=40))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    torch.manual_seed(3)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True, temperature=0.7)
    expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    torch.manual_seed(3)
    assert "".join(generate(model, tokenizer, prompt, max_new_tokens=40, temperature=0.7)) == expected


def test_a_failure_while_streaming_reaches_the_caller(
    speaker: tuple[HybridForCausalLM, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = speaker
    calls = 0
    forward = model.forward

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("the device fell off")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", fails_later)
    with pytest.raises(RuntimeError, match="the device fell off"):
        list(generate(model, tokenizer, "The quiet river"))


@pytest.mark.parametrize(
    "arguments, field",
    [({"prompt": ""}, "prompt"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature")],
)
def test_wrong_requests_are_one_line(
    speaker: tuple[HybridForCausalLM, Any], arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError, match=field) as raised:
        list(generate(*speaker, **{"prompt": "The quiet river"} | arguments))
    assert "\n" not in str(raised.value)


# Throughput


def test_throughput_counts_the_cache_and_names_its_rows(model: HybridForCausalLM) -> None:
    rows = measure(model, context=40, batch=2, decode_tokens=3, chunk=16)
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    cache = model(torch.stack(prompts(40, 40))).past_key_values
    assert all(row["cache_bytes"] == cache_size(cache) // 2 == cache.nbytes // 2 for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert rows[1]["n"] == 3
    assert rows[1]["stderr"] >= 0


# A saved folder, in a process of its own


@pytest.fixture(scope="module")
def folder(speaker: tuple[HybridForCausalLM, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model, tokenizer = speaker
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


READ = """
import torch
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The quiet river", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=12, do_sample=False)
print(json.dumps([type(model).__name__, type(AutoConfig.from_pretrained(folder)).__name__, out[0].tolist()]))
"""
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
ORDERS = {
    "postnas first": "import postnas\n" + AUTO,
    "transformers first": AUTO + "import postnas\n",
    "transformers, its Auto classes later": "import transformers\nimport postnas\n" + AUTO,
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_auto_classes_open_a_saved_folder_after_import_postnas(
    order: str, folder: Path, speaker: tuple[HybridForCausalLM, Any]
) -> None:
    model, tokenizer = speaker
    code = f"import json\nfolder = {str(folder)!r}\n" + ORDERS[order] + READ
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, config, ids = json.loads(done.stdout)
    assert (name, config) == ("HybridForCausalLM", "HybridConfig")
    expected = model.generate(**tokenizer("The quiet river", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert ids == expected[0].tolist()


def test_a_saved_folder_holds_safetensors_and_plain_text_only(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}
    assert "model.safetensors" in names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "postnas"
    assert config["placement"] == MIXED
    assert "auto_map" not in config  # no remote code


def test_load_gives_model_and_tokenizer(folder: Path, speaker: tuple[HybridForCausalLM, Any]) -> None:
    model, tokenizer = load(folder)
    assert not model.training
    text = "".join(generate(model, tokenizer, "The quiet river", max_new_tokens=12))
    assert text == "".join(generate(*speaker, "The quiet river", max_new_tokens=12))

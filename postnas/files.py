"""Files that are whole or absent: everything is written beside its place and renamed into it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from postnas.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) that takes `path`'s place when the block ends well.

    A block that raises leaves `path` as it was and nothing beside it. Raises UserError where the
    disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if temporary.is_dir() and path.exists():
            # A folder cannot be renamed over a full one, so the old one steps aside first.
            os.replace(path, temporary.with_suffix(".old"))
        os.replace(temporary, path)
    except Exception as error:
        # safetensors and tokenizers raise types of their own for a full disk, with the system's words in the text.
        if isinstance(error, UserError) or not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        raise _unwritten(path, error) from error
    finally:
        _sweep(path)


def _unwritten(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written ({reason}); free some space or choose another place")


def _sweep(path: Path) -> None:
    """Remove what this or an earlier, killed writer of `path` has left beside it, not what another one writes now."""
    recover(path)
    for left in _left(path, "tmp") + _left(path, "old"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def recover(path: Path) -> None:
    """Put a folder back that a killed writer had moved aside, where its successor never came."""
    for old in _left(path, "old"):
        if not path.exists():
            os.replace(old, path)


def _left(path: Path, ending: str) -> list[Path]:
    """Files of ours beside `path` whose writer is this process or lives no more."""
    found = path.parent.glob(f".{escape(path.name)}.*.{ending}")
    return [left for left in found if not _alive(left.name.split(".")[-2])]


def _alive(pid: str) -> bool:
    """Whether another process of this number runs on this machine."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises UserError where another one has it, or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise _unwritten(folder, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another process runs in it; wait for that one, or choose another `out`"
            ) from None
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same `path`, an empty file beside what is changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; `path` holds the old text or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. Raises UserError on NaN or infinity: a model whose weights are not sound."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise UserError(
            f"{path}: a result is not finite ({error}); lower the learning rates, or mend the base"
        ) from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`. Raises UserError where the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error}); make the file anew") from error


def read_jsonl(path: str | Path) -> list[Any]:
    """One value a line; a last line that a killed process left unfinished is dropped.

    Raises UserError where the file is there and cannot be read, or another line is no JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    values = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, or choose another run") from error
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: is no JSON; remove the line, or the file") from error
    return values


def write_jsonl(path: str | Path, values: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def append_jsonl(path: str | Path, value: Any) -> None:
    """Add a line at the end. Raises UserError where the disk is full or the place cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(value) + "\n")
    except OSError as error:
        raise _unwritten(path, error) from error

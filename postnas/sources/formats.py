"""Files of text and rows: one reader a format, each giving where a row stands and the row."""

from __future__ import annotations

import gzip
import io
import json
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postnas.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ".json, .jsonl or .txt (also with .gz or .zst), .parquet or .arrow"
TEXT_IN_ONE = 1_000_000
"""Bytes up to which a .txt file is one document."""

Rows = Iterator[tuple[str, Any]]
"""("line 3", value): where a row stands in its file, and the row."""


def format_of(path: Path) -> str:
    """The ending that tells how to read a file: ".jsonl" of a.jsonl.gz. Tables compress inside."""
    *_, inner, last = ("", "", *(ending.lower() for ending in path.suffixes))
    return inner if last in (".gz", ".zst") and inner in (".json", ".jsonl", ".txt") else last


def short(text: object) -> str:
    """Someone else's message, cut to the length of a line."""
    return textwrap.shorten(str(text), 300, placeholder=" ...")


@contextmanager
def reading(path: str | Path, *more: type[Exception]) -> Iterator[None]:
    """What a missing, forbidden, cut-off or damaged file raises becomes a UserError of one line."""
    damage: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *more)
    try:
        yield
    except damage as error:
        reason = getattr(error, "strerror", None) or short(error)
        raise UserError(f"{path}: cannot be read ({reason}); check the file or fetch it again") from error


def no_field(place: str | Path, field: str, fields: Iterable[str]) -> UserError:
    names = short(", ".join(map(str, fields))) or "(it has none)"
    return UserError(f"{place}: has no field {field!r}; choose one of: {names}")


def _open(path: Path) -> io.BufferedIOBase:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(path)
    if ending == ".zst":
        import pyarrow as pa

        # The reader of the zstandard package ends in silence where a file is cut off; this one raises.
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with reading(path), _open(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 ({error.reason}); convert the file") from error
            yield number, text


def _loads(text: str, path: Path, line: int = 0) -> Any:
    """The JSON value in `text`; line: where it stands in `path`, 0 where it is all of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line or error.lineno}"
        raise UserError(f"{place}: is not JSON ({error.msg}, column {error.colno}); mend the file") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets nested thousands deep.
        raise UserError(f"{path}, line {line or 1}: is JSON that cannot be read ({error}); mend the file") from error


def _json(path: Path, field: str | None) -> Rows:
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    rows = _loads(text, path)
    if isinstance(rows, dict):
        values = list(rows.values())
        texts = field is not None and field not in rows and all(isinstance(value, str) for value in values)
        rows = values if texts or all(isinstance(value, dict) for value in values) else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one {type(rows).__name__}; give a list, or an object of objects")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _json_lines(path: Path, field: str | None) -> Rows:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", _loads(line, path, number)


def _text(path: Path, field: str | None) -> Rows:
    with reading(path):
        in_one = path.stat().st_size <= TEXT_IN_ONE
    passage: list[str] = []
    start = 1
    for number, line in _lines(path):
        if in_one or line.strip():
            passage.append(line)
        else:
            yield f"line {start}", "".join(passage)
            passage, start = [], number + 1
    yield f"line {start}", "".join(passage)


def _parquet(path: Path, field: str | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path, pa.ArrowException, UnicodeDecodeError), pq.ParquetFile(path) as table:
        if field is not None and field not in table.schema_arrow.names:
            raise no_field(path, field, table.schema_arrow.names)
        yield from _numbered(table.iter_batches(columns=None if field is None else [field]))


def _arrow(path: Path, field: str | None) -> Rows:
    import pyarrow as pa

    with reading(path, pa.ArrowException, UnicodeDecodeError), pa.OSFile(str(path)) as source:
        # Two formats share the ending: `datasets` writes streams, Feather is the file format.
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
        if field is not None and field not in reader.schema.names:
            raise no_field(path, field, reader.schema.names)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        yield from _numbered(batch if field is None else batch.select([field]) for batch in batches)


def _numbered(batches: Iterable[pa.RecordBatch]) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".txt": _text,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""By ending: (path, field) -> rows. Tables read the column `field` alone where one is given."""

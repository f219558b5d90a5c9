"""A name -> documents to train on, or rows to evaluate on, streamed file by file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from postnas.errors import UserError
from postnas.sources.formats import KINDS, READERS, Rows, format_of, no_field, short
from postnas.sources.names import resolve

DATASET = re.compile(r"hf:(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?", re.ASCII)


def documents(name: str, sha256: str | None = None, field: str = "text") -> Iterator[str]:
    """Every document with text in it, as it stands, in the order of files and rows.

    name: what `resolve` takes, or `hf:OWNER/NAME[:CONFIG][@SPLIT]`, which is streamed; train is the split unless named.
    field: the key or column that holds the text; a row that is itself a string is a document.
    - .json: a list of strings or objects, an object of objects or of strings (its values are the
      rows), or one object with `field`. .jsonl: a string or an object a line.
    - .txt: one document where the file has at most TEXT_IN_ONE bytes (as stored), else one a
      passage between blank lines.
    - .parquet, .arrow (stream or file format): `field` is a column. .json, .jsonl and .txt may be
      compressed (.gz, .zst).
    Half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD. Raises UserError at what cannot
    be read, at a row without the field, and at a file without any text.
    """
    for place, rows in _tables(name, sha256, field):
        empty = True
        for where, row in rows:
            text = row if isinstance(row, str) else _field_of(row, field, f"{place}, {where}")
            if text.strip():
                empty = False
                yield _encodable(text)
        if empty:
            raise UserError(f"{place}: holds no text; give a file with at least one document")


def records(name: str, sha256: str | None = None) -> Iterator[dict[str, Any]]:
    """Every row as an object, from the files and formats that `documents` reads.

    Raises UserError at what cannot be read, at a row that is no object, and at a file without rows.
    """
    for place, rows in _tables(name, sha256, None):
        empty = True
        for where, row in rows:
            if not isinstance(row, dict):
                raise _no_object(f"{place}, {where}", row)
            empty = False
            yield row
        if empty:
            raise UserError(f"{place}: holds no rows; give a file with at least one")


def _tables(name: str, sha256: str | None, field: str | None) -> Iterator[tuple[str, Rows]]:
    """(place, rows) of every file of `name`, or of the one streamed dataset."""
    if name.startswith("hf:"):
        if sha256 is not None:
            raise UserError(f"sha256: cannot be checked for {name}, which is streamed; drop it")
        yield name, _streamed(name)
        return
    for path in resolve(name, sha256):
        reader = READERS.get(format_of(path))
        if reader is None:
            ending = repr(path.suffix) if path.suffix else "a name without an ending"
            raise UserError(f"{path}: {ending} is no kind of text that is read; give {KINDS}")
        yield str(path), reader(path, field)


def _field_of(row: Any, field: str, place: str) -> str:
    """The text in a row; "" where the field is null."""
    if not isinstance(row, dict):
        raise _no_object(place, row)
    if field not in row:
        raise no_field(place, field, row)
    text = row[field]
    if text is not None and not isinstance(text, str):
        fields = short(", ".join(row))
        raise UserError(f"{place}: field {field!r} holds {type(text).__name__}, not text; the fields are: {fields}")
    return text or ""


def _no_object(place: str, row: Any) -> UserError:
    return UserError(f"{place}: holds {type(row).__name__}; give objects, each with its fields")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _streamed(name: str) -> Rows:
    match = DATASET.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name}: is no dataset of the hub; write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or either with @SPLIT"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        rows = load_dataset(match["id"], match["config"], streaming=True, split=match["split"] or "train")
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except (OSError, RuntimeError, ValueError, DatasetsError, HTTPError) as error:  # a script is a RuntimeError
        raise UserError(
            f"{name}: cannot be streamed ({short(error)}); check name, configuration, split and network"
        ) from error

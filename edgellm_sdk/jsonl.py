"""Strict line-by-line readers. Every refusal is one DataError that names file, line and cause.

Files are read as bytes and split at `\\n` only (a `\\r` before it is dropped): `str.splitlines` would also split at
U+2028 and its like. A line is read with a cap, so a file without line ends costs no memory.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import stat
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO

from edgellm_sdk.errors import DataError, printable
from edgellm_sdk.wire import strict_json

MAX_LINE = 16 << 20
MAX_NESTING = 64
MAX_COLUMNS = 1024
_BOMS = (
    (b"\xef\xbb\xbf", "starts with a byte-order mark"),
    (b"\xff\xfe", "is UTF-16"),
    (b"\xfe\xff", "is UTF-16"),
)


def bad(path: Path, line: int, cause: str, fix: str = "") -> DataError:
    """`path:line: cause`, or `path: cause` for line 0. A long path keeps its end, so the cause is always shown."""
    name = printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
    name = name if len(name) <= 120 else "..." + name[-117:]
    return DataError(f"{name}:{line}: {cause}" if line else f"{name}: {cause}", fix=fix)


def open_regular(path: Path) -> BinaryIO:
    """`path` opened for reading, if it is a regular, readable, non-empty file; never blocks on a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise DataError("the path holds a NUL byte", printable(str(path))[:120]) from None
    except OSError as error:
        raise bad(path, 0, f"cannot be opened: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        os.close(descriptor)
        if stat.S_ISREG(status.st_mode):
            raise bad(path, 1, "the file is empty")
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise bad(path, 0, f"is {kind}")
    return os.fdopen(descriptor, "rb")


def lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end), lazily; blank lines only if `blank`."""
    with open_regular(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if number == 1:
                for mark, cause in _BOMS:
                    if raw.startswith(mark):
                        raise bad(path, 1, cause, "save it as UTF-8 without a mark")
            if len(raw) > MAX_LINE:
                raise bad(path, number, f"the line is longer than {MAX_LINE >> 20} MiB")
            if b"\0" in raw:
                raise bad(path, number, "holds a NUL byte", "is it UTF-8 text?")
            raw = raw[:-1] if raw.endswith(b"\n") else raw
            raw = raw[:-1] if raw.endswith(b"\r") else raw
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise bad(path, number, f"byte {error.start + 1} is not UTF-8", "save it as UTF-8") from None
            if blank or text.strip():
                yield number, text


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file: no NaN, duplicate keys, deep nesting, NUL or lone surrogates."""
    for number, text in lines(path):
        try:
            row = strict_json(text)
        except JSONDecodeError as error:
            raise bad(path, number, f"not valid JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise bad(path, number, f"not valid JSON: {str(error)[:60]}") from None
        if not isinstance(row, dict):
            raise bad(path, number, f"holds {_kind(row)} where an object is expected")
        try:
            _check(row, 1)
        except ValueError as error:
            raise bad(path, number, str(error)) from None
        yield number, row


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _check(value: Any, depth: int) -> None:
    if depth > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds a number too large for JSON")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)


def check_text(text: str) -> None:
    """ValueError for NUL or a lone surrogate, neither of which any tokenizer can be given."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds a lone surrogate") from None


def text_field(row: dict[str, Any], name: str, path: Path, line: int, empty: bool = False) -> str:
    """`row[name]` as text; DataError when it is missing, of another type, or blank (unless `empty`)."""
    if name not in row:
        raise bad(path, line, f"lacks the field {name!r}")
    value = row[name]
    if empty and value is None:
        return ""
    if not isinstance(value, str):
        raise bad(path, line, f"{name!r} is {_kind(value)}, not text")
    if not empty and not value.strip():
        raise bad(path, line, f"{name!r} is empty")
    return value


def word_field(row: dict[str, Any], name: str, path: Path, line: int) -> str:
    """A label or a user: short text on one line, or a whole number."""
    value = row.get(name)
    if type(value) is int:
        value = str(value)
    text = text_field({name: value} if name in row else {}, name, path, line).strip()
    if len(text.encode()) > 255 or not text.isprintable():
        raise bad(path, line, f"{name!r} is longer than 255 bytes or holds control characters")
    return text


def table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number of the row's end, {column: cell}) of a CSV file with a header row."""
    number = 0

    def feed() -> Iterator[str]:
        nonlocal number
        for number, text in lines(path, blank=True):  # noqa: B007 - counted for the errors below
            yield text + "\n"

    reader = csv.reader(feed(), strict=True)
    header: list[str] | None = None
    while True:
        start = number + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise bad(path, start, f"not valid CSV: {str(error)[:80]}") from None
        if header is None:
            header = [name.strip().lower() for name in row]
            named = [name for name in header if name]
            if len(set(named)) != len(named) or len(header) > MAX_COLUMNS:
                raise bad(path, number, "a column name appears twice or there are too many columns")
            continue
        if not row:
            continue
        if len(row) != len(header):
            raise bad(path, start, f"has {len(row)} cells where the header has {len(header)}")
        yield number, dict(zip(header, row, strict=True))


def gunzip(raw: bytes) -> bytes:
    """A shipped asset, unpacked."""
    return gzip.decompress(raw)

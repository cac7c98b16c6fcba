"""A strict reader of GGUF files, with a budget for everything and no foreign code.

It knows versions 2 and 3, little endian: magic, version, counts, key-values, tensor table, padding, tensor data. It
never trusts a number in the file: counts are held against the bytes that are left before anything is allocated, and a
file is either read whole or refused with one ModelError that names the file and the cause. It parses memory-mapped
bytes and leaves tensor data alone until asked, so a large model costs what its header costs.

Stricter than llama.cpp on purpose: text must be UTF-8, names printable, tensors back to back in table order, and
nothing may follow the last tensor but its padding.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 255
MAX_NAME_BYTES = 63
MAX_TEXT_BYTES = 64 << 10
MAX_METADATA_BYTES = 256 << 20
MAX_ARRAY_TEXTS = 1 << 20
MAX_ARRAY_DEPTH = 4
MAX_NESTED_ARRAYS = 1 << 12
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

# id: (name, weights per block, bytes per block)
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
TYPE_IDS: Mapping[str, int] = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}

# id: (our name, struct code); strings and arrays are handled apart
SCALAR_TYPES: Mapping[int, tuple[str, str]] = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<B"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml order (contiguous dimension first), `offset` from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    type_id: int
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of `shape[0]` weights."""
        _, block, size = TENSOR_TYPES[self.type_id]
        return self.shape[0] // block * size

    @property
    def parameters(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class GGUFFile:
    """What `read` found. Metadata values are Python scalars, text, lists of text, or read-only numpy arrays of numbers.

    `kinds` gives each key's stored type: `u32`, `string`, `array[i32]`, ... Tensor data stays on disk until asked for.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    kinds: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    _bytes: Any = field(repr=False, compare=False)

    def tensor_bytes(self, name: str) -> Array:
        """The stored bytes of a tensor as (rows, bytes per row) uint8, a read-only view of the mapped file.

        Rows are all dimensions but the first, flattened. ModelError when there is no such tensor.
        """
        import numpy as np

        if name not in self.tensors:
            raise ModelError(f"has no tensor {name!r}", str(self.path))
        info = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, info.nbytes, info.offset).reshape(-1, info.row_bytes)


class _Refused(Exception):
    """A cause of refusal on its way to becoming the ModelError that also names the file."""


class _Cursor:
    """A position in the mapped bytes; every read is checked against the end and the metadata budget."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0
        self.texts = 0  # strings read as array items so far
        self.nested = 0  # arrays read as array items so far

    def take(self, n: int, what: str) -> int:
        """Move over `n` bytes and return where they began."""
        start = self.at
        if n > self.size - start:
            raise _Refused(f"ends inside {what} (needs {n} bytes at {start}, file has {self.size})")
        if start + n > MAX_METADATA_BYTES:
            raise _Refused(f"its header is larger than {MAX_METADATA_BYTES >> 20} MiB")
        self.at = start + n
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code), what))[0]

    def text(self, limit: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise _Refused(f"{what} claims {length} bytes (limit {limit})")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused(f"{what} is not UTF-8") from None

    def texts_array(self, count: int, what: str) -> list[str]:
        """`count` strings in a row. The loop is written out because vocabularies hold 100 000s of them."""
        self.texts += count
        if self.texts > MAX_ARRAY_TEXTS:
            raise _Refused(f"{what} brings the strings in arrays above {MAX_ARRAY_TEXTS}")
        data, at, length_of = self.data, self.at, struct.Struct("<Q").unpack_from
        end = min(self.size, MAX_METADATA_BYTES)
        items = []
        for _ in range(count):
            start = at + 8
            if start > end:
                raise _Refused(f"ends inside {what}")
            length = length_of(data, at)[0]
            at = start + length
            if length > MAX_TEXT_BYTES or at > end:
                raise _Refused(f"ends inside {what}, or holds a string above {MAX_TEXT_BYTES} bytes")
            items.append(data[start:at])
        self.at = at
        try:
            return [item.decode() for item in items]
        except UnicodeDecodeError:
            raise _Refused(f"{what} is not UTF-8") from None


def _array(cursor: _Cursor, what: str, depth: int) -> tuple[str, Any]:
    import numpy as np

    if depth > MAX_ARRAY_DEPTH:
        raise _Refused(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    left = cursor.size - cursor.at
    if kind == STRING:
        if count > left // 8:
            raise _Refused(f"{what} claims {count} strings in {left} bytes")
        return "array[string]", cursor.texts_array(count, what)
    if kind == ARRAY:
        cursor.nested += count
        if cursor.nested > min(left // 12, MAX_NESTED_ARRAYS):
            raise _Refused(f"{what} claims {count} arrays")
        nested = [_array(cursor, what, depth + 1) for _ in range(count)]
        inner = nested[0][0] if nested else "array"
        return f"array[{inner}]", [value for _, value in nested]
    if kind not in SCALAR_TYPES:
        raise _Refused(f"{what} is an array of the unknown type {kind}")
    name, code = SCALAR_TYPES[kind]
    size = struct.calcsize(code)
    if count > left // size:
        raise _Refused(f"{what} claims {count} values of {size} bytes, {left} bytes are left")
    start = cursor.take(count * size, what)
    # a copy: the header of a file that is rewritten under us must not change once checked
    values: Array = np.frombuffer(cursor.data[start : start + count * size], np.dtype(code))
    if name == "bool":
        if (values > 1).any():
            raise _Refused(f"{what} holds a boolean that is neither 0 nor 1")
        values = values.astype(np.bool_)
    return f"array[{name}]", values


def _value(cursor: _Cursor, what: str) -> tuple[str, Any]:
    kind = cursor.number("<I", what)
    if kind == STRING:
        return "string", cursor.text(MAX_TEXT_BYTES, what)
    if kind == ARRAY:
        return _array(cursor, what, 1)
    if kind not in SCALAR_TYPES:
        raise _Refused(f"{what} has the unknown type {kind}")
    name, code = SCALAR_TYPES[kind]
    value = cursor.number(code, what)
    if name == "bool":
        if value > 1:
            raise _Refused(f"{what} is a boolean that is neither 0 nor 1")
        return name, bool(value)
    return name, value


def _key_values(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for i in range(count):
        key = cursor.text(MAX_KEY_BYTES, f"key {i}")
        if not key or not key.isprintable():
            raise _Refused(f"key {i} is empty or not printable")
        if key in metadata:
            raise _Refused(f"key {key[:60]!r} appears twice")
        kinds[key], metadata[key] = _value(cursor, f"the value of {key[:60]!r}")
    return metadata, kinds


def _tensor(cursor: _Cursor, index: int) -> TensorInfo:
    """One row of the tensor table; `offset` still counts from the start of the data."""
    name = cursor.text(MAX_NAME_BYTES, f"the name of tensor {index}")
    if not name or not name.isprintable():
        raise _Refused(f"the name of tensor {index} is empty or not printable")
    what = f"tensor {name!r}"
    dims = cursor.number("<I", what)
    if not 1 <= dims <= MAX_DIMS:
        raise _Refused(f"{what} has {dims} dimensions")
    shape = tuple(cursor.number("<Q", what) for _ in range(dims))
    kind, offset = cursor.number("<I", what), cursor.number("<Q", what)
    if kind not in TENSOR_TYPES:
        raise _Refused(f"{what} has the unknown type {kind}")
    label, block, size = TENSOR_TYPES[kind]
    elements = 1
    for n in shape:
        elements *= n
        if n == 0 or n >= 1 << 63 or elements >= 1 << 60:
            raise _Refused(f"{what} has an impossible shape {shape}")
    if shape[0] % block:
        raise _Refused(f"{what}: rows of {shape[0]} are no whole number of {label} blocks of {block}")
    return TensorInfo(name, shape, label, kind, offset, elements // block * size)


def _place(table: list[TensorInfo], start: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """Tensors by name with offsets from the start of the file; they must lie back to back and end with the file."""
    placed: dict[str, TensorInfo] = {}
    at, end = start, start
    for info in table:
        if info.name in placed:
            raise _Refused(f"tensor {info.name!r} appears twice")
        if info.offset % alignment:
            raise _Refused(f"tensor {info.name!r} is not aligned to {alignment}")
        if start + info.offset != at:
            raise _Refused(f"tensor {info.name!r} lies at {info.offset}, not at {at - start} behind the one before it")
        end = at + info.nbytes
        if end > size:
            raise _Refused(f"ends inside tensor {info.name!r} (needs {end} bytes, file has {size})")
        placed[info.name] = TensorInfo(info.name, info.shape, info.type, info.type_id, at, info.nbytes)
        at = end + -end % alignment
    if size > at:
        raise _Refused(f"{size - at} bytes belong to no tensor")
    return placed


def _header(cursor: _Cursor) -> tuple[int, int, dict[str, Any], dict[str, str], list[TensorInfo]]:
    start = cursor.take(4, "the magic")
    if cursor.data[start : start + 4] != b"GGUF":
        raise _Refused("is not a GGUF file (wrong magic)")
    version = cursor.number("<I", "the version")
    if version and version & 0xFFFF == 0:
        raise _Refused("is a big-endian GGUF file, which is not supported")
    if version not in (2, 3):
        raise _Refused(f"has GGUF version {version}; versions 2 and 3 are supported")
    tensors, keys = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the key count")
    # the smallest key-value is 14 bytes long, the smallest row of the tensor table 33
    if keys > min(MAX_KEYS, (cursor.size - cursor.at) // 14):
        raise _Refused(f"claims {keys} keys")
    if tensors > min(MAX_TENSORS, (cursor.size - cursor.at) // 33):
        raise _Refused(f"claims {tensors} tensors")
    metadata, kinds = _key_values(cursor, keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if kinds.get("general.alignment", "u32") != "u32":
        raise _Refused(f"general.alignment is a {kinds['general.alignment']}, not u32")
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _Refused(f"general.alignment {alignment} is no power of two up to {MAX_ALIGNMENT}")
    table = [_tensor(cursor, i) for i in range(tensors)]
    return version, alignment, metadata, kinds, table


def read(path: Path) -> GGUFFile:
    """Open and check a GGUF file. ModelError, one line, for anything that is not a whole, well-formed one."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError("is not a regular file", str(path))
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelError(f"is too short for a GGUF file ({size} bytes)", str(path))
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError as error:  # a NUL in the path, or a file that shrank under us
        raise ModelError(f"cannot be read: {printable(str(error))}", str(path)) from None
    return _checked(path, data, size)


def _checked(path: Path, data: mmap.mmap, size: int) -> GGUFFile:
    cursor = _Cursor(data, size)
    try:
        version, alignment, metadata, kinds, table = _header(cursor)
        tensors = _place(table, cursor.at + -cursor.at % alignment, alignment, size)
    except _Refused as cause:
        data.close()
        raise ModelError(str(cause)[:160], str(path), "the file is damaged or was not written by a GGUF tool") from None
    return GGUFFile(path, version, alignment, metadata, kinds, tensors, data)

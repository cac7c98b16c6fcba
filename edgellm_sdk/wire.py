"""Messages and state as canonical safetensors bytes: equal content, equal bytes.

Layout (the safetensors contract): 8-byte little-endian header length, a JSON header padded with spaces to a multiple
of 8, then the arrays back to back. We add: names sorted, keys sorted, no spaces, `__metadata__` = {"edgellm": JSON
text of the scalars}. The reader is our own and strict: every size is checked against the bytes at hand before memory
is taken, and NaN in the header, holes, overlaps, duplicate names and unknown dtypes are refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.types import Assignment, State, Update

if TYPE_CHECKING:
    from edgellm_sdk.types import Arrays

MAX_HEADER = 16 << 20
MAX_NAME = 255
MAX_TENSORS = 1 << 16
PROTOCOL = 1
TOO_LARGE = 2.0**64
"""From here on float32 cannot hold a value's square, so no norm and no moment is a number."""
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_CODES = {text[1:]: code for code, text in _DTYPES.items()}


def pack(arrays: Arrays, scalars: Mapping[str, Any]) -> bytes:
    """Arrays and JSON scalars as canonical bytes. Non-contiguous and big-endian arrays are normalised."""
    import numpy as np

    header: dict[str, Any] = {
        "__metadata__": {"edgellm": json.dumps(dict(scalars), sort_keys=True, separators=(",", ":"), allow_nan=False)}
    }
    parts, offset = [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        code = _CODES.get(array.dtype.newbyteorder("<").str[1:])
        if code is None:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which has no place on the wire")
        raw = np.ascontiguousarray(array, dtype=_DTYPES[code]).tobytes()
        header[name] = {"data_offsets": [offset, offset + len(raw)], "dtype": code, "shape": list(array.shape)}
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def strict_json(text: str) -> Any:
    """JSON without NaN, Infinity, numbers as large as that, duplicate keys or deep nesting; ValueError otherwise."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unpack(raw: bytes, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, scalars) from `pack`'s bytes; ModelError with the cause for anything else. Arrays are read-only."""
    try:
        return _unpack(raw)
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"malformed: {printable(str(error))[:120]}", where) from None


def _unpack(raw: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    import numpy as np

    if len(raw) < 8:
        raise ValueError("shorter than a header")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER or length > len(raw) - 8:
        raise ValueError(f"header of {length} bytes in a file of {len(raw)}")
    header = strict_json(raw[8 : 8 + length].decode("utf-8"))
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError("the header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    scalars = strict_json(metadata["edgellm"]) if "edgellm" in metadata else {}
    if not isinstance(scalars, dict):
        raise ValueError("the scalars are not a table")
    body, expected = memoryview(raw)[8 + length :], 0
    arrays = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if not 0 < len(name.encode()) <= MAX_NAME:
            raise ValueError("a tensor name is empty or too long")
        shape, (begin, end), code = entry["shape"], entry["data_offsets"], entry["dtype"]
        if code not in _DTYPES:
            raise ValueError(f"tensor {name[:40]!r} has unknown dtype {str(code)[:20]!r}")
        sizes = [*shape, begin, end]
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes) or len(shape) > 8:
            raise ValueError(f"tensor {name[:40]!r} has an impossible shape or place")
        dtype = np.dtype(_DTYPES[code])
        if begin != expected or end > len(body) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name[:40]!r} does not fill its place")
        arrays[name] = np.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
        expected = end
    if expected != len(body):
        raise ValueError(f"{len(body) - expected} bytes belong to no tensor")
    return arrays, scalars


def payload_bytes(arrays: Arrays) -> int:
    """Bytes of the arrays alone, without header: what a method's formula predicts."""
    return sum(array.nbytes for array in arrays.values())


def _message(kind: str, fields: Mapping[str, Any], arrays: Arrays) -> bytes:
    return pack(arrays, {"protocol": PROTOCOL, "message": kind, **fields})


def _open(raw: bytes, kind: str, names: tuple[str, ...], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, fields = unpack(raw, where)
    if fields.get("message") != kind or fields.get("protocol") != PROTOCOL:
        raise ModelError(f"is not {kind} of protocol {PROTOCOL}", where)
    missing = [name for name in names if name not in fields]
    if missing:
        raise ModelError(f"lacks {', '.join(missing)}", where)
    return arrays, fields


def update_to_bytes(update: Update) -> bytes:
    fields = {
        "base": update.base, "round": update.round, "client": update.client, "kind": update.kind,
        "examples": update.examples, "rng": update.rng, "scalars": dict(update.scalars),
    }  # fmt: skip
    return _message("update", fields, update.arrays)


def update_from_bytes(raw: bytes, where: str) -> Update:
    """ModelError for malformed bytes or fields of the wrong type."""
    names = ("base", "round", "client", "kind", "examples", "rng", "scalars")
    arrays, f = _open(raw, "update", names, where)
    texts = all(isinstance(f[n], str) for n in ("base", "client", "kind", "rng"))
    if not texts or type(f["round"]) is not int or type(f["examples"]) is not int or not isinstance(f["scalars"], dict):
        raise ModelError("has a field of the wrong type", where)
    return Update(f["base"], f["round"], f["client"], f["kind"], arrays, f["examples"], f["rng"], f["scalars"])


def assignment_to_bytes(assignment: Assignment) -> bytes:
    fields = {
        "base": assignment.base, "round": assignment.round, "client": assignment.client,
        "scalars": dict(assignment.scalars), "options": dict(assignment.options),
    }  # fmt: skip
    return _message("assignment", fields, assignment.arrays)


def assignment_from_bytes(raw: bytes, where: str) -> Assignment:
    arrays, f = _open(raw, "assignment", ("base", "round", "client", "scalars", "options"), where)
    return Assignment(f["base"], f["round"], f["client"], arrays, f["scalars"], f["options"])


def state_to_bytes(state: State) -> bytes:
    fields = {"base": state.base, "round": state.round, "scalars": dict(state.scalars), "cohort": state.cohort}
    return _message("state", fields, state.arrays)


def state_from_bytes(raw: bytes, where: str) -> State:
    arrays, f = _open(raw, "state", ("base", "round", "scalars", "cohort"), where)
    return State(f["base"], f["round"], arrays, f["scalars"], f["cohort"])


def check_update(update: Update, state: State, client: str, known: Arrays | None = None) -> str | None:
    """Why `update` cannot be used against `state`, or None: base, round, client, finiteness, size, shapes, weight.

    `known`, when given, are the arrays an update of this kind must match in name, shape and dtype, exactly.
    """
    import numpy as np

    if update.base != state.base:
        return "was computed on another base model"
    if update.round != state.round + 1:
        return f"belongs to round {update.round}, not {state.round + 1}"
    if update.client != client:
        return f"claims to come from {printable(update.client[:40])!r}"
    if update.examples <= 0:
        return f"claims {update.examples} examples"
    for name, array in sorted(update.arrays.items()):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{printable(name[:60])} is not finite"
        if array.dtype.kind == "f" and float(np.abs(array).max(initial=0)) >= TOO_LARGE:
            return f"{printable(name[:60])} holds numbers too large to square"
    if known is not None:
        if set(update.arrays) != set(known):
            return "does not carry exactly the expected arrays"
        for name, array in known.items():
            got = update.arrays[name]
            if got.shape != array.shape or got.dtype != array.dtype:
                return f"{name[:60]} is {got.dtype}{list(got.shape)}, not {array.dtype}{list(array.shape)}"
    return None

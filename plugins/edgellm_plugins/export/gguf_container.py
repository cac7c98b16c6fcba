"""Writes a GGUF version 3 file whose tensors arrive in any order, one at a time.

The plan (names, shapes, types) fixes every offset before the first weight is read, so a tensor is written where it
belongs as soon as it comes and can be forgotten. The finished file is read back with the independent strict reader and
compared with what went in, byte for byte, before it takes its name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import gguf_file
from edgellm_sdk.errors import ModelError, StorageError
from edgellm_sdk.store import atomic, storage_error, sync_folder

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

ALIGNMENT = gguf_file.DEFAULT_ALIGNMENT
_KINDS = {name: (number, code) for number, (name, code) in gguf_file.SCALAR_TYPES.items()}


@dataclass(frozen=True)
class Value:
    """A metadata value with its stored type: `u32`, `f32`, `bool`, `string`, `array[string]`, `array[i32]`, ..."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Planned:
    """A tensor to come: `shape` as numpy has it (rows first), `type` a ggml type name such as `Q4_0`."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        _, block, size = gguf_file.TENSOR_TYPES[gguf_file.TYPE_IDS[self.type]]
        count = 1
        for n in self.shape:
            count *= n
        return count // block * size


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode(value: Value) -> bytes:
    """A metadata value with its type in front."""
    kind, content = value.kind, value.value
    if kind == "string":
        return struct.pack("<I", gguf_file.STRING) + _text(content)
    if kind.startswith("array["):
        inner = kind[6:-1]
        if inner == "string":
            number, body = gguf_file.STRING, b"".join(_text(item) for item in content)
        else:
            number, code = _KINDS[inner]
            body = struct.pack(f"<{len(content)}{code[1:]}", *content)
        return struct.pack("<IIQ", gguf_file.ARRAY, number, len(content)) + body
    number, code = _KINDS[kind]
    return struct.pack("<I", number) + struct.pack(code, content)


def _header(metadata: Mapping[str, Value], plan: Sequence[Planned]) -> tuple[bytes, dict[str, int], int]:
    """(header padded to the alignment, file offset of every tensor, size of the whole file)."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _encode(value)]
    offset, offsets = 0, {}
    for tensor in plan:
        dims = tensor.shape[::-1]
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, gguf_file.TYPE_IDS[tensor.type], offset))
        offsets[tensor.name] = offset
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    return header, {name: len(header) + place for name, place in offsets.items()}, len(header) + offset


def size(metadata: Mapping[str, Value], plan: Sequence[Planned]) -> int:
    """Bytes of the file that `write` would write."""
    return _header(metadata, plan)[2]


def write(
    target: Path,
    metadata: Mapping[str, Value],
    plan: Sequence[Planned],
    data: Iterable[tuple[str, Array | Iterable[Array]]],
) -> dict[str, Any]:
    """Write `target` and return what the strict reader confirmed: {"tensors", "bytes", "types", "sha256"}.

    `data` yields (name, array in storage form: the planned type's own dtype, or uint8 blocks; or its parts, first rows
    first), in any order, each planned tensor once. ModelError when a tensor is missing, surplus or of the wrong size,
    or does not read back.
    """
    import numpy as np

    header, offsets, end = _header(metadata, plan)
    planned = {tensor.name: tensor for tensor in plan}
    digests: dict[str, str] = {}
    staged = target.parent / f".{target.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with atomic(staged) as file:
            file.write(header)
            for name, whole in data:
                if name not in planned or name in digests:
                    raise ModelError(f"tensor {name!r} comes twice or does not belong to the model", str(target))
                left, sha = planned[name].nbytes, hashlib.sha256()
                file.seek(offsets[name])
                for part in [whole] if isinstance(whole, np.ndarray) else whole:
                    left -= part.nbytes
                    if left < 0:
                        break
                    raw = part.reshape(-1).view("u1").data
                    file.write(raw)
                    sha.update(raw)
                if left:
                    size = planned[name].nbytes
                    raise ModelError(f"tensor {name!r} has {size - left} bytes, not {size}")
                digests[name] = sha.hexdigest()
            missing = sorted(planned.keys() - digests.keys())
            if missing:
                raise ModelError(f"the model lacks {len(missing)} tensors, first the one for {missing[0]!r}")
            file.truncate(end)
        facts = _read_back(staged, metadata, plan, digests)
        try:
            staged.replace(target)
            sync_folder(target.parent)
        except OSError as error:
            raise storage_error(error, target) from error
    except StorageError as error:
        raise StorageError(error.what, str(target), error.fix) from error
    finally:
        staged.unlink(missing_ok=True)
    return facts


def _read_back(
    path: Path, metadata: Mapping[str, Value], plan: Sequence[Planned], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Compare the file with what was to be written; ModelError at the first difference."""
    found = gguf_file.read(path)
    if [(t.name, t.shape, t.type) for t in found.tensors.values()] != [(t.name, t.shape[::-1], t.type) for t in plan]:
        raise ModelError("the written file has another tensor table than was planned", str(path))
    if dict(found.kinds) != {key: value.kind for key, value in metadata.items()}:
        raise ModelError("the written file has other metadata than was planned", str(path))
    types: dict[str, int] = {}
    for tensor in plan:
        if _digest(path, found.tensors[tensor.name]) != digests[tensor.name]:
            raise ModelError(f"tensor {tensor.name!r} does not read back as written", str(path), "check the disk")
        types[tensor.type] = types.get(tensor.type, 0) + 1
    whole = hashlib.sha256("".join(digests[tensor.name] for tensor in plan).encode()).hexdigest()
    return {"tensors": len(plan), "bytes": path.stat().st_size, "types": types, "sha256": whole}


def _digest(path: Path, info: gguf_file.TensorInfo) -> str:
    """sha256 of a tensor's bytes, read in pieces: mapped pages would count as memory of the size of the model."""
    sha, left = hashlib.sha256(), info.nbytes
    with path.open("rb") as file:
        file.seek(info.offset)
        while left and (piece := file.read(min(left, 1 << 22))):
            sha.update(piece)
            left -= len(piece)
    return sha.hexdigest()

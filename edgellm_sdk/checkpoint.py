"""What a model folder holds, found out without torch: strict safetensors headers, decoded tensors, digests.

Three kinds of folder with `config.json` are understood:

    plain            *.safetensors, one file or the shards that `model.safetensors.index.json` names
    block-quantised  `model.safetensors` and, for the linear layers, `quantized.safetensors` with uint8 arrays
                     (rows, packed bytes per row) and the scalars {"format": {tensor: "q4_0", ...}}
    GPTQ             `<linear>.qweight/.qzeros/.scales/.g_idx` under `quantization_config.quant_method == "gptq"`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.errors import ModelError, StorageError, printable
from edgellm_sdk.store import digest_file, write_json
from edgellm_sdk.wire import MAX_HEADER, MAX_NAME, MAX_TENSORS, strict_json

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

CONFIG, INDEX, QUANTIZED = "config.json", "model.safetensors.index.json", "quantized.safetensors"
SIDE_FILES = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
BLOCKS = {  # weights in a block and its bytes
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34), "iq4_nl": (32, 18),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq4_xs": (256, 136),
}  # fmt: skip
MAX_JSON = 4 << 20
MAX_CONFIG_NUMBER = 1 << 31
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Entry:
    """A stored array: `begin` and `end` count from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self, rows: slice = slice(None)) -> Array:
        """The array as stored (bfloat16 as its 16-bit words), or some of its rows, in memory of its own."""
        import numpy as np

        if self.dtype not in _NUMPY:
            raise ModelError(f"tensors of type {self.dtype} cannot be read", str(self.path))
        dtype = np.dtype(_NUMPY[self.dtype])
        shape, row = self.shape, math.prod(self.shape[1:])
        first = 0
        if shape:
            first, last, _ = rows.indices(shape[0])
            shape = (max(0, last - first), *shape[1:])
        count = math.prod(shape)
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + first * row * dtype.itemsize)
                array = np.fromfile(file, dtype=dtype, count=count)
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", str(self.path)) from None
        if array.size != count:
            raise ModelError("became shorter while it was read", str(self.path))
        return array.reshape(shape)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: its logical shape, how it is stored (`F32`, `q4_0`, `gptq`) and the arrays behind it."""

    name: str
    shape: tuple[int, ...]
    stored: str
    parts: tuple[Entry, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by name, its configuration and the files that its digest covers."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def parameters(self) -> int:
        """Scalars, a tied output matrix counted once."""
        skip = "lm_head.weight" if self.tied else ""
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.name != skip)

    @property
    def dtype(self) -> str:
        """The name most weights are stored under: `float32`, `bfloat16`, `q4_0`, `gptq`."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.stored] = sizes.get(tensor.stored, 0) + math.prod(tensor.shape)
        largest = max(sorted(sizes), key=lambda name: sizes[name])
        return DTYPES.get(largest, largest.lower())

    def array(self, name: str, rows: slice = slice(None)) -> Array:
        """One tensor, or some rows of a plain one, decoded: float32 for floats, integers and booleans as they are."""
        import numpy as np

        tensor = self.tensors[name]
        where = str(tensor.parts[0].path)
        if tensor.stored in BLOCKS:
            from edgellm_sdk.kit.blocks import decode

            return np.asarray(decode(tensor.parts[0].read(), tensor.stored))
        if tensor.stored == "gptq":
            from edgellm_sdk.kit import gptq_format

            settings = self.config["quantization_config"]
            bits, version = int(settings["bits"]), gptq_version(settings)
            qweight, qzeros, scales, g_idx = (part.read() for part in tensor.parts)
            try:
                weight = gptq_format.decode(qweight, qzeros, scales, g_idx, bits, version)
            except (ModelError, ValueError, IndexError) as error:
                raise ModelError(f"{name[:60]} cannot be decoded: {str(error)[:80]}", where) from None
            return np.asarray(weight)
        raw = tensor.parts[0].read(rows)
        if tensor.stored == "BF16":
            return np.asarray((raw.astype(np.uint32) << np.uint32(16)).view(np.float32))
        return raw.astype(np.float32, copy=False) if raw.dtype.kind == "f" else raw


def gptq_version(settings: Mapping[str, Any]) -> int:
    """1 where zeros are stored minus one (`gptq`, the usual), 2 for `gptq_v2`."""
    return 2 if settings.get("checkpoint_format") == "gptq_v2" else 1


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries, metadata) of a safetensors file; ModelError unless every byte of it is accounted for.

    Nothing is allocated on the word of the file: the header is at most 16 MiB and at most the file's size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror}", str(path)) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError("is not a regular file", str(path))
        try:
            return _header(path, file.read(8), file.read, status.st_size)
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
        except (ValueError, TypeError, KeyError) as error:
            cause = f"the entry lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"is not valid safetensors: {printable(cause)[:120]}", str(path)) from None


def _header(path: Path, head: bytes, read: Any, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    if len(head) < 8:
        raise ValueError("shorter than a header")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER or length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = strict_json(read(length).decode("utf-8"))
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError("the header is not a table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata is not a table of texts")
    found = []
    for name, row in header.items():
        if not 0 < len(name.encode()) <= MAX_NAME or not name.isprintable():
            raise ValueError("a tensor name is empty, too long or holds control characters")
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name[:60]} is not described by dtype, shape and data_offsets")
        shape, offsets, dtype = row["shape"], row["data_offsets"], row["dtype"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 8:
            raise ValueError(f"tensor {name[:60]} has an impossible shape or place")
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in [*shape, *offsets]):
            raise ValueError(f"tensor {name[:60]} has an impossible shape or place")
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise ValueError(f"tensor {name[:60]} has the unknown type {str(dtype)[:20]!r}")
        begin, end = offsets
        if end - begin != math.prod(shape) * _BYTES[dtype]:
            raise ValueError(f"tensor {name[:60]} does not fill its place")
        found.append((begin, end, name, Entry(path, dtype, tuple(shape), 8 + length + begin, 8 + length + end)))
    expected = 0
    for begin, end, name, _ in sorted(found, key=lambda row: row[:2]):
        if begin != expected:
            raise ValueError(f"tensor {name[:60]} leaves a hole or overlaps another")
        expected = end
    if expected != size - 8 - length:
        raise ValueError(f"{size - 8 - length - expected} bytes belong to no tensor")
    return {name: entry for _, _, name, entry in found}, metadata


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file, at most 4 MiB; ModelError otherwise."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > MAX_JSON:
            raise ModelError(f"is not a regular file below {MAX_JSON >> 20} MiB", str(path))
        value = strict_json(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError:
        raise ModelError("is not valid JSON", str(path)) from None
    if not isinstance(value, dict):
        raise ModelError("does not hold a JSON object", str(path))
    return value


def _weight_files(folder: Path) -> list[Path]:
    """The plain weight files, shards in name order. ModelError for pickle checkpoints and missing shards."""
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ModelError("has no weight_map of file names", str(folder / INDEX))
        names = sorted(set(table.values()))
        odd = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if odd:
            raise ModelError(f"names {odd[0][:60]!r}, which is not a safetensors file of this folder", str(folder))
        return [folder / name for name in names]
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != QUANTIZED)
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise pickle_refused(folder / pickles[0])
        raise ModelError("has no *.safetensors file", str(folder))
    return files


def pickle_refused(path: Path) -> ModelError:
    """The error for checkpoints whose mere loading runs code."""
    cause = "is a pickle-type checkpoint, which can run code when it is read"
    return ModelError(cause, str(path), "convert it to safetensors where you trust it")


def _gptq(entries: dict[str, Entry], config: Mapping[str, Any], folder: Path) -> list[Tensor]:
    """Take the GPTQ quadruples out of `entries`; logical shape (out, in)."""
    settings = config["quantization_config"]
    bits = settings.get("bits")
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise ModelError(f"has {str(bits)[:20]}-bit GPTQ weights; 2, 3, 4 and 8 are known", str(folder))
    found = []
    for name in sorted(name for name in entries if name.endswith(".qweight")):
        stem = name.removesuffix(".qweight")
        missing = [part for part in _GPTQ_PARTS if f"{stem}.{part}" not in entries]
        if missing:
            raise ModelError(f"{stem[:60]} lacks {missing[0]}", str(folder))
        parts = tuple(entries.pop(f"{stem}.{part}") for part in _GPTQ_PARTS)
        rows, columns = parts[0].shape if len(parts[0].shape) == 2 else (0, 0)
        found.append(Tensor(f"{stem}.weight", (columns, rows * 32 // bits), "gptq", parts))
    return found


def _quantized(path: Path) -> list[Tensor]:
    entries, metadata = read_header(path)
    try:
        formats = strict_json(metadata["edgellm"])["format"]
        kinds = {name: formats[name] for name in entries}
    except (KeyError, TypeError, ValueError):
        raise ModelError("does not say the format of each tensor", str(path)) from None
    found = []
    for name, entry in entries.items():
        width, size = BLOCKS.get(kinds[name], (0, 1)) if isinstance(kinds[name], str) else (0, 1)
        if not width or entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] % size:
            raise ModelError(f"{name[:60]} does not hold blocks of {str(kinds[name])[:20]!r}", str(path))
        found.append(Tensor(name, (entry.shape[0], entry.shape[1] // size * width), kinds[name], (entry,)))
    return found


def _check_config(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Numbers that would make a library allocate or loop without end are refused before it sees them."""
    for key, value in config.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > MAX_CONFIG_NUMBER:
            if key in ("model_max_length",):
                continue
            raise ModelError(f"config.json says {printable(key[:40])} = {value:.3g}", str(folder))
    layers = config.get("num_hidden_layers", 0)
    if type(layers) is not int or not 0 <= layers <= tensors:
        raise ModelError(f"config.json says {str(layers)[:20]} layers, but there are {tensors} tensors", str(folder))


def inspect(folder: Path) -> Checkpoint:
    """Everything about a model folder but its numbers; ModelError for anything malformed or unsafe."""
    config = read_json(folder / CONFIG)
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings is not None and method != "gptq":
        raise ModelError(f"is quantised by {str(method)[:30]!r}, which cannot be read", str(folder))
    entries: dict[str, Entry] = {}
    files = _weight_files(folder)
    for path in files:
        for name, entry in read_header(path)[0].items():
            if name in entries:
                raise ModelError(f"{name[:60]} is in two files", str(path))
            entries[name] = entry
    special = _gptq(entries, config, folder) if method == "gptq" else []
    if (folder / QUANTIZED).is_file():
        files.append(folder / QUANTIZED)
        special += _quantized(folder / QUANTIZED)
    tensors = {name: Tensor(name, entry.shape, entry.dtype, (entry,)) for name, entry in entries.items()}
    for tensor in special:
        if tensor.name in tensors:
            raise ModelError(f"{tensor.name[:60]} is stored twice", str(folder))
        tensors[tensor.name] = tensor
    if not tensors:
        raise ModelError("holds no tensors", str(folder))
    _check_config(config, len(tensors), folder)
    side = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    return Checkpoint(folder, config, tensors, tuple(sorted([*files, *side])))


def file_digest(path: Path, cache: Path) -> str:
    """sha256 of a file, remembered in `cache` for as long as size, times and inode stay the same."""
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    note = cache / "digests" / (hashlib.sha256(os.fsencode(real)).hexdigest()[:40] + ".json")
    try:
        known = json.loads(note.read_bytes())
        if known["stamp"] == stamp and isinstance(known["sha256"], str):
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not seen before, or a damaged note: measure
    digest = digest_file(real)
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:  # a younger file could still change within one tick
        with contextlib.suppress(StorageError):  # the cache only saves time
            write_json(note, {"stamp": stamp, "sha256": digest})
    return digest


def digest(files: tuple[Path, ...], root: Path, cache: Path) -> str:
    """One sha256 over names and contents, as `store.digest_files`, with remembered file digests."""
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path, cache)}\n".encode())
    return sha.hexdigest()

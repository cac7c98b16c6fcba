"""The strict GGUF reader: reads what is well-formed, refuses the rest in one line, quickly, whatever the bytes are."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm_sdk import gguf_file
from edgellm_sdk.errors import ModelError

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, body: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + body


def row(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int, dims: int | None = None) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def strings(*items: str | bytes) -> bytes:
    return struct.pack("<IQ", STRING, len(items)) + b"".join(text(item) for item in items)


KEYS = (
    pair("general.architecture", STRING, text("llama")),
    pair("general.alignment", U32, struct.pack("<I", 32)),
    pair("a.float", F32, struct.pack("<f", 0.5)),
    pair("a.flag", BOOL, b"\x01"),
    pair("a.tokens", ARRAY, strings("one", "zwölf", "🦙")),
    pair("a.numbers", ARRAY, struct.pack("<IQ3i", 5, 3, -1, 0, 7)),
    pair("a.nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQ2B", 0, 2, 1, 2) + strings("x")),
)
ROWS = (row("first.weight", (32, 3), 8, 0), row("second.weight", (5,), 0, 128))
DATA = bytes(range(102)) + bytes(26) + struct.pack("<5f", *range(5)) + bytes(12)


def gguf(
    keys: tuple[bytes, ...] = KEYS,
    rows: tuple[bytes, ...] = ROWS,
    data: bytes = DATA,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(rows) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join((*keys, *rows))
    return head + bytes(-len(head) % alignment) + data


def one(key_value: bytes) -> bytes:
    return gguf((*KEYS, key_value))


def tensor(entry: bytes, data: bytes = bytes(1 << 12)) -> bytes:
    return gguf(rows=(entry,), data=data)


HUGE = 2**64 - 1
BAD: dict[str, bytes] = {
    "bad magic": gguf(magic=b"GGUX"),
    "version 0": gguf(version=0),
    "version 1": gguf(version=1),
    "version 4": gguf(version=4),
    "big endian": gguf(version=3 << 24),
    "tensor count -1": gguf(n_tensors=HUGE),
    "tensor count above the bytes": gguf(n_tensors=10_000),
    "key count -1": gguf(n_keys=HUGE),
    "one key more than there are": gguf(n_keys=len(KEYS) + 1),
    "one key fewer than there are": gguf(n_keys=len(KEYS) - 1),
    "key length 2^64-1": gguf((struct.pack("<Q", HUGE) + b"abc",)),
    "key of 256 bytes": one(pair("k" * 256, BOOL, b"\x00")),
    "empty key": one(pair("", BOOL, b"\x00")),
    "key not UTF-8": one(pair(b"\xff\xfe", BOOL, b"\x00")),
    "key with an escape sequence": one(pair("a\x1b[2J", BOOL, b"\x00")),
    "duplicate key": one(KEYS[2]),
    "unknown value type": one(pair("b", 13, bytes(8))),
    "string of 2^63 bytes": one(pair("b", STRING, struct.pack("<Q", 1 << 63))),
    "string above 64 KiB": one(pair("b", STRING, text("x" * 70_000))),
    "string not UTF-8": one(pair("b", STRING, text(b"\xc3\x28"))),
    "boolean 2": one(pair("b", BOOL, b"\x02")),
    "array of an unknown type": one(pair("b", ARRAY, struct.pack("<IQ", 99, 1) + bytes(8))),
    "array longer than the file": one(pair("b", ARRAY, struct.pack("<IQ", U64, 1 << 40))),
    "array whose size overflows": one(pair("b", ARRAY, struct.pack("<IQ", U64, 1 << 61))),
    "array of 2^63 strings": one(pair("b", ARRAY, struct.pack("<IQ", STRING, 1 << 63))),
    "array with a string beyond the end": one(pair("b", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 62))),
    "arrays nested too deep": one(pair("b", ARRAY, struct.pack("<IQ", ARRAY, 1) * 40 + bytes(12))),
    "alignment 0": gguf((pair("general.alignment", U32, struct.pack("<I", 0)),)),
    "alignment 48": gguf((pair("general.alignment", U32, struct.pack("<I", 48)),)),
    "alignment of the wrong type": gguf((pair("general.alignment", U64, struct.pack("<Q", 32)),)),
    "alignment unlike the layout": gguf((pair("general.alignment", U32, struct.pack("<I", 1024)),)),
    "tensor name of 64 bytes": tensor(row("n" * 64, (32,), 0, 0), bytes(128)),
    "empty tensor name": tensor(row("", (32,), 0, 0), bytes(128)),
    "no dimensions": tensor(row("t", (), 0, 0), b""),
    "5 dimensions": tensor(row("t", (2, 2, 2, 2, 2), 0, 0), bytes(128)),
    "2^32 dimensions": tensor(row("t", (32,), 0, 0, dims=2**32 - 1), bytes(128)),
    "zero dimension": tensor(row("t", (32, 0), 0, 0), b""),
    "negative dimension": tensor(row("t", (32, HUGE), 0, 0)),
    "shape whose product overflows": tensor(row("t", (1 << 32, 1 << 32, 1 << 32), 0, 0)),
    "bytes that overflow": tensor(row("t", (1 << 59, 4), 28, 0)),
    "unknown tensor type": tensor(row("t", (32,), 4, 0), bytes(128)),
    "tensor type of 2^31": tensor(row("t", (32,), 1 << 31, 0), bytes(128)),
    "row that is no whole block": tensor(row("t", (33,), 8, 0), bytes(64)),
    "offset not aligned": tensor(row("t", (32,), 0, 4), bytes(132)),
    "offset leaves a hole": tensor(row("t", (32,), 0, 64), bytes(192)),
    "offset 2^64-32": tensor(row("t", (32,), 0, 2**64 - 32), bytes(128)),
    "tensors overlap": gguf(rows=(ROWS[0], row("second.weight", (5,), 0, 0))),
    "duplicate tensor": gguf(rows=(ROWS[0], row("first.weight", (5,), 0, 128))),
    "not enough data": gguf(data=DATA[:-13]),
    "no data at all": gguf(data=b""),
    "bytes after the last tensor": gguf(data=DATA + b"\0"),
    "a megabyte after the last tensor": gguf(data=DATA + bytes(1 << 20)),
    "only the magic": b"GGUF",
    "empty file": b"",
}


def refused(path: Path) -> str | None:
    """The refusal of a file, checked for form and time; None when it was read."""
    began = time.monotonic()
    try:
        found = gguf_file.read(path)
        for name in found.tensors:
            found.tensor_bytes(name)
    except ModelError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message and message.isprintable()
        return message
    finally:
        assert time.monotonic() - began < 1.0
    return None


def test_good_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(gguf())
    found = gguf_file.read(path)
    assert found.version == 3 and found.alignment == 32
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["a.flag"] is True and found.metadata["a.float"] == 0.5
    assert found.metadata["a.tokens"] == ["one", "zwölf", "🦙"]
    assert found.metadata["a.numbers"].tolist() == [-1, 0, 7]
    assert [list(v) for v in found.metadata["a.nested"]] == [[1, 2], ["x"]]
    assert found.kinds["a.tokens"] == "array[string]" and found.kinds["a.numbers"] == "array[i32]"
    first, second = found.tensors.values()
    assert (first.name, first.shape, first.type, first.nbytes) == ("first.weight", (32, 3), "Q8_0", 102)
    assert found.tensor_bytes("first.weight").shape == (3, 34)
    assert found.tensor_bytes("first.weight").tobytes() == bytes(range(102))
    assert found.tensor_bytes("second.weight").view("<f4").ravel().tolist() == [0, 1, 2, 3, 4]
    assert second.row_bytes == 20 and second.parameters == 5
    with pytest.raises(ValueError, match="read-only"):
        found.tensor_bytes("first.weight")[0, 0] = 1
    with pytest.raises(ModelError, match="no tensor"):
        found.tensor_bytes("third.weight")


@pytest.mark.parametrize(
    "content",
    [
        gguf(version=2),
        gguf((), (), b""),
        gguf((pair("general.alignment", U32, struct.pack("<I", 64)),), alignment=64),
        gguf(data=DATA[:-12]),  # some writers leave the padding of the last tensor out
        gguf((pair("k" * 255, BOOL, b"\x00"), *KEYS)),
        gguf((pair("b", STRING, text("x" * (64 << 10))),)),
    ],
    ids=["version 2", "empty", "alignment 64", "no last padding", "longest key", "longest string"],
)
def test_other_good_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(content)
    assert refused(path) is None


@pytest.mark.row("F2")
@pytest.mark.parametrize("kind", BAD)
def test_malformed_kinds_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[kind])
    message = refused(path)
    assert message is not None
    assert len(message) - len(str(path)) <= 230


@pytest.mark.row("F2")
def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "short.gguf", gguf()
    for length in range(len(whole) - 12):  # the last 12 bytes are padding
        path.write_bytes(whole[:length])
        assert refused(path) is not None, f"accepted {length} of {len(whole)} bytes"


def mutate(rng: random.Random, whole: bytes) -> bytes:
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(raw))
        kind = rng.randrange(5)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            wild = rng.choice((HUGE, 1 << 63, 1 << 32, 1 << 20, 1 << 16, 0, rng.getrandbits(64)))
            raw[at : at + 8] = struct.pack("<Q", wild)
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 40)]
        else:
            raw[at:at] = rng.randbytes(rng.randrange(1, 40))
        if not raw:
            raw = bytearray(b"\0")
    return bytes(raw)


@pytest.mark.parametrize("count", [2000, pytest.param(5000, marks=pytest.mark.bar("F2"))])
def test_mutants_are_read_or_refused(count: int, tmp_path: Path) -> None:
    rng, path, whole = random.Random(7), tmp_path / "mutant.gguf", gguf()
    outcomes = {True: 0, False: 0}
    for _ in range(count):
        path.write_bytes(mutate(rng, whole))
        outcomes[refused(path) is None] += 1
    assert outcomes[False] > count // 2


def special(tmp_path: Path, make: Callable[[Path], Any]) -> Path:
    path = tmp_path / "special.gguf"
    make(path)
    return path


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    assert "regular" in (refused(special(tmp_path, os.mkfifo)) or "")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert "regular" in (refused(folder) or "")
    assert "No such file" in (refused(tmp_path / "missing.gguf") or "")


def test_claims_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "claims.gguf"
    tracemalloc.start()
    try:
        for kind, content in BAD.items():
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            assert refused(path) is not None
            assert tracemalloc.get_traced_memory()[1] - before < 4 << 20, kind
    finally:
        tracemalloc.stop()


def test_a_big_vocabulary_is_fast_and_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(one(pair("tokenizer.ggml.tokens", ARRAY, strings(*(f"token{i}" for i in range(262_144))))))
    assert refused(path) is None
    path.write_bytes(one(pair("bomb", ARRAY, struct.pack("<IQ", STRING, 4_000_000) + bytes(32_000_000))))
    assert "above" in (refused(path) or "")
    inner = struct.pack("<IQ", ARRAY, 4000) + struct.pack("<IQ", 0, 0) * 4000
    path.write_bytes(one(pair("bomb", ARRAY, struct.pack("<IQ", ARRAY, 1000) + inner * 1000)))
    assert "arrays" in (refused(path) or "")


def test_type_table_agrees_with_the_gguf_package() -> None:
    gguf_package = pytest.importorskip("gguf")
    theirs = {int(t): (t.name, *gguf_package.GGML_QUANT_SIZES[t]) for t in gguf_package.GGML_QUANT_SIZES}
    for number, entry in gguf_file.TENSOR_TYPES.items():
        assert theirs.get(number, entry) == entry
    assert len(gguf_file.TENSOR_TYPES.keys() & theirs.keys()) >= 28

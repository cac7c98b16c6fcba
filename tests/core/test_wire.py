"""Messages: canonical bytes, and a reader that refuses everything else."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from edgellm_sdk import wire
from edgellm_sdk.errors import ModelError
from edgellm_sdk.types import Assignment, State, Update

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
arrays = st.dictionaries(
    names,
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.uint64, np.bool_, np.float16]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    max_size=4,
)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


@given(arrays)
@settings(max_examples=100, deadline=None)
def test_round_trip_is_canonical_and_plain_safetensors(given_arrays: dict[str, Any]) -> None:
    raw = wire.pack(given_arrays, {"a": 1})
    back, scalars = wire.unpack(raw, "x")
    assert same(given_arrays, back) and scalars == {"a": 1}
    assert wire.pack(dict(reversed(list(back.items()))), {"a": 1}) == raw
    assert same(given_arrays, load(raw))


def test_reads_what_the_safetensors_library_writes() -> None:
    back, scalars = wire.unpack(save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}), "x")
    assert back["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and scalars == {}


def test_messages_round_trip() -> None:
    update = Update("base", 3, "c", "seeds", {"jvp": np.ones(2, np.float32)}, 5, "rng", {"loss": 0.5})
    assert wire.update_to_bytes(wire.update_from_bytes(wire.update_to_bytes(update), "c")) == wire.update_to_bytes(
        update
    )
    assignment = Assignment("base", 3, "c", {"x": np.ones(1, np.float32)}, {"b": 1}, {"rank": 4})
    assert wire.assignment_from_bytes(wire.assignment_to_bytes(assignment), "c").options == {"rank": 4}
    state = State("base", 3, {"x": np.ones(1, np.float32)}, {"n": [1, 2]}, 9)
    assert wire.state_from_bytes(wire.state_to_bytes(state), "s").cohort == 9


def header(entries: dict[str, Any] | str, body: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length beyond the file": struct.pack("<Q", 100) + b"{}",
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "header of 17 MiB": struct.pack("<Q", 17 << 20),
    "not JSON": header("{"),
    "not UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
    "a list": header("[]"),
    "null": header("null"),
    "NaN": header('{"a": NaN}'),
    "Infinity": header('{"a": Infinity}'),
    "deep": header("[" * 100_000),
    "twice the same tensor": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"0" * 4),
    "unknown dtype": header({"a": {**F32, "dtype": "F31"}}, b"0" * 4),
    "dtype a number": header({"a": {**F32, "dtype": 3}}, b"0" * 4),
    "no dtype": header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0" * 4),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"0" * 4),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, b"0" * 4),
    "negative shape": header({"a": {**F32, "shape": [-1]}}, b"0" * 4),
    "shape of text": header({"a": {**F32, "shape": ["1"]}}, b"0" * 4),
    "shape of true": header({"a": {**F32, "shape": [True]}}, b"0" * 4),
    "shape overflow": header({"a": {**F32, "shape": [1 << 40, 1 << 40]}}, b"0" * 4),
    "nine dimensions": header({"a": {**F32, "shape": [1] * 9}}, b"0" * 4),
    "one offset": header({"a": {**F32, "data_offsets": [0]}}, b"0" * 4),
    "three offsets": header({"a": {**F32, "data_offsets": [0, 4, 8]}}, b"0" * 4),
    "offsets swapped": header({"a": {**F32, "data_offsets": [4, 0]}}, b"0" * 4),
    "beyond the body": header({"a": F32}, b"0" * 3),
    "trailing bytes": header({"a": F32}, b"0" * 5),
    "a hole": header({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, b"0" * 12),
    "an overlap": header({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"0" * 6),
    "empty name": header({"": F32}, b"0" * 4),
    "long name": header({"a" * 256: F32}, b"0" * 4),
    "scalars not a table": header({"__metadata__": {"edgellm": "[]"}}),
    "scalars not JSON": header({"__metadata__": {"edgellm": "{"}}),
    "scalars of 1e400": header({"__metadata__": {"edgellm": '{"loss": 1e400}'}}),
    "an integer of 5000 digits": header({"__metadata__": {"edgellm": '{"n": ' + "9" * 5000 + "}"}}),
    "metadata not a table": header({"__metadata__": 3}),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_is_one_line_exit_6(kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        wire.unpack(MALFORMED[kind], "client-001")
    assert "client-001" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 200


def test_mutants_are_read_or_refused(request: pytest.FixtureRequest) -> None:
    update = Update("base", 1, "c", "delta", {"w": np.arange(8, dtype=np.float32), "b": np.zeros(2, np.int64)}, 5)
    raw = wire.update_to_bytes(update)
    stream = np.random.default_rng(0)
    began = time.monotonic()
    refused = 0
    for _ in range(4000):
        mutant = bytearray(raw)
        for _ in range(int(stream.integers(1, 4))):
            mutant[int(stream.integers(len(mutant)))] = int(stream.integers(256))
        if stream.random() < 0.3:
            mutant = mutant[: int(stream.integers(len(mutant)))]
        try:
            wire.update_from_bytes(bytes(mutant), "c")
        except ModelError:
            refused += 1
    assert refused > 1000 and time.monotonic() - began < 20


def make(**changes: Any) -> Update:
    fields: dict[str, Any] = {
        "base": "base", "round": 1, "client": "c", "kind": "delta", "arrays": {"w": np.ones((2, 2), np.float32)},
        "examples": 3,
    }  # fmt: skip
    return Update(**{**fields, **changes})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "other"}, "another base"),
        ({"round": 0}, "belongs to round 0"),
        ({"round": 2}, "belongs to round 2"),
        ({"client": "d"}, "claims to come from"),
        ({"examples": 0}, "claims 0 examples"),
        ({"examples": -4}, "claims -4 examples"),
        ({"arrays": {"w": np.full((2, 2), np.nan, np.float32)}}, "not finite"),
        ({"arrays": {"w": np.full((2, 2), np.inf, np.float32)}}, "not finite"),
        ({"arrays": {"w": np.full((2, 2), -np.inf, np.float32)}}, "not finite"),
        ({"arrays": {"w": np.ones(4, np.float32)}}, "not float32[2, 2]"),
        ({"arrays": {"w": np.ones((2, 2))}}, "float64"),
        ({"arrays": {"v": np.ones((2, 2), np.float32)}}, "exactly the expected"),
        ({"arrays": {}}, "exactly the expected"),
    ],
)
def test_checked_before_anyone_adds_it(change: dict[str, Any], reason: str) -> None:
    state, known = State("base", 0, {}), {"w": np.zeros((2, 2), np.float32)}
    assert wire.check_update(make(), state, "c", known) is None
    assert reason in str(wire.check_update(make(**change), state, "c", known))

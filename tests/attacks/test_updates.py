"""Hostile clients against every rule that aggregates: bad updates, bad schedules, bad bytes.

A client that misbehaves is as if absent, to the byte, and the ledger says why.
"""

from __future__ import annotations

import functools
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError, ModelError
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, run_rounds
from edgellm_sdk.kit import conformance_runs as runs
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import State, Update

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from test_wire import MALFORMED

NAMES = [row.name for row in registry.for_stage("aggregate") if row.state == "ok"]


# B1: bad updates


def floats(update: Update) -> str:
    """The first floating-point array of an update."""
    return next(name for name, array in sorted(update.arrays.items()) if array.dtype.kind == "f")


def filled(value: float) -> Callable[[Update], Update]:
    def change(update: Update) -> Update:
        name = floats(update)
        array = np.array(update.arrays[name], np.float32 if abs(value) == 1e38 else None)
        array.reshape(-1)[-1:] = value
        return replace(update, arrays={**update.arrays, name: array})

    return change


def reshaped(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[Update], Update]:
    def change(update: Update) -> Update:
        name = floats(update)
        array = update.arrays[name]
        return replace(update, arrays={**update.arrays, name: np.zeros(shape(array.shape), array.dtype)})

    return change


def cast(update: Update, kind: Any) -> Update:
    name = floats(update)
    array = update.arrays[name]
    other = kind or (np.float64 if array.dtype == np.float32 else np.float32)
    return replace(update, arrays={**update.arrays, name: array.astype(other)})


def renamed(update: Update) -> Update:
    name = floats(update)
    rest = {other: array for other, array in update.arrays.items() if other != name}
    return replace(update, arrays={**rest, f"{name}x": update.arrays[name]})


def extra(name: str) -> Callable[[Update], Update]:
    return lambda update: replace(update, arrays={**update.arrays, name: np.ones(2, np.float32)})


def without(update: Update) -> Update:
    name = floats(update)
    return replace(update, arrays={other: array for other, array in update.arrays.items() if other != name})


BAD: dict[str, Callable[[Update], Update]] = {
    "NaN": filled(float("nan")),
    "+Inf": filled(float("inf")),
    "-Inf": filled(float("-inf")),
    "1e38": filled(1e38),
    "-1e38": filled(-1e38),
    "longer": reshaped(lambda shape: (*shape[:-1], shape[-1] + 1)),
    "one dimension more": reshaped(lambda shape: (1, *shape)),
    "a number, which would broadcast": reshaped(lambda shape: ()),
    "another float": lambda update: cast(update, None),
    "whole numbers": lambda update: cast(update, np.int32),
    "another name": renamed,
    "one tensor more": extra("more"),
    "a moment of the server's": extra("server/u/x"),
    "another plugin's array": extra("lora/x"),
    "one tensor less": without,
    "no tensor": lambda update: replace(update, arrays={}),
    "another base": lambda update: replace(update, base="f" * 64),
    "the last round": lambda update: replace(update, round=update.round - 1),
    "the next round": lambda update: replace(update, round=update.round + 1),
    "another random stream": lambda update: replace(update, rng="mt19937"),
    "another kind": lambda update: replace(update, kind="gossip"),
    "no examples": lambda update: replace(update, examples=0),
    "fewer than no examples": lambda update: replace(update, examples=-20),
    "1e12 examples": lambda update: replace(update, examples=10**12),
    "another client's name": lambda update: replace(update, client="a"),
}


@dataclass
class Bench:
    """One rule with its clients' honest first replies; `play` runs the round with b's reply changed."""

    relay: Relay
    start: State
    replies: dict[str, bytes]
    ctx: Context
    plan: Plan

    def play(self, folder: Path, change: Callable[[bytes], bytes] | None) -> tuple[bytes, str]:
        """(the state's bytes, why b was left out); without `change` b does not answer."""
        ctx = replace(self.ctx, folder=folder, curves={}, notes=[], assigned={})
        ledger = Ledger(folder / "ledger.jsonl")

        def engine(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
            for client in messages:
                if client != "b":
                    yield client, self.replies[client]
                elif change:
                    yield client, change(self.replies[client])

        final = run_rounds(self.relay, self.start, self.plan, engine, ctx, ledger)
        return wire.state_to_bytes(final), next(row["rejected"] for row in ledger.rows() if row["client"] == "b")


@functools.lru_cache(maxsize=1)
def bench(name: str, folder: Path) -> Bench:
    subject = runs.Subject(registry.get(name, "aggregate"), {})
    for kind in ("delta", "weights", f"delta{runs.FROZEN}"):
        relay = subject.relay(kind)
        ctx = Context(folder, seed=7, threads=1, rounds=2, configs=dict(relay.configs))
        shards = runs.shards_of(subject.clients)
        start = relay.initialise(subject.model, ctx)
        data = {client: len(shard) for client, shard in shards.items()}
        try:
            sent = relay.assign(start, subject.clients, data, ctx)
        except (ConfigError, FederationError):
            continue
        ctx.assigned = sent
        replies = {}
        for client, assignment in sent.items():
            message = wire.assignment_to_bytes(assignment)
            reply = work(relay, subject.model, shards[client], client, message, ctx)
            assert isinstance(reply, bytes), reply
            replies[client] = reply
        return Bench(relay, start, replies, ctx, Plan(data, len(data), 1, attempts=1))
    raise AssertionError(f"{name} takes no update")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    return lambda name: made[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.row("B1")
def test_a_bad_update_is_as_if_absent(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """25 kinds on each rule: the same bytes as without that client, and a reason in the ledger."""
    case = bench(name, folders(name))
    absent, silence = case.play(tmp_path / "absent", None)
    assert silence == "did not answer"
    present, nothing = case.play(tmp_path / "present", lambda raw: raw)
    assert nothing == "" and present != absent
    wrong = []
    for number, (kind, change) in enumerate(BAD.items()):

        def changed(raw: bytes, change: Callable[[Update], Update] = change) -> bytes:
            return wire.update_to_bytes(change(wire.update_from_bytes(raw, "b")))

        state, reason = case.play(tmp_path / f"{number}", changed)
        if not reason or state != absent:
            wrong.append(f"{kind}: {reason or 'accepted'}")
        assert "\n" not in reason and len(reason) <= 200
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_denormal_numbers_are_numbers(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The smallest float32 there is is accepted: honest updates hold such, and sums of them are harmless."""
    case = bench(name, folders(name))
    state, reason = case.play(
        tmp_path, lambda raw: wire.update_to_bytes(filled(1e-45)(wire.update_from_bytes(raw, "b")))
    )
    assert reason == ""
    arrays = wire.state_from_bytes(state, "state").arrays
    assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f")


# B2: bad schedules

CLIENTS = ("a", "b", "c", "d", "e")
Reply = tuple[str, bytes]
Schedule = Callable[[int, list[Reply], Mapping[int, Mapping[str, bytes]], Any], list[Reply]]
"""(round, that round's honest replies, those of all rounds so far, a random generator) -> what arrives."""


def update_of(client: str, number: int, seed: int, other: int = 0) -> Update:
    draw = np.random.default_rng([seed, number, CLIENTS.index(client), other])
    return Update("base", number, client, "delta", {"w": draw.normal(size=6).astype(np.float32)}, 3 + len(client))


def moved_first(rows: list[Reply], raw: bytes) -> list[Reply]:
    return [("b", raw), *rows]


def only(rows: list[Reply], raw: bytes | None) -> list[Reply]:
    return [(client, reply) for client, reply in rows if client != "b"] + ([("b", raw)] if raw is not None else [])


def other_of_b(number: int, seed: int) -> bytes:
    return wire.update_to_bytes(update_of("b", number, seed, 1))


def shuffled(rows: list[Reply], draw: Any) -> list[Reply]:
    return [rows[k] for k in draw.permutation(len(rows))]


# name: (what arrives, in which rounds b is as if absent)
SCHEDULES: dict[str, tuple[Schedule, tuple[int, ...]]] = {
    "backwards": (lambda n, rows, past, draw: rows[::-1], ()),
    "shuffled": (lambda n, rows, past, draw: shuffled(rows, draw), ()),
    "each twice": (lambda n, rows, past, draw: [row for row in rows for _ in range(2)], ()),
    "all of it again, shuffled": (lambda n, rows, past, draw: rows + shuffled(rows, draw), ()),
    "another update after the first": (lambda n, rows, past, draw: [*rows, ("b", other_of_b(n, 99))], ()),
    "the last round's before this one's": (
        lambda n, rows, past, draw: moved_first(rows, past[n - 1]["b"]) if n > 1 else rows,
        (2, 3),
    ),
    "the last round's after this one's": (
        lambda n, rows, past, draw: [*rows, ("b", past[n - 1]["b"])] if n > 1 else rows,
        (),
    ),
    "the first round's in every round": (lambda n, rows, past, draw: only(rows, past[1]["b"]), (2, 3)),
    "late by a round": (lambda n, rows, past, draw: only(rows, past[n - 1]["b"] if n > 1 else None), (1, 2, 3)),
    "late by a round, then on time": (
        lambda n, rows, past, draw: only(rows, None) if n == 1 else [*shuffled(rows, draw), ("b", past[n - 1]["b"])],
        (1,),
    ),
    "a's update in b's name": (lambda n, rows, past, draw: only(rows, past[n]["a"]), (1, 2, 3)),
    "a client nobody asked": (
        lambda n, rows, past, draw: [("z", past[n]["a"]), *shuffled(rows, draw), ("", past[n]["b"])],
        (),
    ),
}


def scheduled(
    folder: Path, relay: Relay, seed: int, schedule: Schedule | None, absent: Sequence[int]
) -> tuple[bytes, Ledger]:
    """Three rounds under `schedule`; without one, the honest replies in order, b silent in the rounds `absent`."""
    past: dict[int, dict[str, bytes]] = {}
    draw = np.random.default_rng(seed)

    def engine(messages: Mapping[str, bytes]) -> Iterator[Reply]:
        number = wire.assignment_from_bytes(messages["a"], "a").round
        past[number] = {client: wire.update_to_bytes(update_of(client, number, seed)) for client in CLIENTS}
        rows = list(past[number].items())
        if schedule:
            yield from schedule(number, rows, past, draw)
        else:
            yield from (row for row in rows if row[0] != "b" or number not in absent)

    start = State("base", 0, {"w": np.zeros(6, np.float32)})
    plan, ledger = Plan(dict.fromkeys(CLIENTS, 9), len(CLIENTS), 3, attempts=1), Ledger(folder / "ledger.jsonl")
    ctx = Context(folder, seed=1, rounds=3, configs=dict(relay.configs))
    return wire.state_to_bytes(run_rounds(relay, start, plan, engine, ctx, ledger)), ledger


@pytest.mark.parametrize("seeds", [2, pytest.param(20, marks=pytest.mark.bar("B2"))])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_each_update_counts_once_whatever_the_schedule(kind: str, seeds: int, tmp_path: Path) -> None:
    """12 schedules, on the mean and on a rule that remembers and one that chooses."""
    schedule, absent = SCHEDULES[kind]
    for name in ("fedavg", "fedadam", "krum"):
        loaded = registry.get(name, "aggregate")
        relay = Relay([loaded], {name: loaded.plugin.config()})
        for seed in range(seeds):
            clean, _ = scheduled(tmp_path / f"{name}-{seed}-clean", relay, seed, None, absent)
            found, ledger = scheduled(tmp_path / f"{name}-{seed}", relay, seed, schedule, absent)
            assert found == clean, (name, seed)
            reasons = {row["round"]: row["rejected"] for row in ledger.rows() if row["client"] == "b"}
            assert {number for number, reason in reasons.items() if reason} == set(absent)
            assert len(ledger.rows()) == 3 * len(CLIENTS)  # one line for each client that was asked


@pytest.mark.row("B2")
def test_of_two_updates_the_first_counts(tmp_path: Path) -> None:
    """Whichever of two valid updates of one client arrives first, the other is nothing."""
    loaded = registry.get("fedavg", "aggregate")
    relay = Relay([loaded], {"fedavg": loaded.plugin.config()})
    both, _ = scheduled(
        tmp_path / "both", relay, 0, lambda n, rows, past, draw: moved_first(rows, other_of_b(n, 0)), ()
    )
    other, _ = scheduled(tmp_path / "other", relay, 0, lambda n, rows, past, draw: only(rows, other_of_b(n, 0)), ())
    clean, _ = scheduled(tmp_path / "clean", relay, 0, None, ())
    assert both == other != clean


# F5: bad bytes


def field(name: str, value: Any) -> bytes:
    """A whole update with one field changed; None leaves it out."""
    update = update_of("b", 1, 0)
    fields: dict[str, Any] = {
        "protocol": wire.PROTOCOL, "message": "update", "base": "base", "round": 1, "client": "b", "kind": "delta",
        "examples": 3, "rng": "", "scalars": {},
    }  # fmt: skip
    fields[name] = value
    return wire.pack(update.arrays, {key: value for key, value in fields.items() if value is not None})


FIELDS = {
    f"{name} {value!r:.20}": field(name, value)
    for name, values in {
        "protocol": (None, 0, 2, "1", True, 1.5),
        "message": (None, "assignment", "", 3),
        "base": (None, 7, "", ["base"]),
        "round": (None, "1", 1.0, True, -1, 1 << 70),
        "client": (None, 5, "", "a", "b\0", "\u202eb", "b" * 300),
        "kind": (None, 5, "", "\x1b[31m", "x" * 1000),
        "examples": (None, "3", 3.0, True, 0, 1 << 70),
        "rng": (None, 4, "x" * 1000),
        "scalars": (None, [], "x", 3),
    }.items()
    for value in values
}


def mutants(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flipped, cut, doubled and spliced bytes, half of them in the header."""
    draw = np.random.default_rng(seed)
    head = 8 + int.from_bytes(raw[:8], "little")
    for number in range(count):
        mutant = bytearray(raw)
        kind = number % 5
        if kind == 0:
            del mutant[int(draw.integers(len(mutant))) :]
        elif kind == 1:
            place = int(draw.integers(head))
            mutant[place : place + 8] = (b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little"))[int(draw.integers(3))]
        elif kind == 2:
            begin, end = sorted(int(k) for k in draw.integers(len(mutant), size=2))
            mutant[end:end] = mutant[begin:end]
        else:
            for _ in range(int(draw.integers(1, 5))):
                mutant[int(draw.integers(head if kind == 3 else len(mutant)))] = int(draw.integers(256))
        yield bytes(mutant)


class Unwritten(Ledger):
    """A ledger in memory: thousands of rounds need not reach the disk here."""

    def __init__(self) -> None:
        super().__init__(Path("ledger.jsonl"))
        self.lines: dict[str, str] = {}

    def add(self, number: int, attempt: int, lines: Any, seconds: float) -> None:
        self.lines = {line.client: line.rejected for line in lines}


def flooded(relay: Relay, hostile: Sequence[bytes], ctx: Context) -> tuple[State, dict[str, str]]:
    """One round of two honest clients and one for each of `hostile`; (the state, rejections by client)."""
    clients = {"a": 9, "c": 9, **{f"h{k:03}": 9 for k in range(len(hostile))}}

    def engine(messages: Mapping[str, bytes]) -> Iterator[Reply]:
        yield from ((client, wire.update_to_bytes(update_of(client, 1, 0))) for client in ("a", "c"))
        yield from ((f"h{k:03}", raw) for k, raw in enumerate(hostile))

    ledger = Unwritten()
    start = State("base", 0, {"w": np.zeros(6, np.float32)})
    plan = Plan(clients, len(clients), 1, quorum=0.0, attempts=1)
    return run_rounds(relay, start, plan, engine, ctx, ledger), ledger.lines


def fedavg() -> Relay:
    loaded = registry.get("fedavg", "aggregate")
    return Relay([loaded], {"fedavg": loaded.plugin.config()})


@pytest.mark.parametrize("kind", [*MALFORMED, *FIELDS])
@pytest.mark.row("F5")
def test_a_malformed_reply_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    relay = fedavg()
    ctx = Context(tmp_path, seed=1, configs=relay.configs)
    clean, _ = flooded(relay, [], ctx)
    state, rejected = flooded(relay, [{**MALFORMED, **FIELDS}[kind]], ctx)
    assert wire.state_to_bytes(state) == wire.state_to_bytes(clean)
    reason = rejected["h000"]
    assert reason and len(reason) <= 200 and reason.isprintable()


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.bar("F5"))])
def test_mutants_of_an_update_are_refused_or_are_updates(count: int, tmp_path: Path) -> None:
    """The state is what the rule makes of the honest and of those mutants that are whole updates, to the byte."""
    relay = fedavg()
    ctx = Context(tmp_path, seed=1, configs=relay.configs)
    refused = 0
    for batch in range(count // 100):
        rows = []
        for k in range(100):
            raw = wire.update_to_bytes(replace(update_of("b", 1, 0), client=f"h{k:03}"))
            rows.append(next(mutants(raw, 1, batch)) if k == 0 else [*mutants(raw, k % 5 + 1, batch * 100 + k)][-1])
        state, rejected = flooded(relay, rows, ctx)
        assert set(rejected) == {"a", "c", *(f"h{k:03}" for k in range(100))}
        refused += sum(bool(reason) for reason in rejected.values())
        assert all(reason.isprintable() and len(reason) <= 200 for reason in rejected.values())
        usable = [update_of(client, 1, 0) for client in ("a", "c")]
        usable += [
            wire.update_from_bytes(rows[int(c[1:])], c) for c, reason in rejected.items() if c[0] == "h" and not reason
        ]
        ctx.assigned = {}
        begun = State("base", 0, {"w": np.zeros(6, np.float32)})
        assert wire.state_to_bytes(state) == wire.state_to_bytes(relay.aggregate(begun, usable, ctx))
    assert 0.5 * count < refused < count


def test_a_header_that_promises_gigabytes_takes_no_memory() -> None:
    """Whatever sizes a header names, nothing is taken before they are held against the bytes at hand."""
    raws = [raw for raw in MALFORMED.values() if len(raw) < 1 << 16]
    raws += list(mutants(wire.update_to_bytes(update_of("b", 1, 0)), 500, 3))
    tracemalloc.start()
    try:
        for raw in raws:
            try:
                wire.update_from_bytes(raw, "b")
            except ModelError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()

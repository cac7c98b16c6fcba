"""The rounds: sampling, quorum, clients that fail, lie, repeat themselves or stay silent."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.aggregation.fedavg import Config, method

from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, PluginError
from edgellm_sdk.federate import rounds
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import CHECKPOINT, Failure, Plan, resumed, run_rounds, sample
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, State, Update

START = State("base", 0, {"w": np.zeros(3, np.float32)})


def relay() -> Relay:
    return Relay([registry.get("fedavg")], {"fedavg": Config()})


def honest(message: bytes, client: str) -> Update:
    """Each client adds its number plus one."""
    assignment = wire.assignment_from_bytes(message, client)
    value = assignment.arrays["w"] + np.float32(int(client[-1]) + 1)
    return Update(assignment.base, assignment.round, client, "weights", {"w": value}, 10)


class Engine:
    """Honest clients, except those in `faults`, which may answer with bytes, a Failure, several replies or nothing."""

    def __init__(self, faults: Mapping[str, object] | None = None, backwards: bool = False) -> None:
        self.faults, self.backwards = faults or {}, backwards

    def __call__(self, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client in sorted(messages, reverse=self.backwards):
            fault = self.faults.get(client)
            update = honest(messages[client], client)
            if fault is None:
                yield client, wire.update_to_bytes(update)
            elif isinstance(fault, (bytes, Failure)):
                yield client, fault
            elif isinstance(fault, dict):
                yield client, wire.update_to_bytes(replace(update, **fault))
            elif fault == "twice":
                yield client, wire.update_to_bytes(update)
                yield client, wire.update_to_bytes(replace(update, arrays={"w": update.arrays["w"] * 100}))


def run(tmp_path: Path, engine: Engine, rounds: int = 3, **changes: object) -> tuple[State, Ledger]:
    plan = Plan({f"c{i}": 10 for i in range(4)}, 4, rounds)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ctx = Context(tmp_path, seed=1, rounds=rounds)
    return run_rounds(relay(), START, replace(plan, **changes), engine, ctx, ledger), ledger  # type: ignore[arg-type]


def test_mean_of_honest_clients(tmp_path: Path) -> None:
    final, ledger = run(tmp_path, Engine())
    assert final.round == 3 and final.arrays["w"].tolist() == [7.5, 7.5, 7.5]
    totals = ledger.totals()
    assert all(t["up_payload"] == 36 and t["down_payload"] == 36 and t["rounds"] == 3 for t in totals.values())
    assert all(t["up"] > t["up_payload"] for t in totals.values())


def test_arrival_order_changes_no_byte(tmp_path: Path) -> None:
    a, _ = run(tmp_path / "a", Engine())
    b, _ = run(tmp_path / "b", Engine(backwards=True))
    assert wire.state_to_bytes(a) == wire.state_to_bytes(b)


NAN = {"arrays": {"w": np.full(3, np.nan, np.float32)}}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Failure("ran out of memory"), "ran out of memory"),
        ("silent", "did not answer"),
        (b"garbage", "malformed"),
        (b"", "malformed"),
        (NAN, "not finite"),
        ({"arrays": {"w": np.full(3, 1e38, np.float32)}}, "too large to square"),
        ({"rng": "mersenne"}, "draws from 'mersenne'"),
        ({"arrays": {"w": np.zeros(4, np.float32)}}, "float32[4]"),
        ({"arrays": {"w": np.zeros(3)}}, "float64"),
        ({"arrays": {}}, "exactly the expected"),
        ({"kind": "gossip"}, "no set of weights"),
        ({"round": 0}, "belongs to round 0"),
        ({"base": "other"}, "another base"),
        ({"client": "c1"}, "claims to come from"),
        ({"examples": -1}, "claims -1"),
        ({"examples": 10**12}, "enrolled with 10"),
    ],
)
def test_a_bad_client_is_as_if_absent_with_its_reason(tmp_path: Path, fault: object, reason: str) -> None:
    absent, _ = run(tmp_path / "absent", Engine({"c3": "silent"}), rounds=1)
    state, ledger = run(tmp_path / "bad", Engine({"c3": fault}), rounds=1)
    assert wire.state_to_bytes(state) == wire.state_to_bytes(absent)
    assert reason in [row["rejected"] for row in ledger.rows() if row["client"] == "c3"][0]


def test_the_first_reply_counts_once(tmp_path: Path) -> None:
    clean, _ = run(tmp_path / "clean", Engine(), rounds=1)
    twice, _ = run(tmp_path / "twice", Engine({"c3": "twice"}), rounds=1)
    assert wire.state_to_bytes(clean) == wire.state_to_bytes(twice)


def test_below_quorum_it_tries_again_then_stops_with_the_last_good_state(tmp_path: Path) -> None:
    good, _ = run(tmp_path, Engine(), rounds=2)
    ctx = Context(tmp_path, seed=1, rounds=5)
    faults = {f"c{i}": "silent" for i in range(3)}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(FederationError) as caught:
        run_rounds(relay(), good, Plan({f"c{i}": 10 for i in range(4)}, 4, 5), Engine(faults), ctx, ledger)
    assert caught.value.exit_code == 8 and "round 3" in str(caught.value) and "quorum" in str(caught.value)
    state = resumed(Context(tmp_path), "base")
    assert state is not None and wire.state_to_bytes(state) == wire.state_to_bytes(good)
    assert {row["attempt"] for row in ledger.rows() if row["round"] == 3} == {0, 1, 2}


class Sends:
    """Sends `sends/x` along with w."""

    @hookimpl(wrapper=True)
    def edgellm_assign(self) -> Iterator[None]:
        given: Any = yield
        extra = {"sends/x": np.ones(2, np.float32)}
        return {c: replace(a, arrays={**a.arrays, **extra}) for c, a in given.items()}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sends/x", np.ones(2, np.float32), ""),
        ("sends/x", np.ones(3, np.float32), "float32[3]"),
        ("sends/y", np.ones(2, np.float32), "exactly the expected"),
        ("fedavg/x", np.ones(2, np.float32), "exactly the expected"),
        ("server/x", np.ones(2, np.float32), "exactly the expected"),
    ],
)
def test_what_a_plugin_sends_it_may_be_sent_and_nobody_averages_it(
    tmp_path: Path, name: str, value: np.ndarray, reason: str
) -> None:
    def engine(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for client, message in messages.items():
            update = honest(message, client)
            yield client, wire.update_to_bytes(replace(update, arrays={**update.arrays, name: value}))

    around: Any = Sends()
    loaded = registry.Loaded(registry.Plugin("sends", "", "1"), around, registry.Source("sends", "", ""), ())
    both = Relay([registry.get("fedavg"), loaded], {"fedavg": Config(), "sends": None})
    ctx, ledger = Context(tmp_path, configs=both.configs), Ledger(tmp_path / "l.jsonl")
    plan = Plan({f"c{i}": 10 for i in range(4)}, 4, 1, attempts=1)
    if reason:
        with pytest.raises(FederationError, match="quorum"):
            run_rounds(both, START, plan, engine, ctx, ledger)
        assert all(reason in row["rejected"] for row in ledger.rows())
    else:
        final = run_rounds(both, START, plan, engine, ctx, ledger)
        assert {n: a.tolist() for n, a in final.arrays.items()} == {"w": [2.5] * 3}


def test_sampling_is_a_function_of_seed_cohort_and_attempt(tmp_path: Path) -> None:
    plan = Plan({f"c{i}": 1 for i in range(50)}, 10, 1)
    ctx = Context(tmp_path, seed=3)
    first = sample(plan, 0, 0, ctx)
    assert first == sample(plan, 0, 0, Context(tmp_path, seed=3)) and len(set(first)) == 10
    assert first != sample(plan, 1, 0, ctx) and first != sample(plan, 0, 1, ctx)
    assert first != sample(plan, 0, 0, Context(tmp_path, seed=4))


def test_aggregation_that_overflows_is_refused(tmp_path: Path) -> None:
    huge = {"arrays": {"w": np.full(3, 6e4, np.float16)}}
    start = replace(START, arrays={"w": np.full(3, 6e4, np.float16)})
    plan = Plan({"c0": 10}, 1, 1)
    engine = Engine({"c0": {"kind": "delta", **huge}})
    with pytest.raises(FederationError, match="not finite"), np.errstate(over="ignore"):
        run_rounds(relay(), start, plan, engine, Context(tmp_path), Ledger(tmp_path / "l.jsonl"))
    assert not (tmp_path / "checkpoint" / f"{CHECKPOINT}.safetensors").exists()


def test_fedavg_weights_caps_and_rates() -> None:
    """Against values worked by hand: (1*10 + 4*30)/40, cap 10 -> (1 + 4)/2, and half way from 0."""
    updates = [
        Update("base", 1, "a", "weights", {"w": np.full(3, 1, np.float32)}, 10),
        Update("base", 1, "b", "weights", {"w": np.full(3, 4, np.float32)}, 30),
    ]

    def value(config: Config) -> float:
        return float(method.aggregate(START, updates, config, Context(Path())).arrays["w"][0])

    assert value(Config()) == 3.25
    assert value(Config(cap=10)) == 2.5
    assert value(Config(weighting="equal")) == 2.5
    assert value(Config(server_rate=0.5)) == 1.625
    deltas, ones = [replace(update, kind="delta") for update in updates], {"w": np.ones(3, np.float32)}
    moved = method.aggregate(replace(START, arrays=ones), deltas, Config(), Context(Path()))
    assert float(moved.arrays["w"][0]) == 4.25


def test_a_claim_can_be_capped() -> None:
    updates = [honest_update("c0", 10), honest_update("c3", 10**12)]
    assert float(method.aggregate(START, updates, Config(cap=10), Context(Path())).arrays["w"][0]) == 2.5


def honest_update(client: str, examples: int) -> Update:
    return Update("base", 1, client, "weights", {"w": np.full(3, int(client[-1]) + 1, np.float32)}, examples)


class Chatty:
    """A plugin that asks every client for its number before the round, and picks the cohort itself."""

    chosen: tuple[str, ...] = ("c1", "c3")

    @hookimpl
    def edgellm_cohort(self, clients: list[str], count: int) -> tuple[str, ...]:
        return self.chosen

    @hookimpl
    def edgellm_exchange(self, messages: dict[str, bytes], engine: rounds.Engine) -> object:
        asked = dict.fromkeys(messages, b"number?")
        self.numbers = dict(engine(asked))
        yield from engine(messages)


def chatty(plugin: Chatty) -> Relay:
    module = types.ModuleType("chatty")
    module.edgellm_cohort, module.edgellm_exchange = plugin.edgellm_cohort, plugin.edgellm_exchange  # type: ignore[attr-defined]
    source = registry.Source("chatty", "chatty", "test")
    hooks = ("edgellm_cohort", "edgellm_exchange")
    loaded = registry.Loaded(registry.Plugin("chatty", "asks first", "1"), module, source, hooks)
    assert loaded.stages == ("around",)
    return Relay([registry.get("fedavg"), loaded], {"fedavg": Config(), "chatty": registry.NoOptions()})


def talks(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
    for client, message in messages.items():
        if message == b"number?":
            yield client, client[-1].encode()
            yield client, b"again, which counts for nothing"
        else:
            yield client, wire.update_to_bytes(honest(message, client))


def test_a_plugin_may_exchange_several_messages_and_choose_the_cohort(tmp_path: Path) -> None:
    plan, plugin = Plan({f"c{i}": 10 for i in range(4)}, 4, 1), Chatty()
    ledger, ctx = Ledger(tmp_path / "ledger.jsonl"), Context(tmp_path, seed=1, rounds=1)
    plain, _ = run(tmp_path / "plain", Engine(), rounds=1)
    final = run_rounds(chatty(plugin), START, plan, talks, ctx, ledger)
    assert plugin.numbers == {"c1": b"again, which counts for nothing", "c3": b"again, which counts for nothing"}
    assert final.arrays["w"].tolist() == [3.0, 3.0, 3.0] and plain.arrays["w"].tolist() == [2.5, 2.5, 2.5]
    rows = ledger.rows()
    message = wire.assignment_to_bytes(Assignment("base", 1, "c1", START.arrays))
    reply = wire.update_to_bytes(honest(message, "c1"))
    assert [row["client"] for row in rows] == ["c1", "c3"]
    assert rows[0]["down"] == len(b"number?") + len(message) and rows[0]["up"] == 1 + len(reply)


@pytest.mark.parametrize("chosen", [(), ("c1", "c1"), ("stranger",)])
def test_a_cohort_of_strangers_is_refused(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    plugin = Chatty()
    plugin.chosen = chosen
    plan, ledger = Plan({f"c{i}": 10 for i in range(4)}, 4, 1), Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(PluginError, match="did not choose among the clients enrolled"):
        run_rounds(chatty(plugin), START, plan, talks, Context(tmp_path, seed=1), ledger)

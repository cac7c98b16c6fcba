"""FedAvgM, FedAdam, FedAdamW, FedYogi, FedAdagrad: values worked by hand, an independent loop, Flower's own, resume."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_sdk import config as options
from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, resumed, run_rounds
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import State, Update

NAMES = ("fedavgm", "fedadam", "fedadamw", "fedyogi", "fedadagrad")
CTX = Context(Path())


def rule(name: str, options_: Mapping[str, Any] | None = None) -> Relay:
    loaded = registry.get(name, "aggregate")
    return Relay([loaded], {name: options.build(loaded.plugin.config, options_ or {}, name)})


def state_of(values: Mapping[str, Any]) -> State:
    return State("base", 0, {name: np.array(value, np.float32) for name, value in values.items()})


def updates(state: State, changes: Sequence[Mapping[str, Any]], examples: Sequence[int], kind: str) -> list[Update]:
    found = []
    for k, (change, count) in enumerate(zip(changes, examples, strict=True)):
        arrays = {name: np.array(value, np.float32) for name, value in change.items()}
        if kind == "weights":
            arrays = {name: state.arrays[name] + array for name, array in arrays.items()}
        found.append(Update(state.base, state.round + 1, f"c{k}", kind, arrays, count))
    return found


def drawn(seed: int, clients: int = 3) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [
        {"m.lora_A": draw.normal(size=(2, 5)) * 0.01, "m.lora_B": draw.normal(size=(4, 2)) * 0.01}
        for _ in range(clients)
    ]


def start(seed: int = 0) -> State:
    draw = np.random.default_rng(seed)
    return state_of({"m.lora_A": draw.normal(size=(2, 5)), "m.lora_B": draw.normal(size=(4, 2))})


@pytest.mark.parametrize(
    ("name", "options_", "expected"),
    [
        # theta 1; two clients of 1 and 3 examples change it by 0.1 and 0.5: Delta = 0.4 in both rounds
        ("fedavgm", {"beta": 0.5, "server_rate": 0.5}, (1.2, 1.5)),  # u 0.4, 0.6
        # u 0.2, 0.3; v 0.75 * 0.25 + 0.25 * 0.16 = 0.2275, then 0.210625
        ("fedadam", {"beta1": 0.5, "beta2": 0.75, "tau": 0.5, "server_rate": 1.0}, (1.2047147, 1.5175605)),
        # the same steps, and 0.1 theta less in each round: 1.1047147 = 1.2047147 - 0.1, ...
        (
            "fedadamw",
            {"beta1": 0.5, "beta2": 0.75, "tau": 0.5, "server_rate": 1.0, "weight_decay": 0.1},
            (1.1047147, 1.3070891),
        ),
        # v 0.25 - 0.25 * 0.16 = 0.21, then 0.17
        ("fedyogi", {"beta1": 0.5, "beta2": 0.75, "tau": 0.5, "server_rate": 1.0}, (1.2087122, 1.5375475)),
        # v 0.25 + 0.16 = 0.41, then 0.57
        ("fedadagrad", {"beta1": 0.5, "tau": 0.5, "server_rate": 1.0}, (1.1753905, 1.4144375)),
    ],
)
def test_two_rounds_by_hand(name: str, options_: Mapping[str, Any], expected: tuple[float, float]) -> None:
    relay, state = rule(name, options_), state_of({"w": [1.0]})
    for value in expected:
        rows = updates(state, [{"w": [0.1]}, {"w": [0.5]}], [1, 3], "delta")
        state = relay.aggregate(state, rows, CTX)
        assert float(state.arrays["w"][0]) == pytest.approx(value, rel=2e-7)


def independent(name: str, o: Mapping[str, float], theta: float, u: float, v: float, delta: float) -> tuple[Any, ...]:
    """One round of one scalar, written from the algorithm's lines and nothing of ours."""
    if name == "fedavgm":
        u = o["beta"] * u + delta
        return theta + o["server_rate"] * u, u, v
    u = o["beta1"] * u + (1 - o["beta1"]) * delta
    if name == "fedadagrad":
        v = v + delta * delta
    elif name == "fedyogi":
        square = delta * delta
        sign = (v > square) - (v < square)
        v = v - (1 - o["beta2"]) * square * sign
    else:
        v = o["beta2"] * v + (1 - o["beta2"]) * delta * delta
    moved = theta + o["server_rate"] * u / (math.sqrt(v) + o["tau"])
    if name == "fedadamw":
        moved -= o["server_rate"] * o["weight_decay"] * theta
    return moved, u, v


@pytest.mark.parametrize("kind", ["delta", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_against_an_independent_loop(name: str, kind: str) -> None:
    relay, state = rule(name), start()
    o = options.as_dict(relay.configs[name])
    first = 0.0 if name == "fedavgm" else o["tau"] ** 2
    known = {n: [(float(x), 0.0, first) for x in array.ravel()] for n, array in state.arrays.items()}
    examples = [2, 5, 1]
    for number in range(5):
        rows = updates(state, drawn(10 + number), examples, kind)
        held = dict(state.arrays)
        state = relay.aggregate(state, rows, CTX)
        for n, scalars in known.items():
            came = [row.arrays[n].astype(np.float64) - (held[n] if kind == "weights" else 0) for row in rows]
            delta = sum(c * e for c, e in zip(came, examples, strict=True)) / 8
            known[n] = [
                independent(name, o, float(theta), u, v, float(d))  # theta as the server rounded it
                for theta, (_, u, v), d in zip(held[n].ravel(), scalars, delta.ravel(), strict=True)
            ]
            assert np.allclose(state.arrays[n].ravel(), [row[0] for row in known[n]], rtol=1e-6, atol=1e-7)
            assert np.allclose(state.arrays[f"server/u/{n}"].ravel(), [row[1] for row in known[n]], rtol=1e-9)
            if name != "fedavgm":
                assert np.allclose(state.arrays[f"server/v/{n}"].ravel(), [row[2] for row in known[n]], rtol=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["delta", "weights"]),
    st.lists(st.integers(1, 99), min_size=3, max_size=3),
)
def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(seed: int, kind: str, examples: list[int]) -> None:
    """beta 0 and eta 1, over three rounds."""
    plain, momentum = rule("fedavg"), rule("fedavgm", {"beta": 0.0})
    one = two = start(seed)
    for number in range(3):
        one = plain.aggregate(one, updates(one, drawn(seed + number), examples, kind), CTX)
        two = momentum.aggregate(two, updates(two, drawn(seed + number), examples, kind), CTX)
        assert {n: a.tobytes() for n, a in one.arrays.items()} == {n: a.tobytes() for n, a in two.sent.items()}


@given(st.integers(0, 2**32 - 1))
def test_fedadamw_without_decay_is_fedadam_bit_for_bit(seed: int) -> None:
    plain, decayed = rule("fedadam"), rule("fedadamw", {"weight_decay": 0.0})
    one = two = start(seed)
    for number in range(3):
        one = plain.aggregate(one, updates(one, drawn(seed + number), [1, 2, 3], "delta"), CTX)
        two = decayed.aggregate(two, updates(two, drawn(seed + number), [1, 2, 3], "delta"), CTX)
    assert wire.state_to_bytes(one) == wire.state_to_bytes(two)


@pytest.mark.parametrize("name", NAMES)
def test_folded_loras_and_strange_arrays_stay_and_have_no_moments(name: str) -> None:
    begin = start()
    folded = {"m.folded_A": np.ones((3, 5), np.float32), "m.folded_B": np.ones((4, 3), np.float32)}
    extra = {"server/other": np.arange(3.0), "scaffold/m.lora_A": np.ones(2, np.float32)}
    state = replace(begin, arrays={**begin.arrays, **folded, **extra})
    new = rule(name).aggregate(state, updates(begin, drawn(1), [1, 1, 1], "delta"), CTX)
    for kept, array in {**folded, **extra}.items():
        assert new.arrays[kept].tobytes() == array.tobytes()
    moments = {n.split("/", 2)[2] for n in new.arrays if n.startswith(("server/u/", "server/v/"))}
    assert moments == {"m.lora_A", "m.lora_B"}
    assert set(new.sent) == {*begin.arrays, *folded, "scaffold/m.lora_A"}
    assert all(new.arrays[n].dtype == np.float32 for n in begin.arrays)


def engine(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for client, message in messages.items():
        asked = wire.assignment_from_bytes(message, client)
        assert not any(name.startswith("server/") for name in asked.arrays)
        draw = np.random.default_rng([asked.round, int(client[1:])])
        arrays = {n: draw.normal(size=a.shape).astype(np.float32) - a for n, a in asked.arrays.items()}
        yield client, wire.update_to_bytes(Update(asked.base, asked.round, client, "delta", arrays, 2))


@pytest.mark.parametrize("name", NAMES)
def test_moments_resume_from_bytes_and_are_never_sent(name: str, tmp_path: Path) -> None:
    plan = Plan({f"c{i}": 2 for i in range(3)}, 3, 4)

    def federation(folder: Path, rounds: int, begin: State) -> State:
        ctx = Context(folder, seed=1, rounds=4)
        return run_rounds(rule(name), begin, replace(plan, rounds=rounds), engine, ctx, Ledger(folder / "l.jsonl"))

    whole = federation(tmp_path / "whole", 4, start())
    federation(tmp_path / "cut", 2, start())
    half = resumed(Context(tmp_path / "cut"), "base")
    assert half is not None and half.round == 2
    again = federation(tmp_path / "cut", 4, wire.state_from_bytes(wire.state_to_bytes(half), "here"))
    assert wire.state_to_bytes(again) == wire.state_to_bytes(whole)
    sizes = {n: a.size for n, a in whole.sent.items()}
    assert {row["down_payload"] for row in Ledger(tmp_path / "whole" / "l.jsonl").rows()} == {4 * sum(sizes.values())}


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_a_known_start_are_refused(name: str) -> None:
    rows = updates(start(), drawn(1), [1, 1, 1], "weights")
    with pytest.raises(FederationError, match="no change to step along.*use fedavg"):
        rule(name).aggregate(State("base", 0, {}), rows, CTX)


@pytest.mark.parametrize("name", NAMES)
def test_against_flower(name: str) -> None:
    """Flower's own strategies on the same arrays, three rounds, float64.

    It differs in two points, which are taken out: its v starts at 0, and its FedAdam corrects the bias.
    """
    if name == "fedadamw":
        pytest.skip("Flower has no FedAdamW; without decay it is FedAdam, tested above")
    pytest.importorskip("flwr")
    strategy_of = importlib.import_module("flwr.server.strategy")
    common = importlib.import_module("flwr.common")
    spelled = {"fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedadagrad": "FedAdagrad"}[name]
    ours = rule(name, {"server_rate": 0.1} | ({} if name == "fedavgm" else {"tau": 1e-2}))
    state = State("base", 0, {"w": np.random.default_rng(0).normal(size=(3, 4))})
    given_ = {"initial_parameters": common.ndarrays_to_parameters([state.arrays["w"]])}
    if name == "fedavgm":
        theirs = strategy_of.FedAvgM(server_learning_rate=0.1, server_momentum=0.9, **given_)
    elif name == "fedadagrad":
        theirs = strategy_of.FedAdagrad(eta=0.1, tau=1e-2, **given_)
    else:
        theirs = getattr(strategy_of, spelled)(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-2, **given_)
    if name != "fedavgm":
        theirs.v_t = [np.full((3, 4), 1e-4)]  # tau^2
    ok = common.Status(common.Code.OK, "")
    for number in range(3):
        draw = np.random.default_rng(number + 1)
        values = [state.arrays["w"] + draw.normal(size=(3, 4)) * 0.1 for _ in range(3)]
        rows = [Update("base", number + 1, f"c{k}", "weights", {"w": v}, k + 1) for k, v in enumerate(values)]
        results = [
            (None, common.FitRes(ok, common.ndarrays_to_parameters([v]), k + 1, {})) for k, v in enumerate(values)
        ]
        if name == "fedadam":
            theirs.eta = 0.1 * (1 - 0.9 ** (number + 2)) / math.sqrt(1 - 0.99 ** (number + 2))
        flower, _ = theirs.aggregate_fit(number + 1, results, [])
        state = ours.aggregate(state, rows, CTX)
        assert np.allclose(common.parameters_to_ndarrays(flower)[0], state.arrays["w"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_updates_serves_as_well_as_the_updates(name: str) -> None:
    """What `linear` promises, for protections that only let the server see a sum."""
    relay, state = rule(name), start()
    linear = registry.get(name).plugin.linear
    assert linear is not None and linear(relay.configs[name]) == ""
    changes, examples = drawn(4), [1, 2, 5]
    mean = {n: sum(c[n] * e for c, e in zip(changes, examples, strict=True)) / 8 for n in changes[0]}
    many = relay.aggregate(state, updates(state, changes, examples, "delta"), CTX)
    one = relay.aggregate(state, updates(state, [mean], [8], "delta"), CTX)
    assert all(np.allclose(array, one.arrays[n], rtol=1e-5, atol=1e-7) for n, array in many.arrays.items())

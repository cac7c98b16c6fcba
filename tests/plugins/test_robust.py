"""Median, trimmed mean, Krum, Bulyan, geometric median, clipped mean: arithmetic, gauge, hostile clients, refusals."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.aggregation import factors, robust
from edgellm_plugins.aggregation.bulyan import method as bulyan
from edgellm_plugins.aggregation.geometric_median import method as geometric
from edgellm_plugins.aggregation.krum import method as krum
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from edgellm_sdk import config as options
from edgellm_sdk import models, registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.federate.engine import in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, run_rounds
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, Dataset, Example, State, Update

sys.path.insert(0, str(Path(__file__).parents[2] / "cookbook" / "benchmarks"))
import byzantine

RULES = ("median", "trimmed-mean", "krum", "bulyan", "geometric-median", "norm-clip")
BY_PRODUCT = ("krum", "geometric-median", "norm-clip")
BY_COORDINATE = ("median", "trimmed-mean", "bulyan")


def rule(name: str, given_: Mapping[str, Any] | None = None) -> Relay:
    loaded = registry.get(name, "aggregate")
    return Relay([loaded], {name: options.build(loaded.plugin.config, given_ or {}, name)})


def context(relay: Relay) -> Context:
    return Context(Path(), configs=relay.configs)


def aggregated(name: str, state: State, rows: list[Update], **given_: Any) -> State:
    relay = rule(name, given_)
    return relay.aggregate(state, rows, context(relay))


def vectors(*values: Any) -> list[Update]:
    return [
        Update("base", 1, f"c{k}", "delta", {"w": np.atleast_1d(np.array(value, np.float32))}, 10)
        for k, value in enumerate(values)
    ]


def zeros(*shape: int) -> State:
    return State("base", 0, {"w": np.zeros(shape, np.float32)})


def product(arrays: Mapping[str, Any], module: str = "m") -> Any:
    return np.asarray(arrays[f"{module}.lora_B"], np.float64) @ arrays[f"{module}.lora_A"]


def pairs(seed: int, clients: int, rank: int = 2, size: float = 0.1, kind: str = "delta") -> tuple[State, list[Update]]:
    """A state of one LoRA and a bias, and clients that changed both factors by noise around one direction."""
    draw = np.random.default_rng(seed)
    shapes = {"m.lora_A": (rank, 9), "m.lora_B": (7, rank), "b": (5,)}
    state = State("base", 0, {n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    right = {n: size * draw.normal(size=s) for n, s in shapes.items()}
    rows = []
    for k in range(clients):
        change = {n: (g + 0.5 * size * draw.normal(size=g.shape)).astype(np.float32) for n, g in right.items()}
        arrays = {n: state.arrays[n] + c for n, c in change.items()} if kind == "weights" else change
        rows.append(Update("base", 1, f"c{k}", kind, arrays, 10 + k))
    return state, rows


# Arithmetic


def test_values_by_hand() -> None:
    """Five clients on a line at 0, 1, 2, 3 and 100, on a state at 10 to see that changes are changes."""
    state, rows = State("base", 0, {"w": np.full(1, 10, np.float32)}), vectors(0, 1, 2, 3, 100)
    assert float(aggregated("median", state, rows).arrays["w"][0]) == 12
    assert float(aggregated("median", state, rows[1:]).arrays["w"][0]) == 12.5
    assert float(aggregated("trimmed-mean", state, rows, byzantine=1).arrays["w"][0]) == 12
    assert float(aggregated("trimmed-mean", state, rows, byzantine=0).arrays["w"][0]) == pytest.approx(31.2)
    # Krum, f = 1: the two nearest of 0, 1, 2, 3 are 1 + 4, 1 + 1, 1 + 1, 1 + 4 away, those of 100 far more
    distances = factors.distances([row.arrays for row in rows])
    assert krum.scores(distances, 1).tolist() == [5, 2, 2, 5, 97**2 + 98**2]
    assert float(aggregated("krum", state, rows, byzantine=1).arrays["w"][0]) == 11
    assert float(aggregated("krum", state, rows, byzantine=1, select=4).arrays["w"][0]) == 11.5
    assert float(aggregated("krum", state, rows, byzantine=1, select=0).arrays["w"][0]) == 11.5
    # on a line the geometric median is the median
    assert float(aggregated("geometric-median", state, rows, iterations=2000).arrays["w"][0]) == pytest.approx(
        12, abs=1e-3
    )
    # lengths 0, 1, 2, 3, 100: their median is 2, so 0 + 1 + 2 + 2 + 2 over 5
    assert float(aggregated("norm-clip", state, rows).arrays["w"][0]) == pytest.approx(11.4)
    assert float(aggregated("norm-clip", state, rows, bound=10).arrays["w"][0]) == pytest.approx(13.2)


def test_bulyan_by_hand() -> None:
    """Seven clients, f = 1: Krum takes five of 0, 1, 2, 3, 4, 5, 100, then the three next to their median count."""
    rows = vectors(0, 1, 2, 3, 4, 5, 100)
    taken = bulyan.chosen(factors.distances([row.arrays for row in rows]), 1)
    assert len(taken) == 5 and 6 not in taken
    values = [float(rows[k].arrays["w"][0]) for k in taken]
    near = sorted(values, key=lambda v: (abs(v - np.median(values)), v))[:3]
    assert float(aggregated("bulyan", zeros(1), rows, byzantine=1).arrays["w"][0]) == pytest.approx(np.mean(near))
    columns = np.array([[1.0, 9.0], [2.0, 0.0], [3.0, 1.0], [50.0, 5.0], [2.5, 6.0]])
    # medians 2.5 and 5; next to them 2.5, 2, 3 and 5, 6, and of 1 and 9, both 4 away, the smaller
    assert bulyan.near_the_median(columns, 3).tolist() == [2.5, 4.0]


def naive_krum(values: Any, f: int) -> list[float]:
    scores = []
    for i in range(len(values)):
        gaps = sorted(float(((values[i] - values[j]) ** 2).sum()) for j in range(len(values)) if j != i)
        scores.append(sum(gaps[: len(values) - f - 2]))
    return scores


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.integers(1, 6))
def test_against_loops_over_vectors(seed: int, n: int, width: int) -> None:
    """Arrays that are no factors, of several names, are one vector."""
    values = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    split = width // 2
    rows = [
        Update("base", 1, f"c{k:02}", "delta", {"u": v[:split], "v": v[split:].reshape(1, -1)}, 1)
        for k, v in enumerate(values)
    ]
    state = State("base", 0, {"u": np.zeros(split, np.float32), "v": np.zeros((1, width - split), np.float32)})

    def vector(name: str, **given_: Any) -> Any:
        new = aggregated(name, state, rows, **given_).arrays
        return np.concatenate([new["u"], new["v"].ravel()])

    wide = values.astype(np.float64)
    f = (n - 3) // 2
    assert np.allclose(vector("median"), np.sort(wide, axis=0)[[(n - 1) // 2, n // 2]].mean(0), atol=1e-6)
    assert np.allclose(vector("trimmed-mean"), np.sort(wide, axis=0)[f : n - f].mean(0), atol=1e-6)
    order = np.argsort(naive_krum(wide, f), kind="stable")
    assert np.allclose(vector("krum"), wide[order[0]], atol=1e-6)
    assert np.allclose(vector("krum", select=0), wide[order[: n - f]].mean(0), atol=1e-6)
    lengths = np.linalg.norm(wide, axis=1)
    factor = np.minimum(1, np.median(lengths) / lengths)
    assert np.allclose(vector("norm-clip"), (wide * factor[:, None]).mean(0), atol=1e-6)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 9))
def test_the_geometric_median_is_one(seed: int, n: int) -> None:
    """No step from it in any of 40 directions brings it nearer to the clients."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(n, 4))
    found = geometric.weights(values @ values.T, 5000) @ values

    def sum_of_distances(point: Any) -> float:
        return float(np.linalg.norm(values - point, axis=1).sum())

    steps = draw.normal(size=(40, 4)) * 1e-2
    assert all(sum_of_distances(found + step) >= sum_of_distances(found) - 1e-7 for step in steps)


def test_against_flower() -> None:
    """Flower's own median, Krum, Multi-Krum, trimmed mean on plain arrays."""
    pytest.importorskip("flwr")
    theirs = importlib.import_module("flwr.server.strategy.aggregate")
    values = np.random.default_rng(3).normal(size=(10, 6)).astype(np.float32)
    rows = vectors(*values)
    results = [([v], 1) for v in values]
    for f in range(4):
        ours = aggregated("krum", zeros(6), rows, byzantine=f).arrays["w"]
        assert np.allclose(ours, theirs.aggregate_krum(results, f, 0)[0], atol=1e-6)
        ours = aggregated("krum", zeros(6), rows, byzantine=f, select=10 - f).arrays["w"]
        assert np.allclose(ours, theirs.aggregate_krum(results, f, 10 - f)[0], atol=1e-6)
        ours = aggregated("trimmed-mean", zeros(6), rows, byzantine=f).arrays["w"]
        assert np.allclose(ours, theirs.aggregate_trimmed_avg(results, f / 10)[0], atol=1e-6)
    assert np.allclose(aggregated("median", zeros(6), rows).arrays["w"], theirs.aggregate_median(results)[0], atol=1e-6)


# Products


@pytest.mark.parametrize("kind", ["delta", "weights"])
def test_a_change_of_factors_is_the_change_of_their_product(kind: str) -> None:
    state, rows = pairs(1, 3, kind=kind)
    for row, change in zip(rows, robust.changes(state, rows, Context(Path())), strict=True):
        new = row.arrays if kind == "weights" else {n: state.arrays[n] + a for n, a in row.arrays.items()}
        assert np.allclose(product(change), product(new) - product(state.arrays), atol=1e-6)
        assert change["m.lora_A"].shape == (4, 9) and change["m.lora_B"].shape == (7, 4)


@pytest.mark.parametrize("name", BY_PRODUCT)
def test_identical_clients_and_a_client_alone(name: str) -> None:
    state, rows = pairs(2, 5)
    alike = [replace(rows[0], client=f"c{k}") for k in range(5)]
    wanted = {n: state.arrays[n].astype(np.float64) + a for n, a in rows[0].arrays.items()}
    for given_rows in (alike, alike[:1]) if name != "krum" else (alike,):
        new = aggregated(name, state, given_rows).arrays
        assert np.allclose(product(new), product(wanted), atol=1e-6)
        assert np.allclose(new["b"], wanted["b"], atol=1e-6)
        assert new["m.lora_A"].shape == (2, 9) and new["m.lora_A"].dtype == np.float32


@pytest.mark.parametrize("name", BY_PRODUCT)
@pytest.mark.parametrize("gauge", ["orthogonal", "any", "lopsided"])
def test_the_gauge_changes_nothing(name: str, gauge: str) -> None:
    """Rotating a client's factors by Q, or making one huge and the other tiny, leaves choice, lengths and result."""
    state, rows = pairs(3, 7, kind="weights")
    draw = np.random.default_rng(9)
    turned = []
    for row in rows[:3]:
        q = draw.normal(size=(2, 2))
        q = np.linalg.qr(q)[0] if gauge == "orthogonal" else q if gauge == "any" else 1e3 * np.eye(2)
        a, b = row.arrays["m.lora_A"].astype(np.float64), row.arrays["m.lora_B"].astype(np.float64)
        arrays = {**row.arrays, "m.lora_A": np.linalg.solve(q, a), "m.lora_B": b @ q}
        turned.append(replace(row, arrays={n: np.asarray(x, np.float32) for n, x in arrays.items()}))
    turned += rows[3:]
    ctx = Context(Path())
    before, after = (factors.gram(robust.changes(state, several, ctx)) for several in (rows, turned))
    assert np.allclose(before, after, rtol=1e-4, atol=1e-4 * float(np.diag(before).max()))
    scores = [krum.scores(factors.distances(robust.changes(state, several, ctx)), 2) for several in (rows, turned)]
    assert np.array_equal(*(np.argsort(one) for one in scores))
    old, new = (aggregated(name, state, several).arrays for several in (rows, turned))
    assert np.allclose(product(old), product(new), atol=1e-3)
    plain = [aggregated("fedavg", state, several).arrays for several in (rows, turned)]
    assert not np.allclose(product(plain[0]), product(plain[1]), atol=0.1)  # a rule on factors apart does not stand it


def test_truncation_is_the_best_of_its_rank_and_is_told() -> None:
    """The clipped mean of products of rank 2, against a dense decomposition of the exact mean."""
    state, rows = pairs(4, 4)
    relay = rule("norm-clip", {"bound": 1e6})
    ctx = context(relay)
    new = relay.aggregate(state, rows, ctx)
    exact = np.mean([product({n: state.arrays[n] + a for n, a in row.arrays.items()}) for row in rows], axis=0)
    u, s, vt = np.linalg.svd(exact)
    assert np.allclose(product(new.arrays), u[:, :2] * s[:2] @ vt[:2], atol=1e-5)
    told = ctx.curves["truncation over rounds"]
    assert told == [(1, pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-6))]


def test_what_has_not_been_learnt_can_still_be() -> None:
    """With B at zero and no change the rows of A stay independent, so that B has something to learn on."""
    state, rows = pairs(5, 4)
    state = replace(state, arrays={**state.arrays, "m.lora_B": np.zeros((7, 2), np.float32)})
    still = [replace(row, arrays={n: np.zeros_like(a) for n, a in row.arrays.items()}) for row in rows]
    for name in BY_PRODUCT:
        new = aggregated(name, state, still).arrays
        assert not product(new).any()
        assert np.linalg.matrix_rank(new["m.lora_A"]) == 2


def test_a_rank_wider_than_the_matrix_keeps_its_shape() -> None:
    draw = np.random.default_rng(0)
    shapes = {"m.lora_A": (5, 3), "m.lora_B": (4, 5)}
    state = State("base", 0, {n: draw.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    arrays = {n: 0.1 * draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    new = aggregated("norm-clip", state, [Update("base", 1, "c0", "delta", arrays, 1)]).arrays
    assert {n: a.shape for n, a in new.items()} == shapes
    assert np.allclose(product(new), product({n: state.arrays[n] + a for n, a in arrays.items()}), atol=1e-5)


def test_clients_of_unlike_ranks() -> None:
    """One was sent, and changed, rank 1 of the state's 2: changes count from what each was sent."""
    state, rows = pairs(6, 3)
    short = {
        "m.lora_A": state.arrays["m.lora_A"][:1],
        "m.lora_B": state.arrays["m.lora_B"][:, :1],
        "b": state.arrays["b"],
    }
    cut = {
        "m.lora_A": rows[0].arrays["m.lora_A"][:1],
        "m.lora_B": rows[0].arrays["m.lora_B"][:, :1],
        "b": rows[0].arrays["b"],
    }
    rows = [replace(rows[0], arrays=cut), *rows[1:]]
    relay = rule("norm-clip", {"bound": 1e6})
    ctx = context(relay)
    ctx.assigned = {f"c{k}": Assignment("base", 1, f"c{k}", short if k == 0 else state.arrays) for k in range(3)}
    new = relay.aggregate(state, rows, ctx).arrays
    moved = [product({n: start[n] + row.arrays[n] for n in cut}) - product(start)
             for start, row in zip((short, state.arrays, state.arrays), rows, strict=True)]  # fmt: skip
    exact = product(state.arrays) + np.mean(moved, axis=0)
    u, s, vt = np.linalg.svd(exact)
    assert np.allclose(product(new), u[:, :2] * s[:2] @ vt[:2], atol=1e-5)


# Hostile clients

BOUNDS = {  # of the mean error over seeds and of each seed's, up to three hostile of ten; as the methods' pages say
    "median": 0.5, "trimmed-mean": 0.45, "krum": 0.7, "multi-krum": 0.4, "bulyan": 0.35, "geometric-median": 0.4,
    "norm-clip": 0.7,
}  # fmt: skip
MOST = {"krum": 3, "multi-krum": 3, "bulyan": 1}  # f at which a round of ten is still enough


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, str, str, int], dict[str, float] | None]:
    found = {}
    for setting in byzantine.SETTINGS:
        for name in byzantine.RULES:
            found[setting, name, "", 0] = byzantine.table(setting, name, None, 0)
            for attack in byzantine.ATTACKS:
                for f in range(1, 5):
                    found[setting, name, attack, f] = byzantine.table(setting, name, attack, f)
    return found


@pytest.mark.row("B4")
def test_every_rule_keeps_within_the_bound_of_its_page(errors: Mapping[Any, Any]) -> None:
    for (setting, name, attack, f), measured in errors.items():
        if name in BOUNDS and measured and f <= 3:
            assert measured["largest"] < BOUNDS[name], (setting, name, attack, f, measured)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_page_says_its_bound(name: str) -> None:
    plugin = byzantine.RULES[name][0]
    text = importlib.import_module(f"edgellm_plugins.aggregation.{plugin.replace('-', '_')}.method").__doc__ or ""
    assert f"below {BOUNDS[name]} " in " ".join(text.split())


@pytest.mark.parametrize("setting", byzantine.SETTINGS)
@pytest.mark.parametrize("attack", byzantine.ATTACKS)
@pytest.mark.row("B4")
def test_some_rule_stands_each_attack_within_three_times_the_floor(
    errors: Mapping[Any, Any], setting: str, attack: str
) -> None:
    """f <= 3 of ten: error at most three times the mean's own without hostile clients."""
    floor = errors[setting, "fedavg", "", 0]["mean"]
    assert 0.15 < floor < 0.2
    for f in (1, 2, 3):
        found = [errors[setting, name, attack, f] for name in BOUNDS]
        assert min(e["mean"] for e in found if e) <= 3 * floor
        if attack != "alie":  # one standard deviation hardly moves a mean, and that is its point
            assert errors[setting, "fedavg", attack, f]["mean"] > min(e["mean"] for e in found if e)
    if attack in ("sign flip", "huge", "weight lie"):
        assert errors[setting, "fedavg", attack, 3]["mean"] > 10 * floor


@pytest.mark.row("B4")
def test_beyond_its_limit_a_rule_refuses(errors: Mapping[Any, Any]) -> None:
    for (setting, name, _, f), measured in errors.items():
        by_coordinate = name in BY_COORDINATE and setting == "both factors"
        assert (measured is None) == (by_coordinate or f > MOST.get(name, 4)), (setting, name, f)


# Refusals


@pytest.mark.parametrize(
    ("name", "given_", "clients", "reason"),
    [
        ("krum", {"byzantine": 2}, 6, "krum withstands 2 hostile clients among 7 or more, and 6"),
        ("krum", {}, 2, "krum withstands 0 hostile clients among 3 or more, and 2"),
        ("bulyan", {"byzantine": 1}, 6, "bulyan withstands 1 hostile clients among 7 or more, and 6"),
        ("trimmed-mean", {"byzantine": 2}, 4, "trimmed-mean withstands 2 hostile clients among 5 or more, and 4"),
    ],
)
def test_too_few_clients(name: str, given_: Mapping[str, Any], clients: int, reason: str) -> None:
    """Before anybody works where too few are asked, after the work where too few answered."""
    rows = vectors(*range(clients))
    with pytest.raises(FederationError, match=f"{reason} answered"):
        aggregated(name, zeros(1), rows, **given_)
    relay = rule(name, given_)
    names = [row.client for row in rows]
    with pytest.raises(ConfigError, match=f"{reason} are asked in a round") as caught:
        relay.assign(zeros(1), names, dict.fromkeys(names, 10), context(relay))
    assert len(str(caught.value)) <= 200 and caught.value.exit_code == 3
    more = [*names, "x", "y"]
    assert set(relay.assign(zeros(1), more, dict.fromkeys(more, 10), context(relay))) == set(more)


@pytest.mark.parametrize("name", BY_COORDINATE)
def test_coordinates_of_two_trained_factors_are_refused(name: str) -> None:
    state, rows = pairs(0, 7)
    relay = rule(name)
    says = "both LoRA factors train.*lora-fa, or use krum, geometric-median or norm-clip"
    with pytest.raises(ConfigError, match=says) as caught:
        relay.assign(state, ["a", "b", "c"], dict.fromkeys("abc", 1), context(relay))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 250
    with pytest.raises(ConfigError, match=says):
        relay.aggregate(state, rows, context(relay))
    peft = {f"base_model.model.x.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    with pytest.raises(ConfigError, match=says):
        relay.aggregate(
            State("", 0, {}), [Update("", 1, f"f{k}", "weights", peft, 1) for k in range(3)], context(relay)
        )


def test_rules_that_see_every_update_do_not_say_that_a_sum_will_do() -> None:
    assert all(registry.get(name).plugin.linear is None for name in RULES)


def test_other_refusals() -> None:
    rows = vectors(*range(5))
    with pytest.raises(FederationError, match="krum cannot average 5 of 5 changes of which 1 may be hostile"):
        aggregated("krum", zeros(1), rows, byzantine=1, select=5)
    whole = [replace(row, arrays={"w": np.ones(1, np.int32)}) for row in rows]
    unlike = [*rows[:4], replace(rows[4], arrays={"w": np.ones(2, np.float32)})]
    mixed = [*rows[:4], replace(rows[4], kind="weights")]
    for name in RULES:
        with pytest.raises(FederationError, match="holds int32, which has no mean"):
            aggregated(name, zeros(1), whole)
        with pytest.raises(FederationError, match="w has shapes"):
            aggregated(name, zeros(1), unlike)
        with pytest.raises(FederationError, match="cannot combine updates of kind"):
            aggregated(name, zeros(1), mixed)


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_theta_stays(name: str) -> None:
    rows = vectors(*range(5))
    kept = {"server/x": np.arange(3.0), "m.folded_A": np.ones((2, 2), np.float32), "other": np.ones(2, np.float32)}
    state = State("base", 0, {**zeros(1).arrays, **kept}, {"scale": 2.0}, 7)
    new = aggregated(name, state, rows)
    assert {n: a.tobytes() for n, a in new.arrays.items() if n != "w"} == {n: a.tobytes() for n, a in kept.items()}
    assert (new.round, new.cohort, new.scalars) == (1, 8, {"scale": 2.0})


# End to end


def flipping(engine: Any, hostile: tuple[str, ...]) -> Callable[[Mapping[str, bytes]], Iterator[tuple[str, Any]]]:
    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
        for client, raw in engine(messages):
            if client in hostile:
                update = wire.update_from_bytes(raw, client)
                arrays = {name: -10 * array for name, array in update.arrays.items()}
                raw = wire.update_to_bytes(replace(update, arrays=arrays))
            yield client, raw

    return exchange


def test_two_of_ten_clients_flip_their_signs(tiny_llama: Path, tmp_path: Path) -> None:
    """A trained tiny model, A frozen: the mean diverges; Krum, median and trimmed mean end within 10 % of the clean
    run's loss."""
    handle = models.resolve(str(tiny_llama))
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = tuple(Example(f"{words[i % 4]} {i}", ("spam", "ham")[i % 2], ("spam", "ham")[i % 2]) for i in range(80))
    data = Dataset(rows, "flip", "toy", ("ham", "spam"), ("ham", "spam"))
    shards = {f"c{k}": data.select(range(8 * k, 8 * k + 8)) for k in range(10)}
    settings = {"rank": 4, "layers": 1, "steps": 2, "batch_size": 8, "learning_rate": 0.1, "precision": "float32",
                "optimizer": "sgd", "clip": 0.0, "warmup": 0.0}  # fmt: skip

    def loss(name: str, hostile: tuple[str, ...], given_: Mapping[str, Any], rounds: int = 6) -> float:
        plugins = [registry.get("lora-fa", "finetune"), registry.get(name, "aggregate")]
        asked = {"lora-fa": settings, name: given_}
        configs = {p.plugin.name: options.build(p.plugin.config, asked[p.plugin.name], "test") for p in plugins}
        relay = Relay(plugins, configs)
        folder = tmp_path / f"{name}-{len(hostile)}-{rounds}"
        ctx = Context(folder, seed=3, threads=1, rounds=6, configs=relay.configs)
        start = relay.initialise(handle, ctx)
        plan = Plan({c: len(s) for c, s in shards.items()}, 10, rounds)
        engine = flipping(in_process(relay, handle, shards, ctx), hostile)
        final = run_rounds(relay, start, plan, engine, ctx, Ledger(folder / "ledger.jsonl"))
        return relay.measure(final, data, ctx)["validation loss"].value

    bad = ("c0", "c5")
    before, clean = loss("fedavg", (), {}, 0), loss("fedavg", (), {})
    assert clean < 0.8 * before
    assert loss("fedavg", bad, {}) > 1.5 * clean
    for name, given_ in (("krum", {"byzantine": 2}), ("median", {}), ("trimmed-mean", {"byzantine": 2})):
        assert loss(name, bad, given_) < 1.1 * clean, name

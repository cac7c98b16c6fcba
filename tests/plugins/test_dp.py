"""Client-level differential privacy: the mechanism, the accountant, the ledger, the refusals, and whole runs."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_sdk import registry, steps, wire
from edgellm_sdk.cli.main import main
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, PluginError, PrivacyError
from edgellm_sdk.kit import averaging
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Array, Assignment, State, Update

pytest.importorskip("dp_accounting")
scipy_stats = pytest.importorskip("scipy.stats")

from edgellm_plugins.privacy import accountant, rules  # noqa: E402
from edgellm_plugins.privacy.budget import Budget  # noqa: E402
from edgellm_plugins.privacy.dp import Config, method  # noqa: E402

CLIENTS = ("a", "b", "c", "d")
SHAPES = {"x.lora_A": (2, 3), "x.lora_B": (5, 2)}
STATE = State("base", 0, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
SCALARS = {"loss": 1.5, "steps": 2, "forwards": 6, "dropped": 1, "secret": 42}


def vector(seed: int, scale: float = 1.0) -> dict[str, Array]:
    stream = Context(Path(), seed).stream("vector")
    return {n: stream.normal(math.prod(s)).reshape(s) * np.float32(scale) for n, s in SHAPES.items()}


def update(client: str, arrays: Mapping[str, Array], examples: int = 7, kind: str = "delta", **more: Any) -> Update:
    return Update("base", 1, client, kind, arrays, examples, "", SCALARS | more)


def context(tmp_path: Path, config: Config, rule: str = "fedavg", asked: tuple[str, ...] = CLIENTS) -> Context:
    ctx = Context(tmp_path, 3, rounds=4, configs={rule: registry.get(rule).plugin.config(), "dp": config})
    ctx.assigned = {client: Assignment("base", 1, client, STATE.arrays) for client in asked}
    return ctx


def release(tmp_path: Path, updates: list[Update], config: Config, state: State = STATE, **more: Any) -> list[Update]:
    ctx = context(tmp_path, config, **more)
    method.before_the_round(state, sorted(ctx.assigned), len(CLIENTS), config, ctx)
    return method.released(state, updates, config, ctx)


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "normal", lambda count: np.zeros(count))


def norm(arrays: Mapping[str, Array]) -> float:
    return float(np.sqrt(sum(np.square(a.astype(np.float64)).sum() for a in arrays.values())))


# The clip


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=8), st.floats(1e-6, 1e6))
def test_no_vector_is_longer_than_the_clip(values: list[float], limit: float) -> None:
    array = np.array(values)
    found = method.clipped({"w": array}, limit)["w"]
    assert np.isfinite(found).all() and np.linalg.norm(found) <= limit * (1 + 1e-12)
    before = float(np.linalg.norm(array)) if np.isfinite(array).all() else math.inf
    if before <= limit:
        np.testing.assert_array_equal(found, array)
    elif math.isfinite(before):
        np.testing.assert_allclose(found, array * (limit / before), rtol=1e-12)


def test_nan_and_infinity_do_not_pass_and_zero_is_legal() -> None:
    """min(1, C / NaN) is 1, which is how NaN passes other people's clip."""
    for bad in (math.nan, math.inf, -math.inf):
        found = method.clipped({"a": np.array([1.0, bad]), "b": np.ones(2)}, 1.0)
        assert not any(array.any() for array in found.values())
    assert not method.clipped({"a": np.zeros(3)}, 1.0)["a"].any()
    poisoned = update("b", {"w": np.array([np.nan], np.float32)})
    assert method.screen([update("a", vector(1)), poisoned]) == {"b": "is not finite"}


def test_all_arrays_are_clipped_together() -> None:
    """Clipping array by array would leave a norm of C sqrt(arrays)."""
    found = method.clipped(vector(1, 100.0), 0.5)
    assert norm(found) == pytest.approx(0.5) and all(norm({"": array}) < 0.5 for array in found.values())


# Sensitivity


@pytest.mark.parametrize("kind", ["delta", "weights"])
def test_one_client_moves_the_mean_by_2c_over_m_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    silent(monkeypatch)
    config, start = Config(clip=0.7, epsilon=1e6), vector(99)
    state = replace(STATE, arrays=start)
    moved = []
    for trial in range(12):
        others = [update(c, vector(10 * trial + k, 5.0), 3 + k, kind) for k, c in enumerate(CLIENTS[1:])]
        ends = []
        for place, first in enumerate((vector(trial, 1e3), {n: -a for n, a in vector(trial, 1e3).items()}, None)):
            mine = [] if first is None else [update("a", first, 10**6, kind)]
            ctx = context(tmp_path / f"{kind}{trial}{place}", config)
            ctx.assigned = {c: Assignment("base", 1, c, start) for c in CLIENTS}
            method.before_the_round(state, CLIENTS, 4, config, ctx)
            out = method.released(state, [*mine, *others], config, ctx)
            assert len(out) == 1 and out[0].examples == 1 and out[0].kind == kind
            ends.append(out[0].arrays)
        moved.append(norm({n: ends[0][n] - ends[1][n] for n in SHAPES}))
        absent = norm({n: ends[0][n] - ends[2][n] for n in SHAPES})
        assert absent <= config.clip / 4 * (1 + 1e-5), "a client that is absent changes the divisor"
    assert max(moved) == pytest.approx(2 * 0.7 / 4, rel=1e-5) and max(moved) <= 2 * 0.7 / 4 * (1 + 1e-5)


def test_who_does_not_answer_or_is_not_finite_counts_as_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    config, mine = Config(clip=0.5, epsilon=1e6), vector(1, 100.0)
    alone = release(tmp_path / "1", [update("a", mine)], config)[0]
    assert norm(alone.arrays) == pytest.approx(0.5 / 4)
    nan = {n: np.full(s, np.nan, np.float32) for n, s in SHAPES.items()}
    both = release(tmp_path / "2", [update("a", mine), update("b", nan)], config)[0]
    for name in SHAPES:
        np.testing.assert_array_equal(both.arrays[name], alone.arrays[name])


def test_nothing_else_about_the_data_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    config = Config(epsilon=1e6)
    one = release(tmp_path / "1", [update("a", vector(1)), update("b", vector(2))], config)
    tell = [update("a", vector(1), 3, loss=9.0, dropped=0), update("b", vector(2), 900, loss=0.1, dropped=2, secret=1)]
    other = release(tmp_path / "2", tell, config)
    assert wire.update_to_bytes(one[0]) == wire.update_to_bytes(other[0])
    assert dict(one[0].scalars) == {"steps": 2, "forwards": 24, "loss": 0.0, "dropped": 0}


# Noise


@pytest.mark.row("P3")
def test_noise_has_its_deviation_and_is_normal() -> None:
    """P3: 10^6 draws, sigma within 0.5 % (7 standard errors), KS p > 0.001; a second draw for the one time in 1000."""
    for _ in range(2):
        drawn = method.normal(1_000_000)
        assert abs(float(drawn.std()) - 1) < 0.005 and abs(float(drawn.mean())) < 0.005
        if scipy_stats.kstest(drawn, "norm").pvalue > 0.001:
            break
    else:
        pytest.fail("two samples of a million are not normal")
    assert np.abs(drawn).max() > 4.33, "the run's portable noise has no such tails"


def test_noise_is_the_operating_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variate takes 64 bytes of os.urandom, and one seed gives two releases."""
    taken, urandom = [], os.urandom

    def counted(size: int) -> bytes:
        taken.append(size)
        return urandom(size)

    monkeypatch.setattr(os, "urandom", counted)
    method.normal(300_000)
    assert sum(taken) == 64 * 300_000
    config = Config(epsilon=1e6)
    ends = [release(tmp_path / str(k), [update("a", vector(1))], config)[0].arrays["x.lora_B"] for k in range(2)]
    assert (ends[0] != ends[1]).all()


def test_noise_on_the_mean_is_z_c_over_m(tmp_path: Path) -> None:
    """Added once: neither for each client nor again for each array. Within 3 %."""
    big = {"w": np.zeros((200, 250), np.float32)}
    config = Config(clip=0.4, noise_multiplier=2.5, epsilon=1e6)
    found = release(tmp_path, [update(client, big) for client in CLIENTS], config)[0].arrays["w"]
    assert float(found.std()) == pytest.approx(2.5 * 0.4 / 4, rel=0.03)


def test_noise_in_the_product_is_as_computed() -> None:
    """E|noise in B A|^2 = sigma^2 (m |A|^2 + n |B|^2) + sigma^4 m n r; with A frozen sigma^2 m |A|^2. Within 5 %."""
    m, n, r, sigma = 40, 30, 4, 0.5
    stream = Context(Path(), 1).stream("factors")
    a, b = stream.normal(r * n).reshape(r, n).astype(float), stream.normal(m * r).reshape(m, r).astype(float)
    both, frozen = [], []
    for _ in range(200):
        made = method.noised({"a": a, "b": b}, sigma)
        both.append(np.square(made["b"] @ made["a"] - b @ a).sum())
        frozen.append(np.square(made["b"] @ a - b @ a).sum())
    squares = np.square(a).sum(), np.square(b).sum()
    assert np.mean(both) == pytest.approx(sigma**2 * (m * squares[0] + n * squares[1]) + sigma**4 * m * n * r, rel=0.05)
    assert np.mean(frozen) == pytest.approx(sigma**2 * m * squares[0], rel=0.05)


def lower_bound(hits: int, false: int, trials: int, delta: float) -> float:
    """epsilon that an attack with so many hits and false alarms proves, at 99.9 % (Clopper and Pearson)."""
    beta = scipy_stats.beta
    tpr = beta.ppf(0.0005, hits, trials - hits + 1) if hits else 0.0
    fpr = beta.ppf(0.9995, false + 1, trials - false) if false < trials else 1.0
    return math.log(max(1e-12, (tpr - delta) / fpr))


@pytest.mark.parametrize("deviation, breaks", [(2.0, False), (0.2, True)])
@pytest.mark.row("P3")
def test_a_canary_proves_no_more_than_epsilon(deviation: float, breaks: bool) -> None:
    """P3: one client sends a vector of its own, 1000 trials; noise of a tenth is found out."""
    canary, epsilon = {"w": np.full(50, 3.0)}, accountant.epsilon(1.0, 2.0, 1, 1e-5)
    seen = {}
    for present in (True, False):
        sums = []
        for _ in range(1000):
            part = method.clipped(canary, 1.0)["w"] if present else np.zeros(50)
            sums.append(float(method.noised({"w": part}, deviation)["w"] @ np.full(50, 50**-0.5)))
        seen[present] = np.array(sums)
    proved = max(
        lower_bound(int((seen[True] > t).sum()), int((seen[False] > t).sum()), 1000, 1e-5) for t in (0.5, 1.0, 2.0, 3.0)
    )
    assert (proved > epsilon) == breaks, f"proved {proved:.2f}, reported {epsilon:.2f}"


# The accountant: P2

POINTS = [
    (q, z, count, delta)
    for q, z, count in (
        (1.0, 10.0, 1), (1.0, 10.0, 20), (1.0, 4.0, 3), (1.0, 2.0, 1), (1.0, 1.0, 2), (1.0, 20.0, 200),
        (0.04, 1.5, 2250), (0.1, 0.8, 100), (0.1, 1.0, 100), (0.01, 0.7, 500), (0.5, 3.0, 50), (0.25, 2.0, 30),
    )
    for delta in (1e-3, 1e-5)
] + [(0.04, 1.5, 100, 1e-6)]  # fmt: skip


def own_bound(q: float, z: float, count: int, delta: float) -> float:
    """Renyi at integer orders (Mironov, Talwar and Zhang's binomial sum), converted the plain way."""
    best = math.inf
    for order in range(2, 257):
        logs = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (k * math.log(q) if k else 0.0)
            + ((order - k) * math.log1p(-q) if q < 1 else (0.0 if k == order else -math.inf))
            + (k * k - k) / (2 * z * z)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(logs)
        renyi = count * (top + math.log(sum(math.exp(value - top) for value in logs))) / (order - 1)
        best = min(best, renyi + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, best)


@pytest.mark.parametrize("q, z, count, delta", POINTS)
def test_epsilon_lies_between_the_tight_and_a_looser_bound(q: float, z: float, count: int, delta: float) -> None:
    import dp_accounting as dp
    from dp_accounting import rdp

    found, close = accountant.epsilon(q, z, count, delta), accountant.tight(q, z, count, delta)
    direct = rdp.RdpAccountant()
    direct.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), count)
    assert close is not None and close <= found <= 1.01 * direct.get_epsilon(delta)
    own = own_bound(q, z, count, delta)  # integer orders alone are looser: 13.83 against 12.41 at (0.1, 0.8, 100)
    assert close <= own and found <= own * 1.0001 <= 1.15 * found


@pytest.mark.row("P2")
def test_25_points_golden_value_and_monotony() -> None:
    """Opacus, sigma 1.5, q 0.04, 2250 steps, delta 1e-5: 7.32911117143."""
    assert len(POINTS) == 25
    assert accountant.epsilon(0.04, 1.5, 2250, 1e-5) == pytest.approx(7.32911117143, abs=1e-3)
    for q, z, count, delta in POINTS:
        here = accountant.epsilon(q, z, count, delta)
        assert here < accountant.epsilon(q, z, count + 1, delta)
        assert here < accountant.epsilon(q, z * 0.9, count, delta)
        assert q == 1 or here < accountant.epsilon(min(1.0, q * 1.1), z, count, delta)
    assert accountant.epsilon(1.0, 1.0, 0, 1e-5) == 0


def test_what_a_budget_pays_for() -> None:
    rounds = accountant.affordable(1.0, 4.0, 1e-3, 3.0, 100)
    assert accountant.epsilon(1.0, 4.0, rounds, 1e-3) <= 3 < accountant.epsilon(1.0, 4.0, rounds + 1, 1e-3)
    z = accountant.enough(1.0, 10, 1e-3, 3.0)
    assert accountant.epsilon(1.0, z, 10, 1e-3) <= 3 < accountant.epsilon(1.0, z / 1.02, 10, 1e-3)
    assert accountant.enough(1.0, 10, 1e-9, 1e-6) == math.inf


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PluginError, match=r"pip install 'edgellm-sdk\[privacy\]'"):
        accountant.epsilon(0.123, 1.0, 1, 1e-3)


# The ledger

TERMS = {"noise_multiplier": 1.0, "population": 4}


def test_the_ledger_counts_clients_and_survives_a_cut(tmp_path: Path) -> None:
    ledger = Budget(tmp_path, TERMS)
    ledger.charge(1, ["a", "b"])
    ledger.charge(2, ["b", "c"])
    assert (ledger.times(), ledger.times(["b"]), ledger.times(["a"])) == (2, 3, 2)
    raw = ledger.path.read_bytes()
    for cut in range(raw.index(b"\n") + 2, len(raw)):
        ledger.path.write_bytes(raw[:cut])
        again = Budget(tmp_path, TERMS)
        assert again.charges == 2 and again.times(["b"]) >= 3, "a cut line is free"
        again.charge(2, ["b", "c"])
        assert Budget(tmp_path, TERMS).times() == 3, "the next line was lost in the cut one"
    assert Budget(tmp_path).terms == TERMS


def test_a_charge_is_fsynced_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("disk"), fsync(fd))[1])
    monkeypatch.setattr(method, "normal", lambda count: (order.append("noise"), np.zeros(count))[1])
    release(tmp_path, [update("a", vector(1))], Config(epsilon=1e6))
    assert order[0] == "disk" and "noise" in order and "disk" not in order[order.index("noise") :]


def test_other_terms_and_missing_rounds_are_refused(tmp_path: Path) -> None:
    ledger = Budget(tmp_path, TERMS)
    ledger.charge(1, ["a"])
    ledger.covers(1)
    with pytest.raises(PrivacyError, match="does not hold the charge of round 2"):
        ledger.covers(2)
    with pytest.raises(PrivacyError, match="written under other settings"):
        Budget(tmp_path, TERMS | {"noise_multiplier": 2.0})


# Refusals: one line, exit 9


FREE = Config(epsilon=1e6)


def refused(tmp_path: Path, match: str, updates: list[Update], config: Config = FREE, **more: Any) -> None:
    with pytest.raises(PrivacyError, match=match) as caught:
        release(tmp_path, updates, config, **more)
    assert caught.value.exit_code == 9 and "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_rules_that_are_not_linear_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgellm_plugins.aggregation.fedavg as fedavg

    refused(tmp_path / "1", "fedkseed-pro: needs every client's update", [update("a", vector(1))], rule="fedkseed-pro")
    monkeypatch.setattr(fedavg, "PLUGIN", replace(fedavg.PLUGIN, linear=lambda config: "it is in a mood"))
    refused(tmp_path / "2", "fedavg: it is in a mood", [update("a", vector(1))])
    assert not (tmp_path / "2" / "privacy.jsonl").exists()


@pytest.mark.parametrize("rule", ["median", "krum", "flora", "fedex-lora", "flexlora", "norm-clip", "mixed"])
def test_shipped_rules_that_look_at_single_updates_are_refused(tmp_path: Path, rule: str) -> None:
    refused(tmp_path, f"{rule}: needs every client's update", [update("a", vector(1))], rule=rule)


def test_directions_of_ones_own_get_noise_for_each_client(tmp_path: Path) -> None:
    sent = [Update("base", 1, c, "seeds", {"scalar": np.zeros((500, 20), np.float32)}, 5) for c in CLIENTS[:2]]
    found = release(tmp_path / "1", sent, Config(clip=0.5, noise_multiplier=3.0, epsilon=1e6), rule="fedkseed")
    assert [u.client for u in found] == list(CLIENTS) and all(u.examples == 1 for u in found)
    for one in found:
        assert float(one.arrays["scalar"].std()) == pytest.approx(1.5, rel=0.03)
    refused(
        tmp_path / "2", "clients draw directions of their own", sent, Config(epsilon=1e6, sampling="poisson"),
        rule="fedkseed",
    )  # fmt: skip


def test_a_plugins_own_arrays_and_unlike_shapes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "1", "leaves the client", [update("a", {**vector(1), "scaffold/c": np.zeros(2, np.float32)})])
    refused(tmp_path / "2", "leaves the client", [update("a", {"n": np.zeros(2, np.int32)})])
    other = {"x.lora_A": np.zeros((1, 3), np.float32), "x.lora_B": np.zeros((5, 1), np.float32)}
    refused(tmp_path / "3", "unlike shapes", [update("a", vector(1)), update("b", other)])


def test_order_around_and_secagg_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path, Config())
    ctx.configs["secagg"] = None
    with pytest.raises(PrivacyError, match="which secagg hides"):
        method.before_the_round(STATE, CLIENTS, 4, Config(), ctx)
    ctx = context(tmp_path, Config())
    ctx.configs = {"fedavg": ctx.configs["fedavg"], "other": None, "dp": ctx.configs["dp"]}
    real = registry.get

    def get(name: str, stage: str | None = None) -> registry.Loaded:
        return replace(real("dp"), hooks=("edgellm_incoming",)) if name == "other" else real(name, stage)

    monkeypatch.setattr(rules.registry, "get", get)
    with pytest.raises(PrivacyError, match="other would change updates before dp has bounded them"):
        method.before_the_round(STATE, CLIENTS, 4, Config(), ctx)


def test_delta_is_below_one_over_the_clients(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not below 1 / 4 clients"):
        release(tmp_path, [update("a", vector(1))], Config(delta=0.25))


# The clip on B A


def test_the_product_is_clipped_where_a_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """|dB A|_F is at most C, whatever A's scale, and a dB that is short in B A is not cut."""
    silent(monkeypatch)
    a = 0.01 * vector(5)["x.lora_A"]
    state = State("base", 0, {"x.lora_B": np.zeros((5, 2), np.float32)})
    config = Config(clip=0.3, clip_on="product", epsilon=1e6)
    for scale in (1.0, 1e4):
        ctx = context(tmp_path / str(scale), config)
        ctx.assigned = {c: Assignment("base", 1, c, {**state.arrays, "x.lora_A": a}) for c in CLIENTS}
        method.before_the_round(state, CLIENTS, 4, config, ctx)
        b = {"x.lora_B": scale * vector(6)["x.lora_B"]}
        out = method.released(state, [update(c, b) for c in CLIENTS], config, ctx)[0].arrays["x.lora_B"]
        length = float(np.linalg.norm(b["x.lora_B"] @ a))
        assert float(np.linalg.norm(out @ a)) == pytest.approx(min(0.3, length), rel=1e-5)
        np.testing.assert_allclose(out, b["x.lora_B"] * min(1, 0.3 / length), rtol=1e-4)


def test_noise_on_the_product_is_z_c_within_the_rows_of_a(tmp_path: Path) -> None:
    a = np.diag([3.0, 0.1, 1.0]).astype(np.float32)[:2]
    shape, config = (20_000, 2), Config(clip=0.5, noise_multiplier=2.0, clip_on="product", epsilon=1e6)
    state = State("base", 0, {"x.lora_B": np.zeros(shape, np.float32)})
    ctx = context(tmp_path, config)
    ctx.assigned = {c: Assignment("base", 1, c, {**state.arrays, "x.lora_A": a}) for c in CLIENTS}
    method.before_the_round(state, CLIENTS, 4, config, ctx)
    zeros = {"x.lora_B": np.zeros(shape, np.float32)}
    out = method.released(state, [update("a", zeros)], config, ctx)[0].arrays["x.lora_B"] @ a
    assert out[:, 0].std() == pytest.approx(0.25, rel=0.03) and out[:, 1].std() == pytest.approx(0.25, rel=0.03)


def test_the_product_is_refused_where_it_bounds_nothing(tmp_path: Path) -> None:
    config = Config(clip_on="product", epsilon=1e6)
    refused(tmp_path / "1", "bounds neither factor when both train", [update("a", vector(1))], config)
    only = {"y.lora_B": np.zeros((5, 2), np.float32)}
    refused(tmp_path / "2", "the server does not hold y.lora_A", [update("a", only)], config)


# Poisson


def test_poisson_cohorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, config = [f"c{k:02d}" for k in range(40)], Config(sampling="poisson")
    ctx = Context(tmp_path)
    sizes = [len(method.cohort(clients, 10, config, ctx) or ()) for _ in range(400)]
    assert abs(np.mean(sizes) - 10) < 0.7 and np.std(sizes) == pytest.approx(math.sqrt(40 * 0.25 * 0.75), rel=0.2)
    assert method.cohort(clients, 10, Config(), ctx) is None


def test_an_empty_draw_releases_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    monkeypatch.setattr(method.secrets.SystemRandom, "random", lambda self: 1.0)
    config = Config(sampling="poisson", epsilon=1e6)
    ctx = context(tmp_path, config)
    asked = method.cohort(CLIENTS, 2, config, ctx)
    assert asked is not None and len(asked) == 1
    ctx.assigned = {c: Assignment("base", 1, c, STATE.arrays) for c in asked}
    method.before_the_round(STATE, asked, 4, config, ctx)
    out = method.released(STATE, [update(asked[0], vector(1))], config, ctx)[0]
    assert not any(array.any() for array in out.arrays.values())


# Whole runs

Run = Callable[..., steps.Outcome]
SMALL = {"layers": 1, "rank": 2, "batch_size": 4, "max_length": 64}
PLAIN = {"noise_multiplier": 4.0, "clip": 0.5}


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    data = tmp_path / "messages.csv"
    rows = [f"message {i} {'win a prize' if i % 2 else 'see you'},{'spam' if i % 2 else 'ham'}" for i in range(32)]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")

    def start(
        plugin: str, name: str = "run", rounds: int = 3, dp: Mapping[str, Any] = PLAIN, **more: Any
    ) -> steps.Outcome:
        options = {**SMALL, **more.pop("options", {}), "dp": dict(dp)}
        given = {"clients": 4, "rounds": rounds, "seed": 5, "around": "dp", "watch": 0, **more}
        return steps.finetune(plugin, str(tiny_llama), str(data), tmp_path / name, options=options, **given)

    return start


CASES = {
    "lora": ("lora", {"steps": 1}, {}),
    "lora-fa, on the product": ("lora-fa", {"steps": 1}, {"clip_on": "product"}),
    "lora, ffa-lora, on the product": ("lora", {"steps": 1}, {"clip_on": "product"}, "ffa-lora"),
    "lora, rolora": ("lora", {"steps": 1}, {}, "rolora"),
    "lora, fedadam": ("lora", {"steps": 1}, {}, "fedadam"),
    "fedit": ("fedit", {}, {}),
    "fedkseed": ("fedkseed", {"steps": 2}, {}),
    "fedkseed, shared": ("fedkseed", {"steps": 2, "directions": "shared"}, {}),
    "fwdllm": ("fwdllm", {"perturbations": 2}, {}),
    "fwdllm, shared": ("fwdllm", {"perturbations": 2, "directions": "shared"}, {}),
    "fwdllm, tensors": ("fwdllm", {"perturbations": 2, "wire": "tensors"}, {}),
    "mezo": ("mezo", {"steps": 1, "probes": 2}, {}),
    "decomfl": ("decomfl", {"steps": 1, "probes": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_under_dp(run: Run, case: str) -> None:
    plugin, options, more, *rule = CASES[case]
    done = run(plugin, options=options, dp=PLAIN | more, aggregate="".join(rule))
    report = done.report
    assert report.metrics["rounds"].value == 3 and done.model is not None
    expected = accountant.epsilon(1.0, 4.0, 3, 0.1 / 4)
    assert report.metrics["epsilon"].value == pytest.approx(expected) and report.privacy is not None
    assert report.privacy["epsilon"] == pytest.approx(expected) and report.privacy["clients"] == 4
    assert [x for x, _ in report.curves["epsilon over rounds"]] == [1, 2, 3]
    assert not any(name.startswith(("training ", "aggregation error")) for name in report.curves)
    assert any("cannot be repeated" in note for note in report.notes)
    rows = [json.loads(line) for line in (done.folder / "privacy.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3] and len(rows[0]["clients"]) == 4


def test_two_runs_of_one_seed_differ(run: Run) -> None:
    ends = [(run("lora", name, 1, options={"steps": 1}).folder / "model/adapter_model.safetensors") for name in "ab"]
    assert ends[0].read_bytes() != ends[1].read_bytes()


def test_poisson_sampling_end_to_end(run: Run) -> None:
    dp = PLAIN | {"sampling": "poisson", "noise_multiplier": 2.0}
    report = run("lora", options={"steps": 1}, dp=dp, clients_per_round=2, rounds=4).report
    assert report.metrics["epsilon"].value == pytest.approx(accountant.epsilon(0.5, 2.0, 4, 0.1 / 4))
    assert report.privacy is not None and report.privacy["sampling"] == "poisson, 0.5 of the clients a round"


def test_only_the_rounds_a_client_took_part_in_count(run: Run) -> None:
    report = run("lora", options={"steps": 1}, clients_per_round=1, rounds=4).report
    assert report.privacy is not None
    most = int(report.privacy["charges"].split("which ")[1].split()[0])
    assert 1 <= most <= 4 and report.metrics["epsilon"].value == accountant.epsilon(1.0, 4.0, most, 0.1 / 4)


def test_a_plan_beyond_the_budget_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        PrivacyError, match=r"50 rounds cost epsilon .* of 2 .* use --dp-noise-multiplier .* or --rounds"
    ) as e:
        run("lora", rounds=50, dp={"epsilon": 2.0, "noise_multiplier": 3.0}, options={"steps": 1})
    assert e.value.exit_code == 9 and not (tmp_path / "run" / "ledger.jsonl").exists()
    rounds = int(str(e.value).rpartition("--rounds ")[2])
    done = run("lora", "less", rounds, {"epsilon": 2.0, "noise_multiplier": 3.0}, options={"steps": 1})
    assert done.report.metrics["epsilon"].value <= 2.0


def killed(at: int, run: Run, name: str, dp: Mapping[str, Any]) -> int:
    """The exit code of a child that runs until the noise of round `at` is about to be drawn, and kills itself."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    true, calls = method.noised, iter(range(1, 100))

    def noised(vector: Mapping[str, Array], deviation: float) -> dict[str, Array]:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(vector, deviation)

    method.noised = noised
    try:
        run("lora", name, options={"steps": 1}, dp=dp, resume=True)
    except BaseException as error:  # noqa: B036 - whatever happens, this process must end here
        os.write(2, f"{error!r}\n".encode())
    os._exit(9)


@pytest.mark.row("P2")
def test_kill_9_wastes_budget_and_never_uses_it_twice(run: Run, tmp_path: Path) -> None:
    """Killed between charge and noise in round 2: the round is charged again, the report says four; a budget for three
    is then exhausted: exit 9, with the state after round 2 as it was."""
    exact = accountant.epsilon(1.0, 4.0, 3, 0.1 / 4)
    for budget, name in ((8.0, "enough"), (exact * 1.0001, "short")):
        folder = tmp_path / name
        dp = PLAIN | {"epsilon": budget}
        assert killed(2, run, name, dp) == -signal.SIGKILL
        assert len((folder / "privacy.jsonl").read_bytes().splitlines()) == 2
        if name == "enough":
            report = run("lora", name, options={"steps": 1}, dp=dp, resume=True).report
            assert report.metrics["epsilon"].value == pytest.approx(accountant.epsilon(1.0, 4.0, 4, 0.1 / 4))
            assert report.metrics["epsilon"].value > exact and report.metrics["rounds"].value == 3
            continue
        with pytest.raises(PrivacyError, match="the privacy budget is exhausted: round 3 would make epsilon") as caught:
            run("lora", name, options={"steps": 1}, dp=dp, resume=True)
        assert caught.value.exit_code == 9
        state = Context(folder).resume("state")
        assert state is not None and state[1]["round"] == 2
        with pytest.raises(PrivacyError):
            run("lora", name, options={"steps": 1}, dp=dp, resume=True)
        again = Context(folder).resume("state")
        assert (
            again is not None and again[1] == state[1] and len((folder / "privacy.jsonl").read_text().splitlines()) == 3
        )


def test_a_lost_ledger_stops_the_run(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert killed(3, run, "run", PLAIN) == -signal.SIGKILL
    (folder / "privacy.jsonl").unlink()
    with pytest.raises(PrivacyError, match="does not hold the charge of round 1"):
        run("lora", options={"steps": 1}, resume=True)


def test_the_command_ends_with_exit_9_and_one_line(
    tiny_llama: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--plugin", "lora", "--model", str(tiny_llama), "--data", str(tmp_path / "messages.csv")]
    words += ["--clients", "4", "--rounds", "50", "--around", "dp", "--dp-epsilon", "0.5", "--output"]
    with pytest.raises(SystemExit) as end:
        main([*words, str(tmp_path / "o")])
    assert end.value.code == 9 and capsys.readouterr().err.count("\n") == 1


def test_fedavgs_mean_of_the_release_is_the_release(tmp_path: Path) -> None:
    """The rule is given one update, whose mean it is."""
    config = Config(epsilon=1e6)
    out = release(tmp_path, [update(c, vector(k)) for k, c in enumerate(CLIENTS)], config)
    relay = Relay([registry.get("fedavg")], {"fedavg": registry.get("fedavg").plugin.config()})
    new = relay.aggregate(STATE, out, Context(tmp_path))
    for name in SHAPES:
        np.testing.assert_array_equal(new.arrays[name], out[0].arrays[name])
    assert averaging.theta(new.arrays).keys() == SHAPES.keys()

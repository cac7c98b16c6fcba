"""Rules for LoRA factors: exact where they say so, every client where the server thinks it is, bytes as foretold."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.aggregation import factors, folding, halves, turns
from edgellm_plugins.aggregation.factors import Product

from edgellm_sdk import config as options
from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.federate.engine import in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, resumed, run_rounds
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.kit import averaging
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import FROZEN, Assignment, Dataset, Example, ModelHandle, Profile, State, Update

SCALE = 2.0
SHAPES = {"x": (23, 17), "y": (9, 31)}
EXACT = ("ffa-lora", "rolora", "fedex-lora", "flora")
ALL = (*EXACT, "flexlora", "fedavg", "hetlora", "fedsa-lora")
MODEL = ModelHandle(Path("nowhere"), "base", "hf", "none", "float32", 0)


def change_of(client: str, round: int, arrays: Mapping[str, np.ndarray], size: float) -> dict[str, np.ndarray]:
    """What `client` makes of an array in a round: a function of the names, the ranks and the seed alone."""
    found = {}
    for name in sorted(arrays):
        seed = [sum(map(ord, f"{client}/{name}")), len(client), round]
        shape = arrays[name].shape
        wide = np.random.default_rng(seed).normal(size=tuple(64 if n in (2, 3, 4, 8, 16) else n for n in shape))
        found[name] = (size * wide[tuple(slice(n) for n in shape)]).astype(np.float32)
    return found


class Toy:
    """A method without a model, which writes down what every client started from and ended with."""

    def __init__(self, kind: str = "delta", rank: int = 3, size: float = 0.3, alike: bool = False) -> None:
        self.kind, self.rank, self.size, self.alike = kind, rank, size, alike
        self.turns: list[tuple[int, str, dict[str, np.ndarray], dict[str, np.ndarray]]] = []
        self.failing: set[tuple[int, str]] = set()

    @hookimpl
    def edgellm_initialise(self, model: ModelHandle) -> State:
        rng, arrays = np.random.default_rng(0), {}
        for head, (m, n) in SHAPES.items():
            arrays[f"{head}.lora_A"] = rng.normal(size=(self.rank, n)).astype(np.float32)
            arrays[f"{head}.lora_B"] = np.zeros((m, self.rank), np.float32)
        return State(model.digest, 0, {**arrays, "norm": np.ones(4, np.float32)}, {"scale": SCALE})

    @hookimpl
    def edgellm_finetune(self, data: Dataset, assignment: Assignment) -> Update:
        if (assignment.round, assignment.client) in self.failing:
            raise FederationError("fails on purpose")
        theta = averaging.theta(assignment.arrays)
        under = {name.removeprefix(FROZEN): a for name, a in assignment.arrays.items() if name.startswith(FROZEN)}
        folds = folding.folded(assignment.arrays)
        change = change_of("all" if self.alike else assignment.client, assignment.round, theta, self.size)
        after = {name: theta[name] + change[name] for name in theta}
        before, later = {**theta, **under, **folds}, {**after, **under, **folds}
        self.turns.append((assignment.round, assignment.client, before, later))
        arrays = change if self.kind == "delta" else after
        return Update(assignment.base, assignment.round, assignment.client, self.kind, arrays, len(data))


def dense(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is added to the base: s B A + folded, in float64; other arrays as they are."""
    found = {}
    for head in factors.modules(arrays):
        found[head] = SCALE * arrays[f"{head}.lora_B"].astype(np.float64) @ arrays[f"{head}.lora_A"]
        if f"{head}.folded_A" in arrays:
            found[head] += arrays[f"{head}.folded_B"].astype(np.float64) @ arrays[f"{head}.folded_A"]
    return found | averaging.theta(factors.others(arrays))


def gap(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """||one - other|| / ||other|| over all together."""
    assert one.keys() == other.keys()
    whole = np.linalg.norm([np.linalg.norm(array) for array in other.values()])
    return float(np.linalg.norm([np.linalg.norm(one[name] - other[name]) for name in other]) / (whole or 1))


def shard(count: int) -> Dataset:
    return Dataset(tuple(Example("", "text") for _ in range(count)), f"shard-{count}")


SIZES = {"a": 3, "b": 5, "c": 2, "d": 7, "e": 1}


@dataclass
class Run:
    toy: Toy
    ctx: Context
    states: list[State]
    ledger: Ledger
    relay: Relay


def relay_of(toy: Toy, rule: str, given: Mapping[str, Any] | None = None) -> Relay:
    made: Any = toy
    about = registry.Plugin("toy", "made up", "1")
    hooks = ("edgellm_finetune", "edgellm_initialise")
    source = registry.Source("toy", __name__, "built-in")
    loaded = registry.get(rule, "aggregate")
    chosen: Any = options.build(loaded.plugin.config, given or {}, rule)
    return Relay([registry.Loaded(about, made, source, hooks), loaded], {"toy": registry.NoOptions(), rule: chosen})


def federate(
    folder: Path,
    rule: str,
    toy: Toy | None = None,
    rounds: int = 5,
    per_round: int = 3,
    clients: Mapping[str, int] = SIZES,
    given: Mapping[str, Any] | None = None,
) -> Run:
    """`rounds` rounds one at a time, each picked up from disk; three of five clients take part in each."""
    toy = toy or Toy()
    relay = relay_of(toy, rule, given)
    ctx = Context(folder, seed=3, rounds=rounds, configs=relay.configs)
    shards = {client: shard(size) for client, size in clients.items()}
    ledger, states = Ledger(folder / "ledger.jsonl"), [relay.initialise(MODEL, ctx)]
    for number in range(1, rounds + 1):
        plan = Plan(dict(clients), min(per_round, len(clients)), number)
        states.append(run_rounds(relay, states[-1], plan, in_process(relay, MODEL, shards, ctx), ctx, ledger))
        ctx = Context(folder, seed=3, rounds=rounds, configs=relay.configs)
        again = resumed(ctx, "base")
        assert again is not None and wire.state_to_bytes(again) == wire.state_to_bytes(states[-1])
    return Run(toy, ctx, states, ledger, relay)


def means_of(run: Run, number: int, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    """The mean of the clients' models of a round, by examples."""
    turns = [(client, dense(after)) for round, client, _, after in run.toy.turns if round == number]
    total = sum(sizes[client] for client, _ in turns)
    first = turns[0][1]
    return {name: sum(sizes[client] / total * model[name] for client, model in turns) for name in first}


# What is exact, and where every client stands


@pytest.mark.parametrize("kind", ["delta", "weights"])
@pytest.mark.parametrize("rule", ALL[:-1])
def test_every_client_starts_from_the_servers_model(tmp_path: Path, rule: str, kind: str) -> None:
    """Whoever took part before or not, and whatever it was sent: the same matrices as the server's, and exact rules end
    in the mean of the clients'."""
    run = federate(tmp_path, rule, Toy(kind))
    assert len(run.toy.turns) == 15 and len({client for _, client, _, _ in run.toy.turns}) == 5
    for number, _, before, _ in run.toy.turns:
        assert gap(dense(before), dense(run.states[number - 1].sent)) <= 1e-6
    for number in range(1, 6):
        error = gap(dense(run.states[number].sent), means_of(run, number))
        if rule in EXACT:
            assert error <= 1e-6
        elif rule == "fedavg" and number > 1:
            assert error > 1e-2
    drawn = run.ctx.curves["aggregation error over rounds"]
    assert [x for x, _ in drawn] == [1, 2, 3, 4, 5]
    if rule in EXACT:
        assert max(y for _, y in drawn) <= 1e-6
    if rule in ("fedex-lora", "flora", "flexlora"):
        assert min(y for _, y in run.ctx.curves["error of averaged factors over rounds"]) > 1e-2


@pytest.mark.parametrize("rule", EXACT)
def test_a_round_of_unequal_clients_is_exact(tmp_path: Path, rule: str) -> None:
    """K = 4, r = 3, unequal weights, from a start where neither factor is zero: two rounds, both phases of RoLoRA."""
    sizes = {"a": 1, "b": 2, "c": 3, "d": 4}
    run = federate(tmp_path, rule, rounds=4, per_round=4, clients=sizes)
    for number in range(1, 5):
        assert gap(dense(run.states[number].sent), means_of(run, number, sizes)) <= 1e-6
    if rule == "fedex-lora":
        ranks = {len(a) for name, a in run.states[1].arrays.items() if name.endswith("folded_A") and "step/" in name}
        assert ranks == {9}


@pytest.mark.parametrize("rule", ALL[:-1])
def test_identical_clients_and_one_client_change_nothing(tmp_path: Path, rule: str) -> None:
    """The rule returns the client's own matrices, for three that are alike and for one alone."""
    for name, run in {
        "alike": federate(tmp_path / "alike", rule, Toy(alike=True)),
        "alone": federate(tmp_path / "alone", rule, clients={"a": 3}, per_round=1),
    }.items():
        for number, _, _, after in run.toy.turns:
            assert gap(dense(run.states[number].sent), dense(after)) <= 1e-6, name


def test_flexlora_loses_the_tail(tmp_path: Path) -> None:
    """Its error is sqrt(sum of the squares of the singular values beyond r) / norm, module by module and drawn."""
    run = federate(tmp_path, "flexlora", rounds=2)
    wanted = means_of(run, 2)
    tails, whole = [], []
    for head in SHAPES:
        s = np.linalg.svd(wanted[head], compute_uv=False)
        tails.append(np.linalg.norm(s[3:]))
        whole.append(np.linalg.norm(s))
        lost = np.linalg.norm(dense(run.states[2].sent)[head] - wanted[head])
        assert lost == pytest.approx(tails[-1], rel=1e-4)
        a = run.states[2].arrays[f"{head}.lora_A"]
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-5)
    told = run.ctx.curves["aggregation error over rounds"][1][1]
    assert told == pytest.approx(float(np.linalg.norm(tails) / np.linalg.norm(whole)), rel=1e-4)


def test_fedavg_draws_what_it_misses(tmp_path: Path) -> None:
    run = federate(tmp_path, "fedavg", rounds=2)
    wanted, got = means_of(run, 2), dense(run.states[2].sent)
    gone = gap({head: got[head] for head in SHAPES}, {head: wanted[head] for head in SHAPES})
    assert run.ctx.curves["aggregation error over rounds"][1][1] == pytest.approx(gone, rel=1e-3)
    assert "error of averaged factors over rounds" not in run.ctx.curves


def test_fedex_may_cut_its_residual(tmp_path: Path) -> None:
    """Rank 2 of the residual: the error is its tail, and two columns travel."""
    run = federate(tmp_path, "fedex-lora", rounds=1, given={"rank": 2})
    folded = {name: a for name, a in run.states[1].arrays.items() if name.endswith("folded_A") and "/" not in name}
    assert {len(a) for a in folded.values()} == {2}
    kept = run.ctx.curves["aggregation error over rounds"][0][1]
    assert 1e-3 < kept < run.ctx.curves["error of averaged factors over rounds"][0][1]
    assert gap(dense(run.states[1].sent), means_of(run, 1)) > 1e-3


def test_what_is_folded_becomes_a_matrix_where_that_is_smaller() -> None:
    rng = np.random.default_rng(0)

    def lora(rank: int, m: int, n: int) -> dict[str, np.ndarray]:
        draw = {"x.folded_A": rng.normal(size=(rank, n)), "x.folded_B": rng.normal(size=(m, rank))}
        return {name: array.astype(np.float32) for name, array in draw.items()}

    for m, n in ((6, 20), (20, 6)):
        several = [lora(4, m, n) for _ in range(3)]
        total: dict[str, np.ndarray] = {}
        for one in several:
            total = folding.fold(total, one)
        assert total["x.folded_A"].shape == (6, n) and total["x.folded_B"].shape == (m, 6)
        wanted = sum(one["x.folded_B"].astype(np.float64) @ one["x.folded_A"] for one in several)
        np.testing.assert_allclose(total["x.folded_B"] @ total["x.folded_A"], wanted, atol=1e-5)
    assert folding.fold({}, {}) == {}


# Unlike ranks


@pytest.mark.parametrize("rule", ["flora", "flexlora", "hetlora"])
def test_unlike_ranks(tmp_path: Path, rule: str) -> None:
    """Ranks 2, 4, 8, 16 by name: every client trains its own, FLoRA is exact, FlexLoRA loses less than zeros do."""
    clients = {"a": 3, "b": 5, "c": 2, "d": 7}
    run = federate(tmp_path, rule, Toy(rank=16), 3, 4, clients, {"ranks": "2, 4,8,16"})
    for number, client, before, _ in run.toy.turns:
        rank = {"a": 2, "b": 4, "c": 8, "d": 16}[client]
        assert before["x.lora_A"].shape == (rank, 17) and before["x.lora_B"].shape == (23, rank)
        server = dense(run.states[number - 1].sent)
        if rule == "flora":
            assert gap(dense(before), server) <= 1e-6
        else:
            cut = factors.best(Product(server["x"], np.eye(17)), rank).dense() if rule == "flexlora" else None
            assert cut is None or np.linalg.norm(dense(before)["x"] - cut) <= 1e-5 * np.linalg.norm(cut)
    errors = [y for _, y in run.ctx.curves["aggregation error over rounds"]]
    if rule == "flora":
        assert max(errors) <= 1e-6 and gap(dense(run.states[3].sent), means_of(run, 3, clients)) <= 1e-6
    if rule == "flexlora":
        zeros = [y for _, y in run.ctx.curves["error of averaged factors over rounds"]]
        assert all(kept < lost for kept, lost in zip(errors, zeros, strict=True))
    if rule == "hetlora":
        norms = [np.linalg.norm([np.linalg.norm(factors.factors(after)[h].dense()) for h in SHAPES])
                 for round, _, _, after in run.toy.turns if round == 1]  # fmt: skip
        first = [after["norm"] for round, _, _, after in run.toy.turns if round == 1]
        wanted = sum(w * one for w, one in zip(norms, first, strict=True)) / sum(norms)
        np.testing.assert_allclose(run.states[1].arrays["norm"], wanted, rtol=1e-5)


def test_a_rank_by_uplink(tmp_path: Path) -> None:
    """The largest rank that is sent in time, the smallest where none is, and in turn where nothing is known."""
    from edgellm_plugins.aggregation import ranking
    from edgellm_plugins.aggregation.lora_options import Ranked

    theta = {"x.lora_A": np.zeros((8, 17), np.float32), "x.lora_B": np.zeros((23, 8), np.float32)}
    ctx, bits = Context(tmp_path), 8 * 4 * (17 + 23)  # of a rank
    ups = {"a": 0.0, "b": 8 * bits / 10, "c": 7.9 * bits / 10, "d": 1.0, "e": 2 * bits / 10}
    ctx.profiles = {client: Profile(up=up) for client, up in ups.items()}
    config = Ranked(ranks="8,4,2", upload_seconds=10.0)
    found = ranking.ranks_of(dict.fromkeys("abcdef", 1), theta, config, ctx)
    assert found == {"a": 8, "b": 8, "c": 4, "d": 2, "e": 2, "f": 2}


@pytest.mark.parametrize("ranks", ["0", "4,5", "2;3", "two", "-1", "٣", "2,"])
def test_wrong_ranks(tmp_path: Path, ranks: str) -> None:
    with pytest.raises(ConfigError, match="ranks from 1 to 3"):
        federate(tmp_path, "flora", rounds=1, given={"ranks": ranks})


def test_a_round_in_which_no_client_has_the_full_rank_kills_no_direction(tmp_path: Path) -> None:
    """FlexLoRA with ranks 1 only: the rest of A stays as it was, so that it can train again."""
    run = federate(tmp_path, "flexlora", rounds=1, per_round=1, given={"ranks": "1"})
    start, after = run.states
    np.testing.assert_array_equal(after.arrays["x.lora_A"][1:], start.arrays["x.lora_A"][1:])
    assert not after.arrays["x.lora_B"][:, 1:].any()


# Who is sent what


def test_ffa_never_moves_a_and_sends_it_once(tmp_path: Path) -> None:
    run = federate(tmp_path, "ffa-lora")
    for head in SHAPES:
        np.testing.assert_array_equal(run.states[5].arrays[f"{head}.lora_A"], run.states[0].arrays[f"{head}.lora_A"])
    a, b, rest = 4 * 3 * (17 + 31), 4 * 3 * (23 + 9), 16
    seen: set[str] = set()
    for row in run.ledger.rows():
        assert row["up_payload"] == b + rest
        assert row["down_payload"] == b + rest + (0 if row["client"] in seen else a)
        seen.add(row["client"])


def test_rolora_begins_with_b_and_alternates(tmp_path: Path) -> None:
    run = federate(tmp_path, "rolora", rounds=4, per_round=5)
    moved = [
        {end for end in ("lora_A", "lora_B") if not np.array_equal(new.arrays[f"x.{end}"], old.arrays[f"x.{end}"])}
        for old, new in zip(run.states, run.states[1:], strict=False)
    ]
    assert moved == [{"lora_B"}, {"lora_A"}, {"lora_B"}, {"lora_A"}]
    a, b, rest = 4 * 3 * (17 + 31), 4 * 3 * (23 + 9), 16
    rows = {(row["round"], row["down_payload"] - rest, row["up_payload"] - rest) for row in run.ledger.rows()}
    assert rows == {(1, a + b, b), (2, b, a), (3, a, b), (4, b, a)}


def test_when_a_factor_last_changed() -> None:
    from edgellm_plugins.aggregation.rolora.method import alternate

    assert [halves.changed("lora_A", n, alternate) for n in (1, 2, 3, 4, 5)] == [0, 0, 2, 2, 4]
    assert [halves.changed("lora_B", n, alternate) for n in (1, 2, 3, 4, 5)] == [0, 1, 1, 3, 3]


@pytest.mark.parametrize("rule", ["ffa-lora", "rolora", "fedex-lora", "flora"])
def test_who_was_not_heard_or_forgot_is_sent_everything(tmp_path: Path, rule: str) -> None:
    """A client fails in round 2, and before round 4 all have lost their memory: they come back with the server's
    model, and the round is done again."""
    toy = Toy()
    toy.failing = {(2, "b")}
    relay = relay_of(toy, rule)
    ctx = Context(tmp_path, seed=3, rounds=6, configs=relay.configs)
    shards = {client: shard(size) for client, size in SIZES.items()}
    ledger, states = Ledger(tmp_path / "ledger.jsonl"), [relay.initialise(MODEL, ctx)]
    for number in range(1, 7):
        if number == 4:
            shutil.rmtree(tmp_path / "clients")
        plan, engine = Plan(SIZES, 5, number), in_process(relay, MODEL, shards, ctx)
        states.append(run_rounds(relay, states[-1], plan, engine, ctx, ledger))
    told = {(row["round"], row["attempt"], row["client"]): row["rejected"] for row in ledger.rows()}
    assert [key for key, reason in told.items() if reason and key[0] != 4] == [(2, 0, "b")]
    lost = [reason for key, reason in told.items() if key[:2] == (4, 0)]
    assert lost == ["no longer holds what it was sent in round 3"] * 5
    assert [reason for key, reason in told.items() if key[:2] == (4, 1)] == [""] * 5
    for number, _, before, _ in toy.turns:
        assert gap(dense(before), dense(states[number - 1].sent)) <= 1e-6
    assert len(toy.turns) == 29


def test_turns_are_of_those_who_were_heard(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    state = State("base", 4, {}, {turns.TURNS: {"a": 4, "b": 4, "c": 2}})
    ctx.assigned = {client: Assignment("base", 5, client, {}) for client in ("a", "b")}
    told = turns.taken(state, [Update("base", 5, "a", "delta", {}, 1)], ctx)
    assert told == {"turns": {"a": 5, "c": 2}}
    sent = turns.assignment(state, "a", {}, {"since": 4})
    assert sent.scalars == {"since": 4} and sent.round == 5
    with pytest.raises(FederationError, match="no longer holds what it was sent in round 3"):
        turns.held("a", "factors", 5, 3, ctx)


# FedSA


def test_fedsa_shares_a_and_keeps_every_b(tmp_path: Path) -> None:
    """No B travels either way; each client goes on with its own; A is the mean; the wire agrees."""
    run = federate(tmp_path, "fedsa-lora", rounds=4)
    kept: dict[str, np.ndarray] = {}
    for number, client, before, after in run.toy.turns:
        np.testing.assert_array_equal(before["x.lora_B"], kept.get(client, np.zeros((23, 3))))
        np.testing.assert_array_equal(before["x.lora_A"], run.states[number - 1].arrays["x.lora_A"])
        kept[client] = after["x.lora_B"]
    assert len(kept) == 5 and len({b.tobytes() for b in kept.values()}) == 5
    weights = [(SIZES[c], after["x.lora_A"]) for n, c, _, after in run.toy.turns if n == 4]
    mean = sum(w * a for w, a in weights) / sum(w for w, _ in weights)
    np.testing.assert_allclose(run.states[4].arrays["x.lora_A"], mean, rtol=1e-5)
    a = 4 * 3 * (17 + 31) + 16
    assert {(row["down_payload"], row["up_payload"]) for row in run.ledger.rows()} == {(a, a)}
    assert run.states[4].scalars["personal"] == sorted(kept)
    assert not run.states[4].arrays["x.lora_B"].any()


def test_fedsa_sends_a_start_that_is_not_zero_once(tmp_path: Path) -> None:
    from edgellm_plugins.aggregation.fedsa_lora import method

    start = Toy().edgellm_initialise(MODEL)
    start = replace(start, arrays={**start.arrays, "x.lora_B": np.ones((23, 3), np.float32)})
    ctx = Context(tmp_path)
    first = method.assign(start, ["a"], ctx)["a"]
    assert sorted(first.arrays) == ["norm", "own/x.lora_B", "x.lora_A", "y.lora_A"]
    ready = method.prepare(first, ctx)
    assert (ready.arrays["x.lora_B"] == 1).all() and not ready.arrays["y.lora_B"].any()
    later = method.assign(replace(start, round=1, scalars={"turns": {"a": 1}}), ["a"], ctx)["a"]
    assert sorted(later.arrays) == ["norm", "x.lora_A", "y.lora_A"]
    assert method.folder_name("client-001") == "client-001"
    assert "/" not in method.folder_name("../up") and method.folder_name("../up") != method.folder_name("..-up")


# Bytes, from shapes alone


MODULES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
FEDIT, B_ONLY, A_ONLY = 3_686_400, 1_474_560, 2_211_840


@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora", "rolora", "fedsa-lora", "flexlora", "fedex-lora", "flora"])
def test_bytes_of_smollm2(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M, rank 8, q, k, v and o, float32: payloads of the messages of rounds 2 and 3, three clients."""
    shapes = {f"l{i}.{name}": shape for i in range(30) for name, shape in MODULES.items()}
    monkeypatch.setitem(globals(), "SHAPES", shapes)

    class Sized(Toy):
        @hookimpl
        def edgellm_initialise(self, model: ModelHandle) -> State:
            start = super().edgellm_initialise(model)
            return replace(start, arrays={name: a for name, a in start.arrays.items() if name != "norm"})

    run = federate(tmp_path, rule, Sized(rank=8), 3, 3, {"a": 1, "b": 2, "c": 3})
    told = {(row["round"], row["down_payload"], row["up_payload"]) for row in run.ledger.rows() if row["round"] > 1}
    both = {(2, FEDIT, FEDIT), (3, FEDIT, FEDIT)}
    assert (
        told
        == {
            "fedavg": both,
            "flexlora": both,
            "ffa-lora": {(2, B_ONLY, B_ONLY), (3, B_ONLY, B_ONLY)},
            "fedsa-lora": {(2, A_ONLY, A_ONLY), (3, A_ONLY, A_ONLY)},
            "rolora": {(2, B_ONLY, A_ONLY), (3, A_ONLY, B_ONLY)},
            "fedex-lora": {(2, 3 * FEDIT, FEDIT), (3, 3 * FEDIT, FEDIT)},
            "flora": {(2, 3 * FEDIT, FEDIT), (3, 3 * FEDIT, FEDIT)},
        }[rule]
    )
    raw = wire.assignment_to_bytes(run.relay.assign(run.states[1], ["a"], {"a": 1, "b": 2, "c": 3}, run.ctx)["a"])
    read = wire.assignment_from_bytes(raw, "a")
    assert wire.payload_bytes(read.arrays) in {down for _, down, _ in told}
    assert len(raw) - wire.payload_bytes(read.arrays) < 60_000


# Errors


def test_a_method_without_a_scale_is_refused(tmp_path: Path) -> None:
    class Silent(Toy):
        @hookimpl
        def edgellm_initialise(self, model: ModelHandle) -> State:
            return replace(super().edgellm_initialise(model), scalars={})

    for rule in ("flora", "fedex-lora"):
        with pytest.raises(FederationError, match="does not tell the scale of its LoRAs"):
            federate(tmp_path / rule, rule, Silent(), rounds=1)


def test_another_rank_than_asked_for_is_left_out(tmp_path: Path) -> None:
    class Sly(Toy):
        @hookimpl
        def edgellm_finetune(self, data: Dataset, assignment: Assignment) -> Update:
            update = super().edgellm_finetune(data, assignment)
            if assignment.client != "b":
                return update
            wide = {n: np.pad(a, ((0, 1), (0, 0))) if n.endswith("A") else a for n, a in update.arrays.items()}
            wide |= {n: np.pad(a, ((0, 0), (0, 1))) for n, a in wide.items() if n.endswith("B")}
            return replace(update, arrays=wide)

    for rule in ("flora", "flexlora", "hetlora"):
        run = federate(tmp_path / rule, rule, Sly(), rounds=1, per_round=5)
        assert [row["client"] for row in run.ledger.rows() if row["rejected"]] == ["b"]


# Unlike ranks at equal bytes


class Pulled(Toy):
    """Clients whose loss is the squared distance of their matrices to targets of rank 12, each a little off the common
    one; five steps of gradient descent a round."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank=rank)
        rng = np.random.default_rng(7)
        self.goal = {
            head: 4 * rng.normal(size=(m, 12)) @ rng.normal(size=(12, n)) / np.sqrt(12 * n)
            for head, (m, n) in SHAPES.items()
        }

    def loss(self, state: State) -> float:
        """Of the server's matrices, against the common target."""
        found = dense(state.sent)
        return sum(float(np.square(found[head] - goal).sum()) for head, goal in self.goal.items())

    @hookimpl
    def edgellm_finetune(self, data: Dataset, assignment: Assignment) -> Update:
        start = {n: a.astype(np.float64) for n, a in averaging.theta(assignment.arrays).items() if n != "norm"}
        theta, folds = dict(start), folding.products_of(folding.folded(assignment.arrays))
        off = np.random.default_rng(ord(assignment.client))
        for head, goal in self.goal.items():
            own = goal + 0.3 * off.normal(size=goal.shape) / np.sqrt(goal.shape[1])
            own -= folds[head].dense() if head in folds else 0
            a, b = theta[f"{head}.lora_A"], theta[f"{head}.lora_B"]
            for _ in range(5):
                error = SCALE * b @ a - own
                a, b = a - 8e-3 * SCALE * b.T @ error, b - 8e-3 * SCALE * error @ a.T
            theta |= {f"{head}.lora_A": a, f"{head}.lora_B": b}
        change = {name: (theta[name] - start[name]).astype(np.float32) for name in start}
        change["norm"] = np.zeros(4, np.float32)
        return Update(assignment.base, assignment.round, assignment.client, "delta", change, len(data))


def test_unlike_ranks_at_equal_bytes(tmp_path: Path) -> None:
    """Ranks 2, 4, 8, 16, half a megabyte both ways in all, one step size: FlexLoRA and the stack are below factors of
    the smallest rank and below zero-padding."""
    losses, clients = {}, dict.fromkeys("abcd", 5)
    for rule, rank, rounds in (("flexlora", 16, 26), ("flora", 16, 11), ("hetlora", 16, 26), ("fedavg", 2, 97)):
        toy = Pulled(rank)
        run = federate(
            tmp_path / rule, rule, toy, rounds, 4, clients, {} if rule == "fedavg" else {"ranks": "2,4,8,16"}
        )
        spent = np.zeros(rounds)
        for row in run.ledger.rows():
            spent[row["round"] - 1] += row["up_payload"] + row["down_payload"]
        assert spent.sum() >= 5e5
        losses[rule] = toy.loss(run.states[int((spent.cumsum() <= 5e5).sum())])
    assert losses["flexlora"] < losses["flora"] < losses["hetlora"] < losses["fedavg"]

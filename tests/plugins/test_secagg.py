"""Secure aggregation: the arithmetic of masks and shares, the protocol, what it refuses, and whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import registry, steps, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, PluginError, PrivacyError
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Failure, Plan, run_rounds
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Array, Assignment, Dataset, Example, State, Update

pytest.importorskip("cryptography")

from edgellm_plugins.privacy import masks, protocol, rules, vectors  # noqa: E402
from edgellm_plugins.privacy.secagg import Config, method  # noqa: E402

# Masks, keys, shares


@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_any_threshold_of_shares_gives_the_secret_and_fewer_say_nothing(
    secret: bytes, count: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(2, count))
    made = masks.shares(secret, count, threshold)
    places = data.draw(st.permutations(range(1, count + 1)))
    enough = places[:threshold]
    assert masks.joined({p: made[p - 1] for p in enough}, masks.weights(enough)) == secret
    few = places[: threshold - 1]
    with pytest.raises(ValueError):  # chance of a right size: 2^-265
        masks.joined({p: made[p - 1] for p in few}, masks.weights(few))


def test_a_polynomial_by_hand() -> None:
    """f(x) = 5 + 3 x + 2 x^2 at 1, 2, 3 is 10, 19, 32; Lagrange's weights at 0 are 3, -3, 1."""
    known = masks.weights([1, 2, 3])
    assert known == [3, masks.PRIME - 3, 1]
    held = {place: value.to_bytes(masks.SHARE, "big") for place, value in ((1, 10), (2, 19), (3, 32))}
    assert masks.joined(held, known) == (5).to_bytes(32, "big")


def test_two_parties_agree_on_one_key_for_each_purpose() -> None:
    (a, public_a), (b, public_b) = masks.key_pair(), masks.key_pair()
    assert masks.public_of(a) == public_a != public_b and len({a, b, public_a, public_b}) == 4
    assert masks.agreed(a, public_b, "x") == masks.agreed(b, public_a, "x") != masks.agreed(a, public_b, "y")
    with pytest.raises(ValueError):
        masks.agreed(a, bytes(32), "x")  # a point of low order


def test_a_mask_is_chacha20s_stream() -> None:
    """RFC 8439, A.1, test vector 1: key and nonce zero, counter 0."""
    words = masks.mask(bytes(32), 4)
    assert words.astype("<u4").tobytes() == bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28")
    key = bytes(range(32))
    assert masks.opened(key, masks.sealed(key, b"share")) == b"share"
    with pytest.raises(ValueError, match="not what was sealed"):
        masks.opened(key, masks.sealed(key, b"share")[:-1] + b"?")


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.integers(2, 12), st.integers(8, 20))
def test_the_sum_of_a_grid_is_exact_and_half_a_step_off_for_each(values: list[float], count: int, bits: int) -> None:
    levels, bound = (1 << bits) - 1, 2.0
    step = bound / ((levels - 1) // 2)
    rows = [masks.quantised(np.array(values) * (k - 3) / 4, bound, levels) for k in range(count)]
    total = np.zeros(len(values), np.uint32)
    for row in rows:
        total += row
    integers = np.sum([row.view(np.int32).astype(np.int64) for row in rows], axis=0)
    assert (total.view(np.int32) == integers).all()
    exact = np.sum([np.clip(np.array(values) * (k - 3) / 4, -bound, bound) for k in range(count)], axis=0)
    assert np.abs(masks.restored(total, bound, levels) - exact).max() <= count / 2 * step * (1 + 1e-9)


# The protocol: P1


def play(vectors: Mapping[str, Array], gone: int, threshold: int) -> tuple[Array, dict[str, Array], list[str]]:
    """All four exchanges, the last `gone` clients vanishing before they send: (sum, masked vectors, survivors)."""
    clients = sorted(vectors)
    begun = {client: protocol.advertise("s") for client in clients}
    public = {client: shown for client, (_, shown) in begun.items()}
    stacked = np.stack([public[client] for client in clients])
    shared = {c: protocol.share(begun[c][0], c, clients, stacked, threshold) for c in clients}
    sent = {}
    memory = {}
    for place, client in enumerate(clients):
        rows = np.stack([shared[other][1][place] for other in clients])
        memory[client], sent[client] = protocol.masked(shared[client][0], client, vectors[client], clients, rows)
    survivors = clients[: len(clients) - gone]
    answers = {client: protocol.unmask(memory[client], client, survivors)[1] for client in survivors}
    total = np.zeros_like(sent[clients[0]])
    for client in survivors:
        total += sent[client]
    answers = dict(sorted(answers.items())[-threshold:])  # no more than are needed
    return protocol.unmasked(total, "s", clients, public, clients, survivors, threshold, answers), sent, survivors


def p1(sizes: tuple[int, ...], dimensions: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [(n, gone, d) for n in sizes for gone in sorted({0, 1, n // 3}) for d in dimensions]


def uniform(words: Array) -> None:
    """chi^2 over the 256 values of all bytes: within 6 standard deviations of its 255 degrees of freedom."""
    found = np.bincount(words.astype("<u4").view(np.uint8), minlength=256)
    expected = found.sum() / 256
    chi = float((np.square(found - expected) / expected).sum())
    assert abs(chi - 255) < 6 * np.sqrt(2 * 255), chi


def sums_are_exact(n: int, gone: int, d: int) -> None:
    stream = Context(Path(), 1).stream(f"{n}/{gone}/{d}")
    vectors = {f"c{k:03d}": stream.bits(d).astype(np.uint32) >> np.uint32(12) for k in range(n)}
    total, sent, survivors = play(vectors, gone, max(2, -(-6 * n // 10)))
    expected = np.sum([vectors[client].astype(np.uint64) for client in survivors], axis=0) % 2**32
    assert (total == expected).all()
    assert not any((sent[client] == vectors[client]).mean() > 0.01 for client in vectors if d > 100)
    if d >= 2000:
        for client in sorted(vectors)[:3]:
            uniform(sent[client])


@pytest.mark.parametrize("n, gone, d", p1((3, 5, 10), (1, 1000, 20_000)))
def test_the_masked_sum_is_the_integer_sum(n: int, gone: int, d: int) -> None:
    sums_are_exact(n, gone, d)


@pytest.mark.bar("P1")
@pytest.mark.parametrize("n, gone, d", p1((3, 5, 10, 32, 100), (1, 1000, 20_000)))
def test_the_masked_sum_is_the_integer_sum_at_full_size(n: int, gone: int, d: int) -> None:
    sums_are_exact(n, gone, d)


def test_an_unmasked_vector_is_not_uniform() -> None:
    """The test above can fail."""
    with pytest.raises(AssertionError):
        uniform(masks.quantised(Context(Path(), 1).stream("x").normal(20_000) * 0.01, 1.0, (1 << 20) - 1))


def test_one_clients_own_mask_stays_when_all_others_secrets_are_known() -> None:
    """Why b_u is there: whoever has the others' mask secrets can take every pairwise mask off what u sent."""
    clients, memories, sealed = shared()
    rows, x = np.stack([sealed[other][0] for other in clients]), np.arange(3000, dtype=np.uint32)
    before = memories["c0"]
    _, sent = protocol.masked(before, "c0", x, clients, rows)
    shown = masks.public_of(bytes.fromhex(before["mask"])).hex()
    for other in clients[1:]:
        pair = protocol._pair(memories[other]["mask"], shown, "s", other)
        sent = sent - masks.mask(pair, 3000)
    uniform(sent)
    assert (sent - masks.mask(bytes.fromhex(before["self"]), 3000) == x).all()


# What clients refuse


def begin(n: int = 4, threshold: int = 3) -> tuple[list[str], dict[str, Any], Array]:
    clients = [f"c{k}" for k in range(n)]
    begun = {client: protocol.advertise("s") for client in clients}
    return clients, {c: m for c, (m, _) in begun.items()}, np.stack([shown for _, shown in begun.values()])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"clients": ["c0", "c2", "c1", "c3"]}, "the list of clients is not one"),
        ({"clients": ["c1", "c2", "c3", "c4"]}, "the list of clients is not one"),
        ({"threshold": 2}, "2 of 4 clients is no threshold"),
        ({"threshold": 5}, "5 of 4 clients is no threshold"),
        ({"twice": True}, "two clients have one key"),
        ({"exchanged": True}, "my key was exchanged"),
        ({"again": True}, "keys were shared before"),
        ({"low": True}, "a public key is not one"),
        ({"short": True}, "the keys are not one pair a client"),
    ],
)
def test_lists_that_weaken_the_protocol_are_refused(change: dict[str, Any], reason: str) -> None:
    clients, memories, public = begin()
    public = public.copy()
    memory = memories["c0"]
    if "twice" in change:
        public[2] = public[1]
    if "exchanged" in change:
        public[0] = protocol.advertise("s")[1]
    if "low" in change:
        public[1, 1] = 0
    if "short" in change:
        public = public[:3]
    if "again" in change:
        memory, _ = protocol.share(memory, "c0", clients, public, 3)
    with pytest.raises(FederationError, match=reason):
        protocol.share(memory, "c0", change.get("clients", clients), public, change.get("threshold", 3))


def shared(n: int = 4) -> tuple[list[str], dict[str, Any], dict[str, Array]]:
    clients, memories, public = begin(n)
    both = {c: protocol.share(memories[c], c, clients, public, 3) for c in clients}
    return clients, {c: m for c, (m, _) in both.items()}, {c: rows for c, (_, rows) in both.items()}


def test_too_few_shares_changed_shares_and_a_second_vector_are_refused() -> None:
    clients, memories, sealed = shared()
    rows = np.stack([sealed[other][0] for other in clients])
    x = np.ones(3, np.uint32)
    with pytest.raises(FederationError, match="only 2 have shared"):
        protocol.masked(memories["c0"], "c0", x, clients[:2], rows[:2])
    with pytest.raises(FederationError, match="strangers have shared"):
        protocol.masked(memories["c0"], "c0", x, [*clients, "c9"], np.concatenate([rows, rows[:1]]))
    with pytest.raises(FederationError, match="a sealed share is missing"):
        protocol.masked(memories["c0"], "c0", x, clients, rows[:3])
    spoilt = rows.copy()
    spoilt[2, 7] ^= 1
    with pytest.raises(FederationError, match="a sealed share was changed"):
        protocol.masked(memories["c0"], "c0", x, clients, spoilt)
    memory, _ = protocol.masked(memories["c0"], "c0", x, clients, rows)
    with pytest.raises(FederationError, match="a vector was sent before"):
        protocol.masked(memory, "c0", x, clients, rows)
    assert not {"mask", "seal", "self"} & memory.keys()


def test_shares_are_given_once_and_never_below_the_threshold() -> None:
    clients, memories, sealed = shared()
    rows = np.stack([sealed[other][0] for other in clients])
    memory, _ = protocol.masked(memories["c0"], "c0", np.ones(3, np.uint32), clients, rows)
    for survivors, reason in (
        (clients[:2], "only 2 have finished"),
        (clients[1:], "strangers"),
        (["c0", "x"], "strangers"),
    ):
        with pytest.raises(FederationError, match=reason):
            protocol.unmask(memory, "c0", survivors)
    over, _ = protocol.unmask(memory, "c0", clients[:3])
    assert over == {"session": "s"}
    with pytest.raises(FederationError, match="over or never was"):
        protocol.unmask(over, "c0", clients)


def test_the_server_needs_the_threshold_and_shares_that_fit() -> None:
    clients = ["a", "b", "c"]
    rows = np.zeros((3, masks.SHARE), np.uint8)
    public = {c: protocol.advertise("s")[1] for c in clients}
    x = np.zeros(2, np.uint32)
    with pytest.raises(FederationError, match="1 of 2 needed have unmasked"):
        protocol.unmasked(x, "s", clients, public, clients, clients, 2, {"a": rows})
    odd = rows + np.uint8(7)
    with pytest.raises(FederationError, match="shares do not fit together"):
        protocol.unmasked(x, "s", clients, public, clients, clients, 2, {"a": odd, "b": rows})
    with pytest.raises(FederationError, match="shares do not give the key"):
        protocol.unmasked(x, "s", clients, public, clients, ["b", "c"], 2, {"b": rows, "c": rows})


# Rounds with made-up clients

NAMES = tuple(f"c{k}" for k in range(5))
START = State("base", 0, {"w": np.zeros(3, np.float32), "v": np.zeros((2, 2), np.float32)})


def change(client: str, number: int) -> dict[str, Array]:
    stream = Context(Path(), 9).stream(client, number)
    return {"w": stream.normal(3), "v": stream.normal(4).reshape(2, 2)}


class Clients:
    """Five clients with `examples` 1 .. 5; `silent` maps (round, phase) to those who do not answer it."""

    def __init__(self, tmp_path: Path, config: Config, kind: str = "delta", **more: Any) -> None:
        self.kind, self.silent, self.seen = kind, more.get("silent", {}), []
        self.spoil: Callable[[str, Update], Update] = more.get("spoil", lambda client, update: update)
        configs = {"fedavg": registry.get("fedavg").plugin.config(), "secagg": config}
        loaded = [registry.get("fedavg"), registry.get("secagg")]
        self.relay = Relay(loaded, configs)
        self.ctx = Context(tmp_path, 3, rounds=3, configs=configs)
        self.made: dict[tuple[int, str], Update] = {}
        self.clients = {name: k + 1 for k, name in enumerate(NAMES)}

    def engine(self, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, message in messages.items():
            assignment = wire.assignment_from_bytes(message, client)
            phase = assignment.scalars["secagg"]["phase"]
            if client in self.silent.get((assignment.round, phase), ()):
                yield client, Failure("lost the network")
                continue
            try:
                reply = self.turn(assignment, phase)
            except FederationError as error:
                yield client, Failure(error.what)
                continue
            self.seen.append((client, phase, reply))
            yield client, wire.update_to_bytes(self.spoil(phase, reply))

    def turn(self, assignment: Assignment, phase: str) -> Update:
        client = assignment.client
        data = Dataset((Example("", "x"),) * self.clients[client], "f")
        answer = method.answer(data, assignment, self.ctx)
        if answer is not None:
            return answer
        assert phase == "masked"
        plain = method.prepare(assignment, self.ctx)
        assert "secagg" not in plain.scalars and set(plain.arrays) == {"w", "v"}
        moved = change(client, plain.round)
        if self.kind == "weights":
            moved = {name: array + plain.arrays[name] for name, array in moved.items()}
        scalars = {"loss": 0.5 * self.clients[client], "steps": 2, "forwards": 6}
        made = Update("base", plain.round, client, self.kind, moved, self.clients[client], "", scalars)
        self.made[plain.round, client] = made
        return method.under_masks(made, plain, self.ctx)

    def run(self, rounds: int = 1, attempts: int = 1) -> tuple[State, Ledger]:
        plan = Plan(self.clients, 5, rounds, attempts=attempts)
        ledger = Ledger(self.ctx.folder / "ledger.jsonl")
        return run_rounds(self.relay, START, plan, self.engine, self.ctx, ledger), ledger


def expected(many: Clients, finished: tuple[str, ...], config: Config) -> dict[str, Array]:
    weight = {c: min(many.clients[c], config.cap or 5) if config.weighting == "examples" else 1 for c in finished}
    total = sum(weight.values())
    parts = {c: many.made[1, c].arrays for c in finished}
    return {n: np.sum([parts[c][n].astype(float) * weight[c] / total for c in finished], axis=0) for n in ("w", "v")}


@pytest.mark.parametrize("kind", ["delta", "weights"])
@pytest.mark.parametrize("config", [Config(), Config(weighting="equal"), Config(cap=2), Config(bits=12, clip=5.0)])
def test_a_round_is_the_weighted_mean_within_half_a_step(tmp_path: Path, kind: str, config: Config) -> None:
    many = Clients(tmp_path, config, kind)
    state, _ = many.run()
    step = config.clip / ((1 << (config.bits - 1)) - 1)
    heaviest = (config.cap or 5) if config.weighting == "examples" else 1
    total = sum(min(k, heaviest) for k in range(1, 6)) if config.weighting == "examples" else 5
    bound = 5 / 2 * step * heaviest / total + 1e-6
    for name, array in expected(many, NAMES, config).items():
        assert np.abs(state.arrays[name] - array).max() <= bound
    weights = [min(k, heaviest) if config.weighting == "examples" else 1 for k in range(1, 6)]
    loss = sum(w * 0.5 * k for w, k in zip(weights, range(1, 6), strict=True)) / sum(weights)
    assert many.ctx.curves["training loss over rounds"][0][1] == pytest.approx(loss, abs=64 / 2**10)
    assert state.scalars["forwards"] == 30 and state.scalars["steps"] == 2


def test_the_server_is_sent_nothing_that_tells_one_client_from_another(tmp_path: Path) -> None:
    """The sums of integers are exact, and every vector on its own is noise."""
    many = Clients(tmp_path, Config())
    many.run()
    rows = {client: reply for client, phase, reply in many.seen if phase == "masked"}
    told = [reply.scalars for reply in rows.values()]
    assert all(one == told[0] for one in told) and all(reply.examples == 1 for reply in rows.values())
    assert told[0]["public"] == {"steps": 2, "forwards": 6} and told[0]["form"]["loss"] is True
    plain = {c: vectors.laid_out(many.made[1, c], START.arrays, TERMS)[0] for c in rows}
    assert not any((rows[c].arrays["rows"] == plain[c]).any() for c in rows)


TERMS = {"clip": 10.0, "levels": (1 << 20) - 1, "heaviest": 5, "weighting": "examples"}


def test_dropouts_in_every_exchange_are_recovered(tmp_path: Path) -> None:
    for place, (phase, lost) in enumerate(
        (("keys", {"c1"}), ("shares", {"c0", "c3"}), ("masked", {"c4"}), ("masked", {"c0", "c2"}), ("unmask", {"c1"}))
    ):
        config = Config()
        many = Clients(tmp_path / str(place), config, silent={(1, phase): lost})
        state, ledger = many.run()
        finished = NAMES if phase == "unmask" else tuple(c for c in NAMES if c not in lost)
        for name, array in expected(many, finished, config).items():
            np.testing.assert_allclose(state.arrays[name], array, atol=1e-4)
        rejected = {row["client"]: row["rejected"] for row in ledger.rows() if row["rejected"]}
        assert rejected == ({} if phase == "unmask" else dict.fromkeys(lost, "lost the network"))


@pytest.mark.parametrize("phase", ["keys", "shares", "masked", "unmask"])
def test_below_the_threshold_nothing_is_unmasked(tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(protocol, "unmasked", lambda *words: opened.append(words))
    many = Clients(tmp_path, Config(), silent={(1, phase): {"c0", "c1", "c2"}})
    with pytest.raises(FederationError, match="stayed below quorum") as caught:
        many.run()
    assert caught.value.exit_code == 8 and not opened
    rows = many.ctx.folder / "ledger.jsonl"
    assert "2 of 3 needed answered, nothing was unmasked" in rows.read_text()


def test_a_round_given_up_is_done_again_under_fresh_keys(tmp_path: Path) -> None:
    many = Clients(tmp_path, Config())
    many.silent = {(1, "masked"): {"c0", "c1", "c2"}}
    engine, tries = many.engine, iter(range(100))

    def heals(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        if next(tries) == 4:
            many.silent = {}
        yield from engine(messages)

    many.engine = heals  # type: ignore[method-assign]
    state, _ = many.run(attempts=2)
    keys = [reply.arrays["rows"].tobytes() for _, phase, reply in many.seen if phase == "keys"]
    assert len(set(keys)) == 10 and state.round == 1


def test_replies_of_another_form_are_left_out(tmp_path: Path) -> None:
    def shorter(phase: str, update: Update) -> Update:
        if phase == "masked" and update.client == "c3":
            return replace(update, arrays={"rows": update.arrays["rows"][:-1]})
        return replace(update, kind="delta") if phase == "shares" and update.client == "c1" else update

    many = Clients(tmp_path, Config(), spoil=shorter)
    state, ledger = many.run()
    for name, array in expected(many, ("c0", "c2", "c4"), Config()).items():
        np.testing.assert_allclose(state.arrays[name], array, atol=1e-4)
    reasons = {row["client"]: row["rejected"] for row in ledger.rows() if row["rejected"]}
    assert set(reasons) == {"c1", "c3"} and "another form" in reasons["c3"] and "asked" in reasons["c1"]


def test_all_messages_are_counted(tmp_path: Path) -> None:
    many = Clients(tmp_path, Config())
    _, ledger = many.run()
    up: dict[str, int] = {}
    for client, _, reply in many.seen:
        up[client] = up.get(client, 0) + len(wire.update_to_bytes(reply))
    assert len(many.seen) == 20
    assert {row["client"]: row["up"] for row in ledger.rows()} == up
    assert all(row["down"] > 4 * 200 for row in ledger.rows())


def test_nothing_secret_is_left_on_a_clients_disk(tmp_path: Path) -> None:
    many = Clients(tmp_path, Config())
    many.run(rounds=2)
    for name in NAMES:
        found = many.ctx.recall(name, "secagg", 10)
        assert found is not None and set(found[1]) == {"session"}
    folders = list((tmp_path / "clients").iterdir())
    assert len(folders) == 5 and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)


def test_a_client_under_secagg_gives_no_plain_update(tmp_path: Path) -> None:
    ctx = Context(tmp_path, configs={"secagg": Config()})
    with pytest.raises(FederationError, match="without masks"):
        method.prepare(Assignment("base", 1, "c0", START.arrays), ctx)
    with pytest.raises(FederationError, match="this session is not known"):
        asked = {"secagg": {"phase": "unmask", "session": "other", "survivors": ["c0"]}}
        method.answer(Dataset((), "f"), Assignment("base", 1, "c0", {}, asked), ctx)
    with pytest.raises(FederationError, match="no such message"):
        method.answer(Dataset((), "f"), Assignment("base", 1, "c0", {}, {"secagg": {"phase": "", "session": ""}}), ctx)


@pytest.mark.parametrize(
    "bad", [{"w": np.full(3, np.nan, np.float32)}, {"scaffold/c": np.ones(2, np.float32)}, {"n": np.ones(2, np.int32)}]
)
def test_what_has_no_sum_does_not_leave_the_client(bad: dict[str, Array]) -> None:
    update = Update("base", 1, "c0", "delta", {**change("c0", 1), **bad}, 3)
    with pytest.raises(FederationError, match="is no finite number that secagg could add up"):
        vectors.laid_out(update, {}, TERMS)


# Refusals: one line, exit 9


def refused(match: str, ctx: Context, data: Mapping[str, int], config: Config) -> None:
    with pytest.raises(PrivacyError, match=match) as caught:
        method.before_the_round(sorted(data), data, config, ctx)
    assert caught.value.exit_code == 9 and "\n" not in str(caught.value)


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five = dict.fromkeys(NAMES, 4)
    fedavg = {"fedavg": registry.get("fedavg").plugin.config()}
    for rule, reason in (("fedkseed-pro", "needs every client's update"), ("fedkseed", "use directions = shared")):
        ctx = Context(tmp_path, configs={rule: registry.get(rule).plugin.config(), "secagg": Config()})
        refused(f"a sum does not serve this rule: {rule}: .*{reason}", ctx, five, Config())
    refused("no plugin of the run aggregates", Context(tmp_path, configs={"secagg": Config()}), five, Config())
    ctx = Context(tmp_path, configs={**fedavg, "dp": registry.get("dp").plugin.config(), "secagg": Config()})
    refused("dp looks at single updates, which secagg hides", ctx, five, Config())
    ctx = Context(tmp_path, configs={**fedavg, "secagg": Config()})
    refused("among 2 clients a sum hides nobody", ctx, {"a": 1, "b": 1}, Config())
    many = {f"c{k}": 1 for k in range(5000)}
    refused("the sum of 5000 clients' 20 bits does not fit into 32", ctx, many, Config())
    refused("does not fit into 32", ctx, {**five, "c0": 1 << 30}, Config())
    method.before_the_round(NAMES, {f"c{k}": 1 for k in range(5)}, Config(bits=29), ctx)
    assert rules.not_linear(ctx) == ""


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'edgellm-sdk\[privacy\]'"):
        masks.available()


# Whole runs

Run = Callable[..., steps.Outcome]
SMALL = {"layers": 1, "rank": 2, "batch_size": 4, "max_length": 64}


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    data = tmp_path / "messages.csv"
    rows = [f"message {i} {'win a prize' if i % 2 else 'see you'},{'spam' if i % 2 else 'ham'}" for i in range(32)]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")

    def start(plugin: str, name: str = "run", **more: Any) -> steps.Outcome:
        options = {**SMALL, **more.pop("options", {})}
        given = {"clients": 3, "rounds": 2, "seed": 5, "around": "secagg", "watch": 0, **more}
        return steps.finetune(plugin, str(tiny_llama), str(data), tmp_path / name, options=options, **given)

    return start


CASES = {
    "lora": ("lora", {"steps": 1}),
    "lora-fa": ("lora-fa", {"steps": 1}),
    "lora, ffa-lora": ("lora", {"steps": 1}, "ffa-lora"),
    "lora, rolora": ("lora", {"steps": 1}, "rolora"),
    "lora, fedadam": ("lora", {"steps": 1}, "fedadam"),
    "fedit": ("fedit", {}),
    "fedpetuning": ("fedpetuning", {}),
    "fedkseed": ("fedkseed", {"steps": 2, "directions": "shared"}),
    "fwdllm": ("fwdllm", {"perturbations": 2, "directions": "shared"}),
    "fwdllm, tensors": ("fwdllm", {"perturbations": 2, "wire": "tensors"}),
    "decomfl": ("decomfl", {"steps": 1, "probes": 2}),
}


def adapter(done: steps.Outcome) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return load_file(done.folder / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_run_under_secagg_repeats_and_its_first_round_is_the_plain_one(run: Run, case: str) -> None:
    """Masks leave nothing behind; a round is off by half a step of the grid for each client. FwdLLM's accept test sees
    one sum where it saw three clients, so its first round is compared below."""
    plugin, options, *rule = CASES[case]
    more: dict[str, Any] = {"options": options, "aggregate": "".join(rule)}
    hidden = [run(plugin, name, **more) for name in ("once", "again")]
    report = hidden[0].report
    assert report.metrics["rounds"].value == 2 and report.privacy is not None and not report.rejected
    assert any("no single update was screened" in note for note in report.notes)
    assert "training loss over rounds" in report.curves
    ends = [adapter(done) for done in hidden]
    assert all((ends[1][name] == array).all() for name, array in ends[0].items())
    if plugin == "fwdllm":
        return
    assert "aggregation error over rounds" not in report.curves
    if "fedadam" in rule:  # which makes 1e-3 of anything that is not zero
        return
    first = [run(plugin, name or "plain", rounds=1, around=name, **more) for name in ("secagg", "")]
    assert first[0].report.metrics["forwards"].value == first[1].report.metrics["forwards"].value
    for name, array in adapter(first[0]).items():
        np.testing.assert_allclose(array, adapter(first[1])[name], atol=3e-5)


def test_fwdllms_shared_directions_give_the_plain_sum(run: Run) -> None:
    """One round, accepted at once: theta moves by the same mean."""
    options = {"perturbations": 2, "directions": "shared", "limit": 1, "sampling": False}
    ends = [adapter(run("fwdllm", n, options=options, rounds=1, around=a)) for n, a in (("m", "secagg"), ("p", ""))]
    assert any((array != 0).any() for name, array in ends[0].items() if "lora_B" in name)
    for name, array in ends[0].items():
        np.testing.assert_allclose(array, ends[1][name], atol=2e-4)


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm_sdk.errors import Interrupted

    options = {"steps": 1}
    whole = adapter(run("lora", "whole", options=options))
    true, calls = protocol.unmasked, iter(range(10))

    def stopped(*words: Any) -> Array:
        if next(calls) == 1:
            raise Interrupted(2)
        return true(*words)

    monkeypatch.setattr(protocol, "unmasked", stopped)
    with pytest.raises(Interrupted):
        run("lora", "stopped", options=options)
    again = adapter(run("lora", "stopped", options=options, resume=True))
    assert all((again[name] == array).all() for name, array in whole.items())


def test_refused_before_any_work_with_exit_9(run: Run) -> None:
    more: dict[str, dict[str, Any]] = {"hides nobody": {"clients": 2}, "which secagg hides": {"around": "dp,secagg"}}
    for reason, changed in more.items():
        with pytest.raises(PrivacyError, match=reason) as caught:
            run("lora", reason, options={"steps": 1}, **changed)
        assert caught.value.exit_code == 9

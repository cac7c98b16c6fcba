"""FedKSeed and Pro: accumulators that are the model, messages of a few kilobytes, probabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.zeroth_order import candidates, fedkseed, trajectory
from edgellm_plugins.zeroth_order.candidates import CandidateMethod, candidate_seeds
from edgellm_plugins.zeroth_order.fedkseed import method as plain
from edgellm_plugins.zeroth_order.fedkseed_pro import method as pro
from edgellm_plugins.zeroth_order.mezo.method import METHOD as mezo
from edgellm_plugins.zeroth_order.space import Follower
from seed_method_cases import dataset, options, snapshot

from edgellm_sdk import models, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import noise
from edgellm_sdk.types import Dataset, ModelHandle, State, Update

SHARDS = {"a": dataset(12), "b": dataset(4), "c": dataset(8)}


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def config(**changes: Any) -> fedkseed.Config:
    settings = {"layers": 1, "rank": 4, "steps": 5, "batch_size": 4, "precision": "float32", "step": 0.01, "seeds": 16}
    return fedkseed.Config(**settings | changes)


def context(folder: Path, made: fedkseed.Config) -> Context:
    return Context(folder, seed=7, rounds=4, configs={"fedkseed": made, "fedkseed-pro": made})


def one_round(
    method: CandidateMethod, handle: ModelHandle, state: State, shards: dict[str, Dataset], made: Any, ctx: Context
) -> tuple[State, list[Update], list[dict[str, np.ndarray]]]:
    given, updates, ends = method.assign(state, sorted(shards), made), [], []
    for client in sorted(shards):
        updates.append(method.finetune(handle, shards[client], given[client], made, ctx))
        ends.append(snapshot(method.follower(handle, made, ctx).space))
    assert method.screen(updates, state, made) == {}
    return method.aggregate(state, updates, made, ctx), updates, ends


def theta(method: CandidateMethod, handle: ModelHandle, state: State, made: Any, ctx: Context) -> Follower:
    """A fresh client's model, from theta_0 and the state alone."""
    fresh = Follower(method.space(handle, made, dataclasses.replace(ctx, _kept={})))
    fresh.goto(method.moves(state.arrays, state.scalars, made), come_back=False)
    return fresh


@pytest.mark.parametrize("train", ["full", "lora-fa"])
@pytest.mark.parametrize("method", [plain.METHOD, pro.METHOD])
def test_accumulators_are_the_mean_of_the_clients_models(
    handle: ModelHandle, tmp_path: Path, train: str, method: CandidateMethod
) -> None:
    """fedkseed.md checks 1 and 2: three rounds of unequal clients; who was absent ends in the same bytes. The gap is
    rounding of the clients' own float32 steps: 1e-6 of all that moved, for a small set also of the largest move."""
    made = config(train=train, learning_rate=1e-3)
    ctx = context(tmp_path, made)
    state = method.initialise(handle, made, ctx)
    start = snapshot(method.space(handle, made, ctx))
    for _ in range(3):
        state, _, ends = one_round(method, handle, state, SHARDS, made, ctx)
        late = theta(method, handle, state, made, ctx)
        gaps, moves = [], []
        for name, value in snapshot(late.space).items():
            wanted = sum(len(shard) / 24 * end[name] for shard, end in zip(SHARDS.values(), ends, strict=True))
            np.testing.assert_allclose(value, wanted, atol=1e-6)
            gaps.append((value - wanted).ravel().astype(np.float64))
            moves.append((value - start[name]).ravel().astype(np.float64))
        gap, moved = np.concatenate(gaps), np.concatenate(moves)
        assert 0 < np.linalg.norm(gap) <= 1e-6 * np.linalg.norm(moved)
        assert train == "full" or np.abs(gap).max() <= 1e-6 * np.abs(moved).max()
    follower = method.follower(handle, made, ctx)
    follower.goto(method.moves(state.arrays, state.scalars, made), come_back=False)
    assert follower.space.digest() == late.space.digest()


def test_bytes_of_whole_messages(handle: ModelHandle, tmp_path: Path) -> None:
    """fedkseed.md check 3: both ways under 18 000 bytes at K = 4096 and 200 steps, framing included, in every round."""
    made = config(seeds=4096, steps=200, learning_rate=1e-4)
    ctx = context(tmp_path, made)
    method = plain.METHOD
    state = method.initialise(handle, made, ctx)
    totals = []
    for _ in range(2):
        given = method.assign(state, ["client-000"], made)["client-000"]
        update = method.finetune(handle, SHARDS["a"], given, made, ctx)
        down, up = len(wire.assignment_to_bytes(given)), len(wire.update_to_bytes(update))
        assert wire.payload_bytes(given.arrays) == 4 * 4096 and wire.payload_bytes(update.arrays) == 4 * 200
        totals.append(down + up)
        state = method.aggregate(state, [update], made, ctx)
    assert max(totals) <= 18_000 and abs(totals[0] - totals[1]) < 64


def test_fewer_seeds_are_a_part_of_more() -> None:
    assert candidate_seeds(5, 64)[:16] == candidate_seeds(5, 16)
    assert len(set(candidate_seeds(5, 4096))) == 4096


def test_probabilities() -> None:
    """fedkseed.md check 5."""
    uniform = candidates.probabilities(np.zeros(8), np.zeros(8))
    np.testing.assert_allclose(uniform, 1 / 8)
    sums, uses = np.array([0.0, 2.0, 30.0, 4.0]), np.array([0.0, 2.0, 3.0, 1.0])
    p = candidates.probabilities(sums, uses)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p.max() / p.min() == pytest.approx(np.e, abs=1e-6)
    assert np.argsort(p).tolist() == np.argsort(sums / np.maximum(uses, 1)).tolist()
    drawn = candidates.draw(p, np.random.default_rng(0).random(20_000))
    counts = np.bincount(drawn, minlength=4)
    assert ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum() < 11.34  # chi-square, 3 degrees of freedom, 1 %


def test_pro_prefers_a_seed_with_large_gradients(handle: ModelHandle, tmp_path: Path) -> None:
    made = config(seeds=4, steps=400, learning_rate=1e-9)
    ctx = context(tmp_path, made)
    state = pro.METHOD.initialise(handle, made, ctx)
    arrays = {**state.arrays, "magnitudes": np.float32([0, 0, 900, 0]), "uses": np.float32([1, 1, 1, 1])}
    state = dataclasses.replace(state, arrays=arrays)
    index = pro.METHOD.chosen(pro.METHOD.sent(state), "a", 1, made, ctx)
    counts = np.bincount(index, minlength=4)
    assert counts[2] / 400 == pytest.approx(np.e / (np.e + 3), abs=4 * 0.025)


def test_refusals(handle: ModelHandle, tmp_path: Path) -> None:
    made = config()
    ctx = context(tmp_path, made)
    method = plain.METHOD
    state = method.initialise(handle, made, ctx)
    given = method.assign(state, ["a"], made)["a"]
    wrong = dataclasses.replace(given, scalars={**given.scalars, "noise": noise.noise_id("rademacher")})
    with pytest.raises(ModelError, match="made with noise"):
        method.finetune(handle, SHARDS["a"], wrong, made, ctx)
    good = method.finetune(handle, SHARDS["a"], given, made, ctx)
    assert method.screen([good], state, made) == {}
    bad: dict[str, dict[str, Any]] = {
        "rng": {"rng": "mt19937"},
        "more": {"arrays": {**good.arrays, "index": np.full(5, 16, np.uint16)}},
        "short": {"arrays": {name: array[:2] for name, array in good.arrays.items()}},
        "dtype": {"arrays": {**good.arrays, "scalar": good.arrays["scalar"].astype(np.float64)}},
        "forwards": {"scalars": {**good.scalars, "forwards": -3}},
        "loss": {"scalars": {**good.scalars, "loss": "low"}},
    }
    for name, change in bad.items():
        assert method.screen([dataclasses.replace(good, **change)], state, made), name


def test_a_step_with_a_jump_in_the_loss_is_left_out(handle: ModelHandle, tmp_path: Path) -> None:
    made = config(limit=1e-9)
    ctx = context(tmp_path, made)
    state = plain.METHOD.initialise(handle, made, ctx)
    given = plain.METHOD.assign(state, ["a"], made)["a"]
    update = plain.METHOD.finetune(handle, SHARDS["a"], given, made, ctx)
    assert update.scalars["dropped"] == made.steps and not update.arrays["scalar"].any()


def test_accumulators_are_the_mean_in_float64(tmp_path: Path) -> None:
    """fedkseed.md check 1: w_0 - eta sum_j a_j z_j against the mean of float64 clients, 3 rounds, unequal clients.

    g are multiples of 1/256, so that the sums are exact and only the identity is tested.
    """
    method, d, clients = plain.METHOD, 50, {"a": 2, "b": 1, "c": 1}
    made = config(steps=4, learning_rate=0.25)
    ctx = context(tmp_path, made)
    counts: dict[str, Any] = {"forwards": 8, "dropped": 0, "loss": 1.0}
    state = State("base", 0, {"sums": np.zeros(16, np.float32)}, {**counts, "steps": 0, "noise": "n", "master": 5})
    z = np.stack([noise.take("gaussian", seed, "w", d) for seed in candidate_seeds(5, 16)]).astype(np.float64)
    generator = np.random.default_rng(0)
    start = generator.normal(size=d)
    now, used = start.copy(), []
    for number in (1, 2, 3):
        updates, mean = [], np.zeros(d)
        for client, examples in clients.items():
            g = (generator.integers(-512, 512, (4, 1)) / 256).astype(np.float32)
            chosen = method.chosen(method.sent(state), client, number, made, ctx)
            local = now.copy()
            for scalar, j in zip(g[:, 0], chosen, strict=True):
                local -= 0.25 * float(scalar) * z[j]
            mean += examples / 4 * local
            used += chosen.tolist()
            updates.append(Update("base", number, client, "seeds", {"scalar": g}, examples, "n", counts))
        state = method.aggregate(state, updates, made, ctx)
        now = start - 0.25 * (state.arrays["sums"].astype(np.float64) @ z)
        assert np.abs(now - mean).max() <= 1e-12
        assert np.abs(now - start).max() > 0.1
    assert len(set(used)) < len(used), "some seeds were used again"


def test_seeds_that_are_used_once_are_a_run_of_mezo(
    handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fedkseed.md check 4: bit-equal scalars and models along the same fresh seeds, and the server's rebuild."""
    made = config(learning_rate=0.0625)
    ctx = dataclasses.replace(context(tmp_path / "fedkseed", made), rounds=1)
    state = plain.METHOD.initialise(handle, made, ctx)
    monkeypatch.setattr(candidates, "draw", lambda weights, uniform: np.arange(len(uniform)))
    ((after, (update,), (local,))) = one_round(plain.METHOD, handle, state, {"a": SHARDS["a"]}, made, ctx)

    other = options("mezo", steps=5, probes=1, learning_rate=0.0625)
    alone = Context(tmp_path / "mezo", seed=7, rounds=1, configs={"mezo": other})
    seeds = candidate_seeds(state.scalars["master"], 16)
    monkeypatch.setattr(trajectory, "seeds_of", lambda client, round, step, probes, ctx: [seeds[step]])
    given = mezo.assign(mezo.initialise(handle, other, alone), ["a"], other)["a"]
    reference = mezo.finetune(handle, SHARDS["a"], given, other, alone)
    theirs = snapshot(mezo.follower(handle, other, alone).space)

    assert np.array_equal(update.arrays["scalar"], reference.arrays["scalar"]) and update.arrays["scalar"].all()
    assert all(np.array_equal(local[name], value) for name, value in theirs.items())
    for name, value in snapshot(theta(plain.METHOD, handle, after, made, ctx).space).items():
        assert np.abs(value - theirs[name]).max() <= 1e-6
        assert np.abs(value).max() > 1e-3


def test_probabilities_stay_within_e(tmp_path: Path) -> None:
    """fedkseed.md check 5: max p / min p <= e as computed, and within float32 rounding as sent."""
    generator, widest = np.random.default_rng(0), 0.0
    for _ in range(50):
        sums, uses = generator.exponential(30.0, 256), generator.integers(0, 5, 256)
        p = candidates.probabilities(sums * (uses > 0), uses)
        assert p.max() / p.min() <= np.e + 1e-9
        arrays = {"sums": np.zeros(256, np.float32), "uses": uses.astype(np.float32)}
        arrays["magnitudes"] = (sums * (uses > 0)).astype(np.float32)
        sent = pro.METHOD.sent(State("base", 0, arrays, {}))["p"]
        assert sent.dtype == np.float32
        widest = max(widest, float(sent.max()) / float(sent.min()))
    assert 2.7 < widest <= np.e * (1 + 2.4e-7)


def test_a_seed_with_large_gradients_is_drawn_more_often(tmp_path: Path) -> None:
    """fedkseed.md check 5: chi-square of its count against uniform draws, 1 degree of freedom, 1 %: 6.63."""
    made = config(steps=400)
    ctx = context(tmp_path, made)

    def chi_square(method: CandidateMethod) -> float:
        arrays = {name: np.ones(16, np.float32) for name in ("sums", "magnitudes", "uses")}
        arrays["magnitudes"][5] = 900
        index = method.chosen(method.sent(State("base", 0, arrays, {})), "a", 1, made, ctx)
        seen, fair = int((index == 5).sum()), 400 / 16
        assert method is plain.METHOD or seen > fair
        return (seen - fair) ** 2 / fair + (seen - fair) ** 2 / (400 - fair)

    assert chi_square(pro.METHOD) > 6.63
    assert chi_square(plain.METHOD) < 6.63


def test_bytes_of_pro(handle: ModelHandle, tmp_path: Path) -> None:
    """fedkseed.md check 3 at K = 1024 and 200 steps: accumulators and probabilities down, one scalar a step up."""
    made = config(seeds=1024, steps=200, learning_rate=1e-4)
    ctx = context(tmp_path, made)
    state = pro.METHOD.initialise(handle, made, ctx)
    for _ in range(2):
        given = pro.METHOD.assign(state, ["a"], made)["a"]
        assert {name: wire.payload_bytes({name: a}) for name, a in given.arrays.items()} == {"sums": 4096, "p": 4096}
        update = pro.METHOD.finetune(handle, SHARDS["a"], given, made, ctx)
        assert wire.payload_bytes(update.arrays) == 800
        state = pro.METHOD.aggregate(state, [update], made, ctx)


def test_a_step_that_was_left_out_is_not_a_use(handle: ModelHandle, tmp_path: Path) -> None:
    """Pro's mean |g| of a seed is over the steps that were taken."""
    made = config(seeds=4, limit=1e-9)
    ctx = context(tmp_path, made)
    state = pro.METHOD.initialise(handle, made, ctx)
    given = pro.METHOD.assign(state, ["a"], made)["a"]
    update = pro.METHOD.finetune(handle, SHARDS["a"], given, made, ctx)
    assert update.scalars["dropped"] == 5
    left_out = pro.METHOD.aggregate(state, [update], made, ctx)
    assert not left_out.arrays["uses"].any() and not left_out.arrays["magnitudes"].any()
    g = np.array([[0.5], [0], [-2], [0], [4000]], np.float32)
    taken = pro.METHOD.aggregate(state, [dataclasses.replace(update, arrays={"scalar": g})], made, ctx)
    index = pro.METHOD.chosen(given.arrays, "a", 1, made, ctx)
    uses, magnitudes = np.zeros(4), np.zeros(4)
    for j, size in zip(index[[0, 2, 4]], (0.5, 2.0, 1000.0), strict=True):
        uses[j] += 1
        magnitudes[j] += size
    assert np.array_equal(taken.arrays["uses"], uses) and np.array_equal(taken.arrays["magnitudes"], magnitudes)

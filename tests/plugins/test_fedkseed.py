"""FedKSeed and Pro: accumulators that are the model, messages of a few kilobytes, probabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.zeroth_order import candidates, fedkseed
from edgellm_plugins.zeroth_order.candidates import CandidateMethod, candidate_seeds
from edgellm_plugins.zeroth_order.fedkseed import method as plain
from edgellm_plugins.zeroth_order.fedkseed_pro import method as pro
from edgellm_plugins.zeroth_order.space import Follower
from test_seed_methods import dataset, snapshot

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
    """fedkseed.md checks 1 and 2: three rounds of unequal clients; who was absent ends in the same bytes."""
    made = config(train=train, learning_rate=1e-3)
    ctx = context(tmp_path, made)
    state = method.initialise(handle, made, ctx)
    for _ in range(3):
        state, _, ends = one_round(method, handle, state, SHARDS, made, ctx)
        late = theta(method, handle, state, made, ctx)
        for name, value in snapshot(late.space).items():
            wanted = sum(len(shard) / 24 * end[name] for shard, end in zip(SHARDS.values(), ends, strict=True))
            np.testing.assert_allclose(value, wanted, atol=1e-6)
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

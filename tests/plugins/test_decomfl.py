"""DeComFL: scalars both ways, the same model everywhere, a download that grows with absence only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.zeroth_order.decomfl import Config
from edgellm_plugins.zeroth_order.decomfl.method import METHOD, kept_at
from edgellm_plugins.zeroth_order.space import Follower
from test_seed_methods import dataset

from edgellm_sdk import models, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.types import ModelHandle, State

SHARDS = {"a": dataset(12), "b": dataset(4)}


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def config(**changes: Any) -> Config:
    settings = {"layers": 1, "rank": 4, "steps": 3, "probes": 2, "batch_size": 4, "precision": "float32", "step": 0.01}
    return Config(**settings | changes)


def play(
    handle: ModelHandle, folder: Path, made: Config, who: list[list[str]]
) -> tuple[State, list[dict[str, int]], Context]:
    """Rounds with the given clients: the final state, and each round's download in payload bytes."""
    ctx = Context(folder, seed=7, rounds=len(who))
    state, downloads = METHOD.initialise(handle, made, ctx), []
    for clients in who:
        given = METHOD.assign(state, clients, made)
        downloads.append({c: wire.payload_bytes(a.arrays) for c, a in given.items()})
        updates = [METHOD.finetune(handle, SHARDS[c], given[c], made, ctx) for c in clients]
        assert METHOD.screen(updates, state, made) == {}
        assert all(wire.payload_bytes(u.arrays) == 4 * made.steps * made.probes for u in updates)
        state = METHOD.aggregate(state, updates, made, ctx)
    return state, downloads, ctx


@pytest.mark.parametrize("train", ["full", "lora-fa"])
def test_everyone_has_the_servers_model(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    """zo_extensions.md check 7."""
    made = config(train=train, learning_rate=1e-3)
    state, downloads, ctx = play(handle, tmp_path, made, [["a", "b"], ["a"], ["a"], ["a", "b"]])
    step = 4 * made.steps * made.probes
    assert downloads == [{"a": 0, "b": 0}, {"a": step}, {"a": step}, {"a": step, "b": 3 * step}]
    moves = METHOD.moves(state.arrays, state.scalars, made)
    assert len(moves) == 4 * made.steps
    server = METHOD.follower(handle, made, ctx)
    server.goto(moves, come_back=False)
    given = METHOD.assign(state, ["b"], made)["b"]
    history = METHOD.history(given, ctx)
    late = Follower(METHOD.space(handle, made, Context(tmp_path, seed=7)))
    late.goto(METHOD.moves({"scalar": history}, given.scalars, made), come_back=False)
    assert late.space.digest() == server.space.digest()


def test_averaging_scalars_averages_gradients(handle: ModelHandle, tmp_path: Path) -> None:
    made = config(steps=1)
    ctx = Context(tmp_path, seed=7)
    state = METHOD.initialise(handle, made, ctx)
    given = METHOD.assign(state, ["a", "b"], made)
    updates = [METHOD.finetune(handle, SHARDS[c], given[c], made, ctx) for c in ("a", "b")]
    mean = METHOD.aggregate(state, updates, made, ctx).arrays["scalar"]
    np.testing.assert_allclose(mean, 0.75 * updates[0].arrays["scalar"] + 0.25 * updates[1].arrays["scalar"], rtol=1e-6)


def test_a_client_that_lost_its_history_says_so(handle: ModelHandle, tmp_path: Path) -> None:
    made = config()
    state, _, ctx = play(handle, tmp_path, made, [["a", "b"], ["a", "b"]])
    kept_at(tmp_path, "b").unlink()
    given = METHOD.assign(state, ["b"], made)["b"]
    with pytest.raises(ModelError, match="b has lost the scalars before step 3"):
        METHOD.finetune(handle, SHARDS["b"], given, made, ctx)
    good = METHOD.finetune(handle, SHARDS["a"], METHOD.assign(state, ["a"], made)["a"], made, ctx)
    bad: list[dict[str, Any]] = [
        {"rng": "mt19937"},
        {"arrays": {"scalar": good.arrays["scalar"][:1]}},
        {"scalars": {**good.scalars, "forwards": 1 << 50}},
        {"scalars": {**good.scalars, "loss": None}},
    ]
    assert all(METHOD.screen([dataclasses.replace(good, **change)], state, made) for change in bad)


@pytest.mark.parametrize("client", ["../../evil", "/elsewhere/evil", "a" * 300, "\u00e9 x"])
def test_a_clients_name_is_no_path(tmp_path: Path, client: str) -> None:
    """`--partition user` takes names from the data file."""
    assert kept_at(tmp_path, client).parent == tmp_path / "clients"
    assert len(kept_at(tmp_path, client).name) < 64 and kept_at(tmp_path, client) != kept_at(tmp_path, client + "x")

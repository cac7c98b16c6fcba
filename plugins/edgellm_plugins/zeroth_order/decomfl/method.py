"""DeComFL, arXiv 2405.15861.

All clients of a round take the same K local steps along the same P fresh directions each, by forward differences, and
upload K * P scalars; their local steps are then forgotten. The server averages each scalar over the clients, and
everyone's model is theta_0 moved by the averages of all rounds. A client downloads the averages it has missed, so its
download grows with its absence and not with the model: 4 P bytes for each step.

Where we differ from the published code: scalars are averaged by examples, not equally; a client keeps what it
downloaded in `clients/` of its run folder, under a digest of its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.clients import SpaceMethod, advanced, minibatch, update_of
from edgellm_plugins.zeroth_order.decomfl import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.trajectory import sgd
from edgellm_sdk import random, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.types import Array, Assignment, Dataset, ModelHandle, State, Update


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    return Dense("gaussian", {name: tuple(t.shape) for name, t in theta.items()}, device, share=config.share)


def shared_seeds(master: int, step: int, probes: int) -> list[int]:
    """The P directions of the step-th step of the whole training (from 0), the same for everyone."""
    return [random.key(master, "shared", step * probes + k) for k in range(probes)]


def kept_at(folder: Path, client: str) -> Path:
    """Where a client keeps what it downloaded: names of clients come from the data and may be anything."""
    return folder / "clients" / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}.safetensors"


class DeComFL(SpaceMethod):
    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Config) -> list[Move]:
        """`scalar` (steps, P): the averages of all steps so far."""
        return [
            sgd(shared_seeds(scalars["master"], step, options.probes), row.tolist(), options.learning_rate)
            for step, row in enumerate(arrays["scalar"])
        ]

    def initialise(self, model: ModelHandle, options: Config, ctx: Context) -> State:
        noise = self.noise(model, options, ctx)
        master = int(ctx.stream("shared").seeds(1)[0]) >> 1
        scalars = {"forwards": 0, "steps": 0, "dropped": 0, "noise": noise, "master": master, "seen": {}}
        return State(model.digest, 0, {"scalar": np.zeros((0, options.probes), np.float32)}, scalars)

    def assign(self, state: State, clients: Sequence[str], options: Config) -> dict[str, Assignment]:
        """The averages that each client has not seen."""
        given = {}
        for client in clients:
            begin = int(state.scalars["seen"].get(client, 0))
            scalars = {name: state.scalars[name] for name in ("noise", "master")} | {"from": begin}
            arrays = {"scalar": state.arrays["scalar"][begin:]}
            given[client] = Assignment(state.base, state.round + 1, client, arrays, scalars)
        return given

    def finetune(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Config, ctx: Context
    ) -> Update:
        """Catch up, take K steps along the shared directions, report the scalars."""
        follower, noise = self.checked(model, data, assignment, options, ctx)
        history = self.history(assignment, ctx)
        follower.goto(self.moves({"scalar": history}, assignment.scalars, options), come_back=True)
        estimate, found = differences.one_sided(options.step), []
        for i in range(options.steps):
            step = len(history) + i
            number = (assignment.round - 1) * options.steps + i
            name, indices = minibatch(data, assignment.client, number, options.batch_size, ctx)
            seeds = shared_seeds(assignment.scalars["master"], step, options.probes)
            probe = estimate(follower.space, name, partial(data.select, indices), seeds)
            found.append(probe)
            follower.step(step, sgd(seeds, probe.scalars.tolist(), options.learning_rate))
        return update_of(assignment, found, len(data), noise, {})

    def history(self, assignment: Assignment, ctx: Context) -> Array:
        """All averages up to this round, (steps, P), from what the client kept and what it was sent; kept again."""
        path = kept_at(ctx.folder, assignment.client)
        begin, sent = int(assignment.scalars["from"]), assignment.arrays["scalar"]
        kept = store.try_load_arrays(path) if begin else None
        held = kept[0]["scalar"] if kept is not None else sent[:0]
        if len(held) < begin:
            raise ModelError(f"{assignment.client} has lost the scalars before step {begin}", str(Path("clients")))
        whole = np.concatenate([held[:begin], sent])
        store.save_arrays(path, {"scalar": whole}, {})
        return whole

    def expected(self, options: Config) -> dict[str, tuple[int, ...]]:
        return {"scalar": (options.steps, options.probes)}

    def aggregate(self, state: State, updates: Sequence[Update], options: Config, ctx: Context) -> State:
        """Each scalar's mean over the clients, by examples, in float64."""
        total, number = sum(update.examples for update in updates), state.round + 1
        mean = sum(update.examples / total * update.arrays["scalar"].astype(np.float64) for update in updates)
        whole = np.concatenate([state.arrays["scalar"], np.asarray(mean, np.float32)])
        seen = state.scalars["seen"] | {update.client: len(state.arrays["scalar"]) for update in updates}
        scalars = advanced(state, updates, options.steps, ctx) | {"seen": seen}
        return State(state.base, number, {"scalar": whole}, scalars, state.cohort + 1)


METHOD = DeComFL(PLUGIN.name, sampler)

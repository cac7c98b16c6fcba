"""FedKSeed and FedKSeed-Pro, arXiv 2312.06353: K seeds for a whole training, and one scalar for each.

w^r = w_0 - eta * sum_j a_j z(seed_j): the accumulators a are all a client downloads, whatever the round, and theta is
one move from theta_0. Local steps are MeZO's along seeds drawn from the K; a client uploads its g, and the server,
which knows what was drawn, adds c_i g to a_index. That is the mean of the clients' models, because all moved along the
same directions.

Pro draws seed j with p = softmax of its mean |g|, clipped at 1000 and scaled to [0, 1] over the seeds.

Where we differ from the published code (and why):
- Every client rebuilds its model from theta_0 and what it was sent; the code rebuilds once on the server.
- All K terms are summed in float32 before they touch a weight, so K small additions cost no bits.
- The mean |g| of a seed is over what was reported, with no initial zero and without left-out steps; a seed never used
  counts as 0.
- The index of each g is not sent: it is drawn from a stream that both sides know.
- Clients always get all K sums, never only those that changed: whoever was away must end in the same bytes, which sums
  of differences do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.clients import Probe, SpaceMethod, advanced, minibatch, update_of
from edgellm_plugins.zeroth_order.options import Candidates
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.trajectory import sgd
from edgellm_sdk import random
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.types import Array, Assignment, Dataset, Float32, ModelHandle, State, Update

CLIP = 1000.0


def sampler(theta: Mapping[str, Tensor], config: Candidates, ctx: Context, device: str) -> Dense:
    return Dense("gaussian", {name: tuple(t.shape) for name, t in theta.items()}, device, share=config.share)


@lru_cache(maxsize=4)
def candidate_seeds(master: int, count: int) -> tuple[int, ...]:
    """The first `count` of one long list, so that runs with fewer seeds use a part of those with more."""
    return tuple(random.key(master, "candidate", j) for j in range(count))


def probabilities(magnitudes: Array, uses: Array) -> Array:
    """p over the seeds from the sums of clipped |g| and their counts: (K,) float64, between 1 and e times apart."""
    mean = magnitudes / np.maximum(uses, 1)
    scaled = np.exp((mean - mean.min()) / (mean.max() - mean.min() + 1e-10))
    return np.asarray(scaled / scaled.sum())


def draw(weights: Array, uniform: Array) -> Array:
    """Indices into `weights` for numbers in [0, 1): int64."""
    edges = np.cumsum(weights) / weights.sum()
    return np.minimum(np.searchsorted(edges, uniform, side="right"), len(weights) - 1)


@dataclass(frozen=True)
class CandidateMethod(SpaceMethod):
    """`weighted` is Pro."""

    weighted: bool

    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Candidates) -> list[Move]:
        sums: Float32 = arrays["sums"]
        made = sgd(candidate_seeds(scalars["master"], options.seeds), sums.tolist(), options.learning_rate)
        return [made] if made.seeds else []

    def initialise(self, model: ModelHandle, options: Candidates, ctx: Context) -> State:
        noise = self.noise(model, options, ctx)
        master = int(ctx.stream("candidates").seeds(1)[0]) >> 1
        zeros = np.zeros(options.seeds, np.float32)
        arrays = {"sums": zeros} | ({"magnitudes": zeros, "uses": zeros} if self.weighted else {})
        scalars = {"forwards": 0, "steps": 0, "dropped": 0, "noise": noise, "master": master}
        return State(model.digest, 0, arrays, scalars)

    def assign(self, state: State, clients: Sequence[str], options: Candidates) -> dict[str, Assignment]:
        arrays = self.sent(state)
        scalars = {name: state.scalars[name] for name in ("noise", "master")} | {"several": len(clients) > 1}
        return {c: Assignment(state.base, state.round + 1, c, arrays, scalars) for c in clients}

    def finetune(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Candidates, ctx: Context
    ) -> Update:
        """Catch up, then MeZO steps along candidate seeds."""
        follower, noise = self.checked(model, data, assignment, options, ctx)
        if any(array.shape != (options.seeds,) for array in assignment.arrays.values()):
            raise ModelError(
                f"the log is not one of {options.seeds} seeds", assignment.client, "use the server's --seeds"
            )
        follower.goto(
            self.moves(assignment.arrays, assignment.scalars, options), come_back=assignment.scalars["several"]
        )
        seeds = candidate_seeds(assignment.scalars["master"], options.seeds)
        chosen = self.chosen(assignment.arrays, assignment.client, assignment.round, options, ctx)
        estimate, found = differences.central(options.step), []
        for i, j in enumerate(chosen.tolist()):
            number = (assignment.round - 1) * options.steps + i
            name, indices = minibatch(data, assignment.client, number, options.batch_size, ctx)
            probe = estimate(follower.space, name, partial(data.select, indices), [seeds[j]])
            if options.limit and abs(float(probe.scalars[0])) * 2 * options.step > options.limit:
                probe = Probe(np.zeros(1, np.float32), probe.loss, probe.forwards, 1)
            found.append(probe)
            follower.step(1, sgd([seeds[j]], probe.scalars.tolist(), options.learning_rate))
        return update_of(assignment, found, len(data), noise, {})

    def expected(self, options: Candidates) -> dict[str, tuple[int, ...]]:
        return {"scalar": (options.steps, 1)}

    def chosen(self, arrays: Mapping[str, Array], client: str, round: int, options: Candidates, ctx: Context) -> Array:
        """Which seed each local step of a client takes: (steps,) int64, known to both sides and never sent."""
        weights = arrays["p"].astype(np.float64) if self.weighted else np.ones(options.seeds)
        who = client if options.directions == "own" else ""
        return draw(weights, ctx.stream(f"candidates/{who}", round).uniform(options.steps))

    def sent(self, state: State) -> dict[str, Array]:
        """The accumulators, 4 bytes for each seed; for Pro as many for the probabilities."""
        arrays = {"sums": state.arrays["sums"]}
        if self.weighted:
            p = probabilities(state.arrays["magnitudes"].astype(np.float64), state.arrays["uses"])
            arrays["p"] = p.astype(np.float32)
        return arrays

    def aggregate(self, state: State, updates: Sequence[Update], options: Candidates, ctx: Context) -> State:
        """a_j += c_i g, c_i the client's share of all examples; in float64, clients and steps in order."""
        total, number = sum(update.examples for update in updates), state.round + 1
        sums = state.arrays["sums"].astype(np.float64)
        index = {u.client: self.chosen(self.sent(state), u.client, number, options, ctx) for u in updates}
        arrays = {}
        for update in updates:
            share = update.examples / total
            np.add.at(sums, index[update.client], share * update.arrays["scalar"][:, 0].astype(np.float64))
        if self.weighted:
            magnitudes, uses = state.arrays["magnitudes"].astype(np.float64), state.arrays["uses"].copy()
            for update in updates:
                size = np.minimum(np.abs(update.arrays["scalar"][:, 0].astype(np.float64)), CLIP)
                np.add.at(magnitudes, index[update.client], size)
                np.add.at(uses, index[update.client], (size > 0).astype(np.float32))
            arrays = {"magnitudes": magnitudes.astype(np.float32), "uses": uses}
        arrays["sums"] = sums.astype(np.float32)
        return State(state.base, number, arrays, advanced(state, updates, options.steps, ctx), state.cohort + 1)

"""A run as a list of (seed, scalar): what clients send, what the server keeps, and how anyone rebuilds theta from it.

Group t of the log is an estimate g_t = sum_k scalar_k z(seed_k), and theta_{t+1} follows from theta_t, the log and the
options. A client that works alone appends one group for each of its steps. Several clients start from one theta and
move along directions of their own, so the mean of their models is theta minus eta times the weighted sum of all their
estimates: one group for the round, exact up to float32 rounding.

State: `seed` (T,) uint64, `scalar` (T,) float32, `end` (G,) uint32, `eta` (G,) float32: group t is the entries
end[t-1] .. end[t] - 1, taken at learning rate eta[t].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from edgellm_plugins.zeroth_order.clients import Probe, SpaceMethod, advanced, minibatch, update_of
from edgellm_plugins.zeroth_order.options import Options
from edgellm_plugins.zeroth_order.space import Space
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.types import Array, Assignment, Dataset, ModelHandle, State, Update

Estimate = Callable[[Space, str, Callable[[], Dataset], Sequence[int]], Probe]


@dataclass
class Log:
    """Groups of (seed, scalar). Mutable: a client appends while it works."""

    seeds: list[int] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    etas: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Log:
        return cls(arrays["seed"].tolist(), arrays["scalar"].tolist(), arrays["end"].tolist(), arrays["eta"].tolist())

    def arrays(self) -> dict[str, Array]:
        return {
            "seed": np.array(self.seeds, np.uint64),
            "scalar": np.array(self.scalars, np.float32),
            "end": np.array(self.ends, np.uint32),
            "eta": np.array(self.etas, np.float32),
        }

    def append(self, seeds: Sequence[int], scalars: Sequence[float], eta: float) -> None:
        """One group; zeros are left out, and a group of nothing moves nothing but counts."""
        for seed, scalar in zip(seeds, scalars, strict=True):
            if scalar:
                self.seeds.append(int(seed))
                self.scalars.append(scalar)
        self.ends.append(len(self.seeds))
        self.etas.append(eta)

    def group(self, t: int) -> tuple[list[int], list[float]]:
        part = slice(self.ends[t - 1] if t else 0, self.ends[t])
        return self.seeds[part], self.scalars[part]

    def __len__(self) -> int:
        return len(self.ends)


def learning_rate(done: float, options: Options) -> float:
    """eta after a share `done` of the run: linear warm-up, then constant or linear to 0; a float32 value."""
    eta = options.learning_rate
    if done < options.warmup:
        eta *= done / options.warmup
    elif options.schedule == "linear":
        eta *= (1 - done) / (1 - options.warmup)
    return float(np.float32(eta))


def sgd(seeds: Sequence[int], scalars: Sequence[float], eta: float, decay: float = 0.0) -> Move:
    """theta <- (1 - decay) theta - eta g; zeros are left out."""
    used = [(seed, -eta * scalar) for seed, scalar in zip(seeds, scalars, strict=True) if scalar]
    return Move(tuple(seed for seed, _ in used), tuple(c for _, c in used), decay=decay)


def move(log: Log, t: int, options: Options) -> Move:
    """The t-th move, from groups t - window + 1 .. t.

    sgd: -eta g. momentum: -eta m with m = (1 - b1) sum_s b1^(t-s) g_s. adam: m and v = (1 - b2) sum_s b2^(t-s) g_s^2,
    bias-corrected over the steps taken or the window, whichever is shorter (MeZO-Adam without stored moments,
    arXiv 2305.17333, appendix; one direction a step, so that g_s^2 needs no cross terms).
    """
    eta = log.etas[t]
    decay = eta * options.weight_decay
    if options.rule == "sgd":
        return sgd(*log.group(t), eta, decay)
    seeds, first, second = [], [], []
    for s in range(max(0, t - options.window + 1), t + 1):
        for seed, scalar in zip(*log.group(s), strict=True):
            seeds.append(seed)
            first.append(-eta * (1 - options.beta1) * options.beta1 ** (t - s) * scalar)
            second.append((1 - options.beta2) * options.beta2 ** (t - s) * scalar**2)
    if options.rule == "momentum" or not seeds:
        return Move(tuple(seeds), tuple(first), decay=decay)
    taken = min(t + 1, options.window)
    first = [value / (1 - options.beta1**taken) for value in first]
    second = [value / (1 - options.beta2**taken) for value in second]
    return Move(tuple(seeds), tuple(first), tuple(second), decay)


@dataclass(frozen=True)
class SeedMethod(SpaceMethod):
    """A method whose whole run is such a log. `estimate(options)` evaluates one step."""

    estimate: Callable[[Any], Estimate]

    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Options) -> list[Move]:
        log = Log.of(arrays)
        return [move(log, t, options) for t in range(len(log))]

    def initialise(self, model: ModelHandle, options: Options, ctx: Context) -> State:
        if options.rule == "adam" and options.probes != 1:
            raise ConfigError("adam replays one direction a step", "probes", "set probes to 1")
        noise = self.follower(model, options, ctx).space.sampler.id
        scalars = {"forwards": 0, "steps": 0, "dropped": 0, "noise": noise}
        return State(model.digest, 0, Log().arrays(), scalars)

    def assign(self, state: State, clients: Sequence[str], options: Options) -> dict[str, Assignment]:
        """The whole log, 12 bytes a probe and 8 a step: whoever has it can rebuild theta."""
        alone = len(clients) == 1
        if not alone and (options.rule != "sgd" or options.weight_decay):
            fix = "use --rule sgd without weight decay, or one client a round"
            raise ConfigError("the mean of several clients' steps is one log only for plain steps", "rule", fix)
        scalars = {"noise": state.scalars["noise"], "alone": alone}
        arrays = dict(state.arrays)
        return {client: Assignment(state.base, state.round + 1, client, arrays, scalars) for client in clients}

    def finetune(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Options, ctx: Context
    ) -> Update:
        """A client's local steps from the theta that the log describes."""
        if not len(data):
            raise DataError("has no examples", assignment.client)
        follower, noise = self.checked(model, assignment, options, ctx)
        log, alone = Log.of(assignment.arrays), bool(assignment.scalars["alone"])
        follower.goto(self.moves(assignment.arrays, assignment.scalars, options), come_back=not alone)
        began, found, estimate = len(log), [], self.estimate(options)
        for i in range(options.steps):
            t = began + i if alone else began
            follower.aim(t)
            number = (assignment.round - 1) * options.steps + i
            name, indices = minibatch(data, assignment.client, number, options.batch_size, ctx)
            seeds = seeds_of(assignment.client, assignment.round, i, options.probes, ctx)
            probe = estimate(follower.space, name, partial(data.select, indices), seeds)
            found.append(probe)
            eta = rate_at(assignment.round, i if alone else 0, options, ctx)
            if alone:
                log.append(seeds, probe.scalars.tolist(), eta)
                follower.step(t, move(log, t, options))
            else:
                follower.step(t, sgd(seeds, probe.scalars.tolist(), eta))
        return update_of(assignment, found, len(data), noise, {"alone": alone})

    def expected(self, options: Options) -> dict[str, tuple[int, ...]]:
        return {"scalar": (options.steps, options.probes)}

    def screen(self, updates: Sequence[Update], state: State, options: Options) -> dict[str, str]:
        """As for all; and nobody among several may have worked as if alone."""
        reasons = super().screen(updates, state, options)
        for update in updates:
            alone = update.scalars.get("alone")
            if type(alone) is not bool or (alone and len(updates) > 1):
                reasons.setdefault(update.client, "worked as if it were alone")
        return reasons

    def aggregate(self, state: State, updates: Sequence[Update], options: Options, ctx: Context) -> State:
        """The log with this round's estimates."""
        log, number = Log.of(state.arrays), state.round + 1
        weight = sum(update.examples for update in updates)
        alone = len(updates) == 1 and updates[0].scalars["alone"]
        seeds: list[int] = []
        scalars: list[float] = []
        for update in updates:
            for i, row in enumerate(update.arrays["scalar"]):
                drawn = seeds_of(update.client, number, i, options.probes, ctx)
                if alone:
                    log.append(drawn, row.tolist(), rate_at(number, i, options, ctx))
                else:
                    seeds += drawn
                    scalars += (row * np.float32(update.examples / weight)).tolist()
        if not alone:
            log.append(seeds, scalars, rate_at(number, 0, options, ctx))
        scalars_now = advanced(state, updates, options.steps, ctx)
        return State(state.base, number, log.arrays(), scalars_now, state.cohort + 1)


def rate_at(round: int, step: int, options: Options, ctx: Context) -> float:
    """eta of a local step (from 0) of a round (from 1)."""
    return learning_rate((round - 1 + step / options.steps) / ctx.rounds, options)


def seeds_of(client: str, round: int, step: int, probes: int, ctx: Context) -> list[int]:
    """The directions of one local step: known to the server, so never sent."""
    drawn: list[int] = ctx.stream(f"directions/{client}/{step}", round).seeds(probes).tolist()
    return drawn

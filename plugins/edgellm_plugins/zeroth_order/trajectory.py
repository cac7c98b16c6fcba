"""A run as a list of (seed, scalar): what clients send, what the server keeps, and how anyone rebuilds theta from it.

Group t of the log is an estimate g_t = sum_k scalar_k z(seed_k), and theta_{t+1} follows from theta_t, the log and the
options. A client that works alone appends one group for each of its steps. Several clients start from one theta and
move along directions of their own, so the mean of their models is theta minus eta times the weighted sum of all their
estimates: one group for the round, exact up to float32 rounding.

State: `seed` (T,) uint64 and `scalar` (T,) float32, 12 bytes a direction, and the groups in runs that are alike:
`groups` (R,) uint32 of them, of `size` (R,) uint32 entries each, taken at learning rate `eta` (R,) float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import numpy as np

from edgellm_plugins.zeroth_order.clients import Probe, SpaceMethod, advanced, minibatch, update_of
from edgellm_plugins.zeroth_order.options import Options
from edgellm_plugins.zeroth_order.space import Space
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.scoring import Goal
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
        sizes = np.repeat(arrays["size"], arrays["groups"]).astype(np.int64)
        etas = np.repeat(arrays["eta"], arrays["groups"])
        return cls(arrays["seed"].tolist(), arrays["scalar"].tolist(), np.cumsum(sizes).tolist(), etas.tolist())

    def arrays(self) -> dict[str, Array]:
        sizes, etas = np.diff([0, *self.ends]), np.array(self.etas, np.float32)
        first = np.flatnonzero(np.append(True, (np.diff(sizes) != 0) | (np.diff(etas) != 0))) if len(self) else sizes
        return {
            "seed": np.array(self.seeds, np.uint64),
            "scalar": np.array(self.scalars, np.float32),
            "groups": np.diff(np.append(first, len(self))).astype(np.uint32),
            "size": sizes[first].astype(np.uint32),
            "eta": etas[first],
        }

    def append(self, seeds: Sequence[int], scalars: Sequence[float], eta: float) -> None:
        """One group. A scalar of 0 moves nothing."""
        self.seeds += [int(seed) for seed in seeds]
        self.scalars += scalars
        self.ends.append(len(self.seeds))
        self.etas.append(eta)

    def group(self, t: int) -> tuple[list[int], list[float]]:
        part = slice(self.ends[t - 1] if t else 0, self.ends[t])
        return self.seeds[part], self.scalars[part]

    def __len__(self) -> int:
        return len(self.ends)


def learning_rate(done: float, each: float, options: Options) -> float:
    """eta of a step that is a share `each` of the run, after a share `done` of it: linear warm-up that begins above 0,
    then constant or linear to 0; a float32 value."""
    eta = options.learning_rate
    if done < options.warmup:
        eta *= min(1.0, (done + each) / options.warmup)
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
            if not scalar:
                continue
            seeds.append(seed)
            first.append(-eta * (1 - options.beta1) * options.beta1 ** (t - s) * scalar)
            second.append((1 - options.beta2) * options.beta2 ** (t - s) * scalar**2)
    if options.rule == "momentum" or not seeds:
        return Move(tuple(seeds), tuple(first), decay=decay)
    taken = min(t + 1, options.window)
    first = [value / (1 - options.beta1**taken) for value in first]
    second = [value / (1 - options.beta2**taken) for value in second]
    return Move(tuple(seeds), tuple(first), tuple(second), decay)


class Moves(Sequence[Move]):
    """The moves of a log, each made when it is asked for."""

    def __init__(self, log: Log, options: Options) -> None:
        self.log, self.options = log, options

    def __len__(self) -> int:
        return len(self.log)

    @overload
    def __getitem__(self, t: int) -> Move: ...

    @overload
    def __getitem__(self, t: slice) -> list[Move]: ...

    def __getitem__(self, t: int | slice) -> Move | list[Move]:
        places = range(len(self.log))[t]
        if isinstance(places, range):
            return [move(self.log, place, self.options) for place in places]
        return move(self.log, places, self.options)

    def mark(self, count: int) -> bytes:
        """A digest of the first `count` groups, from which all of their moves follow."""
        log, entries = self.log, self.log.ends[count - 1] if count else 0
        sha = hashlib.blake2b(digest_size=16)
        sha.update(np.array(log.seeds[:entries], np.uint64).tobytes())
        for values in (log.scalars[:entries], log.ends[:count], log.etas[:count]):
            sha.update(np.array(values, np.float64).tobytes() + b"/")
        return sha.digest()


@dataclass(frozen=True)
class SeedMethod(SpaceMethod):
    """A method whose whole run is such a log. `estimate(options)` evaluates one step."""

    estimate: Callable[[Any], Estimate]

    def goal(self, options: Any) -> Goal:
        return Goal(options.objective, options.new_tokens)

    def directions(self, seeds: Sequence[int], options: Any) -> list[int]:
        """The seeds of a step's directions, from `options.probes` drawn for it."""
        return list(seeds)

    def bent(self, options: Options) -> str:
        """The setting under which local steps do not add up, so that a mean of models is not a sum of estimates."""
        if options.rule != "sgd":
            return f"rule {options.rule}"
        return "weight decay" if options.weight_decay else ""

    def rows(self, options: Any) -> int:
        """Examples of one estimate."""
        size: int = options.batch_size
        return size

    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Options) -> Moves:
        return Moves(Log.of(arrays), options)

    def initialise(self, model: ModelHandle, options: Options, ctx: Context) -> State:
        if options.rule == "adam" and options.probes != 1:
            raise ConfigError("adam replays one direction a step", "probes", "set probes to 1")
        noise = self.noise(model, options, ctx)
        scalars = {"forwards": 0, "steps": 0, "dropped": 0, "noise": noise}
        return State(model.digest, 0, Log().arrays(), scalars)

    def assign(self, state: State, clients: Sequence[str], options: Options) -> dict[str, Assignment]:
        """The whole log, 12 bytes a direction: whoever has it can rebuild theta."""
        alone = len(clients) == 1
        if not alone and (reason := self.bent(options)):
            fix = "use plain steps, or one client a round"
            raise ConfigError("the mean of several clients' steps is one log only for plain steps", reason, fix)
        scalars = {"noise": state.scalars["noise"], "alone": alone}
        arrays = dict(state.arrays)
        return {client: Assignment(state.base, state.round + 1, client, arrays, scalars) for client in clients}

    def finetune(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Options, ctx: Context
    ) -> Update:
        """A client's local steps from the theta that the log describes."""
        follower, noise = self.checked(model, data, assignment, options, ctx)
        log, alone = Log.of(assignment.arrays), bool(assignment.scalars["alone"])
        follower.goto(self.moves(assignment.arrays, assignment.scalars, options), come_back=not alone)
        began, found, estimate = len(log), [], self.estimate(options)
        for i in range(options.steps):
            t = began + i if alone else began
            follower.aim(t)
            number = (assignment.round - 1) * options.steps + i
            name, indices = minibatch(data, assignment.client, number, self.rows(options), ctx)
            seeds = self.directions(seeds_of(assignment.client, assignment.round, i, options.probes, ctx), options)
            probe = estimate(follower.space, name, partial(data.select, indices), seeds)
            found.append(probe)
            eta = rate_at(assignment.round, i if alone else None, options, ctx)
            if alone:
                log.append(seeds, probe.scalars.tolist(), eta)
                follower.step(t, move(log, t, options))
            else:
                follower.step(t, sgd(seeds, probe.scalars.tolist(), eta))
        if alone:
            follower.arrived(Moves(log, options))
        return update_of(assignment, found, len(data), noise, {"alone": alone})

    def expected(self, options: Options) -> dict[str, tuple[int, ...]]:
        return {"scalar": (options.steps, len(self.directions(range(options.probes), options)))}

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
                drawn = self.directions(seeds_of(update.client, number, i, options.probes, ctx), options)
                if alone:
                    log.append(drawn, row.tolist(), rate_at(number, i, options, ctx))
                else:
                    seeds += drawn
                    scalars += (row * np.float32(update.examples / weight)).tolist()
        if not alone:
            log.append(seeds, scalars, rate_at(number, None, options, ctx))
        scalars_now = advanced(state, updates, options.steps, ctx, self.goal(options))
        return State(state.base, number, log.arrays(), scalars_now, state.cohort + 1)


def rate_at(round: int, step: int | None, options: Options, ctx: Context) -> float:
    """eta of a local step (from 0) of a round (from 1), or of the round as a whole."""
    each = 1 / ctx.rounds if step is None else 1 / (options.steps * ctx.rounds)
    return learning_rate((round - 1) / ctx.rounds + (step or 0) * each, each, options)


def seeds_of(client: str, round: int, step: int, probes: int, ctx: Context) -> list[int]:
    """The directions of one local step: known to the server, so never sent."""
    drawn: list[int] = ctx.stream(f"directions/{client}/{step}", round).seeds(probes).tolist()
    return drawn

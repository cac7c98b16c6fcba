"""A client of any method whose theta is a function of theta_0 and of moves along seeded directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.zeroth_order.options import Small as SmallOptions
from edgellm_plugins.zeroth_order.samplers import Sampler
from edgellm_plugins.zeroth_order.space import Follower, Full, Small, Space
from edgellm_sdk.companions import is_torch
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.objective import Objective, objective
from edgellm_sdk.kit.scoring import LOSS, Goal
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Array, Assignment, Dataset, Metric, ModelHandle, Session, State, Update

COUNTS = ("forwards", "dropped")
KIND = "seeds"


@dataclass(frozen=True)
class Probe:
    """An estimate: `scalars` (n,) float32, so that g = sum_k scalars_k z_k; the mean `loss` seen (of whatever is
    minimised: minus the score where that is one); `forwards` paid; `dropped` probes whose losses were not finite, whose
    scalars are 0."""

    scalars: Array
    loss: float
    forwards: int
    dropped: int = 0


@dataclass(frozen=True)
class SpaceMethod(ABC):
    """`sampler(theta_0, options, ctx, device)` makes the directions; `moves` says how a state's theta comes about."""

    name: str
    sampler: Callable[[Mapping[str, Tensor], Any, Context, str], Sampler]

    @abstractmethod
    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Any) -> Sequence[Move]:
        """From theta_0 to the theta of a state or an assignment."""

    @abstractmethod
    def initialise(self, model: ModelHandle, options: Any, ctx: Context) -> State: ...

    @abstractmethod
    def assign(self, state: State, clients: Sequence[str], options: Any) -> Mapping[str, Assignment]: ...

    @abstractmethod
    def finetune(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Any, ctx: Context
    ) -> Update: ...

    @abstractmethod
    def expected(self, options: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of an update; all are float32."""

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], options: Any, ctx: Context) -> State: ...

    def screen(self, updates: Sequence[Update], state: State, options: Any) -> dict[str, str]:
        """Reject what cannot be replayed, or is not what was asked for."""
        reasons = {}
        shape = self.expected(options)["scalar"]
        most = 2 * math.prod(shape) + shape[0]  # two forwards a direction, or one and a shared one
        expected = {name: (np.dtype(np.float32), size) for name, size in self.expected(options).items()}
        for update in updates:
            found = {name: (array.dtype, array.shape) for name, array in update.arrays.items()}
            counts, loss = [update.scalars.get(name) for name in COUNTS], update.scalars.get("loss")
            if update.kind != KIND:
                reasons[update.client] = f"kind {update.kind[:40]!r} is not {KIND!r}"
            elif update.rng != state.scalars["noise"]:
                reasons[update.client] = f"seeds of noise {update.rng[:40]!r} cannot be replayed"
            elif found != expected:
                reasons[update.client] = "does not carry the arrays it was asked for"
            elif any(type(count) is not int or not 0 <= count <= most for count in counts):
                reasons[update.client] = "claims an impossible number of forwards"
            elif not isinstance(loss, float) or not math.isfinite(loss):
                reasons[update.client] = "claims an impossible loss"
        return reasons

    def follower(self, model: ModelHandle, options: Any, ctx: Context) -> Follower:
        return ctx.keep(f"follower {model.digest}", lambda: Follower(self.space(model, options, ctx)))

    def space(self, model: ModelHandle, options: Any, ctx: Context) -> Space:
        """theta_0, on the device, with the method's directions."""
        if options.train == "full":
            on_torch(ctx)
            whole = Whole(model, options.precision, ctx.device, options.max_length, self.goal(options))
            return Full(whole, self.sampler(whole.parameters, options, ctx, ctx.device))
        live = small_objective(model, options.train, options, ctx, self.share(options), self.goal(options))
        theta = {name: torch.from_numpy(np.array(value)) for name, value in live.initial.items()}
        return Small(live, self.sampler(theta, options, ctx, "cpu"))

    def noise(self, model: ModelHandle, options: Any, ctx: Context) -> str:
        """Names all that seeds and scalars depend on: the sampler and what it kept of theta_0, and the run's seed, from
        which both sides draw what is never sent."""
        return f"{self.follower(model, options, ctx).space.sampler.id}/run {ctx.stream('log').key & 0xFFFFFFFF:08x}"

    def goal(self, options: Any) -> Goal:
        """What is minimised."""
        return LOSS

    def share(self, options: Any) -> int:
        """Candidates of a small set in one call; 0 leaves it to the objective."""
        return 0

    def checked(
        self, model: ModelHandle, data: Dataset, assignment: Assignment, options: Any, ctx: Context
    ) -> tuple[Follower, str]:
        """The live model and its noise; ModelError when the assignment belongs to another model or noise, DataError
        when there is nothing to train on."""
        if not len(data):
            raise DataError("has no examples", assignment.client)
        follower = self.follower(model, options, ctx)
        noise, theirs = self.noise(model, options, ctx), str(assignment.scalars.get("noise"))
        if assignment.base != model.digest:
            raise ModelError("the log belongs to another base model", assignment.client)
        if theirs != noise:
            raise ModelError(f"the log was made with noise {theirs[:60]!r}, not {noise!r}", assignment.client)
        return follower, noise

    def measure(
        self, subject: Session | State, data: Dataset, options: Any, ctx: Context
    ) -> Mapping[str, Metric] | None:
        """Loss, for labelled data balanced accuracy, and the text score that is trained, in the middle of a run."""
        live = next((kept for name, kept in ctx.kept("follower ")), None)
        if not isinstance(subject, State) or not isinstance(live, Follower):
            return None
        live.goto(self.moves(subject.arrays, subject.scalars, options), come_back=False)
        return live.space.measure(data)

    def personalise(self, model: ModelHandle, state: State, folder: Path, options: Any, ctx: Context) -> ModelHandle:
        follower = self.follower(model, options, ctx)
        follower.goto(self.moves(state.arrays, state.scalars, options), come_back=False)
        if not follower.space.finite():
            raise ModelError("training ended in numbers that are not finite", model.name, "lower the learning rate")
        return follower.space.write(folder, model)


def on_torch(ctx: Context) -> None:
    """ConfigError unless the run's device is torch's."""
    if not is_torch(ctx.device):
        fix = "use --device cpu, or train a small set of tensors"
        raise ConfigError(f"{ctx.device} evaluates adapters only, not whole models", "device", fix)


def update_of(
    assignment: Assignment, probes: Sequence[Probe], examples: int, noise: str, scalars: Mapping[str, Any]
) -> Update:
    """What a client sends: the scalars (steps, n) float32 of its steps, what they cost, and the mean loss seen.

    DataError when no loss was finite.
    """
    losses = [probe.loss for probe in probes if math.isfinite(probe.loss)]
    if not losses:
        raise DataError("no loss was finite", assignment.client, "lower the learning rate or the step")
    arrays: dict[str, Array] = {"scalar": np.stack([probe.scalars for probe in probes]).astype(np.float32)}
    counts = {"forwards": sum(p.forwards for p in probes), "dropped": sum(p.dropped for p in probes)}
    told = {**counts, "loss": round(float(np.mean(losses)), 6), **scalars}
    return Update(assignment.base, assignment.round, assignment.client, KIND, arrays, examples, noise, told)


def advanced(state: State, updates: Sequence[Update], steps: int, ctx: Context, goal: Goal = LOSS) -> dict[str, Any]:
    """The state's scalars after a round of `steps` local steps, and the curves of its training loss or score."""
    counts = {name: state.scalars[name] + sum(update.scalars[name] for update in updates) for name in COUNTS}
    loss = float(np.mean([update.scalars["loss"] for update in updates]))
    if goal.name == "loss":
        ctx.trained(state.round + 1, counts["forwards"], loss)
    else:
        places = {"rounds": state.round + 1, "forwards": counts["forwards"], "seconds": ctx.elapsed}
        for x, place in places.items():
            ctx.curve(f"training {goal.title} over {x}", place, -loss)
    return {**state.scalars, **counts, "steps": state.scalars["steps"] + steps}


def minibatch(data: Dataset, client: str, number: int, size: int, ctx: Context) -> tuple[str, list[int]]:
    """(name, example indices) of the client's `number`-th minibatch, cyclic over one fixed shuffle."""
    order = ctx.stream(f"order/{client}").permutation(len(data)).tolist()
    place = number % math.ceil(len(order) / size)
    return f"{client}/{place}", order[place * size : (place + 1) * size]


def small_objective(
    model: ModelHandle, train: str, options: SmallOptions, ctx: Context, share: int = 0, goal: Goal = LOSS
) -> Objective:
    targets = adapters.module_names(options.targets)
    spec = adapters.Spec(train, options.layers, options.rank, options.alpha, targets)
    return objective(model, spec, ctx, options.precision, options.hidden_memory, options.max_length, share, goal)

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
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.objective import Objective, objective
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Array, Assignment, Dataset, Metric, ModelHandle, Session, State, Update


@dataclass(frozen=True)
class SpaceMethod(ABC):
    """`sampler(theta_0, options, ctx, device)` makes the directions; `moves` says how a state's theta comes about."""

    name: str
    sampler: Callable[[Mapping[str, Tensor], Any, Context, str], Sampler]

    @abstractmethod
    def moves(self, arrays: Mapping[str, Array], scalars: Mapping[str, Any], options: Any) -> list[Move]:
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
    def screen(self, updates: Sequence[Update], state: State, options: Any) -> Mapping[str, str]: ...

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update], options: Any, ctx: Context) -> State: ...

    def follower(self, model: ModelHandle, options: Any, ctx: Context) -> Follower:
        return ctx.keep(f"follower {model.digest}", lambda: Follower(self.space(model, options, ctx)))

    def space(self, model: ModelHandle, options: Any, ctx: Context) -> Space:
        """theta_0, on the device, with the method's directions."""
        if options.train == "full":
            whole = Whole(model, options.precision, ctx.device, options.max_length)
            return Full(whole, self.sampler(whole.parameters, options, ctx, ctx.device))
        live = small_objective(model, options.train, options, ctx)
        theta = {name: torch.from_numpy(np.array(value)) for name, value in live.initial.items()}
        return Small(live, self.sampler(theta, options, ctx, "cpu"))

    def checked(self, model: ModelHandle, assignment: Assignment, options: Any, ctx: Context) -> tuple[Follower, str]:
        """The live model and its noise; ModelError when the assignment belongs to another model or noise."""
        follower = self.follower(model, options, ctx)
        noise, theirs = follower.space.sampler.id, str(assignment.scalars.get("noise"))
        if assignment.base != model.digest:
            raise ModelError("the log belongs to another base model", assignment.client)
        if theirs != noise:
            raise ModelError(f"the log was made with noise {theirs[:60]!r}, not {noise!r}", assignment.client)
        return follower, noise

    def measure(
        self, subject: Session | State, data: Dataset, options: Any, ctx: Context
    ) -> Mapping[str, Metric] | None:
        """Loss and, for labelled data, balanced accuracy of theta in the middle of a run."""
        live = next((kept for name, kept in ctx.kept("follower ")), None)
        if not isinstance(subject, State) or not isinstance(live, Follower):
            return None
        live.goto(self.moves(subject.arrays, subject.scalars, options), come_back=False)
        return live.space.measure(data)

    def personalise(self, model: ModelHandle, state: State, folder: Path, options: Any, ctx: Context) -> ModelHandle:
        follower = self.follower(model, options, ctx)
        follower.goto(self.moves(state.arrays, state.scalars, options), come_back=False)
        return follower.space.write(folder, model)


def minibatch(data: Dataset, client: str, number: int, size: int, ctx: Context) -> tuple[str, list[int]]:
    """(name, example indices) of the client's `number`-th minibatch, cyclic over one fixed shuffle."""
    order = ctx.stream(f"order/{client}").permutation(len(data)).tolist()
    place = number % math.ceil(len(order) / size)
    return f"{client}/{place}", order[place * size : (place + 1) * size]


def small_objective(model: ModelHandle, train: str, options: SmallOptions, ctx: Context) -> Objective:
    targets = tuple(name.strip() for name in options.targets.split(",") if name.strip())
    spec = adapters.Spec(train, options.layers, options.rank, options.alpha, targets)
    return objective(model, spec, ctx, options.precision, options.hidden_memory, options.max_length)

"""What a method needs that only evaluates: the loss of a frozen model as a function of a few trainable tensors.

An engine that can load a model and a LoRA can offer this, whether or not it can back-propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from edgellm_sdk.companions import is_torch
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.kit.scoring import LOSS, Goal
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Array, Arrays, Dataset, Float32, Metric, ModelHandle


class Objective(Protocol):
    @property
    def initial(self) -> Mapping[str, Float32]:
        """theta_0: name -> float32, names and shapes as in `edgellm_sdk.kit.adapters`."""

    def evaluate(
        self,
        name: str,
        make: Callable[[], Dataset],
        theta: Arrays,
        directions: Sequence[Arrays],
        steps: Sequence[float],
    ) -> Array:
        """What is minimised, on one batch at theta + steps[k] * directions[k]: (n,) float64. Mean cross-entropy per
        scored token, or whatever `Goal` the objective was opened with.

        `name` names the batch: one name is always the same examples, so what does not depend on theta may be kept.
        `make` gives them.
        """

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        """Loss per token, for labelled data balanced accuracy, and the text score that is trained, at theta."""

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        """theta as an adapter folder on `base` ({path, digest, name})."""


@runtime_checkable
class ExampleWise(Protocol):
    """An objective that gives every example of a batch a candidate of its own in one call."""

    def evaluate_each(
        self,
        name: str,
        make: Callable[[], Dataset],
        theta: Arrays,
        directions: Sequence[Arrays],
        steps: Sequence[float],
    ) -> Array:
        """Example i alone at theta + steps[s] * directions[i]: (S, n) float64 for the n examples of the batch, of which
        there may be fewer than directions."""


def evaluate_each(
    live: Objective,
    name: str,
    make: Callable[[], Dataset],
    theta: Arrays,
    directions: Sequence[Arrays],
    steps: Sequence[float],
) -> Array:
    """As in `ExampleWise`; by a call for each example where the backend knows no other way."""
    if isinstance(live, ExampleWise):
        return live.evaluate_each(name, make, theta, directions, steps)
    data = make()
    columns = [
        live.evaluate(f"{name}/{i}", lambda i=i: data.select([i]), theta, [v] * len(steps), steps)  # type: ignore[misc]
        for i, v in zip(range(len(data)), directions, strict=False)
    ]
    return np.stack(columns, axis=1)


def objective(
    model: ModelHandle,
    spec: Spec,
    ctx: Context,
    precision: str = "auto",
    hidden_memory: int = 512,
    max_length: int = 128,
    share: int = 0,
    goal: Goal = LOSS,
) -> Objective:
    """The objective on `ctx.device`, made once per process. `hidden_memory` MB may keep frozen hidden states.

    torch serves `cpu` and `cuda`; any other device is a plugin that implements `edgellm_objective`, with its options
    from `ctx.configs`, else their defaults. PluginError when it does not, ConfigError for a `goal` other than the loss.
    """
    return ctx.keep(
        f"objective {model.digest}", lambda: _open(model, spec, ctx, precision, hidden_memory, max_length, share, goal)
    )


def measured(theta: Arrays, data: Dataset, ctx: Context) -> dict[str, Metric] | None:
    """The live objective's metrics at theta; None before there is one."""
    live: Objective | None = next((kept for _, kept in ctx.kept("objective ")), None)
    return None if live is None else live.measure(theta, data)


def written(live: Objective, folder: Path, theta: Arrays, model: ModelHandle) -> ModelHandle:
    """theta in `folder` as an adapter on `model`, which it was trained on."""
    live.write(folder, theta, {"path": str(model.path), "digest": model.digest, "name": model.name})
    return resolve(str(folder))


def _open(
    model: ModelHandle,
    spec: Spec,
    ctx: Context,
    precision: str,
    hidden_memory: int,
    max_length: int,
    share: int,
    goal: Goal,
) -> Objective:
    if is_torch(ctx.device):
        from edgellm_sdk.kit.frozen import Frozen

        budget = min(hidden_memory << 20, ctx.memory if ctx.memory is not None else 1 << 62)
        stream = ctx.stream("adapter")
        frozen = Frozen(model, spec, stream, precision, ctx.device, budget, max_length, share, goal, ctx.hidden)
        if ctx.hidden is not None and not frozen.rows_only:
            ctx.note("--hidden keeps nothing here: more than the FFN of the last layer trains")
        return frozen
    if ctx.hidden is not None:
        ctx.note(f"--hidden keeps nothing here: {ctx.device} keeps its own")
    if goal.name != "loss":
        raise ConfigError(f"{ctx.device} computes losses only, no {goal.title}", "objective", "use --device cpu")
    from edgellm_sdk import config, registry
    from edgellm_sdk.relay import Relay

    loaded = registry.get(ctx.device)
    name = loaded.plugin.name
    chosen: Any = ctx.configs[name] if name in ctx.configs else config.build(loaded.plugin.config, {}, name)
    relay = Relay([loaded], {name: chosen})
    return relay.objective(model, spec, max_length, ctx)

"""What a method needs that only evaluates: the loss of a frozen model as a function of a few trainable tensors.

An engine that can load a model and a LoRA can offer this, whether or not it can back-propagate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgellm_sdk.context import Context
from edgellm_sdk.kit.adapters import Spec
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
        """Mean cross-entropy per scored token of one batch at theta + steps[k] * directions[k]: (n,) float64.

        `name` names the batch: one name is always the same examples, so what does not depend on theta may be kept.
        `make` gives them.
        """

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        """Loss per token and, for labelled data, balanced accuracy at theta."""

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        """theta as an adapter folder on `base` ({path, digest, name})."""


def objective(
    model: ModelHandle,
    spec: Spec,
    ctx: Context,
    precision: str = "auto",
    hidden_memory: int = 512,
    max_length: int = 128,
    share: int = 0,
) -> Objective:
    """The objective on `ctx.device`, made once per process. `hidden_memory` MB may keep frozen hidden states.

    torch serves `cpu` and `cuda`; any other device is a plugin that implements `edgellm_objective`, with its options
    from `ctx.configs`, else their defaults. PluginError when it does not.
    """
    return ctx.keep(
        f"objective {model.digest}", lambda: _open(model, spec, ctx, precision, hidden_memory, max_length, share)
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
    model: ModelHandle, spec: Spec, ctx: Context, precision: str, hidden_memory: int, max_length: int, share: int
) -> Objective:
    if ctx.device.partition(":")[0] in ("cpu", "cuda"):
        from edgellm_sdk.kit.frozen import Frozen

        budget = min(hidden_memory << 20, ctx.memory if ctx.memory is not None else 1 << 62)
        return Frozen(model, spec, ctx.stream("adapter"), precision, ctx.device, budget, max_length, share)
    from edgellm_sdk import config, registry
    from edgellm_sdk.relay import Relay

    loaded = registry.get(ctx.device)
    name = loaded.plugin.name
    chosen: Any = ctx.configs[name] if name in ctx.configs else config.build(loaded.plugin.config, {}, name)
    relay = Relay([loaded], {name: chosen})
    return relay.objective(model, spec, max_length, ctx)

"""Training in one place from the first step to the last, for methods that are no federation: killed at any moment and
started again it ends in the same bytes.

The steps are those of `backprop`: minibatches, schedule and everything drawn are functions of the run's seed and the
step's number, so theta, the optimiser's moments and the number of steps taken are all there is to keep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Slope, StepRule
from edgellm_plugins.training.options import Options
from edgellm_sdk.context import Context
from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.types import Array, Arrays, Dataset

SHARE = 20
"""A checkpoint is written once the steps since the last one took this many times as long as that took to write."""


def train(
    slope: Slope, start: Arrays, data: Dataset, settings: Options, ctx: Context, *, title: str, key: str
) -> tuple[dict[str, Array], list[float]]:
    """`settings.steps` steps down `slope` from `start`: what theta became, float32, and the loss before each step.

    `title` names the run's streams and its checkpoint, `key` what the run depends on: a checkpoint of another key is
    not taken up. The caller `forget`s the checkpoint once it has stored the result. DataError without examples,
    ModelError when a loss is not finite.
    """
    if not len(data):
        raise DataError("has no examples", data.name or title)
    leaves = backprop.leaves_of(start, ctx.device if ctx.device.partition(":")[0] == "cuda" else "cpu")
    rule = StepRule(leaves, settings.optimizer, settings.weight_decay)
    losses = _taken_up(rule, title, key, ctx)
    for step, loss in enumerate(losses, 1):
        ctx.curve("training loss over steps", step, loss)
    with ctx.progress(title, total=settings.steps) as bar:
        bar.advance(len(losses))
        written, cost = time.monotonic(), 0.0
        for step in range(len(losses), settings.steps):
            rate = backprop.learning_rate(step, settings.steps, settings)
            loss = backprop.one_step(slope, rule, step, rate, title, data, start, settings, ctx)
            if not math.isfinite(loss):
                raise ModelError(
                    "the training loss is not finite", f"{title}, step {step + 1}", "lower --learning-rate"
                )
            losses.append(loss)
            ctx.curve("training loss over steps", step + 1, loss)
            bar.advance(1, f"step {step + 1} of {settings.steps}, loss {loss:.4f}")
            began = time.monotonic()
            if began - written >= SHARE * cost:
                ctx.checkpoint(title, _kept(rule, losses), {"key": key})
                written = time.monotonic()
                cost = written - began
    return {name: leaf.detach()[0].cpu().numpy() for name, leaf in leaves.items()}, losses


def _kept(rule: StepRule, losses: list[float]) -> dict[str, Array]:
    found: dict[str, Array] = {"losses": np.array(losses, np.float64)}
    for name, leaf in rule.leaves.items():
        found[f"theta/{name}"] = leaf.detach().cpu().numpy()
    for name, pair in rule.moments.items():
        found |= {f"{which}/{name}": moment.cpu().numpy() for which, moment in zip("mv", pair, strict=True)}
    return found


@torch.no_grad()
def _taken_up(rule: StepRule, title: str, key: str, ctx: Context) -> list[float]:
    """The losses of the steps that a checkpoint of this very run holds, `rule` brought to where it stood."""
    found: tuple[dict[str, Array], Mapping[str, Any]] | None = ctx.resume(title)
    if found is None or found[1].get("key") != key:
        return []
    arrays = found[0]
    for name, leaf in rule.leaves.items():
        leaf.copy_(torch.tensor(arrays[f"theta/{name}"]))
    for name, pair in rule.moments.items():
        for which, moment in zip("mv", pair, strict=True):
            moment.copy_(torch.tensor(arrays[f"{which}/{name}"]))
    losses: list[float] = arrays["losses"].tolist()
    rule.taken = len(losses)
    return losses


def forget(ctx: Context, title: str) -> None:
    """Remove the checkpoint of `train`, once its result is stored for good."""
    (ctx.folder / "checkpoint" / f"{title}.safetensors").unlink(missing_ok=True)

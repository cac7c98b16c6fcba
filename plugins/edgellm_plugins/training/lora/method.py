"""LoRA, arXiv 2106.09685: y = W x + s B A x with s = alpha / r; A (r, d_in) and B (d_out, r) train, W does not.

A starts kaiming-uniform and B at zero, so that training starts from the base (section 4.1; the paper's A is Gaussian,
we start as peft does). What keeps a step small is in `edgellm_plugins.training.backprop`.

Where we differ from the paper (and why):
- All linear layers of a decoder layer train by default, where the paper adapts W_q and W_v.
- In a federation A and B are averaged each on its own, as FedIT does (arXiv 2305.05644): the mean of products B A is
  another matrix. `lora-fa` has no such gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora import PLUGIN, Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.types import Assignment, Dataset, ModelHandle, State, Update


def _frozen(model: ModelHandle, config: Config, ctx: Context) -> Frozen:
    targets = adapters.module_names(config.targets)
    spec = adapters.Spec("lora", config.layers, config.rank, config.alpha, targets)
    return backprop.frozen_base(model, spec, ctx, config.precision, config.hidden_memory, config.max_length)


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0: A random, B zero."""
    return backprop.initialise(model, _frozen(model, config, ctx))


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """One client's steps in one round: kind `delta`, float32 arrays of theta's names and shapes."""
    slope = backprop.exact_slope(_frozen(model, config, ctx), config.chunk, backprop.folded(assignment.arrays))
    return backprop.work(slope, backprop.FORWARDS, data, assignment, config, ctx)


def screen(updates: Sequence[Update], state: State, ctx: Context) -> dict[str, str]:
    """As `backprop.screen`, for the steps this run asks of a client."""
    config: Config = ctx.configs[PLUGIN.name]
    return backprop.screen(updates, state, config.steps, backprop.FORWARDS, ctx)


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta as a PEFT adapter on its base."""
    return backprop.personalise(model, state, folder, _frozen(model, config, ctx))


measure = backprop.measure

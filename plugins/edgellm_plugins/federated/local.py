"""A client's turn as FedIT and FedPETuning have it: from the server's weights, E passes, the new weights back.

The optimiser and its schedule are new in every round and nothing stays on the client. Steps and memory are those of
`edgellm_plugins.training.backprop`. A digest of what trains goes with the weights; who trains something else refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from edgellm_plugins.federated.options import Local, steps_of
from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Leaves, Slope
from edgellm_sdk import config as options
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.types import Assignment, Dataset, ModelHandle, State, Update

ADAPTER = "adapter"


def targets_of(text: str) -> tuple[str, ...]:
    """Module name endings; every name ends in nothing, which is what `all-linear` asks for."""
    return ("",) if text.strip() == "all-linear" else adapters.module_names(text)


def frozen_of(model: ModelHandle, spec: Spec, config: Local, ctx: Context) -> Frozen:
    """The frozen base with the tensors of `spec`, as `backprop.frozen_base`."""
    return backprop.frozen_base(model, spec, ctx, config.precision, config.hidden_memory, config.max_length)


def digest(spec: Spec, *more: str) -> str:
    """Of what trains and how it counts. Its rank is left out: shapes tell it, and clients may differ in it."""
    told = {name: value for name, value in asdict(spec).items() if name != "rank"}
    return hashlib.sha256(json.dumps([told, *more], sort_keys=True).encode()).hexdigest()


def slope_of(frozen: Frozen, config: Local, beneath: Mapping[str, Tensor] | None = None, inputs: bool = False) -> Slope:
    """The exact gradient of the mean over all scored tokens of a minibatch, `micro_batch` examples at a time; with
    `inputs` prompts are scored too."""
    if not config.micro_batch and not inputs:
        return backprop.exact_slope(frozen, config.chunk, beneath)

    def slope(step: int, name: str, make: Callable[[], Dataset], leaves: Leaves) -> float:
        sums = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        frozen.trainables.set({**leaves, **(beneath or {})})
        data = make()
        size, loss, tokens = config.micro_batch or len(data), 0.0, 0
        for begin in range(0, len(data), size):
            rows = range(begin, min(begin + size, len(data)))
            kept = frozen.batch(f"{name}/{begin}", lambda rows=rows: data.select(rows), inputs)  # type: ignore[misc]
            for leaf in leaves.values():
                leaf.grad = torch.zeros_like(leaf)
            loss += backprop.backward(frozen, kept, config.chunk) * len(kept.targets)
            tokens += len(kept.targets)
            for key, leaf in leaves.items():
                sums[key].add_(leaf.grad, alpha=len(kept.targets))  # type: ignore[arg-type]
        for key, leaf in leaves.items():
            leaf.grad = sums[key].div_(tokens)
        return loss / tokens

    return slope


def finetune(slope: Slope, told: str, data: Dataset, assignment: Assignment, config: Local, ctx: Context) -> Update:
    """One client's round down `slope`: kind `weights`, float32 arrays of theta's names and shapes. `told` is the
    `digest` of what trains here. FederationError when the server's is another, and as `backprop.work`."""
    asked = assignment.scalars.get(ADAPTER, told)
    if asked != told:
        raise FederationError("the server trains another adapter", assignment.client, "use the server's options")
    settings = replace(config, steps=max(1, steps_of(config, len(data))))
    update = backprop.work(slope, backprop.FORWARDS, data, assignment, settings, ctx, kind="weights", fresh=True)
    return replace(update, scalars={**update.scalars, ADAPTER: told})


def screen(updates: Sequence[Update], state: State, config: Local, ctx: Context) -> dict[str, str]:
    """As `backprop.screen`, for the steps that each client's options and examples come to; and what trains."""
    reasons: dict[str, str] = {}
    for update in updates:
        asked = ctx.assigned[update.client].options if update.client in ctx.assigned else {}
        steps = steps_of(options.overridden(config, asked, update.client), update.examples)
        reasons |= backprop.screen([update], state, steps, backprop.FORWARDS, ctx, "weights")
        if update.scalars.get(ADAPTER) != state.scalars.get(ADAPTER, update.scalars.get(ADAPTER)):
            reasons[update.client] = "trained another adapter"
    return reasons

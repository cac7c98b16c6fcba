"""LoRA-FA, arXiv 2308.03303: y = W x + s B A x, s = alpha / r; A is drawn once and frozen, B starts at 0 and trains.

h = A x is all that the adapter keeps for g_B = s (dL/dy)^T h, where LoRA keeps x as well. Nothing of A is sent: every
client draws it from the run's seed, so mean_i(B_i) A = mean_i(B_i A) and averaging B is averaging the update itself.

`correction=projection` is the second version's: g~_B = g_B (A A^T)^-1 / s^2 makes the induced update s g~_B A =
G A^T (A A^T)^-1 A, the orthogonal projection of the full gradient G = dL/dW on the row space of A. Exact for SGD; AdamW
on g~_B keeps it only roughly.

`gradient=zeroth` estimates g_B from central differences along random directions v_k, as MeZO does (arXiv 2305.17333):
g_B = mean_k(jvp_k v_k). With `optimizer=sgd` a step is a function of theta, the direction numbers and jvp alone.

Where we differ from the code in peft (and why):
- (A A^T)^-1 is computed once, in float64: A never changes. A pseudo-inverse, without the code's 1e-8 on the diagonal.
- Weight decay comes before the step, as in torch's AdamW; there it comes after. eps is 1e-6 as there.
- The adapter file holds A itself and is a plain PEFT LoRA.
- Activations are recomputed layer by layer (`backprop`), which leaves little of the saving: it is one layer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Leaves, Slope
from edgellm_plugins.training.lora_fa import PLUGIN, Config
from edgellm_plugins.zeroth_order import estimator
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.adapters import Trainables
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.objective import Objective, objective
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Assignment, Dataset, ModelHandle, State, Update

EPS = 1e-6
Correct: TypeAlias = Callable[[Leaves], None]


def _objective(model: ModelHandle, config: Config, ctx: Context) -> Objective:
    """The loss as a function of B, with A frozen as `config.init` says."""
    targets = adapters.module_names(config.targets)
    spec = adapters.Spec("lora-fa", config.layers, config.rank, config.alpha, targets)
    if config.gradient == "zeroth":
        found = objective(model, spec, ctx, config.precision, config.hidden_memory, config.max_length)
    else:
        found = backprop.frozen_base(model, spec, ctx, config.precision, config.hidden_memory, config.max_length)
    if config.init == "gaussian":
        if not isinstance(found, Frozen):
            raise ConfigError(f"{ctx.device} draws its own A", "init", "use kaiming_uniform")
        trainables = found.trainables
        ctx.keep(f"gaussian A {model.digest}", lambda: draw_gaussian(trainables, ctx.stream("gaussian A")))
    return found


def draw_gaussian(trainables: Trainables, stream: Stream) -> bool:
    """Replace every frozen A (r, d_in) by draws from N(0, 1/r), in name order; used from the next `set` on."""
    for name in sorted(trainables.frozen):
        shape = trainables.frozen[name].shape
        drawn = stream.normal(math.prod(shape)).reshape(shape)
        trainables.frozen[name] = drawn * np.float32(1 / math.sqrt(shape[0]))
    return True


# B's gradient


def inverse_gram(a: Tensor, scale: float) -> Tensor:
    """(A A^T)^+ / s^2 of a frozen A (r, d_in): (r, r) float64."""
    wide = a.double()
    return torch.linalg.pinv(wide @ wide.mT, hermitian=True) / scale**2


def projection(trainables: Trainables) -> Correct:
    """g_B <- g_B (A A^T)^-1 / s^2 for every B, each (1, d_out, r), in g_B's dtype."""
    frozen = {
        name.removesuffix("A") + "B": inverse_gram(torch.from_numpy(a), trainables.spec.scale)
        for name, a in trainables.frozen.items()
    }

    def correct(leaves: Leaves) -> None:
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                leaf.grad.copy_(leaf.grad @ frozen[name].to(leaf.grad))

    return correct


def zeroth_slope(found: Objective, config: Config, client: str, ctx: Context) -> Slope:
    """The `Slope` of MeZO: mean_k(jvp_k v_k) over `probes` directions numbered by (client, step)."""

    def slope(step: int, name: str, make: Callable[[], Dataset], leaves: Leaves) -> float:
        theta = {key: leaf.detach()[0].cpu().numpy() for key, leaf in leaves.items()}
        pool = int(ctx.stream(f"directions/{client}", step).seeds(1)[0])
        directions = [estimator.direction(estimator.shapes_of(theta), pool, k) for k in range(config.probes)]
        estimate = estimator.probe(partial(found.evaluate, name, make), theta, directions, config.step)
        for key, gradient in estimator.mean_gradient(directions, estimate.jvp).items():
            leaves[key].grad = torch.from_numpy(gradient)[None].to(leaves[key])
        return float(estimate.loss.astype(np.float64).mean())

    return slope


def _cost(config: Config) -> int:
    return 2 * config.probes if config.gradient == "zeroth" else backprop.FORWARDS


# The rounds


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0: every B zero."""
    return backprop.initialise(model, _objective(model, config, ctx))


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """One client's steps in one round: kind `delta`, the change of every B (d_out, r) float32."""
    found = _objective(model, config, ctx)
    if config.gradient == "zeroth":
        slope = zeroth_slope(found, config, assignment.client, ctx)
    elif isinstance(found, Frozen):
        slope = backprop.exact_slope(found, config.chunk, backprop.folded(assignment.arrays))
    if config.correction == "projection":
        slope = _corrected(slope, _correction(found, model, ctx))
    return backprop.work(slope, _cost(config), data, assignment, config, ctx, EPS)


def _correction(found: Objective, model: ModelHandle, ctx: Context) -> Correct:
    if not isinstance(found, Frozen):
        raise ConfigError(f"{ctx.device} keeps A to itself", "correction", "use none")
    trainables = found.trainables
    return ctx.keep(f"projection {model.digest}", lambda: projection(trainables))


def _corrected(slope: Slope, correct: Correct) -> Slope:
    def corrected(step: int, name: str, make: Callable[[], Dataset], leaves: Leaves) -> float:
        loss = slope(step, name, make, leaves)
        correct(leaves)
        return loss

    return corrected


def screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    """As `backprop.screen`, for the steps this run asks of a client."""
    config: Config = ctx.configs[PLUGIN.name]
    return backprop.screen(updates, state, config.steps, _cost(config), ctx)


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta as a PEFT LoRA, A included, on its base."""
    return backprop.personalise(model, state, folder, _objective(model, config, ctx))


measure = backprop.measure

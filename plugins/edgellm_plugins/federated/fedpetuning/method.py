"""FedPETuning, arXiv 2212.10025: FedAvg over theta, a few parameters of one of five kinds; nothing else is sent.

| tune    | theta                                                                                 |
|---------|---------------------------------------------------------------------------------------|
| lora    | A, B of query and value, alpha = r (arXiv 2106.09685)                                  |
| adapter | h + W_up relu(W_down h + b) + b' after attention and after the FFN (arXiv 1902.00751)  |
| prefix  | the MLP that makes keys and values, put before the text's in every layer (2101.00190)  |
| bitfit  | all biases (arXiv 2106.10199)                                                          |
| full    | all weights, biases and norm gains of the chosen layers                                |

A client starts from theta_t with a new AdamW and a new linear schedule, makes E passes and sends its theta. Then
theta_{t+1} = sum_k p_k theta_k, p_k its share of the examples; the code's plain mean is the same where clients are of
one size, which `--partition skew:ALPHA` makes them. The server measures every watched state on validation data and
keeps the best.

`lora` and `adapter` start as the base: B and W_up are zero. A prefix does not: attention shares itself with keys it did
not see before. Its MLP is there for training; what is saved is the plain prefix that it makes.

Where we differ from the paper and its code (and why):
- Causal language models, whose head answers for the labels: there is no classification head to train. For an encoder
  `edgellm_sdk.kit.adapters.install` puts the same theta in place, its head always included.
- `full` leaves the embeddings, the last norm and the output matrix as they are: back-propagation here ends at layers.
- The code sends every parameter and computes what theta would cost; here theta is all that is sent, and measured.
- The paper leaves the bottleneck's nonlinearity open; it is a ReLU. There is no dropout.
- BitFit has nothing to train in a model without biases, as Llama is, and refuses it; `norms` trains norm gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.federated import local
from edgellm_plugins.federated.fedpetuning import PLUGIN, Config
from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Leaves, Slope
from edgellm_sdk.context import Context
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Array, Arrays, Assignment, Dataset, Float32, Metric, ModelHandle, State, Update

KINDS = {"lora": "lora", "prefix": "prefix", "adapter": "houlsby", "bitfit": "bitfit", "full": "full"}
PREFIX = ("prefix_key", "prefix_value")
MLP = ("prefix.embedding", "prefix.inner", "prefix.inner_bias", "prefix.outer", "prefix.outer_bias")
BEST = "best"


def spec_of(config: Config) -> Spec:
    """What trains, as `edgellm_sdk.kit.adapters` names it; of a prefix the plain one."""
    size = config.prefix_length if config.tune == "prefix" else config.width
    targets, alpha = local.targets_of(config.targets), config.alpha or float(config.rank)
    return Spec(KINDS[config.tune], config.layers, config.rank, alpha, targets, size=size, norms=config.norms)


def _told(config: Config) -> str:
    return local.digest(spec_of(config), str(config.prefix_hidden))


def _frozen(model: ModelHandle, config: Config, ctx: Context) -> Frozen:
    return local.frozen_of(model, spec_of(config), config, ctx)


# A prefix made by an MLP


def theta_of(plain: Mapping[str, Float32], config: Config, stream: Stream) -> dict[str, Array]:
    """theta_0 from the tensors in the model, float32: themselves, but for a prefix with `prefix_hidden` = h the MLP.

    That is: embedding (m, h) normal; inner (h, h), inner_bias (h,), outer (C, h), outer_bias (C,) uniform in
    +- 1 / sqrt(h), as torch starts them; C counts all layers' keys and values.
    """
    if config.tune != "prefix" or not config.prefix_hidden:
        return dict(plain)
    h, columns = config.prefix_hidden, sum(plain[name].shape[1] for name in _prefix_names(plain))
    shapes = ((config.prefix_length, h), (h, h), (h,), (columns, h), (columns,))
    theta = {name: array for name, array in plain.items() if not name.endswith(PREFIX)}
    theta[MLP[0]] = stream.normal(math.prod(shapes[0])).reshape(shapes[0])
    for name, shape in zip(MLP[1:], shapes[1:], strict=True):
        drawn = (stream.uniform(math.prod(shape)) * 2 - 1) / math.sqrt(h)
        theta[name] = drawn.astype(np.float32).reshape(shape)
    return theta


def _prefix_names(plain: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in plain if name.endswith(PREFIX))


def projected(theta: Mapping[str, Tensor], plain: Mapping[str, Array]) -> dict[str, Tensor]:
    """The tensors in the model that theta makes: outer tanh(inner embedding + inner_bias) + outer_bias, cut into the
    keys and values of every layer in name order. All carry a leading probe dimension of 1."""
    if MLP[0] not in theta:
        return dict(theta)
    embedding, inner, inner_bias, outer, outer_bias = (theta[name] for name in MLP)
    made = torch.tanh(embedding @ inner.mT + inner_bias[:, None]) @ outer.mT + outer_bias[:, None]
    names = _prefix_names(plain)
    parts = made.split([plain[name].shape[1] for name in names], dim=2)
    rest = {name: tensor for name, tensor in theta.items() if name not in MLP}
    return rest | dict(zip(names, parts, strict=True))


def through(slope: Slope, plain: Mapping[str, Array]) -> Slope:
    """The slope by theta of a loss whose slope by the model's own tensors is `slope`."""

    def composed(step: int, name: str, make: Any, leaves: Leaves) -> float:
        made = projected(leaves, plain)
        ends = {key: tensor.detach().requires_grad_() for key, tensor in made.items()}
        loss = slope(step, name, make, ends)
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        torch.autograd.backward([made[key] for key in sorted(made)], [ends[key].grad for key in sorted(made)])
        return loss

    return composed


def plain_of(theta: Arrays, plain: Mapping[str, Array]) -> Arrays:
    """theta as the tensors in the model: float32."""
    if MLP[0] not in theta:
        return theta
    with torch.no_grad():
        made = projected(backprop.leaves_of(theta), plain)
    return {name: tensor.detach()[0].contiguous().numpy() for name, tensor in made.items()}


# The rounds


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0."""
    frozen = _frozen(model, config, ctx)
    state = backprop.initialise(model, frozen)
    theta = theta_of(frozen.trainables.initial, config, ctx.stream("prefix"))
    return replace(state, arrays=theta, scalars={**state.scalars, local.ADAPTER: _told(config)})


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """One client's E passes: kind `weights`, float32 arrays of theta's names and shapes."""
    frozen = _frozen(model, config, ctx)
    slope = local.slope_of(frozen, config, backprop.folded(assignment.arrays))
    if MLP[0] in assignment.arrays:
        slope = through(slope, frozen.initial)
    return local.finetune(slope, _told(config), data, assignment, config, ctx)


def screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    """As `local.screen`."""
    return local.screen(updates, state, ctx.configs[PLUGIN.name], ctx)


def measure(subject: Any, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """As `backprop.measure`, and the lowest validation loss so far, whose state is kept in `ctx.folder`."""
    if not isinstance(subject, State):
        return None
    plain = next((live.initial for _, live in ctx.kept("objective ")), None)
    if plain is None:
        return None
    found = backprop.measure(replace(subject, arrays=plain_of(subject.sent, plain)), data, ctx)
    config: Config = ctx.configs[PLUGIN.name]
    if found is None or config.keep != BEST:
        return found
    loss, held = found["validation loss"], ctx.resume(BEST)
    if held is None or loss.value < held[1]["loss"]:
        ctx.checkpoint(BEST, subject.arrays, {"round": subject.round, "loss": loss.value})
        return {**found, "best validation loss": replace(loss, ci95=None)}
    return {**found, "best validation loss": Metric(held[1]["loss"], loss.unit, loss.n)}


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta, the best that was watched if there is one, as an adapter folder on its base."""
    held = ctx.resume(BEST) if config.keep == BEST else None
    if held is not None:
        ctx.note(
            f"the model is that of round {held[1]['round']}, whose validation loss {held[1]['loss']:.4f} is lowest"
        )
        state = replace(state, arrays=held[0])
    frozen = _frozen(model, config, ctx)
    return backprop.personalise(model, replace(state, arrays=plain_of(state.sent, frozen.initial)), folder, frozen)

"""QZO, arXiv 2505.13430.

A quantised weight is Delta * w_int. A step takes a direction z over the scales Delta alone, on one minibatch, and

    d = (f(Delta + eps z) - f(Delta - eps z)) / (2 eps),  d' = clip(d, -C, C),  Delta <- max(Delta - eta d' z, floor)

so the integers never change, and the result is a model of the same format and size. Symbols: Delta is theta, w_int is
what a block stores (and a format with a minimum adds it: w = Delta * code + m, m fixed).

Where we differ from the update rule above (and why):
- The scales are those of llama.cpp's blocks, one for 32 weights, which may be negative: |Delta| is held above the floor
  and the sign is kept. The floor is positive, because a block at 0 no longer says what its weights were.
- eps and eta are those of a block's outermost weight, Delta times the format's largest level, so that they fit every
  format; C bounds the derivative in that unit. See `zeroth_order.scales`, also for how scales are stored.
- n directions a step are clipped one by one and averaged. Several clients' directions are applied in one move, and the
  floor after it, so their mean model is exact but for blocks at the floor.
- Token embedding and output head do not train.
- The defaults are ours, tried on SmolLM2-135M in Q4_1, where eta 1e-3 diverges. In bfloat16 the derivative's root mean
  square was larger at an eps of 1e-3 than at 3e-3, which we take for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.clients import Probe, on_torch
from edgellm_plugins.zeroth_order.packed import Packed
from edgellm_plugins.zeroth_order.qzo import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.scales import Scales, trained
from edgellm_plugins.zeroth_order.space import Space
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context
from edgellm_sdk.types import Dataset, ModelHandle


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    return Dense("gaussian", {n: tuple(t.shape) for n, t in theta.items()}, device)


def estimate(config: Config) -> Estimate:
    found = differences.central(config.step)
    return partial(_clipped, found, config.clip) if config.clip else found


def _clipped(
    found: Estimate, limit: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]
) -> Probe:
    """Each directional derivative within +-limit; `found` has divided them by the number of usable ones."""
    probe = found(space, name, make, seeds)
    most = np.float32(limit / max(1, len(seeds) - probe.dropped))
    return replace(probe, scalars=np.clip(probe.scalars, -most, most))


@dataclass(frozen=True)
class Qzo(SeedMethod):
    """A SeedMethod whose theta is the scales."""

    def space(self, model: ModelHandle, options: Config, ctx: Context) -> Space:
        on_torch(ctx)
        packed = Packed(model, ctx, options.precision, options.max_length, self.goal(options))
        return Scales(packed, self.sampler(trained(packed), options, ctx, ctx.device), options.floor)


METHOD = Qzo(PLUGIN.name, sampler, estimate)

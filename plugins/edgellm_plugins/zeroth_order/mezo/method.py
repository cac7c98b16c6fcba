"""MeZO, arXiv 2305.17333.

A step draws n seeds and, for each direction z, takes g = (f(theta + eps z) - f(theta - eps z)) / (2 eps) on one
minibatch; theta <- theta - eta / n * sum g z. Only (seed, g, eta) is kept, and theta is rebuilt from that bit for bit.

Where we differ from the published code (and why):
- theta is never perturbed in place: each weight is shifted in a scratch while it is used, so evaluations leave no
  rounding behind (the published order of +eps, -2 eps, +eps drifts by 12 % of the weights' spread in 1 000 bfloat16
  steps) and cost one pass over the weights each instead of two.
- z comes from the portable bank of `edgellm_sdk.kit.noise`, not from the framework's generator.
- n directions need no stored gradient; their scalars are divided by n.
- Weight decay has no exempt names, and is off.
- 16-bit weights are rounded stochastically after a step, because eta * g * z is far below their spacing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.mezo import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    return Dense(config.noise, {n: tuple(t.shape) for n, t in theta.items()}, device, share=config.share)


def estimate(config: Config) -> Estimate:
    return differences.central(config.step) if config.difference == "central" else differences.one_sided(config.step)


METHOD = SeedMethod(PLUGIN.name, sampler, estimate)

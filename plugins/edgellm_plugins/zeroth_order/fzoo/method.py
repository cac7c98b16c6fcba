"""FZOO, arXiv 2506.09034.

A step evaluates l_0 = f(theta) and l_i = f(theta + eps u_i) for N sign directions u_i, and moves
theta <- theta - eta / (N sigma) * sum_i (l_i - l_0) u_i, sigma the standard deviation (N - 1) of the l_i. sigma is
about eps * |grad|, so the length of a step is eta * sqrt(d / N) whatever the scale of the loss.

Where we differ: eta is in units of eps, as in the published code, whose 1/eps is absorbed by its learning rate; the
paper's eta is eps times ours. eps is this family's, not 1e-4: on a bfloat16 base losses so close together are mostly
rounding. Candidates of a small set share calls as their number and the batch's size allow.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.fzoo import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    return Dense("rademacher", {n: tuple(t.shape) for n, t in theta.items()}, device, share=config.share)


def estimate(config: Config) -> Estimate:
    return differences.normalised(config.step)


METHOD = SeedMethod(PLUGIN.name, sampler, estimate)

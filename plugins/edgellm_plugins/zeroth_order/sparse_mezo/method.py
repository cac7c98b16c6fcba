"""Sparse-MeZO, arXiv 2402.15751.

MeZO with z set to 0 where |theta| is above a limit, one for each matrix: the percentile `keep` of |theta_0|. The
mask is that of the unperturbed theta at every step; since theta is never perturbed in place that needs no care here.

Where we differ: which share the paper keeps could not be read with certainty, so `keep` is an option. Vectors are not
masked.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.samplers import Dense, percentiles
from edgellm_plugins.zeroth_order.sparse_mezo import PLUGIN, Config
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    shapes = {n: tuple(t.shape) for n, t in theta.items()}
    return Dense("gaussian", shapes, device, percentiles(theta, config.keep), config.share)


def estimate(config: Config) -> Estimate:
    return differences.central(config.step)


METHOD = SeedMethod(PLUGIN.name, sampler, estimate)

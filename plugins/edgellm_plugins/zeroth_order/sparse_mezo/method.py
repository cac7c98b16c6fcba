"""Sparse-MeZO, arXiv 2402.15751.

MeZO with z set to 0 where |theta| is above a limit, one for each matrix: the percentile `keep` of |theta_0|. The
mask is that of the unperturbed theta at every step; since theta is never perturbed in place that needs no care here.

With several clients the mask would part their local steps, so a client then takes one a round.

Where we differ: which share the paper keeps could not be read with certainty, so `keep` is an option. Vectors are not
masked. Tensors that start at 0, as LoRA's B does, have no smaller weights and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.samplers import Dense, percentiles
from edgellm_plugins.zeroth_order.sparse_mezo import PLUGIN, Config
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    shapes = {n: tuple(t.shape) for n, t in theta.items()}
    if config.keep == 1:
        return Dense("gaussian", shapes, device, share=config.share)
    limits = percentiles(theta, config.keep)
    if zero := [name for name, limit in limits.items() if limit == 0]:
        raise ConfigError(f"{zero[0]} starts at 0 and has no smaller weights", "train", "use --train full or layers")
    return Dense("gaussian", shapes, device, limits, config.share)


def estimate(config: Config) -> Estimate:
    return differences.central(config.step)


@dataclass(frozen=True)
class SparseMezo(SeedMethod):
    def bent(self, options: Any) -> str:
        return super().bent(options) or ("steps above 1" if options.steps > 1 and options.keep < 1 else "")


METHOD = SparseMezo(PLUGIN.name, sampler, estimate)

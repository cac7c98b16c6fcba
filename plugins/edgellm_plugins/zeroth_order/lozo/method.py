"""LOZO and LOZO-M, arXiv 2410.07698.

Each matrix moves along U V^T: U (rows, r) fresh for every direction, V (columns, r) kept for nu steps; vectors move as
in MeZO. theta <- theta - eta g U V^T; with momentum b, N <- b N + (1 - b) g U, theta <- theta - eta N V^T, and a new V
takes N over as N V_old^T V_new / columns.

Where we differ from the published code (and why): V has a stream of its own, where the code redraws V before U on a
refresh but not in the update, so that every nu-th step of it is a random move. No division by r, as in the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.lozo import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import LowRank
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> LowRank:
    shapes = {n: tuple(t.shape) for n, t in theta.items()}
    master = int(ctx.stream("low-rank").seeds(1)[0])
    return LowRank(config.direction_rank, shapes, master, config.refresh, device, config.momentum)


def estimate(config: Config) -> Estimate:
    return differences.central(config.step)


@dataclass(frozen=True)
class Lozo(SeedMethod):
    def bent(self, options: Any) -> str:
        return super().bent(options) or ("momentum" if options.momentum else "")


METHOD = Lozo(PLUGIN.name, sampler, estimate)

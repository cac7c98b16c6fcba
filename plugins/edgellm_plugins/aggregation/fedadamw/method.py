"""FedAdamW: FedAdam (arXiv 2003.00295) and theta <- theta - eta lambda theta, apart from the moments.

The decay uses theta as it was before the step. With lambda 0 it is FedAdam, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_plugins.aggregation import server_optimizer
from edgellm_plugins.aggregation.fedadamw import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later, its moments `server/u/NAME` and `server/v/NAME` float64 among its arrays."""

    def second(v: Array, square: Array) -> Array:
        return config.beta2 * v + (1 - config.beta2) * square

    return server_optimizer.adaptive(state, updates, config, ctx, second, config.weight_decay)

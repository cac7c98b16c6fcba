"""FedAdagrad, arXiv 2003.00295, Algorithm 2: v <- v + Delta^2, elementwise, so that steps shrink over the rounds."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_plugins.aggregation import server_optimizer
from edgellm_plugins.aggregation.fedadagrad import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later, its moments `server/u/NAME` and `server/v/NAME` float64 among its arrays."""

    def second(v: Array, square: Array) -> Array:
        return v + square

    return server_optimizer.adaptive(state, updates, config, ctx, second)

"""FedYogi, arXiv 2003.00295, Algorithm 2: v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2), elementwise.

v moves by the size of Delta^2, not by its distance from v, so that it forgets large changes slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import server_optimizer
from edgellm_plugins.aggregation.fedyogi import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later, its moments `server/u/NAME` and `server/v/NAME` float64 among its arrays."""

    def second(v: Array, square: Array) -> Array:
        moved: Array = v - (1 - config.beta2) * square * np.sign(v - square)
        return moved

    return server_optimizer.adaptive(state, updates, config, ctx, second)

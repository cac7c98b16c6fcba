"""FedAvgM: u <- beta u + Delta; theta <- theta + eta u, Delta being the clients' weighted mean change.

With beta 0 and eta 1 it is FedAvg, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_plugins.aggregation import server_optimizer
from edgellm_plugins.aggregation.fedavgm import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, Arrays, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later, its moments `server/u/NAME` float64 among its arrays."""

    def rule(theta: Array, change: Array, before: Arrays) -> tuple[Array, dict[str, Array]]:
        u = config.beta * before["u"] + change
        return config.server_rate * u, {"u": u}

    return server_optimizer.stepped(state, updates, config, ctx, rule, {"u": 0.0})

"""FedAvg, arXiv 1602.05629, Algorithm 1: w <- sum_k (n_k / n) w_k over the clients k of the round.

Updates of kind `weights` carry the clients' new values, of kind `delta` their change. LoRA factors are averaged one by
one, as FedIT does; the mean of products B A is another method, and how far this is from it is drawn round by round.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.fedavg import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later; arrays keep their dtype. Arrays that no client changes stay."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    weights = averaging.shares(rows, config.weighting, config.cap)
    found = averaging.mean([update.arrays for update in rows], weights)
    if factors.modules(found) and (rows[0].kind == "weights" or state.arrays):
        several = [factors.factors(averaging.values(update, state, ctx)) for update in rows]
        factors.draw_errors(ctx, state.round + 1, several, weights)
    arrays = dict(state.arrays)
    for name, mean in found.items():
        old = state.arrays.get(name)
        if rows[0].kind == "delta":
            mean = config.server_rate * mean + (0 if old is None else old)
        elif old is not None:
            mean = old + config.server_rate * (mean - old)
        arrays[name] = mean.astype(dtypes[name])
    return averaging.advanced(state, updates, arrays, ctx)

"""The geometric median: the point with the smallest sum of distances to the clients' changes.

Weiszfeld's iteration, y <- sum_k w_k Delta_k with w_k proportional to 1 / max(|y - Delta_k|, nu), which needs nothing
but inner products; nu is 1e-6 of the median length, so that a change met exactly does not divide by zero. Every client
counts alike. Holds while fewer than half of the clients are hostile.

Distances are those of products B A (see `robust`).

Bound: in a round of ten, up to three of them hostile, the error is below 0.4 of the true change,
where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors, robust
from edgellm_plugins.aggregation.factors import Float64
from edgellm_plugins.aggregation.geometric_median import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import State, Update


def weights(gram: Float64, iterations: int) -> Float64:
    """w (n,) summing to 1 with sum_k w_k Delta_k the geometric median, from inner products `gram` (n, n)."""
    count = len(gram)
    w, lengths = np.full(count, 1 / count), np.diag(gram)
    nu = 1e-6 * float(np.sqrt(np.median(lengths)))
    for _ in range(iterations):
        distances = np.sqrt(np.maximum(w @ gram @ w - 2 * (gram @ w) + lengths, 0))
        if not (closest := np.maximum(distances, nu)).all():
            return w
        new = (1 / closest) / (1 / closest).sum()
        if np.abs(new - w).max() < 1e-12:
            return new
        w = new
    return w


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later."""
    rows = averaging.ordered(updates)
    changes = robust.changes(state, rows, ctx)
    found = weights(factors.gram(changes), config.iterations)
    return robust.combined(state, rows, changes, found.tolist(), ctx)

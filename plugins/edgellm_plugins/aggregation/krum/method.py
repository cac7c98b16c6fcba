"""Krum, arXiv 1703.02757: the change with the smallest sum of squared distances to its n - f - 2 nearest others.

Multi-Krum averages the m changes with the smallest sums. Every client counts alike; of equal sums the client whose name
comes first goes first. Needs n >= 2f + 3 clients.

Where we differ: distances and the mean are those of products B A (see `robust`), the paper's are of vectors.

Bounds: the error of a round of ten, up to three of them hostile, stays below 0.7 of the change's length for Krum and
below 0.4 for m = n - f, where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors, robust
from edgellm_plugins.aggregation.factors import Float64
from edgellm_plugins.aggregation.krum import PLUGIN, Config
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import State, Update


def scores(distances: Float64, f: int) -> Float64:
    """s(i) = the sum of the n - f - 2 smallest of `distances` (n, n), squared, from i to the others: (n,)."""
    count = len(distances)
    others = [np.sort(np.delete(distances[i], i))[: max(1, count - f - 2)] for i in range(count)]
    return np.array([float(near.sum()) for near in others])


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later. FederationError for n < 2f + 3 and for more to select than n - f."""
    rows = averaging.ordered(updates)
    f = robust.hostile(config.byzantine, len(rows), 2, 3, PLUGIN.name)
    count = config.select or len(rows) - f
    if count > len(rows) - f:
        what = f"krum cannot average {count} of {len(rows)} changes of which {f} may be hostile"
        raise FederationError(what, "aggregate", "lower select")
    changes = robust.changes(state, rows, ctx)
    order = np.argsort(scores(factors.distances(changes), f), kind="stable")
    chosen = sorted(order[:count].tolist())
    return robust.combined(state, rows, changes, [float(k in chosen) / count for k in range(len(rows))], ctx)

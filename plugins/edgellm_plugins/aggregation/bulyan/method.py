"""Bulyan, arXiv 1802.07927: Krum takes theta = n - 2f changes one after the other, each from those that are left; at
every coordinate the theta - 2f values next to the median of the chosen are averaged.

Every client counts alike; of equals the client whose name comes first goes first. Needs n >= 4f + 3 clients.

Bound: in a round of ten, one of them hostile, the error is below 0.35 of the true change,
where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors, robust
from edgellm_plugins.aggregation.bulyan import PLUGIN, Config
from edgellm_plugins.aggregation.factors import Float64
from edgellm_plugins.aggregation.krum.method import scores
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, State, Update


def chosen(distances: Float64, f: int) -> list[int]:
    """The n - 2f rows of `distances` (n, n), squared, that Krum takes one after the other."""
    left = list(range(len(distances)))
    taken: list[int] = []
    while len(taken) < len(distances) - 2 * f:
        best = int(np.argmin(scores(distances[np.ix_(left, left)], f))) if len(left) > 1 else 0
        taken.append(left.pop(best))
    return sorted(taken)


def near_the_median(values: Float64, count: int) -> Array:
    """At each coordinate the mean of the `count` values of (n, ...) next to the median; of equals the smaller."""
    values = np.sort(values, axis=0)
    order = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0, kind="stable")[:count]
    near: Array = np.take_along_axis(values, order, axis=0).mean(axis=0)
    return near


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later. ConfigError where both factors of a LoRA train, FederationError for n < 4f + 3."""
    rows, changes = robust.by_coordinate(state, updates, PLUGIN.name, ctx)
    f = robust.hostile(config.byzantine, len(rows), 4, 3, PLUGIN.name)
    kept = [changes[k] for k in chosen(factors.distances(changes), f)]
    near = {name: near_the_median(np.stack([c[name] for c in kept]), len(kept) - 2 * f) for name in kept[0]}
    return robust.moved(state, rows, near, ctx)

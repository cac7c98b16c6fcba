"""The coordinate-wise trimmed mean, arXiv 1803.01498: the mean without the f largest and the f smallest values.

Every client counts alike. Needs n > 2f clients.

Bound: in a round of ten, up to three of them hostile, the error is below 0.45 of the true change,
where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import robust
from edgellm_plugins.aggregation.trimmed_mean import PLUGIN, Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Array, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later. ConfigError where both factors of a LoRA train, FederationError for n <= 2f."""
    rows, changes = robust.by_coordinate(state, updates, PLUGIN.name, ctx)
    f = robust.hostile(config.byzantine, len(rows), 2, 1, PLUGIN.name)

    def trimmed(name: str) -> Array:
        values = np.sort([change[name] for change in changes], axis=0)
        kept: Array = values[f : len(values) - f].mean(axis=0)
        return kept

    return robust.moved(state, rows, {name: trimmed(name) for name in changes[0]}, ctx)

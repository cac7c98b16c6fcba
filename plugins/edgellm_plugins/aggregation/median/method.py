"""The coordinate-wise median of changes, arXiv 1803.01498: of an even number of values the mean of the middle two.

Every client counts alike. Holds while fewer than half of the clients are hostile.

Bound: in a round of ten, up to three of them hostile, the error is below 0.5 of the true change,
where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import robust
from edgellm_plugins.aggregation.median import PLUGIN
from edgellm_sdk.context import Context
from edgellm_sdk.registry import NoOptions
from edgellm_sdk.types import State, Update


def aggregate(state: State, updates: Sequence[Update], config: NoOptions, ctx: Context) -> State:
    """The state one round later. ConfigError where both factors of a LoRA train."""
    rows, changes = robust.by_coordinate(state, updates, PLUGIN.name, ctx)
    middle = {name: np.median([change[name] for change in changes], axis=0) for name in changes[0]}
    return robust.moved(state, rows, middle, ctx)

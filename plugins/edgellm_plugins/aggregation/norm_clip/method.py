"""Clipped mean: theta <- theta + sum_k p_k Delta_k min(1, C / |Delta_k|), C a bound or the median of the lengths.

p_k is 1 / n unless asked otherwise. |Delta_k| is the length of the whole change, of products B A where factors train
(see `robust`). One client moves theta by p_k C at most, whatever it sends; a change of length 0 is a change.

Bound: in a round of ten, up to three of them hostile, the error is below 0.7 of the true change,
where a client's noise is 0.55 of it (cookbook/benchmarks/byzantine.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors, robust
from edgellm_plugins.aggregation.norm_clip import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import State, Update


def factor(length: float, bound: float) -> float:
    """min(1, C / |Delta|), 1 for a change of length 0."""
    return 1.0 if length <= bound else bound / length


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The state one round later."""
    rows = averaging.ordered(updates)
    changes = robust.changes(state, rows, ctx)
    lengths = np.sqrt(np.maximum(np.diag(factors.gram(changes)), 0))
    bound = config.bound or float(np.median(lengths))
    shares = averaging.shares(rows, config.weighting, config.cap)
    weights = [share * factor(float(length), bound) for share, length in zip(shares, lengths, strict=True)]
    return robust.combined(state, rows, changes, weights, ctx)

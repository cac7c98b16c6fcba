"""Epsilon of a run, by dp-accounting. The unit is one client: with it, or with zeros in its place.

Each round releases sum_k c_k + N(0, (z C)^2 I), |c_k| <= C, divided by a number that no data changes. Two runs whose
data differ in one client differ by at most C in that sum, which is the relation REPLACE_SPECIAL of dp-accounting. A
client whose data are exchanged for other data moves the sum by up to 2 C: that is the same mechanism with z / 2.

public   A cohort is a function of the run's seed, which clients know, so that sampling hides nobody: a Gaussian event
         for every round in which a client took part, and the busiest client decides.
poisson  Every client takes part with probability q by draws nobody knows: a Poisson-sampled Gaussian event a round.

Fixed-size samples without replacement are not offered: dp-accounting bounds them when data are exchanged (z / 2 from
the start), and at N = 100, m = 10, z = 1, 100 rounds, delta = 1e-4 its bound is 81.6 where Poisson has 6.8.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any

from edgellm_sdk.errors import PluginError

TIGHT = 20.0
"""Above this epsilon no PLD is computed: its grid takes gigabytes, and the figure promises nothing any more."""


def _library() -> Any:
    """dp-accounting. PluginError, with what to do, where it is not installed."""
    try:
        import dp_accounting
    except ImportError:
        raise PluginError("epsilon needs dp-accounting", "dp", "pip install 'edgellm-sdk[privacy]'") from None
    return dp_accounting


def _event(q: float, z: float) -> Any:
    dp = _library()
    gaussian = dp.GaussianDpEvent(z)
    return gaussian if q >= 1 else dp.PoissonSampledDpEvent(q, gaussian)


@lru_cache(maxsize=4096)
def epsilon(q: float, z: float, count: int, delta: float) -> float:
    """epsilon at `delta` of `count` rounds with sampling probability `q` and noise multiplier `z`: Renyi accountant."""
    if not count:
        return 0.0
    dp = _library()
    from dp_accounting import rdp

    log = logging.getLogger("absl")  # it warns of every order that it leaves out
    before, log.disabled = log.disabled, True
    try:
        accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_SPECIAL)
        return float(accountant.compose(_event(q, z), count).get_epsilon(delta))
    finally:
        log.disabled = before


def tight(q: float, z: float, count: int, delta: float) -> float | None:
    """The same epsilon exactly (a Gaussian) or by privacy loss distributions, never above `epsilon`; None where that
    is beyond `TIGHT`."""
    dp = _library()
    from dp_accounting import pld

    bound = epsilon(q, z, count, delta)
    if bound > TIGHT:
        return None
    if q >= 1:
        return float(dp.get_epsilon_gaussian(z / math.sqrt(count), delta)) if count else 0.0
    accountant = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL)
    return min(bound, float(accountant.compose(_event(q, z), count).get_epsilon(delta)))


def affordable(q: float, z: float, delta: float, budget: float, most: int) -> int:
    """How many rounds, `most` at most, cost no more than `budget`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon(q, z, middle, delta) <= budget else (low, middle - 1)
    return low


def enough(q: float, count: int, delta: float, budget: float) -> float:
    """The least noise multiplier, to a percent, under which `count` rounds cost at most `budget`; inf above 10^4."""
    low, high = 1e-2, 1e4
    if epsilon(q, high, count, delta) > budget:
        return math.inf
    while high > low * 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon(q, middle, count, delta) <= budget else (middle, high)
    return high

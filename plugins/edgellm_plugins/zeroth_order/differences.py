"""Estimates of the gradient along random directions, from losses alone.

All give scalars_k with g = sum_k scalars_k z_k. A probe whose loss is not finite is dropped: its scalar is 0, and the
mean is over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from edgellm_plugins.zeroth_order.clients import Probe
from edgellm_plugins.zeroth_order.space import Space
from edgellm_plugins.zeroth_order.trajectory import Estimate
from edgellm_sdk.types import Array, Dataset


def central(eps: float) -> Estimate:
    """SPSA: scalar_k = (f(theta + eps z_k) - f(theta - eps z_k)) / (2 eps n), error O(eps^2), 2n forwards."""
    return partial(_central, eps)


def _central(eps: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]) -> Probe:
    values = space.losses(name, make, [(seed, c) for seed in seeds for c in (eps, -eps)])
    plus, minus = values[0::2], values[1::2]
    return _mean((plus - minus) / (2 * eps), values)


def one_sided(eps: float) -> Estimate:
    """scalar_k = (f(theta + eps z_k) - f(theta)) / (eps n), error O(eps), n + 1 forwards."""
    return partial(_one_sided, eps, False)


def normalised(eps: float) -> Estimate:
    """FZOO (arXiv 2506.09034): scalar_k = (f(theta + eps z_k) - f(theta)) / (n sigma), n + 1 forwards.

    sigma is the standard deviation (n - 1) of the n shifted losses, about eps |grad f|, so a step of eta has length
    eta sqrt(d / n) whatever the scale of the loss. All-equal losses give no step.
    """
    return partial(_one_sided, eps, True)


def _one_sided(
    eps: float, normal: bool, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]
) -> Probe:
    values = space.losses(name, make, [(seeds[0], 0.0), *((seed, eps) for seed in seeds)])
    rises = values[1:] - values[0]
    if not normal:
        return _mean(rises / eps, values)
    finite = values[1:][np.isfinite(values[1:])]
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    return _mean(rises / spread if spread > 0 else np.zeros_like(rises), values)


def _mean(slopes: Array, values: Array) -> Probe:
    usable = np.isfinite(slopes)
    scalars = np.where(usable, slopes, 0.0) / max(1, int(usable.sum()))
    finite = values[np.isfinite(values)]
    loss = float(finite.mean()) if len(finite) else float("nan")
    return Probe(scalars.astype(np.float32), loss, len(values), int((~usable).sum()))

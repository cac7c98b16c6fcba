"""Estimates of the gradient along random directions, from losses alone.

All give scalars_k with g = sum_k scalars_k z_k. A probe whose loss is not finite is dropped: its scalar is 0, and the
mean is over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

from edgellm_plugins.zeroth_order.clients import Probe
from edgellm_plugins.zeroth_order.per_example import base_of
from edgellm_plugins.zeroth_order.space import ExampleSpace, Space
from edgellm_plugins.zeroth_order.trajectory import Estimate
from edgellm_sdk.types import Array, Dataset


def central(eps: float) -> Estimate:
    """SPSA: scalar_k = (f(theta + eps z_k) - f(theta - eps z_k)) / (2 eps n), error O(eps^2), 2n forwards."""
    return partial(_central, eps)


def _central(eps: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]) -> Probe:
    values = space.losses(name, make, [(seed, c) for seed in seeds for c in (eps, -eps)])
    return mean_of_central(values[0::2], values[1::2], eps)


def mean_of_central(plus: Array, minus: Array, eps: float) -> Probe:
    """The estimate from the losses at theta + eps z_k and theta - eps z_k, (n,) each."""
    with np.errstate(invalid="ignore"):
        slopes = (plus - minus) / (2 * eps)
    return _mean(slopes, np.concatenate([plus, minus]))


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
    with np.errstate(invalid="ignore"):
        rises = values[1:] - values[0]
    if not normal:
        return _mean(rises / eps, values)
    return _mean(_standardised(rises), values)


def per_example(eps: float) -> Estimate:
    """GRZO (arXiv 2606.02857): scalar_i = a_i / B with d_i = f_i(theta + eps z_i) - f_i(theta - eps z_i) for example i
    alone, and a_i = d_i / (std(d) + 1e-8); 2 forwards of the batch for the B directions of one base.

    std has B - 1 in its denominator. A step of eta has length about eta sqrt(d / B) whatever the scale of the loss, as
    in `normalised`: the paper's eta is 2 eps times this one. All-equal differences give no step.
    """
    return partial(_per_example, eps)


def _per_example(eps: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]) -> Probe:
    assert isinstance(space, ExampleSpace), "the directions need a space that evaluates every example on its own"
    groups = [list(group) for _, group in groupby(seeds, base_of)]
    pairs = np.stack([space.each(name, make, group, (eps, -eps)) for group in groups])  # (bases, 2, examples)
    with np.errstate(invalid="ignore"):
        slopes = np.stack([_standardised(plus - minus) for plus, minus in pairs])
    found = _mean(slopes.ravel(), pairs.ravel())
    scalars = np.zeros((len(groups), len(seeds) // len(groups)), np.float32)
    scalars[:, : slopes.shape[1]] = found.scalars.reshape(slopes.shape)
    return replace(found, scalars=scalars.ravel(), forwards=2 * len(groups))


def _standardised(rises: Array) -> Array:
    """Over their standard deviation; zeros when that is 0, and what is not finite stays so."""
    finite = rises[np.isfinite(rises)]
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    if not spread:
        return np.where(np.isfinite(rises), 0.0, rises)
    return np.asarray(rises / (spread + 1e-8))


def _mean(slopes: Array, values: Array) -> Probe:
    usable = np.isfinite(slopes)
    scalars = np.where(usable, slopes, 0.0) / max(1, int(usable.sum()))
    finite = values[np.isfinite(values)]
    loss = float(finite.mean()) if len(finite) else float("nan")
    return Probe(scalars.astype(np.float32), loss, len(values), int((~usable).sum()))

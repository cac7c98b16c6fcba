"""GRZO, arXiv 2606.02857.

A step draws one gaussian tensor U for each weight. Example i of the minibatch moves along z_i = U * (r_i s_i^T) with
random signs r_i, s_i, so two batched forwards give B differences d_i = L_i(theta + eps z_i) - L_i(theta - eps z_i), and
theta <- theta - eta / B * sum_i a_i z_i, a_i = d_i / (std(d) + 1e-8). Each z_i is N(0, I), so every d_i z_i / (2 eps)
is an unbiased estimate; dividing by the spread keeps the direction, not the length.

Layers apply a row's signs around one product with U, x (U * (r s^T)) = ((x * r) U) * s; small sets hold B candidates.

Where we differ:
- eta is in units of 2 eps, as `fzoo`'s is in units of eps: the paper's is 2 eps times ours.
- std has B - 1 in its denominator; equal differences, or a minibatch of one example, move nothing.
- Vectors (norm gains, biases) move along U * s_i. A tied embedding has one direction in both its uses.
- Signs come from the portable bank of `edgellm_sdk.kit.noise`, addressed by a seed whose low 16 bits are the example's
  place and whose others address U. The log of (seed, scalar) is that of every method here: B scalars a step.
- sum_i a_i z_i is U times a matrix of rank B whose entries are summed without rounding, so that threads and BLAS
  cannot change a bit of it.
- A backend without a way to give rows directions of their own is asked for one example at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.grzo import PLUGIN, Config
from edgellm_plugins.zeroth_order.per_example import PerExample, example_seeds
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> PerExample:
    return PerExample({n: tuple(t.shape) for n, t in theta.items()}, device, share=config.share)


def estimate(config: Config) -> Estimate:
    return differences.per_example(config.step)


class GRZO(SeedMethod):
    def directions(self, seeds: Sequence[int], options: Any) -> list[int]:
        return [one for seed in seeds for one in example_seeds(seed, options.batch_size)]


METHOD = GRZO(PLUGIN.name, sampler, estimate)

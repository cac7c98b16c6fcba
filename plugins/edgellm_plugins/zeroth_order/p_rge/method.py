"""P-RGE, arXiv 2409.15520 (its third version calls the method MobiZO).

One step: q directions z_k, and the 2q candidates theta + eps z_k, theta - eps z_k stacked on the batch axis of one
forward. Only LoRA-FA's B trains, so X A^T is the same for every candidate and a candidate costs one small matrix.

    g_k = (l_k^+ - l_k^-) / (2 eps),    theta <- theta - eta * mean_k(g_k z_k)

Symbols: theta the B matrices, q `probes`, E `batch_size`, B_e = E / q examples of one query, eps `step`, eta
`learning_rate`. A step always runs 2 E rows, so choices of q compare at equal cost; it counts as two forwards of E.

`loops` says which of the paper's loops share a call: `both` 2q candidates (group-major: all + then all -), `outer` the
q of one sign (two calls), `none` one (2q calls: MeZO's way). All three give the same losses up to rounding.

A run is a log of (seed, g), as of every method of this family: a client uploads q scalars for each step.

Where we differ from the published code (and why):
- B and its update are float32 whatever the base is; there the adapter is updated in the base's float16.
- Directions come from the family's bank of noise; none is added to and removed from the state.
- B_e examples are taken in turn from one fixed shuffle, so what the frozen layers make of them is kept.
- `split` takes E different examples, B_e for each query. Queries then have no batch in common and each makes calls of
  its own; the published option tiles the whole batch all the same when both loops are on.
- Only the last layers' down_proj train by default, as in the rest of this family (`fwdllm` says why); the published
  scripts train every linear layer: `layers=0`, `targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"`.
- eps is 0.05, where the scripts have 0.01: on a bfloat16 base the 2q losses of 0.01 agree with those of float32 to a
  correlation of 0.94, of 0.05 to 0.997 (SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.clients import Probe
from edgellm_plugins.zeroth_order.p_rge import PLUGIN, Config
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.space import Space
from edgellm_plugins.zeroth_order.trajectory import Estimate, SeedMethod
from edgellm_sdk.context import Context
from edgellm_sdk.types import Dataset

ROWS = 2  # forwards of E examples that a step runs


def sampler(theta: Mapping[str, Tensor], config: Config, ctx: Context, device: str) -> Dense:
    return Dense("gaussian", {n: tuple(t.shape) for n, t in theta.items()}, device, share=config.share)


def estimate(config: Config) -> Estimate:
    return partial(_split if config.split else _shared, config.step)


def _shared(eps: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]) -> Probe:
    """All queries on one minibatch of B_e examples."""
    values = space.losses(name, make, [(seed, c) for c in (eps, -eps) for seed in seeds])
    plus, minus = values.reshape(2, -1)
    return replace(differences.mean_of_central(plus, minus, eps), forwards=ROWS)


def _split(eps: float, space: Space, name: str, make: Callable[[], Dataset], seeds: Sequence[int]) -> Probe:
    """Query k on part k of a minibatch of E examples; one with fewer examples than queries deals them out again."""
    data, pairs = make(), []
    order = np.arange(max(len(data), len(seeds))) % len(data)
    for k, (seed, part) in enumerate(zip(seeds, np.array_split(order, len(seeds)), strict=True)):
        rows = partial(data.select, part.tolist())
        pairs.append(space.losses(f"{name}/{k}", rows, [(seed, eps), (seed, -eps)]))
    plus, minus = np.array(pairs).T
    return replace(differences.mean_of_central(plus, minus, eps), forwards=ROWS)


@dataclass(frozen=True)
class PRGE(SeedMethod):
    def rows(self, options: Any) -> int:
        size: int = options.batch_size if options.split else options.batch_size // options.probes
        return size

    def share(self, options: Any) -> int:
        calls: dict[str, int] = {"both": 2 * options.probes, "outer": options.probes, "none": 1}
        return calls[options.loops]


METHOD = PRGE(PLUGIN.name, sampler, estimate)

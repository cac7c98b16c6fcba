"""Optimisers on the server: the clients' mean change is a step's direction, not the step (arXiv 2003.00295, Alg. 1).

With Delta the weighted mean of the clients' changes, a rule turns (theta, Delta, its moments) into theta's step. The
moments are arrays `server/MOMENT/NAME` of the State, float64, so a run resumes from its bytes; no client is sent them.
Arrays that no client changes, among them folded LoRAs, have no moments.

LoRA factors get moments each of its own. With A frozen (`lora-fa`) this optimises the update B A itself; where both
train it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from edgellm_plugins.aggregation.options import Adaptive
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import SERVER, Array, Arrays, State, Update

Rule: TypeAlias = Callable[[Array, Array, Arrays], tuple[Array, dict[str, Array]]]
"""(theta, Delta, moments of one array) -> (the step, added to theta; the new moments): all float64 of one shape."""
Second: TypeAlias = Callable[[Array, Array], Array]
"""(v, Delta^2) -> the next v."""


class Weighting(Protocol):
    """The options behind a weighted mean."""

    @property
    def weighting(self) -> str: ...
    @property
    def cap(self) -> int: ...


def mean_change(state: State, rows: Sequence[Update], config: Weighting) -> dict[str, Array]:
    """Delta = sum_k p_k (theta_k - theta): float64. FederationError when nobody knows what the clients started from."""
    found = averaging.mean([update.arrays for update in rows], averaging.shares(rows, config.weighting, config.cap))
    if rows[0].kind == "delta":
        return found
    unknown = sorted(found.keys() - state.arrays.keys())
    if unknown:
        what = f"nobody knows from which {unknown[0]} the clients started, so there is no change to step along"
        raise FederationError(what, "aggregate", "use fedavg")
    return {name: mean - state.arrays[name] for name, mean in found.items()}


def stepped(
    state: State, updates: Sequence[Update], config: Weighting, ctx: Context, rule: Rule, start: dict[str, float]
) -> State:
    """The state one round later. `start` holds the first value of every moment; arrays keep their dtype."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    arrays = dict(state.arrays)
    for name, change in mean_change(state, rows, config).items():
        theta = state.arrays.get(name, np.zeros(change.shape))
        before = {
            moment: state.arrays.get(f"{SERVER}{moment}/{name}", np.full(change.shape, first))
            for moment, first in start.items()
        }
        step, after = rule(theta.astype(np.float64), change, before)
        arrays[name] = (theta + step).astype(dtypes[name])
        arrays |= {f"{SERVER}{moment}/{name}": value for moment, value in after.items()}
    return averaging.advanced(state, updates, arrays, ctx)


def adaptive(
    state: State, updates: Sequence[Update], config: Adaptive, ctx: Context, second: Second, decay: float = 0.0
) -> State:
    """FedOpt, Algorithm 2: u <- beta_1 u + (1 - beta_1) Delta; v by `second`; theta <- theta + eta u / (sqrt(v) + tau).

    No bias correction; u starts at 0 and v at tau^2. (Flower's rules start v at 0, and its FedAdam corrects the bias.)
    `decay` lambda takes eta lambda theta away as well.
    """

    def rule(theta: Array, change: Array, before: Arrays) -> tuple[Array, dict[str, Array]]:
        u = config.beta1 * before["u"] + (1 - config.beta1) * change
        v = second(before["v"], change**2)
        step = config.server_rate * u / (np.sqrt(v) + config.tau)
        return step - config.server_rate * decay * theta if decay else step, {"u": u, "v": v}

    return stepped(state, updates, config, ctx, rule, {"u": 0.0, "v": config.tau**2})

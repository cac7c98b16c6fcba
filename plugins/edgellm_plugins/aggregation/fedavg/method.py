"""FedAvg, arXiv 1602.05629, Algorithm 1: w <- sum_k (n_k / n) w_k over the clients k of the round.

Updates of kind `weights` carry the clients' new values, of kind `delta` their change. Sums run in float64 over clients
in sorted order, so the order of arrival changes no byte. LoRA factors are averaged one by one, as FedIT does; the mean
of products B A is another method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation.fedavg import Config
from edgellm_sdk.errors import FederationError
from edgellm_sdk.types import State, Update
from edgellm_sdk.wire import check_update

KINDS = ("weights", "delta")


def screen(updates: Sequence[Update], state: State) -> dict[str, str]:
    """Reject kinds we cannot average and shapes that differ from the state's (from the first update's in round 1)."""
    known = dict(state.arrays) or (dict(updates[0].arrays) if updates else {})
    reasons = {}
    for update in updates:
        if update.kind not in KINDS:
            reasons[update.client] = f"kind {update.kind[:40]!r} is no set of weights"
        elif problem := check_update(update, state, update.client, known):
            reasons[update.client] = problem
    return reasons


def aggregate(state: State, updates: Sequence[Update], config: Config) -> State:
    """The state one round later; arrays keep their dtype."""
    kinds = {update.kind for update in updates}
    if len(kinds) != 1 or not kinds <= set(KINDS):
        raise FederationError(f"cannot average updates of kind {', '.join(sorted(kinds))}", "fedavg")
    ordered = sorted(updates, key=lambda update: update.client)
    claims = [min(u.examples, config.cap) if config.cap else u.examples for u in ordered]
    weights = [claim if config.weighting == "examples" else 1 for claim in claims]
    total = float(sum(weights))
    arrays = {}
    for name, first in ordered[0].arrays.items():
        if first.dtype.kind != "f":
            raise FederationError(f"{name} holds {first.dtype}, which has no mean", "fedavg")
        mean = np.zeros(first.shape)
        for update, weight in zip(ordered, weights, strict=True):
            mean += update.arrays[name].astype(np.float64) * (weight / total)
        old = state.arrays.get(name)
        if kinds == {"delta"}:
            mean = config.server_rate * mean + (0 if old is None else old)
        elif old is not None:
            mean = old + config.server_rate * (mean - old)
        arrays[name] = mean.astype(first.dtype)
    return State(state.base, state.round + 1, arrays, state.scalars, state.cohort + 1)

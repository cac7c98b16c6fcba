"""SCAFFOLD, arXiv 1910.06378, Algorithm 1 with option II: a client's step follows g - c_i + c.

c_i is the client's own direction, kept on the client; c the server's, the array `server/scaffold/NAME` of the State,
float64. A client is sent c as `scaffold/NAME` beside theta, and sends back c_i+ - c_i under the same name: twice the
traffic in both directions. From its steps, theta_0 - theta_K = sum_k eta_k (g_k - c_i + c), it takes
    c_i+ = c_i - c + (theta_0 - theta_K) / sum_k eta_k
which is the mean of its gradients, weighted by the rates; the paper's divisor K eta is that of a constant rate. The
server adds sum_i (c_i+ - c_i) / N over those that answered, of N enrolled.

With c = c_i = 0, as in the first round, it is the method alone, bit for bit.

Clients take plain SGD steps: with moments, decay or clipping theta_0 - theta_K is no sum of gradients, and such options
are refused. c belongs to coordinates: a rule that gives LoRA factors other coordinates in every round (krum, norm-clip,
flexlora) makes it meaningless unless A is frozen (`lora-fa`).

Where we differ: theta is aggregated by the run's rule, the paper takes the plain mean (`fedavg`, weighting equal). A
client whose update is lost keeps its c_i+, of which the server never hears; c is then not the mean of the c_i. c is a
plain mean, whatever the rule for theta: one hostile client can bend it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgellm_plugins.federated.drift import drift_of
from edgellm_plugins.federated.scaffold import PLUGIN
from edgellm_plugins.training.options import Options
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit.averaging import KINDS, theta
from edgellm_sdk.types import SERVER, Array, Arrays, Assignment, State, Update

OWN = f"{PLUGIN.name}/"
ENROLLED = "scaffold enrolled"


def variates(arrays: Arrays) -> dict[str, Array]:
    """c or c_i+ - c_i in a message, under theta's names."""
    return {name.removeprefix(OWN): array for name, array in arrays.items() if name.startswith(OWN)}


def packed(found: Arrays) -> dict[str, Array]:
    """As they travel: float32 `scaffold/NAME`."""
    return {f"{OWN}{name}": np.asarray(array, np.float32) for name, array in found.items()}


# The server, before


def assigned(given: Mapping[str, Assignment], state: State, enrolled: int, ctx: Context) -> Mapping[str, Assignment]:
    """Every assignment with c beside theta. ConfigError, before anybody works, for a method that `insist_on_sgd`
    refuses, and where a client is sent theta of another shape than the server's."""
    insist_on_sgd(next((config for config in ctx.configs.values() if isinstance(config, Options)), None))
    ctx.drop(ENROLLED)
    ctx.keep(ENROLLED, lambda: enrolled)
    return {client: replace(a, arrays={**a.arrays, **packed(_server_c(a, state))}) for client, a in given.items()}


def _server_c(assignment: Assignment, state: State) -> dict[str, Array]:
    found = {}
    for name, array in theta(assignment.arrays).items():
        if name not in state.arrays or state.arrays[name].shape != array.shape:
            what = f"scaffold compares clients number by number, and {assignment.client} trains another {name}"
            raise ConfigError(what, "around scaffold", "give all clients the same layers and ranks")
        found[name] = state.arrays.get(f"{SERVER}{OWN}{name}", np.zeros(array.shape))
    return found


# The client


def _own(assignment: Assignment, ctx: Context) -> dict[str, Array]:
    """c_i: what the client kept, zeros on its first turn; float32."""
    kept = ctx.recall(assignment.client, PLUGIN.name, assignment.round)
    if kept is not None:
        return kept[0]
    return {name: np.zeros_like(c) for name, c in variates(assignment.arrays).items()}


def prepare(assignment: Assignment, ctx: Context) -> None:
    """Add c - c_i to every gradient of the turn at hand."""
    own, drift = _own(assignment, ctx), drift_of(ctx)
    correction = {name: c - own[name] for name, c in variates(assignment.arrays).items()}
    drift.arrays = {**drift.arrays, **{name: array + drift.arrays.get(name, 0) for name, array in correction.items()}}


def insist_on_sgd(config: Any) -> None:
    """ConfigError for a method or options whose steps are not a rate times a gradient."""
    if not isinstance(config, Options):
        what = "scaffold needs steps along gradients, at rates that it knows"
        raise ConfigError(what, "around scaffold", "use a method of back-propagation, such as lora or lora-fa")
    if config.optimizer != "sgd" or config.clip or config.weight_decay:
        what = "scaffold needs plain SGD steps, without moments, clipping or decay"
        raise ConfigError(what, "around scaffold", "use optimizer=sgd, clip=0 and weight_decay=0")
    if not config.learning_rate:
        raise ConfigError("scaffold divides by the sum of the learning rates, which is 0", "learning_rate")


def reported(update: Update, assignment: Assignment, ctx: Context) -> Update:
    """`update` with c_i+ - c_i beside theta; c_i+ stays here. ConfigError where another plugin changed what was
    trained."""
    own, sent, start = _own(assignment, ctx), variates(assignment.arrays), theta(assignment.arrays)
    if update.kind not in KINDS or not sent.keys() <= update.arrays.keys():
        what = f"scaffold reads the change of theta, and finds kind {update.kind!r} changed by another plugin"
        raise ConfigError(what, "around scaffold", "name scaffold first in around")
    total, found = math.fsum(drift_of(ctx).rates), {}
    for name, c in sent.items():
        change = update.arrays[name].astype(np.float64) - (start[name] if update.kind == "weights" else 0)
        found[name] = (-change / total - c).astype(np.float32)
    kept = {name: own[name] + change for name, change in found.items()}
    ctx.remember(assignment.client, PLUGIN.name, assignment.round, kept, {})
    return replace(update, arrays={**update.arrays, **packed(found)})


# The server, after


def screen(updates: Sequence[Update], ctx: Context) -> dict[str, str]:
    """Reject what does not carry a change of c_i for everything that was sent, in its shape."""
    reasons = {}
    for update in updates:
        wanted = variates(ctx.assigned[update.client].arrays) if update.client in ctx.assigned else {}
        found = variates(update.arrays)
        if {n: (a.shape, a.dtype) for n, a in found.items()} != {n: (a.shape, a.dtype) for n, a in wanted.items()}:
            reasons[update.client] = "does not carry the change of its control variate"
    return reasons


def aggregated(new: State, state: State, updates: Sequence[Update], ctx: Context) -> State:
    """`new` with c + sum_i (c_i+ - c_i) / N."""
    enrolled: int = ctx.keep(ENROLLED, lambda: len(updates))
    rows = [variates(update.arrays) for update in sorted(updates, key=lambda update: update.client)]
    arrays = dict(new.arrays)
    for name in rows[0]:
        key = f"{SERVER}{OWN}{name}"
        c = state.arrays.get(key, np.zeros(rows[0][name].shape))
        arrays[key] = c + np.sum([row[name].astype(np.float64) for row in rows], axis=0) / enrolled
    return replace(new, arrays=arrays)

"""FedSA-LoRA, arXiv 2410.01463: clients train A_k and B_k, the server averages A alone; B_k never leaves its client.

    A <- sum_k p_k A_k,   client k goes on with dW_k = s B_k A.

There is no one model but one for each client, so no mean of products to miss and no aggregation error is drawn. Where
this machine plays the clients, the metrics of a State are means over the clients' own models, all on the held-out data
of the run, and the model of every client that took part is written: `client`'s as the run's, all into `personal/`.

Where we differ from the paper (and why):
- There each client's model is measured on its own test split; the run here holds out one set for all.
- There the classifier's head stays with the client too; our tasks are answered in words and have no head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_plugins.aggregation import factors, turns
from edgellm_plugins.aggregation.factors import B
from edgellm_plugins.aggregation.fedsa_lora import Config
from edgellm_sdk import store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Arrays, Assignment, Dataset, Metric, ModelHandle, State, Update

MEMORY, OWN, TAKEN = "own B", "own/", "personal"


def own_names(arrays: Arrays) -> list[str]:
    """The names of B in pairs."""
    return [f"{module}.{B}" for module in factors.modules(arrays)]


def assign(state: State, clients: Sequence[str], ctx: Context) -> dict[str, Assignment]:
    """theta without any B, but its shapes; a start other than zero as `own/` in a first turn."""
    theta = averaging.theta(state.arrays)
    names = own_names(theta)
    shared = {name: array for name, array in theta.items() if name not in names}
    shapes = {name: list(theta[name].shape) for name in names}
    begun = {OWN + name: theta[name] for name in names if np.any(theta[name])}
    return {
        client: turns.assignment(
            state, client, shared if turns.last(state, client, ctx) else {**shared, **begun}, {"own": shapes}
        )
        for client in clients
    }


def own(client: str, round: int, ctx: Context) -> Arrays | None:
    """B as `client` has it at the start of `round`; None before its first turn."""
    found = ctx.recall(client, MEMORY, round)
    return None if found is None else found[0]


def prepare(assignment: Assignment, ctx: Context) -> Assignment:
    """With the client's own B, zero in its first turn."""
    shapes, client = assignment.scalars["own"], assignment.client
    arrays = {name: array for name, array in assignment.arrays.items() if not name.startswith(OWN)}
    begun = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    begun |= {name: assignment.arrays[OWN + name] for name in shapes if OWN + name in assignment.arrays}
    return replace(assignment, arrays={**arrays, **begun, **(own(client, assignment.round, ctx) or {})})


def kept(update: Update, assignment: Assignment, ctx: Context) -> Update:
    """The update without B, which the client remembers as it now is."""
    names = [name for name in assignment.scalars["own"] if name in update.arrays]
    change = update.kind == "delta"
    after = {name: update.arrays[name] + (assignment.arrays[name] if change else 0) for name in names}
    ctx.remember(update.client, MEMORY, assignment.round, after, {"round": assignment.round})
    return replace(update, arrays={name: array for name, array in update.arrays.items() if name not in names})


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The mean of what was sent. FederationError for files that hold a B: whose it is to be, no file says."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    if any(own_names(update.arrays) for update in rows):
        raise FederationError("every client keeps its own B: there is no one model", "aggregate", "use flora")
    several = [averaging.values(update, state, ctx) for update in rows]
    means = averaging.mean(several, averaging.shares(rows, config.weighting, config.cap))
    arrays = dict(state.arrays) | {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    told = {TAKEN: sorted({*state.scalars.get(TAKEN, ()), *(update.client for update in rows)})}
    return averaging.advanced(state, updates, arrays, ctx, {**turns.taken(state, updates, ctx), **told})


# One model for each client, where this machine plays them


def models_of(state: State, ctx: Context) -> dict[str, Arrays]:
    """theta of every client whose B is on this machine: the shared arrays and its own B."""
    found = {client: own(client, state.round + 1, ctx) for client in state.scalars.get(TAKEN, ())}
    return {client: {**state.sent, **b} for client, b in found.items() if b is not None}


def measured(found: Any, subject: object, data: Dataset, ctx: Context) -> Any:
    """Means over the clients' models of what is measured; what was `found` where there are none."""
    from edgellm_sdk.kit.objective import measured as measure

    several = [] if not isinstance(subject, State) else list(models_of(subject, ctx).values())
    told: list[Mapping[str, Metric]] = [one for theta in several if (one := measure(theta, data, ctx))]
    if not told:
        return found
    means = {
        name: Metric(float(np.mean([one[name].value for one in told])), metric.unit, metric.n)
        for name, metric in told[0].items()
    }
    return [means]


def folder_name(client: str) -> str:
    """`client` as the name of a folder: itself where that is plain, else with other signs replaced and a digest."""
    plain = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "-_") else "-" for sign in client[:64])
    return plain if plain == client else f"{plain}-{hashlib.sha256(client.encode()).hexdigest()[:12]}"


def personal(handle: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """Every client's adapter in `personal/CLIENT` beside `folder`, the chosen one's in `folder` itself."""
    from edgellm_sdk.kit import adapters
    from edgellm_sdk.models import resolve

    several = models_of(state, ctx)
    if not several:
        return handle
    chosen = config.client or min(several)
    if chosen not in several:
        raise ConfigError(f"client: {chosen[:60]!r} took no part", "client", f"one of {', '.join(several)[:200]}")
    told, base = store.read_json(folder / adapters.MARK), store.read_json(folder / "base.json")
    spec = adapters.Spec(**{**told, "targets": tuple(told["targets"])})
    for client, theta in several.items():
        adapters.write_arrays(folder.parent / "personal" / folder_name(client), spec, theta, base)
    adapters.write_arrays(folder, spec, several[chosen], base)
    ctx.note(f"model: {chosen}'s; those of all clients are in personal/")
    return resolve(str(folder))

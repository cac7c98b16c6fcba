"""What rules of aggregation share: which arrays train, whose word weighs how much, means, the next State.

Everything is numpy, sums run in float64 over clients in sorted order, so the order of arrival changes no byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.random import RNG_ID
from edgellm_sdk.types import FOLDED, Array, Arrays, State, Update
from edgellm_sdk.wire import check_update

Value = TypeVar("Value")
KINDS = ("weights", "delta")
"""`weights`: a client's new values; `delta`: new values minus those it was sent."""


def theta(arrays: Arrays) -> dict[str, Array]:
    """What trains: neither a plugin's own arrays, which have a slash in their names, nor a folded LoRA."""
    return {name: array for name, array in arrays.items() if "/" not in name and not name.endswith(FOLDED)}


def sent(client: str, state: State, ctx: Context) -> dict[str, Array]:
    """theta as `client` trains from it: what it was sent, unless `ctx.starts` knows better; the state's where no
    assignment is known, as for files carried by hand."""
    if client in ctx.starts:
        return dict(ctx.starts[client])
    return theta(ctx.assigned[client].arrays if client in ctx.assigned else state.sent)


def beside(update: Update, ctx: Context) -> dict[str, Array]:
    """What `update` carries besides theta under names that its client was sent by a plugin of the run, as sent."""
    given = ctx.assigned[update.client].arrays if update.client in ctx.assigned else {}
    own = [name for name in update.arrays if "/" in name and name.partition("/")[0] in ctx.configs]
    return {name: given[name] for name in own if name in given}


def screen(updates: Sequence[Update], state: State, ctx: Context) -> dict[str, str]:
    """Reject what is no set of weights, names, shapes or dtypes other than those the client was sent, an unknown random
    stream, and a kind other than that of most. Where nothing was sent the first update's arrays are the measure.

    A plugin that sends arrays `PLUGIN/...` may be sent such arrays back, and judges them itself.
    """
    first = theta(updates[0].arrays) if updates else {}
    reasons = {}
    for update in updates:
        if update.kind not in KINDS:
            reasons[update.client] = f"kind {update.kind[:40]!r} is no set of weights"
            continue
        expected = {**(sent(update.client, state, ctx) or first), **beside(update, ctx)}
        if update.rng not in ("", RNG_ID):
            reasons[update.client] = f"draws from {update.rng[:40]!r}, not from {RNG_ID!r}"
        elif problem := check_update(update, state, update.client, expected):
            reasons[update.client] = problem
    kinds = [update.kind for update in updates if update.client not in reasons]
    most = max(KINDS, key=kinds.count)
    odd = {update.client: f"sends {update.kind}, most send {most}" for update in updates if update.kind != most}
    return {**odd, **reasons}


def shares(updates: Sequence[Update], weighting: str = "examples", cap: int = 0) -> list[float]:
    """Weights that sum to 1: by the number of `examples` a client claims, at most `cap` of them, or `equal`."""
    counts = [
        1 if weighting == "equal" else min(update.examples, cap) if cap else update.examples for update in updates
    ]
    return [count / sum(counts) for count in counts]


def ordered(updates: Sequence[Update]) -> list[Update]:
    """Sorted by client, with nothing but theta. FederationError when they are not all of one kind that is a set of
    weights."""
    kinds = {update.kind for update in updates}
    if len(kinds) != 1 or not kinds <= set(KINDS):
        raise FederationError(f"cannot combine updates of kind {', '.join(sorted(kinds))}", "aggregate")
    return [replace(update, arrays=theta(update.arrays)) for update in sorted(updates, key=lambda u: u.client)]


def values(update: Update, state: State, ctx: Context) -> dict[str, Array]:
    """A client's new theta: float64 for a `delta`, as it came for `weights`."""
    if update.kind == "weights":
        return dict(update.arrays)
    start = sent(update.client, state, ctx)
    return {name: array.astype(np.float64) + start.get(name, 0) for name, array in update.arrays.items()}


def names(several: Sequence[Mapping[str, Value]]) -> list[str]:
    """All names, in the order in which they come first."""
    return list(dict.fromkeys(name for one in several for name in one))


def having(
    name: str, several: Sequence[Mapping[str, Value]], weights: Sequence[float]
) -> tuple[list[Value], list[float]]:
    """What is called `name` where there is such, and the weights, which are as much in sum as all: clients that do not
    train an array have no say in its mean."""
    rows = [(one[name], weight) for one, weight in zip(several, weights, strict=True) if name in one]
    if len(rows) == len(several):
        return [value for value, _ in rows], list(weights)
    whole, part = math.fsum(weights), math.fsum(weight for _, weight in rows)
    share = whole / part if part else 0.0
    return [value for value, _ in rows], [weight * share for _, weight in rows]


def dtypes(updates: Sequence[Update]) -> dict[str, np.dtype[Any]]:
    """Of every array that an update carries."""
    return {name: array.dtype for update in reversed(updates) for name, array in update.arrays.items()}


def mean(several: Sequence[Arrays], weights: Sequence[float]) -> dict[str, Array]:
    """sum_k weights[k] several[k], name by name, over those who have it (see `having`): float64. FederationError for
    integers and for unlike shapes."""
    found = {}
    for name in names(several):
        rows, scaled = having(name, several, weights)
        first = rows[0]
        total = np.zeros(first.shape)
        for array, weight in zip(rows, scaled, strict=True):
            if array.dtype.kind != "f":
                raise FederationError(f"{name} holds {array.dtype}, which has no mean", "aggregate")
            if array.shape != first.shape:
                what = f"{name} has shapes {list(first.shape)} and {list(array.shape)}, which have no mean"
                raise FederationError(what, "aggregate", "use flexlora or flora for unlike ranks")
            total += array.astype(np.float64) * weight
        found[name] = total
    return found


def advanced(
    state: State, updates: Sequence[Update], arrays: Arrays, ctx: Context, scalars: Mapping[str, object] | None = None
) -> State:
    """The State of the next round, with `scalars` added to those there are.

    Where all updates tell their `steps`, `forwards` and `loss`, these are added up and drawn over rounds: steps as the
    most of any client, forwards of all, the loss weighted by examples.
    """
    told: dict[str, object] = {**state.scalars, **(scalars or {})}
    rows = sorted(updates, key=lambda update: update.client)
    if rows and all({"steps", "forwards", "loss"} <= update.scalars.keys() for update in rows):
        examples = sum(update.examples for update in rows)
        steps, forwards = (int(state.scalars.get(name, 0)) for name in ("steps", "forwards"))
        told["steps"] = steps + max(update.scalars["steps"] for update in rows)
        told["forwards"] = forwards = forwards + sum(update.scalars["forwards"] for update in rows)
        loss = math.fsum(update.scalars["loss"] * update.examples for update in rows) / examples
        ctx.trained(state.round + 1, forwards, loss)
    return State(state.base, state.round + 1, arrays, told, state.cohort + 1)

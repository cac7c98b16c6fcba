"""What rules that withstand hostile clients share: changes, their inner products, sums of changes, refusals.

A rule sees client k's change Delta_k = x_k - x_0 from what it was sent. For a pair of LoRA factors that is the change
of the product, Delta(B A) = [B_k - B_0, B_0] [A_k; A_k - A_0], a product of rank 2r that is never formed: (B Q, Q^-1 A)
is the same update in other coordinates, and a client is free to choose them. A rule that looks at distances and norms
alone needs the inner products of changes, and what it gives back is x_0 + sum_k c_k Delta_k. For pairs that is a
stacked product, of which the best approximation of the old rank is kept, B = U S and A = V^T: a hostile client that is
right in the product and absurd in the factors does no harm. What is left out is drawn as `truncation over rounds`.

Rules that look at one coordinate at a time are refused where both factors train; with A frozen (`lora-fa`) they are as
good as for any other arrays, as are distances of B alone.

No rule weighs clients by examples unless it says so: a client's number of examples is its own word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.factors import A, B, Product
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Array, Arrays, State, Update


def changes(state: State, rows: Sequence[Update], ctx: Context) -> list[dict[str, Array]]:
    """Delta_k of every update: float64; pairs of factors of rank 2r (r where nobody knows what the client was sent)."""
    found = []
    for update in rows:
        start = averaging.sent(update.client, state, ctx)
        new = averaging.values(update, state, ctx)
        change = {
            name: np.asarray(update.arrays[name], np.float64) - (start.get(name, 0) if update.kind == "weights" else 0)
            for name in new
        }
        for name, array in update.arrays.items():
            if array.dtype.kind != "f":
                raise FederationError(f"{name} holds {array.dtype}, which has no mean", "aggregate")
        for module in factors.modules(new):
            a, b = f"{module}.{A}", f"{module}.{B}"
            if a in start and b in start:
                change |= {
                    b: np.concatenate([change[b], start[b].astype(np.float64)], axis=1),
                    a: np.concatenate([new[a].astype(np.float64), change[a]]),
                }
        found.append(change)
    if any(change.keys() != found[0].keys() for change in found):
        what = "the clients train unlike sets of layers, and changes of unlike arrays have no distance"
        raise FederationError(what, "aggregate", "give all clients the same layers, or use fedavg or flora")
    for name, first in factors.others(found[0]).items():
        for change in found:
            if change[name].shape != first.shape:
                what = f"{name} has shapes {list(first.shape)} and {list(change[name].shape)}, which have no mean"
                raise FederationError(what, "aggregate", "give all clients one rank")
    return found


def combined(
    state: State, rows: Sequence[Update], moved: Sequence[Arrays], weights: Sequence[float], ctx: Context
) -> State:
    """The State with theta = x_0 + sum_k weights[k] moved[k]; arrays keep the updates' dtypes and the state's ranks."""
    theta = averaging.theta(state.arrays)
    moved = [change for change, weight in zip(moved, weights, strict=True) if weight]
    weights = [weight for weight in weights if weight]
    products = [factors.factors(change) for change in moved]
    arrays = dict(state.arrays)
    lost, whole = 0.0, 0.0
    for module in products[0]:
        a, b = f"{module}.{A}", f"{module}.{B}"
        old = factors.factors({name: theta[name] for name in (a, b) if name in theta}).get(module)
        parts = [one[module] for one in products]
        total = factors.stacked([*([old] if old else []), *parts], [*([1.0] if old else []), *weights])
        rank = old.rank if old else max(part.rank for part in parts)
        kept, left, all_of_it = _refactored(total, rank)
        lost, whole = lost + left, whole + all_of_it
        arrays[a] = kept.a.astype(rows[0].arrays[a].dtype)
        arrays[b] = kept.b.astype(rows[0].arrays[b].dtype)
    for name in factors.others(moved[0]):
        step = np.sum([change[name] * weight for change, weight in zip(moved, weights, strict=True)], axis=0)
        arrays[name] = np.asarray(theta.get(name, 0) + step, rows[0].arrays[name].dtype)
    if whole:
        ctx.curve("truncation over rounds", state.round + 1, float(np.sqrt(lost / whole)))
    return averaging.advanced(state, rows, arrays, ctx)


def _refactored(product: Product, rank: int) -> tuple[Product, float, float]:
    """(the best approximation with `rank` rows in a, the square of what it leaves out, that of the whole).

    Rows of a stay orthonormal where b is zero, so that what has not been learnt yet can still be.
    """
    u, s, vt = product.svd()
    squares = s**2
    kept = Product(u[:, :rank] * s[:rank], vt[:rank])
    missing = rank - kept.rank
    if missing > 0:
        kept = Product(np.pad(kept.b, ((0, 0), (0, missing))), np.pad(kept.a, ((0, missing), (0, 0))))
    return kept, float(squares[rank:].sum()), float(squares.sum())


# Refusals


def hostile(asked: int, clients: int, slope: int, offset: int, rule: str) -> int:
    """f for a round of `clients` >= `slope` f + `offset`: as asked, or with -1 (n - 3) / 2 within that limit.

    FederationError when there are too few clients.
    """
    most = (clients - offset) // slope
    wanted = min(max(0, (clients - 3) // 2), most) if asked < 0 else asked
    if wanted > most or most < 0:
        what = f"{rule} withstands {max(0, wanted)} hostile clients among {slope * max(0, wanted) + offset} or more"
        raise FederationError(f"{what}, and {clients} answered", "aggregate", "ask more clients or lower byzantine")
    return wanted


def enough(asked: int, clients: int, slope: int, offset: int, rule: str) -> None:
    """ConfigError, before any client works, where `hostile` could only refuse."""
    try:
        hostile(asked, clients, slope, offset, rule)
    except FederationError as error:
        what = error.what.replace("answered", "are asked in a round")
        raise ConfigError(what, f"options.{rule}", "raise clients-per-round or lower byzantine") from None


def one_by_one(arrays: Arrays, rule: str) -> None:
    """ConfigError where both factors of a LoRA train: coordinates of A and of B mean nothing apart."""
    if pairs := factors.modules(name.removesuffix(".weight") for name in arrays):
        what = f"{pairs[0]}: both LoRA factors train, and a rule that takes numbers one by one says nothing about B A"
        raise ConfigError(what, rule, "train with lora-fa, or use krum, geometric-median or norm-clip")


def by_coordinate(
    state: State, updates: Sequence[Update], rule: str, ctx: Context
) -> tuple[list[Update], list[dict[str, Array]]]:
    """(updates by client, their changes) for a rule that looks at one coordinate at a time; ConfigError for pairs."""
    rows = averaging.ordered(updates)
    one_by_one(rows[0].arrays, rule)
    return rows, changes(state, rows, ctx)


def moved(state: State, rows: Sequence[Update], change: Arrays, ctx: Context) -> State:
    """The State with theta = x_0 + `change`, arrays in the updates' dtypes."""
    theta = averaging.theta(state.arrays)
    new = {name: (theta.get(name, 0) + array).astype(rows[0].arrays[name].dtype) for name, array in change.items()}
    return averaging.advanced(state, rows, {**state.arrays, **new}, ctx)

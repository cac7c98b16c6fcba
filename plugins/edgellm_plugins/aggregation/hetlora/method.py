"""HetLoRA's aggregation, arXiv 2401.06432: factors of ranks r_k are filled up with zeros to the largest and averaged,

    A <- sum_k p_k [A_k; 0],   B <- sum_k p_k [B_k, 0],   p_k ~ ||B_k A_k||_F,

and client k is sent the first r_k rows of A and columns of B. It is no mean of products, and what only clients of large
ranks train is thinned by the zeros of the others: a baseline. Rows that nobody trains in a round become zero in both
factors and stay so.

Where we differ from the paper (and why):
- Clients do not prune their ranks: that needs a term in their loss and a rank that is theirs to change.
- The norm is that of all modules together, as the change is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.factors import A, B, Product
from edgellm_plugins.aggregation.hetlora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Array, State, Update


def shares_by_norm(products: Sequence[Mapping[str, Product]]) -> list[float]:
    """Weights proportional to ||B_k A_k||_F, equal where all are zero."""
    norms = [float(np.linalg.norm([product.norm() for product in one.values()])) for one in products]
    return [norm / sum(norms) for norm in norms] if sum(norms) else [1 / len(norms)] * len(norms)


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The zero-padded mean of factors; the mean of what is no factor, by the same weights."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    several = [averaging.values(update, state, ctx) for update in rows]
    products = [factors.factors(one) for one in several]
    if config.weighting == "norm":
        weights = shares_by_norm(products)
    else:
        weights = averaging.shares(rows, config.weighting, config.cap)
    means = averaging.mean([factors.others(one) for one in several], weights)
    arrays: dict[str, Array] = dict(state.arrays)
    arrays |= {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    wide = {m: max(one[m].rank for one in products if m in one) for m in averaging.names(products)}
    if state.arrays:
        wide = {module: len(state.arrays[f"{module}.{A}"]) for module in wide}
    padded = [{module: factors.padded(product, wide[module]) for module, product in one.items()} for one in products]
    for module, product in factors.averaged(padded, weights).items():
        arrays[f"{module}.{A}"], arrays[f"{module}.{B}"] = product.a.astype(np.float32), product.b.astype(np.float32)
    factors.draw_errors(ctx, state.round + 1, products, weights)
    return averaging.advanced(state, updates, arrays, ctx)

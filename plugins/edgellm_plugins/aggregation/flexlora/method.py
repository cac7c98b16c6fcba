"""FlexLoRA, arXiv 2402.11505: with dW* = sum_k p_k s B_k A_k = U S V^T the server keeps

    s B = U_r S_r,  A = V_r^T,

S on one side only, and client i is sent the first r_i components, the best approximation of its rank. The error is
sqrt(sum_{j > r} S_j^2) / ||dW*||. At equal ranks this is the control of the exact rules: exact but for the rank.

Where we differ from the paper (and why):
- QR of stacked factors before the SVD: no matrix of the size of W is formed.
- Where dW* has fewer than r components the old rows of A fill up, with zeros in B: a row of zeros in both would never
  train again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.factors import A, B, Product
from edgellm_plugins.aggregation.flexlora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Array, State, Update


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The first components of the exact mean of products; the mean of what is no factor."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    weights = averaging.shares(rows, config.weighting, config.cap)
    several = [averaging.values(update, state, ctx) for update in rows]
    products = [factors.factors(one) for one in several]
    means = averaging.mean([factors.others(one) for one in several], weights)
    arrays: dict[str, Array] = dict(state.arrays)
    arrays |= {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    for module, exact in factors.mean(products, weights).items():
        old = state.arrays.get(f"{module}.{A}")
        widest = max(one[module].rank for one in products if module in one)
        rank = len(old) if old is not None else config.rank or widest
        cut = filled(factors.best(exact, rank), rank, old)
        arrays[f"{module}.{A}"], arrays[f"{module}.{B}"] = cut.a.astype(np.float32), cut.b.astype(np.float32)
    factors.draw_errors(ctx, state.round + 1, products, weights, factors.factors(averaging.theta(arrays)))
    return averaging.advanced(state, updates, arrays, ctx)


def filled(product: Product, rank: int, old: Array | None) -> Product:
    """The same matrix with `rank` components, those added with the rows of `old` and zeros."""
    wide = factors.padded(product, rank)
    if old is not None and product.rank < rank:
        wide.a[product.rank :] = old[product.rank :]
    return wide

"""FedEx-LoRA, arXiv 2410.09432: clients train A and B, the server averages both and folds in what that misses,

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   W <- W + s (sum_k p_k B_k A_k - B A),

so that W + s B A is exactly the mean of the clients' models. The residual has rank (K - 1) r. It travels as factors,
from a QR-SVD that leaves out what is below `tolerance` times the norm of the mean, or all but the `rank` largest
singular values.

Where we differ from the paper (and why):
- W stays as it is (it may be quantised); the residuals make a LoRA beside it that clients and the final adapter carry.
- Adapters are never started anew: the paper finds that this loses most of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellm_plugins.aggregation import factors, folding, turns
from edgellm_plugins.aggregation.factors import Product
from edgellm_plugins.aggregation.fedex_lora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Assignment, State, Update


def assign(state: State, clients: Sequence[str], ctx: Context) -> dict[str, Assignment]:
    """theta, and what of the folded residuals the client lacks."""
    theta = averaging.theta(state.sent)
    return {
        client: turns.assignment(
            state, client, {**theta, **folding.sent(state, client, ctx)}, {"since": folding.since(state, client, ctx)}
        )
        for client in clients
    }


def residual(ideal: Mapping[str, Product], plain: Mapping[str, Product], config: Config) -> dict[str, Product]:
    """sum_k p_k B_k A_k - B A of every module, cut as `config` says."""
    return {
        module: factors.best(factors.difference(exact, plain[module]), config.rank, config.tolerance * exact.norm())
        for module, exact in ideal.items()
    }


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """Mean factors, and one more residual in what is folded."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    weights = averaging.shares(rows, config.weighting, config.cap)
    several = [averaging.values(update, state, ctx) for update in rows]
    means = averaging.mean(several, weights)
    theta = {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    products = [factors.factors(one) for one in several]
    missed = residual(factors.mean(products, weights), factors.factors(means), config)
    step = folding.named(missed, folding.scale(state)) if missed else {}
    used = {
        module: factors.stacked([product, missed[module]], [1.0, 1.0])
        for module, product in factors.factors(theta).items()
    }
    factors.draw_errors(ctx, state.round + 1, products, weights, used)
    arrays = folding.advanced(state, theta, step)
    return averaging.advanced(state, updates, arrays, ctx, turns.taken(state, updates, ctx))

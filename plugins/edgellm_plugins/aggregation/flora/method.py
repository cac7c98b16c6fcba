"""FLoRA, arXiv 2409.05976: the server stacks the clients' adapters, of ranks r_k that may differ,

    B^ = [p_1 B_1 .. p_K B_K],  A^ = [A_1; ..; A_K],  W <- W + s B^ A^ = W + sum_k p_k s B_k A_k,

everybody folds the stack into W, and new adapters begin: A random, B zero. The weights p_k go on one side alone; on
both they would be squared, and without a new start every round would count the last one again.

Where we differ from the paper (and why):
- W stays as it is (it may be quantised): stacks add up in a LoRA beside it, which becomes a matrix where it is larger
  than that.
- s is the same for all ranks, that of the method, as the paper's alpha = 2 r makes it.
- New adapters begin from one A, of which client k takes the first r_k rows. It is drawn from a seed that the assignment
  names, so that it need not be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgellm_plugins.aggregation import factors, folding, ranking, turns
from edgellm_plugins.aggregation.factors import A, B
from edgellm_plugins.aggregation.flora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Array, Arrays, Assignment, State, Update

START = "start"


def begun(modules: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Array]:
    """A (r, d_in) random and B (d_out, r) zero, float32, of `modules` {name: (d_out, d_in)}: rows of A are those that
    a larger rank has first."""
    from edgellm_sdk.kit.adapters import lora_start

    found: dict[str, Array] = {}
    for module, (d_out, d_in) in modules.items():
        low, high = lora_start(rank, d_in, d_out, Stream(seed, module))
        found |= {f"{module}.{A}": low, f"{module}.{B}": high}
    return found


def assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> dict[str, Assignment]:
    """What the client lacks of the stacks, and its rank; theta_0 in the first round, later only what is no factor."""
    theta = averaging.theta(state.arrays)
    ranks = ranking.ranks_of(data, theta, config, ctx)
    ctx.starts = {client: ranking.cut(theta, ranks[client]) for client in clients}
    found = {}
    for client in clients:
        own = factors.others(theta) if START in state.scalars else ctx.starts[client]
        told = {"rank": ranks[client], "since": folding.since(state, client, ctx)}
        found[client] = turns.assignment(state, client, {**own, **folding.sent(state, client, ctx)}, told)
    return found


def prepare(assignment: Assignment, ctx: Context) -> Assignment:
    """With all stacks folded, and a new adapter on them."""
    ready, told = folding.prepare(assignment, ctx), assignment.scalars
    if START not in told:
        return ready
    places = {head: (len(product.b), product.a.shape[1]) for head, product in folding.products_of(ready.arrays).items()}
    return replace(ready, arrays={**ready.arrays, **begun(places, told["rank"], int(told[START]))})


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The stack folded and a new start; of files carried by hand the stack itself."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    weights = averaging.shares(rows, config.weighting, config.cap)
    several = [averaging.values(update, state, ctx) for update in rows]
    products = [factors.factors(one) for one in several]
    stack = factors.mean(products, weights)
    means = averaging.mean([factors.others(one) for one in several], weights)
    theta: dict[str, Array] = {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    if not averaging.theta(state.arrays):
        for module, product in stack.items():
            theta |= {f"{module}.{A}": product.a.astype(np.float32), f"{module}.{B}": product.b.astype(np.float32)}
        factors.draw_errors(ctx, state.round + 1, products, weights, factors.factors(theta))
        return averaging.advanced(state, updates, theta, ctx)
    size, seed = folding.scale(state), int(ctx.stream("flora", state.round + 1).seeds(1)[0])
    step = folding.named(stack, size)
    used = {module: replace(product, b=product.b / size) for module, product in folding.products_of(step).items()}
    factors.draw_errors(ctx, state.round + 1, products, weights, used)
    arrays = folding.advanced(state, {**theta, **begun_like(state.arrays, seed)}, step)
    told = {**turns.taken(state, updates, ctx), START: str(seed)}
    return averaging.advanced(state, updates, arrays, ctx, told)


def begun_like(theta: Arrays, seed: int) -> dict[str, Array]:
    """A new start for every pair of `theta`, each of its own rank."""
    found: dict[str, Array] = {}
    for module, product in factors.factors(averaging.theta(theta)).items():
        found |= begun({module: (len(product.b), product.a.shape[1])}, product.rank, seed)
    return found

"""One factor of every LoRA trains and travels while the other rests: the mean of the one is the mean of the products,

    sum_k p_k B_k A = (sum_k p_k B_k) A.

A client is sent a factor that has changed since its last turn, under its own name if it is to train and as `frozen/` if
not, and takes the rest from its memory. Arrays that are no factors train and travel in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from edgellm_plugins.aggregation import factors, turns
from edgellm_plugins.aggregation.factors import A, B
from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import FROZEN, Array, Arrays, Assignment, State, Update

MEMORY = "factors"
Schedule: TypeAlias = Callable[[int], str]
"""Round 1, 2, ... -> the factor that trains in it, `lora_A` or `lora_B`."""


def side(name: str, pairs: Sequence[str]) -> str:
    """`lora_A` or `lora_B` for a factor of one of the modules `pairs`, else nothing."""
    head, _, end = name.rpartition(".")
    return end if head in pairs and end in (A, B) else ""


def changed(which: str, number: int, schedule: Schedule) -> int:
    """The last round before `number` in which the factor `which` trained, 0 for none."""
    return next((past for past in range(number - 1, 0, -1) if schedule(past) == which), 0)


def assign(state: State, clients: Sequence[str], schedule: Schedule, ctx: Context) -> dict[str, Assignment]:
    """To each client what it lacks."""
    number, theta = state.round + 1, averaging.theta(state.arrays)
    pairs, trains = factors.modules(theta), schedule(state.round + 1)
    fresh = {which: changed(which, number, schedule) for which in (A, B)}
    found = {}
    for client in clients:
        since, arrays = turns.last(state, client, ctx), {}
        for name, array in theta.items():
            which = side(name, pairs)
            if not which or not since or fresh[which] >= since:
                arrays[name if which in ("", trains) else FROZEN + name] = array
        found[client] = turns.assignment(state, client, arrays, {"trains": trains, "since": since})
    start = {name: array for name, array in theta.items() if side(name, pairs) in ("", trains)}
    ctx.starts = dict.fromkeys(clients, start)
    return found


def prepare(assignment: Assignment, ctx: Context) -> Assignment:
    """Completed from the client's memory, which then is of this round."""
    told, client = assignment.scalars, assignment.client
    whole: dict[str, Array] = turns.held(client, MEMORY, assignment.round, told["since"], ctx)
    whole |= {name.removeprefix(FROZEN): array for name, array in assignment.arrays.items()}
    pairs = factors.modules(whole)
    own = {name: array for name, array in whole.items() if side(name, pairs)}
    ctx.remember(client, MEMORY, assignment.round, own, {"round": assignment.round})
    arrays = {name if side(name, pairs) in ("", told["trains"]) else FROZEN + name: a for name, a in whole.items()}
    return Assignment(assignment.base, assignment.round, client, arrays, told, assignment.options)


def aggregate(state: State, updates: Sequence[Update], config: Weighted, sides: Sequence[str], ctx: Context) -> State:
    """The mean of what trained, in place of what was there. Files carried by hand hold both factors: those of one side,
    which is not the only one in `sides` that may train, must be equal in all."""
    rows = averaging.ordered(updates)
    dtypes = averaging.dtypes(rows)
    weights = averaging.shares(rows, config.weighting, config.cap)
    several: list[Arrays] = [averaging.values(update, state, ctx) for update in rows]
    if not averaging.theta(state.arrays):
        _needs_one_side(several, sides)
    means = averaging.mean(several, weights)
    arrays = dict(state.arrays) | {name: mean.astype(dtypes[name]) for name, mean in means.items()}
    products = [factors.factors({**_beside(state, one), **one}) for one in several]
    factors.draw_errors(ctx, state.round + 1, products, weights, factors.factors(averaging.theta(arrays)))
    return averaging.advanced(state, updates, arrays, ctx, turns.taken(state, updates, ctx))


def _beside(state: State, trained: Arrays) -> dict[str, Array]:
    """The factors of the state in the modules of `trained`."""
    heads = {name.rpartition(".")[0] for name in trained}
    return {n: array for n, array in averaging.theta(state.arrays).items() if n.rpartition(".")[0] in heads}


def _needs_one_side(several: Sequence[Arrays], sides: Sequence[str]) -> None:
    pairs = factors.modules(several[0])
    for trained in sides:
        rest = [name for name in several[0] if side(name, pairs) not in ("", trained)]
        if all(np.array_equal(one[name], several[0][name]) for one in several for name in rest):
            return
    resting = " nor ".join("A" if trained == B else "B" for trained in sides)
    what = f"{'neither ' if len(sides) > 1 else 'not '}{resting} is the same in all files"
    raise FederationError(what, "aggregate", "use flora, fedex-lora or flexlora")

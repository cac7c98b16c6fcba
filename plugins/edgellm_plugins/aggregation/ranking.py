"""Clients of unlike ranks: client i trains the first r_i rows of every A and columns of every B, at one scale.

Ranks are dealt in turn. A client that says what its uplink carries (`--profiles`) has the largest of them whose factors
it sends in `upload_seconds`, or the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.factors import A, B
from edgellm_plugins.aggregation.lora_options import Ranked
from edgellm_sdk.context import Context
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Array, Arrays, Assignment, State, Update


def ranks_of(data: Mapping[str, int], theta: Arrays, config: Ranked, ctx: Context) -> dict[str, int]:
    """The rank of every enrolled client. ConfigError for one above that of theta."""
    most = min((len(theta[f"{module}.{A}"]) for module in factors.modules(theta)), default=0)
    chosen = config.chosen(most)
    ranks = {client: chosen[place % len(chosen)] for place, client in enumerate(sorted(data))}
    bits = {rank: 8 * sum(array.nbytes for array in cut(theta, rank).values()) for rank in set(chosen)}
    for client, profile in ctx.profiles.items():
        if profile.up and client in ranks:
            ranks[client] = max((r for r in bits if bits[r] <= profile.up * config.upload_seconds), default=min(bits))
    return ranks


def cut(theta: Arrays, rank: int) -> dict[str, Array]:
    """theta with factors of `rank`."""
    found = dict(theta)
    for module in factors.modules(theta):
        found[f"{module}.{A}"] = theta[f"{module}.{A}"][:rank]
        found[f"{module}.{B}"] = theta[f"{module}.{B}"][:, :rank]
    return found


def assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Ranked, ctx: Context
) -> dict[str, Assignment]:
    """theta in each client's rank."""
    theta = averaging.theta(state.sent)
    ranks = ranks_of(data, theta, config, ctx)
    return {
        client: Assignment(state.base, state.round + 1, client, cut(theta, ranks[client]), state.scalars)
        for client in clients
    }


def screen(updates: Sequence[Update], state: State, ctx: Context) -> dict[str, str]:
    """As `averaging.screen`; of files carried by hand only the sizes of the matrices must agree."""
    if averaging.theta(state.arrays) or not updates:
        return averaging.screen(updates, state, ctx)
    wanted, reasons = _sizes(updates[0].arrays), {}
    for update in updates:
        if update.kind not in averaging.KINDS:
            reasons[update.client] = f"kind {update.kind[:40]!r} is no set of weights"
        elif update.kind == "delta" and factors.modules(update.arrays):
            reasons[update.client] = "carries a change of factors, which has no product"
        elif _sizes(update.arrays) != wanted:
            reasons[update.client] = "does not carry the arrays of the others, or of other sizes"
    return reasons


def _sizes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """Shapes, but for the rank."""
    pairs = factors.modules(arrays)
    inner = {f"{module}.{A}": 1 for module in pairs} | {f"{module}.{B}": 0 for module in pairs}
    return {name: (array.shape[inner[name]],) if name in inner else array.shape for name, array in arrays.items()}

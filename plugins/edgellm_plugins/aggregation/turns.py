"""Who holds what from an earlier turn, so that it need not be sent again.

The server keeps, in the scalar `turns`, the round in which each client last took part and was heard. A client remembers
on its own disk what it held at the start of a turn. Whoever was asked and not heard is taken to hold nothing; so is
everybody when a round is done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.types import Arrays, Assignment, State, Update

TURNS = "turns"


def last(state: State, client: str, ctx: Context) -> int:
    """The round since which `client` holds what it was sent; 0 if it holds nothing, or if this round is done again."""
    if any(assignment.round == state.round + 1 for assignment in ctx.assigned.values()):
        return 0
    return int(state.scalars.get(TURNS, {}).get(client, 0))


def taken(state: State, updates: Sequence[Update], ctx: Context) -> dict[str, Any]:
    """The scalar for the next State."""
    before = {client: turn for client, turn in state.scalars.get(TURNS, {}).items() if client not in ctx.assigned}
    return {TURNS: {**before, **{update.client: state.round + 1 for update in updates}}}


def assignment(state: State, client: str, arrays: Arrays, told: Mapping[str, Any]) -> Assignment:
    """Round `state.round + 1` for `client`, with the scalars of the state, but nobody's turns, and `told`."""
    scalars = {name: value for name, value in state.scalars.items() if name != TURNS}
    return Assignment(state.base, state.round + 1, client, arrays, {**scalars, **told})


def held(holder: str, name: str, round: int, since: int, ctx: Context) -> dict[str, Any]:
    """What `holder` remembers under `name` from a turn before `round`, not before `since`; nothing for `since` 0.

    FederationError when it remembers nothing so new: the server then sends everything next time.
    """
    if not since:
        return {}
    found = ctx.recall(holder, name, round)
    if found is None or found[1]["round"] < since:
        raise FederationError(f"no longer holds what it was sent in round {since}", holder)
    return found[0]

"""Who does the work of a round; in process, each client in turn, through the same messages as anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from edgellm_sdk.context import Context
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.ledger import Line
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Dataset, ModelHandle, Profile, State

if TYPE_CHECKING:
    from edgellm_sdk.steps.fleet import Elsewhere, Fleet


def _nothing(state: State) -> list[Line]:
    return []


@dataclass(frozen=True)
class Crowd:
    """Who takes part, as {client: its number of examples}, the engine that reaches them, and what they have.

    `finished` passes the final state on and says to whom, for the ledger; `tables` are for the report; `fleet`
    gives every client an adapter of its own after the rounds, or knows what they told of theirs.
    """

    clients: Mapping[str, int]
    engine: Engine
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    finished: Callable[[State], list[Line]] = _nothing
    tables: Callable[[], list[dict[str, Any]]] = list
    fleet: Fleet | Elsewhere | None = None


Gather: TypeAlias = Callable[[Relay, ModelHandle, Context], AbstractContextManager[Crowd]]


def in_process(relay: Relay, model: ModelHandle, shards: Mapping[str, Dataset], ctx: Context) -> Engine:
    """An engine over local shards."""

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, message in messages.items():
            yield client, work(relay, model, shards[client], client, message, ctx)

    return exchange

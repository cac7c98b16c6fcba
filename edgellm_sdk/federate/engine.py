"""The in-process engine: every client's work done here, one after the other, through the same messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgellm_sdk.context import Context
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Dataset, ModelHandle


def in_process(relay: Relay, model: ModelHandle, shards: Mapping[str, Dataset], ctx: Context) -> Engine:
    """An engine over local shards."""

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, message in messages.items():
            yield client, work(relay, model, shards[client], client, message, ctx)

    return exchange

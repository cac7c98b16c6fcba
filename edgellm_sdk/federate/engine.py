"""The in-process engine: every client's work done here, one after the other, through the same messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from edgellm_sdk import wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DeviceError, EdgeLLMError, Interrupted, PluginError, StorageError
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Dataset, ModelHandle

NOT_THE_CLIENTS_FAULT = (ConfigError, DeviceError, Interrupted, PluginError, StorageError)


def in_process(relay: Relay, model: ModelHandle, shards: Mapping[str, Dataset], ctx: Context) -> Engine:
    """An engine over local shards. A client whose work raises is left out of the round with its reason."""

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, message in messages.items():
            assignment = wire.assignment_from_bytes(message, client)
            try:
                update = relay.finetune(model, shards[client], assignment, ctx)
            except NOT_THE_CLIENTS_FAULT:
                raise
            except EdgeLLMError as error:
                yield client, Failure(error.what)
                continue
            yield client, wire.update_to_bytes(update)

    return exchange

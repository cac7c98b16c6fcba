"""A client's turn: the bytes of an assignment in, the bytes of an update out. Every engine ends here."""

from __future__ import annotations

import time

from edgellm_sdk import wire
from edgellm_sdk.context import Context, Cost
from edgellm_sdk.errors import ConfigError, DeviceError, EdgeLLMError, Interrupted, PluginError, StorageError
from edgellm_sdk.federate.rounds import Failure
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import forget_peak, peak_rss
from edgellm_sdk.types import Dataset, ModelHandle

NOT_THE_CLIENTS_FAULT = (ConfigError, DeviceError, Interrupted, PluginError, StorageError)


def work(relay: Relay, model: ModelHandle, data: Dataset, client: str, message: bytes, ctx: Context) -> bytes | Failure:
    """What `client` answers to `message`; what it cost goes to `ctx.spent`. Work that raises leaves the client out of
    the round with its reason, unless the error is none of its own."""
    ctx.highest, began = max(ctx.highest, peak_rss()), time.monotonic()
    forget_peak()
    try:
        return wire.update_to_bytes(relay.finetune(model, data, wire.assignment_from_bytes(message, client), ctx))
    except NOT_THE_CLIENTS_FAULT:
        raise
    except EdgeLLMError as error:
        return Failure(error.what)
    finally:
        ctx.spent[client] = Cost(peak_rss(), time.monotonic() - began)

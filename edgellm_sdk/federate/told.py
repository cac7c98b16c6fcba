"""What a client in a network tells of itself beside its updates: what a turn cost it, what personalising gained.

Both are a client's own word, read strictly and used for the report alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from edgellm_sdk.context import Cost
from edgellm_sdk.errors import ModelError
from edgellm_sdk.federate.personal import BASE, CANDIDATES, GLOBAL, Record, gain
from edgellm_sdk.wire import strict_json

MOST = 1 << 16
"""Bytes of either."""
MOST_SECONDS = 1e9


def _packed(told: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(told), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _read(raw: bytes, names: set[str]) -> dict[str, Any]:
    """ValueError for anything but a table of exactly these names."""
    if len(raw) > MOST:
        raise ValueError("is too long")
    said = strict_json(raw.decode())
    if not isinstance(said, dict) or set(said) != names:
        raise ValueError("does not say what is asked")
    return said


def cost_to_bytes(cost: Cost | None) -> bytes:
    """Nothing for None."""
    return b"" if cost is None else _packed({"peak": cost.peak, "seconds": round(cost.seconds, 4)})


def cost_from_bytes(raw: bytes) -> Cost | None:
    """None for what is no cost."""
    try:
        said = _read(raw, {"peak", "seconds"})
    except ValueError:
        return None
    peak, seconds = said["peak"], said["seconds"]
    good = type(peak) is int and 0 <= peak < 1 << 50 and type(seconds) in (int, float)
    return Cost(peak, float(seconds)) if good and 0 <= seconds < MOST_SECONDS else None


def gains_to_bytes(record: Record) -> bytes:
    """What of a user's record leaves it: what it ships, its gains in nats per token, and over how many tokens."""
    gains = {over: gain(record, over) for over in (BASE, GLOBAL)} if record["reporting"] else {}
    return _packed({"chosen": record["chosen"], "gains": gains, "tokens": record["tokens"]})


def gains_from_bytes(raw: bytes, user: str) -> Record:
    """The record of `user` as far as it told it. ModelError for what no user can have gained."""
    try:
        said = _read(raw, {"chosen", "gains", "tokens"})
        gains, tokens, chosen = said["gains"], said["tokens"], said["chosen"]
        if chosen not in CANDIDATES or type(tokens) is not int or not 0 <= tokens < 1 << 40:
            raise ValueError("names no candidate, or no number of tokens")
        if not isinstance(gains, dict) or set(gains) not in (set(), {BASE, GLOBAL}):
            raise ValueError("has other gains than those over base and global")
        if not all(gain is None or (type(gain) in (int, float) and math.isfinite(gain)) for gain in gains.values()):
            raise ValueError("has a gain that is no number")
        if chosen in gains and gains[chosen] not in (0, None):
            raise ValueError("gains over what it ships")
    except (ValueError, TypeError) as error:
        raise ModelError(f"told no gains: {error}"[:120], user) from None
    return {"user": user, "chosen": chosen, "gains": gains, "tokens": tokens}

"""Our messages in Flower's records: parts of 2 MiB, the first of which says kind, size and sha256 of the whole, and
beside an update what it cost.

Flower sends each record of a message in a call of its own, so no call is larger than a part and an upload that breaks
off goes on with the parts that are missing.
"""

from __future__ import annotations

import hashlib

from flwr.app import ConfigRecord, RecordDict

from edgellm_sdk.errors import ModelError
from edgellm_sdk.wire import PROTOCOL

PART = 2 << 20
CALL = PART + (1 << 16)  # the largest call
FIRST, COST = "000000", "cost"


def to_records(kind: str, message: bytes, cost: bytes = b"") -> RecordDict:
    """The first record also says what the message is, and `cost` if there is any."""
    records = RecordDict()
    digest = hashlib.sha256(message).hexdigest()
    for number, begin in enumerate(range(0, max(1, len(message)), PART)):
        records[f"{number:06d}"] = ConfigRecord({"data": message[begin : begin + PART]})
    records[FIRST].update({"protocol": PROTOCOL, "kind": kind, "bytes": len(message), "sha256": digest})
    if cost:
        records[FIRST][COST] = cost
    return records


def cost_of(records: RecordDict) -> bytes:
    """What came beside a message that `from_records` has read."""
    cost = records.config_records[FIRST].get(COST, b"")
    return cost if isinstance(cost, bytes) else b""


def from_records(records: RecordDict, limit: int, where: str) -> tuple[str, bytes]:
    """(kind, message). ModelError for anything that `to_records` did not make or that is larger than `limit` bytes."""
    try:
        first = records.config_records[FIRST]
        parts = [records.config_records[name]["data"] for name in sorted(records)]
        kind, size, digest = first["kind"], first["bytes"], first["sha256"]
        if first["protocol"] != PROTOCOL:
            raise ModelError(f"is not of protocol {PROTOCOL}", where)
    except KeyError:
        raise ModelError("is no message of ours", where) from None
    if not isinstance(kind, str) or not all(isinstance(part, bytes) for part in parts):
        raise ModelError("has a field of the wrong type", where)
    total = sum(len(part) for part in parts)
    if total > limit:
        raise ModelError(f"has {total} bytes, more than the limit of {limit}", where)
    message = b"".join(parts)
    if len(message) != size or hashlib.sha256(message).hexdigest() != digest:
        raise ModelError("is not whole", where)
    return kind, message

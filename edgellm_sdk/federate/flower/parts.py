"""Our messages in Flower's records: a head that says kind, size and sha256, then parts of a few MiB each.

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
HEAD = "head"


def to_records(kind: str, message: bytes) -> RecordDict:
    records = RecordDict()
    digest = hashlib.sha256(message).hexdigest()
    records[HEAD] = ConfigRecord({"protocol": PROTOCOL, "kind": kind, "bytes": len(message), "sha256": digest})
    for number, begin in enumerate(range(0, len(message), PART)):
        records[f"{number:06d}"] = ConfigRecord({"data": message[begin : begin + PART]})
    return records


def from_records(records: RecordDict, limit: int, where: str) -> tuple[str, bytes]:
    """(kind, message). ModelError for anything that `to_records` did not make or that is larger than `limit` bytes."""
    try:
        head = records.config_records[HEAD]
        names = sorted(name for name in records if name != HEAD)
        parts = [records.config_records[name]["data"] for name in names]
        kind, size, digest = head["kind"], head["bytes"], head["sha256"]
        if head["protocol"] != PROTOCOL:
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

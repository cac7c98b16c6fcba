"""What travels between a session and its child: a JSON header and raw bytes, both counted in front.

    u32 header length | u64 payload length | header (UTF-8 JSON object) | payload

Both sides check the lengths against a cap before they take memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

PREFIX = struct.Struct("<IQ")
MAX_HEADER = 64 << 20
MAX_PAYLOAD = 64 << 20


def frame(header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    """The bytes in front of a payload of `payload_bytes` bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return PREFIX.pack(len(text), payload_bytes) + text


def lengths(raw: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(header bytes, payload bytes) from the first `PREFIX.size` bytes; ValueError above the caps."""
    header, payload = PREFIX.unpack_from(raw)
    if header > MAX_HEADER or payload > MAX_PAYLOAD:
        raise ValueError(f"a frame of {header} + {payload} bytes")
    return header, payload


def parse(raw: bytes) -> dict[str, Any]:
    """A header; ValueError when it is not a JSON object."""
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError("a frame's header is not an object")
    return value

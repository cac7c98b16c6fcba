"""What left a client, on the client's own disk: one line for each message, and the bytes that were sent.

wire/sent.jsonl     {"time", "round", "kind", "client", "bytes", "sha256", "file"}
wire/NNNNNN.bin     the message itself, until `keep` bytes are exceeded; then the oldest go, their lines stay
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgellm_sdk import wire
from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.store import storage_error, write_bytes

FOLDER, LIST = "wire", "sent.jsonl"


class Sent:
    """Append-only; a line is on the disk before its message leaves. `keep` is in bytes.

    `count` and `total` (bytes) are those of this process.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder / FOLDER, keep
        self._files = sorted(self.folder.glob("*.bin"))
        self._held = sum(path.stat().st_size for path in self._files)
        self.count = self.total = 0
        self._next = 1 + max((int(path.stem) for path in self._files), default=len(rows(folder)))

    def add(self, kind: str, client: str, round: int, raw: bytes) -> None:
        """Record a message about to leave. StorageError when that cannot be done."""
        path = self.folder / f"{self._next:06d}.bin"
        self._next += 1
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "round": round,
            "kind": kind,
            "client": client,
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "file": path.name,
        }
        write_bytes(path, raw)
        self._files.append(path)
        self._held += len(raw)
        self.count += 1
        self.total += len(raw)
        while self._held > self.keep and len(self._files) > 1:
            oldest = self._files.pop(0)
            self._held -= oldest.stat().st_size
            oldest.unlink()
        try:
            with (self.folder / LIST).open("ab") as file:
                file.write(json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.folder / LIST) from error


def recorded(engine: Engine, sent: Sent) -> Engine:
    """`engine`, with every update that it delivers kept as its client sent it."""

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, reply in engine(messages):
            if not isinstance(reply, Failure):
                sent.add("update", client, round_of(messages[client]), reply)
            yield client, reply

    return exchange


def round_of(message: bytes) -> int:
    """The round that an assignment or an update belongs to, 0 for other bytes."""
    try:
        number = wire.unpack(message, "message")[1].get("round", 0)
    except ModelError:
        return 0
    return number if type(number) is int else 0


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder, none when nothing was recorded. DataError for a list that is not ours."""
    path = folder / FOLDER / LIST
    if not path.is_file():
        return []
    found = []
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(raw)
            found.append({name: row[name] for name in ("time", "round", "kind", "client", "bytes", "sha256", "file")})
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: is not a line of ours") from None
    return found

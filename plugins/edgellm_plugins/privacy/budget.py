"""The privacy ledger: what has been spent is on disk before the noise that was paid for leaves the process.

`privacy.jsonl` in the run folder is append-only and fsynced. A round that is killed after its charge is charged again
when it is done again, with new noise: a crash may waste budget and never uses it twice. A line that a crash cut counts
for every client, since what it would have said is not known.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk.errors import PrivacyError
from edgellm_sdk.store import storage_error, sync_folder

NAME = "privacy.jsonl"


class Budget:
    """The charges of a run. `terms` are what every charge was made under, by default those in the file; a ledger with
    others is refused."""

    def __init__(self, folder: Path, terms: Mapping[str, Any] | None = None) -> None:
        self.path, self.terms = folder / NAME, dict(terms or {})
        self.rounds: set[int] = set()
        self.parts: Counter[str] = Counter()
        self.charges = self.torn = 0
        raw = self._read()
        for line in raw.split(b"\n"):
            if line:
                self._count(line)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _count(self, line: bytes) -> None:
        self.charges += 1
        try:
            row = json.loads(line)
            number, clients, terms = row["round"], row["clients"], row["terms"]
        except (ValueError, KeyError, TypeError):
            self.torn += 1
            return
        self.terms = self.terms or terms
        if terms != self.terms:
            raise PrivacyError("was written under other settings", str(self.path), "use another --output")
        self.rounds.add(number)
        self.parts.update(clients)

    def times(self, clients: Sequence[str] = ()) -> int:
        """The most charges of any client, once `clients` are charged too."""
        after = self.parts + Counter(clients)
        return max(after.values(), default=0) + self.torn

    def covers(self, rounds: int) -> None:
        """PrivacyError unless rounds 1 .. `rounds`, which a model holds, have all been charged."""
        missing = set(range(1, rounds + 1)) - self.rounds
        if len(missing) > self.torn:
            what = f"does not hold the charge of round {min(missing)}, which the model holds"
            raise PrivacyError(what, str(self.path), "start again in another --output")

    def charge(self, number: int, clients: Sequence[str]) -> None:
        """Write down the charge of a round and wait until it is on the disk. StorageError when it cannot be."""
        row = {"round": number, "clients": sorted(clients), "terms": self.terms}
        line = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            with self.path.open("a+b") as file:
                file.seek(0, os.SEEK_END)
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # the last writer was killed in its line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self.path.parent)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._count(line.strip(b"\n"))

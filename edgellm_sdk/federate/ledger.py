"""What crossed the wire, per client and round: an append-only file, fsynced before the next round starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellm_sdk.store import storage_error, write_bytes

MOST = 40
"""Clients that an overview tells of."""
ROUND, FINAL = "round", "final"


@dataclass(frozen=True)
class Line:
    """One client in one round. `down` and `up` are bytes of all its messages, `*_payload` those of the arrays in its
    assignment and in its update. `peak` bytes and `took` seconds of its turn, as measured where it ran and as foretold,
    are 0 where unknown. `kind` is `round`, or `final` for the state that a client is given after the last one.
    """

    client: str
    down: int
    down_payload: int
    up: int
    up_payload: int
    rejected: str = ""
    peak: int = 0
    took: float = 0.0
    foretold_peak: int = 0
    foretold_took: float = 0.0
    kind: str = ROUND


class Ledger:
    """`ledger.jsonl` in a run folder: one line per client, round and attempt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_until(self, number: int) -> None:
        """Drop lines of later rounds: a killed run may have logged a round whose state never reached the disk."""
        if self.path.exists():
            kept = [line for line in self._rows() if line["round"] <= number]
            write_bytes(self.path, b"".join(_encode(line) for line in kept))

    def add(self, number: int, attempt: int, lines: Iterable[Line], seconds: float) -> None:
        rows = [{"round": number, "attempt": attempt, "seconds": round(seconds, 4), **asdict(line)} for line in lines]
        rows = [{name: value for name, value in row.items() if (name, value) != ("kind", ROUND)} for row in rows]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"".join(_encode(row) for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for raw in file:
                if raw.endswith(b"\n"):  # a line cut by a crash has none
                    yield json.loads(raw)

    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows()) if self.path.exists() else []

    def totals(self) -> dict[str, dict[str, int]]:
        """Bytes and rounds by client: {client: {down, up, down_payload, up_payload, rounds, rejected}}."""
        totals: dict[str, dict[str, int]] = {}
        for row in self.rows():
            names = ("down", "up", "down_payload", "up_payload")
            entry = totals.setdefault(row["client"], dict.fromkeys((*names, "rounds", "rejected"), 0))
            for name in names:
                entry[name] += row[name]
            entry["rounds"] += row.get("kind", ROUND) == ROUND
            entry["rejected"] += bool(row["rejected"])
        return totals

    def overview(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """Who took part, and what turns cost, of the MOST clients that were asked most often.

        `marks` has a letter for every round: t took part, r rejected or silent, a dot for not asked. `costs` are the
        highest peak and the mean seconds of a client's turns, measured and foretold, where there are any.
        """
        marks: dict[str, dict[int, str]] = {}
        costs: dict[str, list[dict[str, Any]]] = {}
        last = 0
        for row in self.rows():
            if row.get("kind", ROUND) != ROUND:
                continue
            last = max(last, row["round"])
            marks.setdefault(row["client"], {})[row["round"]] = "r" if row["rejected"] else "t"
            if row.get("peak") or row.get("foretold_peak"):
                costs.setdefault(row["client"], []).append(row)
        shown = sorted(sorted(marks, key=lambda client: (-len(marks[client]), client))[:MOST])
        return {
            "clients": len(marks), "rounds": last,
            "marks": {client: "".join(marks[client].get(n, ".") for n in range(1, last + 1)) for client in shown},
            "costs": [_cost(client, kinds.get(client, ""), costs[client]) for client in shown if client in costs],
        }  # fmt: skip


def _cost(client: str, kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float:
        return round(sum(float(row[name]) for row in rows) / len(rows), 4)

    return {
        "client": client, "kind": kind, "peak": max(row["peak"] for row in rows),
        "foretold_peak": max(row["foretold_peak"] for row in rows), "took": mean("took"),
        "foretold_took": mean("foretold_took"),
    }  # fmt: skip


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode() + b"\n"

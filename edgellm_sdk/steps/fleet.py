"""`--personalise` in a run: what every client keeps aside, its own adapter after the rounds, and what that brought.

In one process a `Fleet` is everybody. In a network each client is a fleet of one, on its own machine, and the server's
is `Elsewhere`: it has what they told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgellm_sdk import store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.federate.personal import (
    BASE,
    CANDIDATES,
    GLOBAL,
    INDEX,
    OWN,
    Personaliser,
    Record,
    everyone,
    gain,
    gains,
    parted,
    record_path,
)
from edgellm_sdk.federate.told import gains_from_bytes
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Report
from edgellm_sdk.types import Dataset, Metric, ModelHandle, State

FORMAT = 1
SHOWN = 30
POINTS = 400
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


class Fleet:
    """All clients of a run. `training` is what each brings to the federation: what it keeps aside is not in it."""

    def __init__(self, shards: Mapping[str, Dataset], share: float, steps: int, ctx: Context) -> None:
        self._shards, self._steps, self._ctx = shards, steps, ctx
        self._parts = {user: parted(data, share, ctx, user) for user, data in shards.items()}
        self.training = {user: data.select(self._parts[user].training) for user, data in shards.items()}

    def personalised(self, relay: Relay, model: ModelHandle, final: State) -> list[Record]:
        """The record of every user, in name order; they are in `users.json` too."""
        ctx, records = self._ctx, []
        found = Personaliser(relay, model, final, self._steps, ctx)
        work = {user: (data, self._parts[user]) for user, data in self._shards.items()}
        with ctx.progress("one adapter for each user", len(work)) as progress:
            for record in everyone(found, work, ctx.folder):
                records.append(record)
                progress.advance(1, f"own adapters {sum(record['chosen'] == OWN for record in records)}")
        _index(model, records, ctx)
        return records


class Elsewhere:
    """Users who personalise on machines of their own; what each told is on disk, so that a server which was stopped
    need not ask it again."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._records: dict[str, Record] = {}

    def told(self, users: Iterable[str]) -> dict[str, int]:
        """Those of `users` who told before a stop, with the bytes of what they told; read from the disk."""
        found = {}
        for user in users:
            path = record_path(self._ctx.folder, user)
            if path.is_file():
                kept = store.read_json(path)
                self._records[user], found[user] = kept["record"], kept["bytes"]
        return found

    def add(self, user: str, raw: bytes) -> None:
        """What `user` told; a note for what is no gain."""
        try:
            record = gains_from_bytes(raw, user)
        except ModelError as error:
            self._ctx.note(f"{user} {error.what}")
            return
        store.write_json(record_path(self._ctx.folder, user), {"record": record, "bytes": len(raw)})
        self._records[user] = record

    def personalised(self, relay: Relay, model: ModelHandle, final: State) -> list[Record]:
        """As `Fleet.personalised`, of those who told."""
        records = [self._records[user] for user in sorted(self._records)]
        _index(model, records, self._ctx)
        return records


def _index(model: ModelHandle, records: Sequence[Record], ctx: Context) -> None:
    base = {"digest": model.digest, "name": model.name}
    store.write_json(ctx.folder / INDEX, {"format": FORMAT, "base": base, "users": list(records)})


def describe(report: Report, records: Sequence[Record]) -> None:
    """Gains of what users ship over the base and over the federation's adapter, on what they kept aside to report."""
    import numpy as np

    counts = {name: sum(record["chosen"] == name for record in records) for name in (OWN, GLOBAL, BASE)}
    report.metrics |= {
        "users with an adapter of their own": Metric(counts[OWN], "users", len(records)),
        "users on the global adapter": Metric(counts[GLOBAL], "users", len(records)),
        "users on the base": Metric(counts[BASE], "users", len(records)),
    }
    for over in (BASE, GLOBAL):
        found = sorted(gains(records, over))
        if not found:
            continue
        for name, share in QUANTILES.items():
            value = float(np.quantile(found, share))
            report.metrics[f"gain over {over}, {name}"] = Metric(value, "nats/token", len(found))
        report.metrics[f"users worse off than with {over}"] = Metric(sum(g < 0 for g in found), "users", len(found))
        places = sorted({round(i * (len(found) - 1) / (POINTS - 1)) for i in range(POINTS)})
        report.curves[f"gain on kept-aside text over users, to {over}"] = [(i + 1, found[i]) for i in places]
    report.tables.append(_table(records))


def _table(records: Sequence[Record]) -> Mapping[str, Any]:
    """Users by what they gained, least first; of many those at both ends. Losses where they are known here."""
    rows = sorted(records, key=lambda record: (gains([record], BASE) or [0.0])[0])
    title = "Users: nats per token on text kept aside to report"
    if len(rows) > SHOWN:
        rows = [*rows[: SHOWN // 2], *rows[-SHOWN // 2 :]]
        title += f" (those who gain least and most of {len(records)}; all are in {INDEX})"
    losses = CANDIDATES if any("reporting" in record for record in rows) else ()
    over = (BASE,) if losses else (BASE, GLOBAL)
    return {
        "title": title,
        "columns": ["user", "ships", *losses, *(f"gain over {name}" for name in over), "tokens"],
        "rows": [
            [
                record["user"],
                record["chosen"],
                *(record["reporting"].get(name) for name in losses),
                *(gain(record, name) for name in over),
                record["tokens"],
            ]
            for record in rows
        ],
    }

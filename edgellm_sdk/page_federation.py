"""The clients of a run on its page: who took part in which round, and what turns cost against what was foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgellm_sdk import charts
from edgellm_sdk.cli.screen import size

COLOURS = {"t": "var(--c0)", "r": "var(--bad)"}
MEANINGS = {"t": "took part", "r": "rejected or silent"}


def section(federation: Mapping[str, Any]) -> str:
    """Nothing for a run of one client without rounds to speak of."""
    marks: Mapping[str, str] = federation.get("marks", {})
    rounds = int(federation.get("rounds", 0))
    drawn = ""
    if len(marks) > 1 and rounds:
        every = federation.get("clients", len(marks))
        told = f"{every} clients, {rounds} rounds."
        if every > len(marks):
            told += f" The {len(marks)} that were asked most often are shown."
        keys = "".join(
            f'<span><i style="background:{COLOURS[mark]}"></i>{escape(said)}</span>' for mark, said in MEANINGS.items()
        )
        grid = charts.grid("Clients by round", marks, COLOURS)
        drawn = f'<h3>Who took part</h3><p class="about">{escape(told)}</p><div class="keys">{keys}</div>{grid}'
    return drawn + _costs(federation.get("costs", []))


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    foretold = any(row["foretold_peak"] for row in rows)
    if len(rows) < 2 and not foretold:
        return ""
    head = ["client", "kind", "peak memory", "foretold", "seconds a turn", "foretold"]
    body = "".join(
        "<tr>"
        + f"<td>{escape(str(row['client']))}</td><td>{escape(str(row['kind']))}</td>"
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in _cells(row))
        + "</tr>"
        for row in rows
    )
    titles = "".join(f'<th class="{"n" if k > 1 else ""}">{escape(title)}</th>' for k, title in enumerate(head))
    about = "Peak memory is that of the process in which a turn ran; clients that run in one process share its model."
    return (
        f'<h3>What turns cost</h3><p class="about">{about}</p>'
        f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        size(row["peak"]) if row["peak"] else "-",
        size(row["foretold_peak"]) if row["foretold_peak"] else "-",
        f"{row['took']:.3g}" if row["took"] else "-",
        f"{row['foretold_took']:.3g}" if row["foretold_took"] else "-",
    ]

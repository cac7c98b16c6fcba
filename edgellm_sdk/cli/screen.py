"""What is drawn: progress on stderr with rich, imported only when something is drawn; plain tables on stdout."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgellm_sdk.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[float, str], None]


@lru_cache(maxsize=1)
def console() -> Console:
    """The console for people, on stderr: stdout belongs to results."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def progress_bar(title: str, total: float | None) -> Iterator[Advance]:
    """A bar on stderr; `advance(amount, text)` moves it. Without a terminal nothing is drawn."""
    if not sys.stderr.isatty():
        yield lambda amount, text: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False, style="dim"),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(title, total=total, text="")

        def advance(amount: float, text: str) -> None:
            progress.advance(task, amount)
            if text:
                progress.update(task, text=printable(text)[:80])

        yield advance


LAST_ROUNDS = 8


@contextmanager
def rounds_view(total: int, done: int) -> Iterator[tuple[Callable[[int, int, int], None], Callable[..., None]]]:
    """A live table of the last rounds over a bar, on stderr. Without a terminal nothing is drawn."""
    if not sys.stderr.isatty():
        yield lambda answered, asked, number: None, lambda cells, text: None
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    bar = Progress(
        TextColumn("rounds"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False, style="dim"), console=console(),
    )  # fmt: skip
    task, rows = bar.add_task("", total=total, completed=done, text=""), list[tuple[str, ...]]()

    def drawn() -> Group:
        shown = Table(box=None, header_style="dim", pad_edge=False)
        for title in ("round", "took part", "left out", "up", "down", "seconds", ""):
            shown.add_column(title, justify="left" if not title else "right")
        for row in rows[-LAST_ROUNDS:]:
            shown.add_row(*row)
        return Group(shown, bar) if rows else Group(bar)

    with Live(drawn(), console=console(), transient=True, refresh_per_second=8) as live:

        def answered(count: int, asked: int, number: int) -> None:
            bar.update(task, text=f"round {number}: {count} of {asked} clients")

        def ended(cells: tuple[Any, ...], text: str) -> None:
            number, took, out, up, down, spent = cells
            rows.append((str(number), str(took), str(out), size(up), size(down), f"{spent:.1f}", printable(text)[:60]))
            bar.advance(task)
            live.update(drawn())

        yield answered, ended


def width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned plain text; columns of numbers lean right, the last column is left ragged."""
    cells = [[cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
    widths = [max(width(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    lines = []
    for line in [list(columns), ["-" * w for w in widths], *cells]:
        padded = [
            " " * (w - width(text)) + text if lean else text + " " * (w - width(text))
            for text, w, lean in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def cell(value: Any) -> str:
    """One value as short text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value) or "-"
    return printable(str(value)) or "-"


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """`name  value` lines, aligned."""
    longest = max((width(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name}{' ' * (longest - width(name))}  {cell(value)}" for name, value in pairs)


def size(count: float) -> str:
    """Bytes as people read them: `98.4 MB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"

"""Tables of a report as HTML, with the figures that some of them ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgellm_sdk import charts
from edgellm_sdk.cli.screen import cell

USERS_LOSSES = ("base", "global", "own")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def tables(given: Sequence[Mapping[str, Any]]) -> str:
    """Every table under its title, and its figures."""
    parts = []
    for entry in given:
        parts.append(f"<h3>{escape(str(entry.get('title', '')))}</h3>{table(entry['columns'], entry['rows'])}")
        figures = (_size_against_accuracy, _users, _costs_against_quality)
        drawn = "".join(draw(entry["columns"], entry["rows"]) for draw in figures)
        parts.append(f'<div class="charts" style="margin-top:.9rem">{drawn}</div>' if drawn else "")
    return "".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; columns of numbers lean right."""
    lean = [' class="n"' if rows and all(_leans(row[i]) for row in rows) else "" for i in range(len(columns))]
    head = "".join(f"<th{lean[i]}>{escape(str(name))}</th>" for i, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{lean[i]}>{html_cell(value)}</td>" for i, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _leans(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, (int, float)) or bool(_NUMBER.match(str(value)))


def html_cell(value: Any) -> str:
    if isinstance(value, bool):
        return f'<span class="{"good" if value else "bad"}">{"yes" if value else "no"}</span>'
    return escape(cell(value))


def _users(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Every user's losses on one line when a table has users, what each ships, and its losses by candidate."""
    if list(columns[:5]) != ["user", "ships", *USERS_LOSSES]:
        return ""
    drawn = []
    for row in rows:
        losses = {n: float(v) for n, v in zip(USERS_LOSSES, row[2:5], strict=True) if isinstance(v, (int, float))}
        if losses:
            drawn.append((str(row[0]), losses, str(row[1])))
    return charts.ranges("Loss of each user; the large dot is shipped", "nats per token", drawn) if drawn else ""


def _size_against_accuracy(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A scatter when a table has a column of sizes and one of accuracies."""
    sizes = [i for i, name in enumerate(columns) if re.search(r"\b(size|bytes|MB)\b", str(name), re.I)]
    scores = [i for i, name in enumerate(columns) if "accuracy" in str(name).lower()]
    if not sizes or not scores:
        return ""
    dots = []
    for row in rows:
        x, found = _megabytes(row[sizes[0]], str(columns[sizes[0]])), _numbers(row[scores[0]])
        if x is not None and found:
            dots.append(_dot(row, x, found))
    if len(dots) < 2:
        return ""
    share = all(0 <= dot.high <= 1 for dot in dots)
    against = str(columns[sizes[0]]).removesuffix(", MB")
    return charts.scatter(f"{str(columns[scores[0]]).capitalize()} against {against}", "MB", dots, share)


def _costs_against_quality(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """For files measured side by side: quality against size and against speed, the best of either joined."""
    place = {str(name): i for i, name in enumerate(columns)}
    quality = next((name for name in ("KL, nats", "perplexity") if name in place), "")
    if not quality or "generated tokens/s" not in place:
        return ""
    drawn = []
    for cost, label, best in (("size, MB", "MB", min), ("generated tokens/s", "tokens/s", max)):
        pairs = [(row, _numbers(row[place[cost]]), _numbers(row[place[quality]])) for row in rows]
        dots = [_dot(row, x[0], y) for row, x, y in pairs if x and y]
        if len(dots) > 1:
            title = f"{quality.split(',')[0]} against {'size' if best is min else 'speed of generation'}"
            drawn.append(charts.scatter(f"{title}; less is better", label, dots, False, _front(dots, best is max)))
    return "".join(drawn)


def _front(dots: Sequence[charts.Dot], more: bool) -> list[charts.Dot]:
    """Those that no other beats both in y, where less is better, and in x, where `more` or less is."""
    sign = -1 if more else 1
    found: list[charts.Dot] = []
    for dot in sorted(dots, key=lambda dot: (sign * dot.x, dot.y)):
        if not found or dot.y < found[-1].y:
            found.append(dot)
    return found


def _dot(row: Sequence[Any], x: float, found: Sequence[float]) -> charts.Dot:
    """A row at x, with the value of a cell and its interval if one is written there."""
    inside = len(found) >= 3 and found[1] <= found[0] <= found[2]
    low, high = (found[1], found[2]) if inside else (found[0], found[0])
    return charts.Dot(str(row[0]), x, found[0], low, high)


def _numbers(value: Any) -> list[float]:
    """The numbers written in a cell: a value, and its interval where one follows."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [float(value)]
    return [float(number) for number in _NUMBER.findall(str(value).replace("\u2212", "-"))]


def _megabytes(value: Any, column: str) -> float | None:
    found = _numbers(value)
    if not found:
        return None
    text = f"{value} {column}"
    for unit, factor in (("GB", 1e3), ("MB", 1.0), ("kB", 1e-3)):
        if re.search(rf"(?<![A-Za-z]){unit}\b", text):
            return found[0] * factor
    return found[0] / 1e6

"""Charts as inline SVG, drawn here so that a page needs nothing from outside. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42
COLOURS = 10
MOST_POINTS = 400
NOISY = 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A range of values laid on a range of pixels; `log` with base 10."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value,
        )  # fmt: skip
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        """Round values within the range, about five."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]
        step = _step(self.high - self.low)
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _step(span: float) -> float:
    rough = (span or 1) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)


def axis(values: Sequence[float], start: float, end: float, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds `values` with a little room; `zero` makes it begin at 0."""
    low, high = min(values), max(values)
    if log:
        return Axis(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-12), start, end, True)
    if zero:
        low = min(low, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low if zero and low == 0 else low - room, high + room, start, end)


def short(value: float) -> str:
    """`12`, `0.25`, `15k`, `1.2M`, `1e-05`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "")):
        if abs(value) >= size:
            return f"{value / (size if letter else 1e3):.3g}{letter or 'k'}"
    return f"{value:.4g}"


def lines(title: str, x_label: str, curves: Mapping[str, Points], share: bool = False, counts: bool = False) -> str:
    """A figure of one or more curves. `share` fixes the value axis to 0..1, written in per cent; `counts` are drawn
    from 0 and never smoothed."""
    drawn = {name: sorted(points) for name, points in curves.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 300
    across = Axis(min(0.0, *xs), max(xs) if max(xs) > 0 else 1.0, LEFT, WIDTH - RIGHT)
    up = Axis(0, 1, HEIGHT - BOTTOM, TOP) if share else axis(ys, HEIGHT - BOTTOM, TOP, log and not counts, zero=counts)
    write: Callable[[float], str] = (lambda v: f"{100 * v:.0f} %") if share else short
    body = [_frame(across, up, short, write, x_label)]
    for number, points in enumerate(drawn.values()):
        body.append(_curve(points, across, up, f"var(--c{number % COLOURS})", write, not counts))
    keys = _keys(list(drawn)) if len(drawn) > 1 else ""
    return _figure(title, keys, "".join(body))


def grid(title: str, rows: Mapping[str, str], colours: Mapping[str, str]) -> str:
    """A row of cells for every name, one for each letter; letters without a colour are left faint."""
    columns = max(len(marks) for marks in rows.values())
    names = min(220, 16 + 7 * max(len(name) for name in rows))
    wide, high = min(26.0, (1000 - names) / columns), 16
    width, height = names + wide * columns, high * len(rows) + 18
    body = []
    for y, (name, marks) in enumerate(rows.items()):
        label = escape(name if len(name) < 32 else name[:30] + "…")
        body.append(f'<text class="name" x="{names - 8}" y="{y * high + 12}" text-anchor="end">{label}</text>')
        for x, mark in enumerate(marks):
            place = f'x="{names + x * wide:.2f}" y="{y * high + 1}" width="{max(wide - 1, wide * 0.8):.2f}" height="14"'
            fill = f'fill="{colours[mark]}"' if mark in colours else 'class="empty"'
            body.append(f'<rect {place} rx="2" {fill}/>')
    for tick in Axis(1, max(columns, 2), 0, 1).ticks():
        if 1 <= tick <= columns and tick == int(tick):
            at = names + (tick - 0.5) * wide
            body.append(f'<text x="{at:.1f}" y="{height - 3}" text-anchor="middle">{int(tick)}</text>')
    svg = (
        f'<svg viewBox="0 0 {width:.0f} {height}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
    )
    return f'<figure class="grid">{svg}</figure>'


def _figure(title: str, keys: str, body: str, height: int = HEIGHT) -> str:
    label = escape(title, quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="keys">{keys}</div>{svg}</figure>'


def _keys(names: Sequence[str]) -> str:
    return "".join(
        f'<span><i style="background:var(--c{n % COLOURS})"></i>{escape(name)}</span>' for n, name in enumerate(names)
    )


def _frame(
    across: Axis,
    up: Axis,
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
    x_label: str,
    y_label: str = "",
) -> str:
    parts = []
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(write_y(tick))}</text>')
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(write_x(tick))}</text>'
        )
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if y_label:
        parts.append(f'<text x="4" y="{TOP - 2}">{escape(y_label)}</text>')
    return "".join(parts)


def _curve(points: Points, across: Axis, up: Axis, colour: str, write: Callable[[float], str], smoothed: bool) -> str:
    """One curve; a long one is drawn faint with its running mean over it, if it may be `smoothed`."""
    thinned = (
        [points[i * len(points) // MOST_POINTS] for i in range(MOST_POINTS)] if len(points) > MOST_POINTS else points
    )
    smooth = running_mean(thinned) if smoothed and len(thinned) > NOISY else thinned
    parts = []
    if smooth is not thinned:
        parts.append(f'<polyline class="raw" stroke="{colour}" points="{_path(thinned, across, up)}"/>')
    parts.append(f'<polyline class="curve" stroke="{colour}" points="{_path(smooth, across, up)}"/>')
    if len(thinned) <= NOISY:
        for x, y in thinned:
            told = escape(f"{short(x)}: {write(y)}")
            place = f'cx="{across.at(x):.1f}" cy="{up.at(y):.1f}"'
            parts.append(f'<circle {place} r="3" fill="{colour}"><title>{told}</title></circle>')
    return "".join(parts)


def _path(points: Points, across: Axis, up: Axis) -> str:
    return " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Each value replaced by the mean over a window of a tenth of the points around it."""
    reach = max(1, len(points) // 20)
    smooth = []
    for i, (x, _) in enumerate(points):
        window = points[max(0, i - reach) : i + reach + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


@dataclass(frozen=True)
class Dot:
    """One point of a scatter: a name, where it lies, and how far its value may be off."""

    name: str
    x: float
    y: float
    low: float
    high: float


def scatter(title: str, x_label: str, dots: Sequence[Dot], share: bool, front: Sequence[Dot] = ()) -> str:
    """Named points with error bars, those of `front` joined."""
    across = axis([dot.x for dot in dots], LEFT, WIDTH - RIGHT - 10, zero=True)
    values = [v for dot in dots for v in (dot.low, dot.high)]
    up = axis(values, HEIGHT - BOTTOM, TOP)
    write: Callable[[float], str] = (lambda v: f"{100 * v:.0f} %") if share else short
    parts = [_frame(across, up, short, write, x_label)]
    path = " ".join(f"{across.at(dot.x):.1f},{up.at(dot.y):.1f}" for dot in front)
    parts += [f'<polyline class="front" points="{path}"/>'] if len(front) > 1 else []
    taken: list[float] = []
    for number, dot in enumerate(dots):
        x, y, colour = across.at(dot.x), up.at(dot.y), f"var(--c{number % COLOURS})"
        if dot.high > dot.low:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up.at(dot.low):.1f}" y2="{up.at(dot.high):.1f}" '
                f'stroke="{colour}" stroke-width="1.5" opacity=".55"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>')
        right = x < WIDTH * 0.6
        line = y + 4
        while any(abs(line - other) < 14 for other in taken):
            line += 14
        taken.append(line)
        side = f'x="{x + 10:.1f}"' if right else f'x="{x - 10:.1f}" text-anchor="end"'
        parts.append(f'<text class="name" {side} y="{line:.1f}">{escape(dot.name)}</text>')
    return _figure(title, "", "".join(parts))


def ranges(title: str, x_label: str, rows: Sequence[tuple[str, Mapping[str, float], str]]) -> str:
    """One line for each (name, values by series, the series that counts): all its values, that one drawn large."""
    series = list(dict.fromkeys(key for _, values, _ in rows for key in values))
    left, line = 130, 20
    base = TOP + line * len(rows)
    across = axis([value for _, values, _ in rows for value in values.values()], left, WIDTH - RIGHT)
    parts = []
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{escape(short(tick))}</text>')
    for number, (name, values, counts) in enumerate(rows):
        y = TOP + line * (number + 0.5)
        shown = name if len(name) <= 18 else f"{name[:17]}\u2026"
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>')
        ends = [across.at(value) for value in values.values()]
        parts.append(f'<line class="axis" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for key, value in values.items():
            told, radius = escape(f"{name}, {key}: {short(value)}"), 6 if key == counts else 3
            place = f'cx="{across.at(value):.1f}" cy="{y:.1f}" r="{radius}"'
            parts.append(f'<circle {place} fill="var(--c{series.index(key)})"><title>{told}</title></circle>')
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{base + 34}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _figure(title, _keys(series), "".join(parts), base + 42)

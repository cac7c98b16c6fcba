"""One self-contained page for one or several reports: no script, nothing loaded from anywhere, everything escaped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgellm_sdk import charts, page_federation
from edgellm_sdk.cli.screen import cell, size
from edgellm_sdk.cli.show import comparison

if TYPE_CHECKING:
    from edgellm_sdk.report import Report
    from edgellm_sdk.types import Metric

MOST_ROWS = 30
WANTED = ("wanted", "expected")
FIRST_METRICS = (
    "balanced accuracy",
    "accuracy",
    "perplexity",
    "validation loss",
    "loss",
    "size",
    "uploaded",
    "downloaded",
)
USERS_LOSSES = ("base", "global", "own")
X_LABELS = {"forwards": "forward passes", "seconds": "seconds", "rounds": "rounds", "steps": "steps"}
FAMILIES = ("loss", "accuracy", "perplexity", "variance", "perturbations")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def render(reports: Sequence[Report]) -> str:
    """The reports in order, each with its figures; of several, the last one's tables come first."""
    reports = [type(report).from_json(report.to_json()) for report in reports]  # as in the file, paths portable
    verbs = " → ".join(report.verb for report in reports)
    started = reports[0].started.replace("T", " ").replace("Z", " UTC") if reports else ""
    wall = sum(report.wall_seconds for report in reports if report.verb != "demo")  # a sum already
    head = f"<header><h1>edgellm: {escape(verbs)}</h1><p>{escape(started)} · {seconds(wall)} in all</p></header>"
    several = len(reports) > 1
    leading = next((r for r in reversed(reports) if r.tables), None) if several else None
    body = [head, _overview(reports, leading) if several else ""]
    body += [_section(r, number if several else 0, r is not leading) for number, r in enumerate(reports, 1)]
    foot = "Drawn from report.json, which holds every figure on this page."
    return document(f"edgellm: {verbs}", "".join(body), foot)


def document(title: str, body: str, foot: str) -> str:
    """A page with our style. `body` and `foot` are HTML, the title is not."""
    style = (resources.files("edgellm_sdk") / "assets" / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}<footer>{foot}</footer></main></body></html>\n"
    )


def seconds(value: float) -> str:
    """`4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if value < 90:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def command(report: Report) -> str:
    """The command line that asks for this step again."""
    words = ["edgellm", report.verb]
    if report.plugin and "plugin" not in report.config and "device" not in report.config:
        words += ["--plugin", report.plugin]
    for name, value in [*report.config.items(), *report.options.items()]:
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "inputs" and isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif name == "subject":
            words.insert(2, str(value))
        elif value not in ("", None) and not isinstance(value, (list, tuple, dict)):
            words += [flag, str(value)]
    return " ".join(shlex.quote(word) for word in words)


def _overview(reports: Sequence[Report], leading: Report | None) -> str:
    rows = [
        [
            n,
            r.verb,
            f"{r.plugin} {r.plugin_version}".strip(),
            seconds(r.wall_seconds),
            seconds(r.cpu_seconds),
            size(r.peak_rss_bytes) if r.peak_rss_bytes else None,
        ]
        for n, r in enumerate(reports, 1)
    ]
    results = _tables(leading.tables) if leading else ""
    names, measured = comparison(reports)
    if not results and len(measured) > 1:
        results = _tables([{"title": "Measured on held-out data", "columns": names, "rows": measured}])
    columns = ("", "step", "plugin", "time", "CPU time", "peak memory")
    return f"<section>{'<h2>Result</h2>' if results else ''}{results}<h3>Steps</h3>{table(columns, rows)}</section>"


def _section(report: Report, number: int, with_tables: bool) -> str:
    name = f"{number}. {report.verb}" if number else report.verb
    plugin = (
        f" <small>with {escape(f'{report.plugin} {report.plugin_version}'.strip())}</small>" if report.plugin else ""
    )
    parts = [
        f"<h2>{escape(name)}{plugin}</h2>",
        _cards(report),
        _gate(report.verified),
        _tables(report.tables) if with_tables else "",
        _charts(report),
        _examples(report.examples),
        page_federation.section(report.federation),
        _traffic(report.bytes),
        _rejected(report.rejected),
        _privacy(report.privacy),
        _notes(report.notes),
        _artifacts(report.artifacts),
        _details(report),
    ]
    return f"<section>{''.join(parts)}</section>"


def figure(metric: Metric) -> str:
    """A metric's value as people read it."""
    if metric.value != metric.value:
        return "-"
    if metric.unit == "bytes":
        return size(metric.value)
    if metric.unit == "s":
        return seconds(metric.value)
    whole = metric.value == int(metric.value) and abs(metric.value) < 1e9
    text = f"{int(metric.value):,}".replace(",", "\u202f") if whole else f"{metric.value:.4g}"
    return f"{text} {metric.unit}" if metric.unit and len(metric.unit) < 12 and metric.unit not in X_LABELS else text


def _cards(report: Report) -> str:
    cards = []
    order = sorted(report.metrics, key=lambda n: FIRST_METRICS.index(n) if n in FIRST_METRICS else len(FIRST_METRICS))
    for name in order:
        metric = report.metrics[name]
        below = [name]
        if metric.ci95:
            below.append(f"95 %: {metric.ci95[0]:.3g} to {metric.ci95[1]:.3g}")
        if metric.n:
            below.append(f"n = {metric.n}")
        cards.append((figure(metric), below))
    if report.wall_seconds:
        cards.append((seconds(report.wall_seconds), ["time", f"{seconds(report.cpu_seconds)} of processor"]))
    if report.peak_rss_bytes:
        cards.append((size(report.peak_rss_bytes), ["peak memory", "largest process"]))
    if report.resumed:
        cards.append((f"{report.resumed} ×", ["resumed"]))
    drawn = "".join(
        f'<div class="card"><b>{escape(value)}</b>{"".join(f"<span>{escape(line)}</span>" for line in below)}</div>'
        for value, below in cards
    )
    return f'<div class="cards">{drawn}</div>' if cards else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; columns of numbers lean right."""
    lean = [' class="n"' if rows and all(_leans(row[i]) for row in rows) else "" for i in range(len(columns))]
    head = "".join(f"<th{lean[i]}>{escape(str(name))}</th>" for i, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{lean[i]}>{_cell(value)}</td>" for i, value in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _leans(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, (int, float)) or bool(_NUMBER.match(str(value)))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return f'<span class="{"good" if value else "bad"}">{"yes" if value else "no"}</span>'
    return escape(cell(value))


def _tables(tables: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for entry in tables:
        parts.append(f"<h3>{escape(str(entry.get('title', '')))}</h3>{table(entry['columns'], entry['rows'])}")
        drawn = _size_against_accuracy(entry["columns"], entry["rows"]) or _users(entry["columns"], entry["rows"])
        parts.append(f'<div class="charts" style="margin-top:.9rem">{drawn}</div>' if drawn else "")
    return "".join(parts)


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
            inside = len(found) >= 3 and found[1] <= found[0] <= found[2]
            low, high = (found[1], found[2]) if inside else (found[0], found[0])
            dots.append(charts.Dot(str(row[0]), x, found[0], low, high))
    if len(dots) < 2:
        return ""
    share = all(0 <= dot.high <= 1 for dot in dots)
    against = str(columns[sizes[0]]).removesuffix(", MB")
    return charts.scatter(f"{str(columns[scores[0]]).capitalize()} against {against}", "MB", dots, share)


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


def _charts(report: Report) -> str:
    """Curves `y over x` or `y over x, series`: one figure for each family of y and each x, without rounds where there
    are forwards."""
    groups: dict[tuple[str, str], dict[str, charts.Points]] = {}
    for name, points in report.curves.items():
        y, _, x = name.rpartition(" over ")
        x, _, series = x.partition(", ")
        if points:
            family = next((f for f in FAMILIES if f in y), y or name)
            groups.setdefault((family, x if y else ""), {})[series or y or name] = points
    families = {family for family, _ in groups}
    drawn = []
    for family in sorted(families, key=lambda f: (FAMILIES.index(f) if f in FAMILIES else len(FAMILIES), f)):
        xs = [x for f, x in groups if f == family]
        if "forwards" in xs and "rounds" in xs:
            xs.remove("rounds")
        for x in sorted(xs, key=lambda name: list(X_LABELS).index(name) if name in X_LABELS else len(X_LABELS)):
            curves = groups[family, x]
            only = next(iter(curves)) if len(curves) == 1 else family
            share = family == "accuracy" and all(0 <= y <= 1 for points in curves.values() for _, y in points)
            title = f"{only[:1].upper()}{only[1:]}" + (f" over {X_LABELS.get(x, x)}" if x else "")
            drawn.append(charts.lines(title, X_LABELS.get(x, x), curves, share, family == "perturbations"))
    return f'<h3>Curves</h3><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _traffic(clients: Mapping[str, Mapping[str, int]]) -> str:
    if not clients:
        return ""
    most = {way: max(max(t.get(way, 0) for t in clients.values()), 1) for way in ("up", "down")}
    rows = []
    for name, totals in sorted(clients.items(), key=lambda item: (-item[1].get("up", 0), item[0]))[:MOST_ROWS]:
        bars = "".join(
            f'<td class="bar"><i style="width:{100 * totals.get(way, 0) / most[way]:.1f}%;'
            f'background:var(--c{n})"></i></td>'
            f'<td class="n">{escape(size(totals.get(way, 0)))}</td>'
            for n, way in enumerate(("up", "down"))
        )
        rows.append(f"<tr><td>{escape(name)}</td>{bars}</tr>")
    total = {way: sum(t.get(way, 0) for t in clients.values()) for way in most}
    more = f" The {MOST_ROWS} that sent most are shown." if len(clients) > MOST_ROWS else ""
    told = (
        f"{len(clients)} clients sent {size(total['up'])} and received {size(total['down'])}, framing included.{more}"
    )
    head = '<tr><th>client</th><th>sent</th><th class="n"></th><th>received</th><th class="n"></th></tr>'
    return (
        f'<h3>Bytes of each client</h3><p class="about">{escape(told)} Each column has its own scale.</p>'
        f'<div class="wide"><table class="bars">{head}{"".join(rows)}</table></div>'
    )


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return ""
    parts = []
    for example in examples:
        wanted = next((example[name] for name in WANTED if name in example), None)
        answers = []
        for name, value in example.items():
            if name != "prompt":
                text, mark = cell(value), ""
                if name not in WANTED and wanted is not None:
                    mark = ' class="good"' if _same(text, str(wanted)) else ' class="bad"'
                answers.append(f"<dt>{escape(name)}</dt><dd{mark}>{escape(text)}</dd>")
        parts.append(
            f'<div class="message"><p>{escape(str(example.get("prompt", "")))}</p><dl>{"".join(answers)}</dl></div>'
        )
    title = "Before and after" if any("before" in example for example in examples) else "Examples"
    return f"<h3>{title}</h3>{''.join(parts)}"


def _same(answer: str, wanted: str) -> bool:
    return answer.strip().lower() == wanted.strip().lower()


def _gate(verified: Mapping[str, Any]) -> str:
    """What the export gate compared."""
    if not verified:
        return ""
    checks = verified.get("checks", ())
    passed = bool(verified.get("passed"))
    told = (
        "The file behaves like its model."
        if passed
        else f"The file does not behave like its model: {verified.get('reason', '')}"
    )
    on = (
        f" Compared on {verified['prompts']} prompts and {verified.get('positions', 0)} positions."
        if "prompts" in verified
        else ""
    )
    rows = "".join(
        f'<tr><td class="{"good" if c.get("passed") else "bad"}">{"✓" if c.get("passed") else "✗"}</td>'
        f'<td>{escape(str(c.get("name", "")))}</td><td class="n">{_cell(c.get("value"))}</td>'
        f'<td class="n">{_cell(c.get("bound"))}</td><td>{escape(str(c.get("detail", "")))}</td></tr>'
        for c in checks
    )
    grid = (
        '<div class="wide"><table><thead><tr><th></th><th>check</th><th class="n">value</th><th class="n">bound</th>'
        f"<th>what was seen</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    mark = "good" if passed else "bad"
    return f'<h3>The gate</h3><p class="verdict {mark}">{escape(told + on)}</p>{grid if checks else ""}'


def _rejected(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    more = f'<p class="about">{len(rows) - MOST_ROWS} more are in report.json.</p>' if len(rows) > MOST_ROWS else ""
    shown = [[row.get("round"), row.get("client"), row.get("reason")] for row in rows[:MOST_ROWS]]
    return f"<h3>Updates left out</h3>{table(('round', 'client', 'reason'), shown)}{more}"


def _privacy(privacy: Mapping[str, Any] | None) -> str:
    return f"<h3>Privacy</h3>{table(('', ''), list(privacy.items()))}" if privacy else ""


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _artifacts(artifacts: Sequence[Mapping[str, Any]]) -> str:
    if not artifacts:
        return ""
    rows = [[a.get("name"), size(a.get("bytes", 0)), str(a.get("sha256", ""))] for a in artifacts]
    return f"<h3>Files</h3>{table(('file', 'size', 'sha256'), rows)}"


def _details(report: Report) -> str:
    """The exact command, every setting, and what the figures depend on."""
    settings = [[name, cell(value)] for name, value in [*report.config.items(), *report.options.items()]]
    environment = [
        [name.removesuffix("_bytes").replace("_", " "), size(v) if name.endswith("_bytes") and v else v]
        for name, v in report.environment.items()
    ]
    return (
        f"<details><summary>Command, settings, environment</summary><pre><code>{escape(command(report))}</code></pre>"
        f"{table(('setting', 'value'), settings) if settings else ''}"
        f"<h3>Environment</h3>{table(('', ''), environment)}</details>"
    )

"""A finished step as a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_sdk.cli.screen import cell, facts, size, table

if TYPE_CHECKING:
    from edgellm_sdk.report import Report
    from edgellm_sdk.steps import Outcome
    from edgellm_sdk.types import Metric

COUNTED = ("rounds", "forwards", "steps", "perplexity")


def metric(value: Metric) -> str:
    """`0.93 [0.88, 0.97]`, `1.2 MB`."""
    if value.unit == "bytes":
        return size(value.value)
    whole = abs(value.value) < 1e15 and value.value == int(value.value)
    text = cell(int(value.value)) if whole else cell(value.value)
    if value.unit and value.unit not in COUNTED:
        text += f" {value.unit}"
    return text + (f" [{cell(value.ci95[0])}, {cell(value.ci95[1])}]" if value.ci95 else "")


def measured(reports: Sequence[Report]) -> str:
    """Every measurement of a recipe in one table, or nothing when there is only one."""
    columns, rows = comparison(reports)
    return table(columns, rows) if len(rows) > 1 else ""


def comparison(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) over the `eval` steps: what was measured, on which device, and each metric that one has."""
    evals = [report for report in reports if report.verb == "eval" and report.metrics]
    names = list(dict.fromkeys(name for report in evals for name in report.metrics))
    rows = []
    for report in evals:
        values = [metric(report.metrics[name]) if name in report.metrics else "-" for name in names]
        rows.append([cell(report.config.get("subject", "")), report.plugin, *values])
    return ["measured", "on", *names], rows


def outcome(done: Outcome) -> str:
    """What a step did, what it measured and where to look."""
    report = done.report
    parts = [_head(report)]
    if report.metrics:
        parts.append(
            facts([(name, metric(v) + (f" (n = {v.n})" if v.n else "")) for name, v in report.metrics.items()])
        )
    parts += [tables(report)] if report.tables else []
    parts += [examples(report)] if report.examples else []
    if report.rejected:
        parts.append(f"{len(report.rejected)} updates were left out; the first: {cell(report.rejected[0]['reason'])}")
    parts += [cell(note) for note in report.notes]
    places = []
    if done.artifact is not None:
        places.append(("file", str(done.artifact.path)))
    elif done.model is not None:
        places.append(("model", str(done.folder)))
    if (done.folder / "report.html").is_file():
        places.append(("report", str(Path(done.folder) / "report.html")))
    if places:
        parts.append(facts(places))
    return "\n\n".join(parts)


def gate(report: Report) -> str:
    """The verdict on a file, and every check."""
    found = report.verified
    verdict = "The file behaves like its model." if found["passed"] else "The file does not behave like its model."
    columns = ["", "check", "value", "bound", "what was seen"]
    rows = [
        ["ok" if c["passed"] else "NO", c["name"], cell(c["value"]), cell(c["bound"]), cell(c["detail"])]
        for c in found["checks"]
    ]
    return f"{verdict}\n\n{table(columns, rows)}"


def _head(report: Report) -> str:
    plugin = f" with {report.plugin} {report.plugin_version}".rstrip() if report.plugin else ""
    took = f": {report.wall_seconds:.1f} s, {report.cpu_seconds:.1f} s of CPU, peak {size(report.peak_rss_bytes)}"
    return f"{report.verb}{plugin}{took if report.wall_seconds else ''}"


def tables(report: Report) -> str:
    return "\n\n".join(f"{cell(t.get('title', ''))}\n{table(t['columns'], t['rows'])}" for t in report.tables)


def examples(report: Report) -> str:
    lines = []
    for example in report.examples[:3]:
        prompt = cell(example.get("prompt", ""))
        lines.append(f"> {prompt[:200]}{'...' if len(prompt) > 200 else ''}")
        lines += [f"  {name:<9}{cell(text)[:200]}" for name, text in example.items() if name != "prompt"]
    return "\n".join(lines)

"""A finished step as a few lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_sdk.cli.screen import cell, facts, size, table

if TYPE_CHECKING:
    from edgellm_sdk.report import Report
    from edgellm_sdk.steps import Outcome
    from edgellm_sdk.types import Metric


def metric(value: Metric) -> str:
    """`0.93 [0.88, 0.97] (n = 200)`, `1.2 MB`."""
    if value.unit == "bytes":
        return size(value.value)
    text = cell(int(value.value)) if value.value == int(value.value) and abs(value.value) < 1e15 else cell(value.value)
    if value.unit and value.unit not in ("rounds", "forwards", "steps"):
        text += f" {value.unit}"
    if value.ci95:
        text += f" [{cell(value.ci95[0])}, {cell(value.ci95[1])}]"
    return text + (f" (n = {value.n})" if value.n else "")


def outcome(done: Outcome) -> str:
    """What a step did, what it measured and where to look."""
    report = done.report
    parts = [_head(report)]
    if report.metrics:
        parts.append(facts([(name, metric(value)) for name, value in report.metrics.items()]))
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
        for name in ("expected", "before", "after"):
            if name in example:
                lines.append(f"  {name:<9}{cell(example[name])[:200]}")
    return "\n".join(lines)

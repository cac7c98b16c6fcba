"""`edgellm demo`: the shipped recipe, then the four versions of the model side by side."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from edgellm_sdk.report import Report
from edgellm_sdk.steps.recipe import page, run
from edgellm_sdk.steps.step import Outcome

VERSIONS = {
    "base": "base",
    "personalised-eval": "personalised",
    "compressed-eval": "compressed",
    "exported-eval": "exported, in llama.cpp",
}
COLUMNS = ["model", "balanced accuracy", "95 % interval", "size MB", "peak memory MB", "prompt tokens/s"]


def demo(output: str | Path, *, resume: bool = False, quiet: bool = True) -> Outcome:
    """Personalise, compress, export, prove and run a spam filter; a summary on top of `output/report.html`."""
    folder = Path(output)
    with resources.as_file(resources.files("edgellm_sdk") / "assets" / "demo.toml") as recipe:
        outcomes = run(recipe, folder, resume=resume, quiet=quiet)
    by_name = {outcome.folder.name.removesuffix(".report"): outcome for outcome in outcomes}
    summary = summarise({name: outcome.report for name, outcome in by_name.items()})
    page([summary, *(outcome.report for outcome in outcomes)], folder)
    summary.write_json(folder)
    return Outcome(summary, folder, artifact=by_name["filter"].artifact)


def summarise(reports: dict[str, Report]) -> Report:
    """One report over all steps: the table, what each client sent, and messages before and after."""
    tuned, base, final = reports["personalised"], reports["base"], reports["exported-eval"]
    summary = Report.begin("demo", tuned.plugin, tuned.plugin_version, tuned.plugin_origin, tuned.options, tuned.config)
    summary.started = base.started
    for report in reports.values():
        summary.wall_seconds += report.wall_seconds
        summary.cpu_seconds += report.cpu_seconds
        summary.peak_rss_bytes = max(summary.peak_rss_bytes, report.peak_rss_bytes)
    rows = []
    for name, shown in VERSIONS.items():
        metrics = reports[name].metrics
        accuracy, low_high = metrics["balanced accuracy"], metrics["balanced accuracy"].ci95
        rows.append(
            [
                shown,
                round(accuracy.value, 3),
                f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "",
                round(metrics["size"].value / 1e6, 1),
                round(metrics["peak memory"].value / 1e6),
                round(metrics["prompt speed"].value),
            ]
        )
        summary.metrics[f"balanced accuracy, {shown}"] = accuracy
    summary.tables.append({"title": "One model, four forms", "columns": COLUMNS, "rows": rows})
    sent = [[client, t["up_payload"], t["up"], t["down"]] for client, t in sorted(tuned.bytes.items())]
    columns = ["client", "scalars up, bytes", "messages up, bytes", "messages down, bytes"]
    summary.tables.append({"title": "What each client sent and got", "columns": columns, "rows": sent})
    summary.bytes, summary.verified = tuned.bytes, reports["filter"].verified
    summary.artifacts = reports["filter"].artifacts
    summary.curves = tuned.curves
    for before, after in zip(base.examples, final.examples, strict=True):
        summary.examples.append(
            {
                "prompt": before["prompt"],
                "expected": before["expected"],
                "before": before["after"],
                "after": after["after"],
            }
        )
    summary.environment = tuned.environment
    return summary

"""`plugins list`, `info`, `new` and `doctor`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from edgellm_sdk import config, registry
from edgellm_sdk.cli.screen import facts, table
from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.errors import PluginError
from edgellm_sdk.settings import NewPlugin


def listing(request: Request) -> Answer:
    """Every plugin with its state. Nothing but their light modules is imported."""
    rows = registry.rows()
    shown = [
        (
            row.name,
            row.version,
            row.stages,
            [hook.removeprefix("edgellm_") for hook in row.hooks],
            row.origin,
            f"{row.state}: {row.reason}" if row.reason else row.state,
        )
        for row in rows
    ]
    text = table(("name", "version", "stage", "hooks", "origin", "state"), shown)
    return Answer([asdict(row) for row in rows], text)


def info(request: Request) -> Answer:
    """One plugin: what it is and its options with bounds and units."""
    loaded = registry.get(request.words[0])
    row = registry.describe(loaded.source)
    options = config.options(loaded.plugin.config)
    described = [
        {
            "name": o.flag,
            "type": o.type.__name__,
            "default": o.default,
            "bounds": o.bounds,
            "unit": o.unit,
            "help": o.help,
        }
        for o in options
    ]
    about = [
        ("name", row.name),
        ("summary", row.summary),
        ("version", row.version),
        ("paper", row.paper),
        ("stages", row.stages),
        ("hooks", [hook.removeprefix("edgellm_") for hook in row.hooks]),
        ("also called", row.aliases),
        ("origin", row.origin),
        ("state", f"{row.state}: {row.reason}" if row.reason else row.state),
        ("in training", _in_training(loaded)),
    ]
    text = facts([(name, value) for name, value in about if value])
    if options:
        rows = [[d["name"], d["type"], d["default"], d["bounds"], d["unit"], d["help"]] for d in described]
        text += "\n\n" + table(("option", "type", "default", "bounds", "unit", "meaning"), rows)
    return Answer({**asdict(row), "options": described}, text)


def _in_training(loaded: registry.Loaded) -> str:
    """How a training run names the plugin and its options; empty when it cannot be a run's device."""
    if "edgellm_objective" not in loaded.hooks:
        return ""
    dashed = loaded.plugin.name.replace("_", "-")
    return f"finetune --device {loaded.plugin.name}, options as --{dashed}-NAME or under [options.{loaded.plugin.name}]"


def new(request: Request) -> Answer:
    """Write a package with a small working method, from the templates."""
    from edgellm_sdk.cli.template import write_package

    settings: NewPlugin = request.settings
    name = request.words[0]
    folder = Path(settings.output or name)
    files = write_package(name, settings.stage, folder)
    where = shlex.quote(str(folder))
    following = (f"pip install -e {where}", f"pytest {where}", f"edgellm plugins info {name}")
    text = "\n  ".join([f"wrote {folder} ({len(files)} files); next:", *following])
    return Answer({"name": name, "stage": settings.stage, "folder": str(folder), "files": files}, text)


def doctor(request: Request) -> Answer:
    """Load every plugin and run the quick conformance checks; exit code 4 when one fails."""
    from edgellm_sdk.kit.conformance import quick_checks

    rows, worst = [], 0
    for row in registry.rows():
        problems = [row.reason] if row.state == "broken" else quick_checks(row.name)
        state = "broken" if problems else row.state
        worst = PluginError.exit_code if problems else worst
        rows.append({"name": row.name, "origin": row.origin, "state": state, "problems": problems})
    shown = [(r["name"], r["origin"], r["state"], r["problems"]) for r in rows]
    return Answer(rows, table(("name", "origin", "state", "problems"), shown), worst)


VERBS = (
    Verb("plugins list", "Every plugin: name, version, stage, hooks, origin, state.", listing),
    Verb("plugins info", "One plugin and its options.", info, words="NAME", least=1, most=1),
    Verb(
        "plugins new",
        "Start a plugin of your own: a package that installs and passes its tests.",
        new,
        NewPlugin,
        "NAME",
        1,
        1,
    ),
    Verb("plugins doctor", "Load and check every plugin.", doctor),
)

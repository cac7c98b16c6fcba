"""`finetune` and `aggregate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from edgellm_sdk import companions, registry
from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.settings import Aggregate, Finetune


def finetune(request: Request) -> Answer:
    from edgellm_sdk import steps
    from edgellm_sdk.cli import show

    done = steps.finetune(**asdict(request.settings), options=request.options, quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


def aggregate(request: Request) -> Answer:
    from edgellm_sdk import steps
    from edgellm_sdk.cli import show

    inputs = [Path(word) for word in request.words]
    settings: Aggregate = request.settings
    done = steps.aggregate(settings.plugin, inputs, settings.output, options=request.options, quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


def company(said: Mapping[str, str]) -> tuple[registry.Loaded, ...]:
    """The plugins of a training run beside its method, as far as they were typed."""
    found = companions.of_training(said.get("device", "") or "cpu", said.get("aggregate", ""), said.get("around", ""))
    return tuple(other for other in found if other.source.name != said.get("plugin", "").replace("_", "-"))


def installed(stage: str) -> str:
    """For the help page: the plugins that can do `stage`, and how to see their options."""
    rows = registry.for_stage(stage)
    if not rows:
        return f"No plugin that can {stage} is installed."
    names = "; ".join(f"{row.name}: {row.summary}" for row in rows)
    return f"Plugins: {names}.\n\nSee a plugin's own options with: edgellm {stage} --plugin {rows[0].name} --help"


VERBS = (
    Verb(
        "finetune",
        "Train a model on private data across clients; one device is a federation of one.",
        finetune,
        Finetune,
        required=("plugin", "model", "data", "output"),
        plugin="plugin",
        stage="finetune",
        company=company,
        more=lambda: installed("finetune"),
    ),
    Verb(
        "aggregate",
        "Combine updates or adapters that were carried by hand.",
        aggregate,
        Aggregate,
        words="INPUT...",
        least=1,
        most=-1,
        required=("plugin", "output"),
        plugin="plugin",
        stage="aggregate",
        more=lambda: installed("aggregate"),
    ),
)

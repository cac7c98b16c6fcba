"""The verbs that make a model: finetune, aggregate, compress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk import config, models, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate.by_hand import combine
from edgellm_sdk.federate.personal import alone
from edgellm_sdk.federate.profiles import read as read_profiles
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter
from edgellm_sdk.steps import federated
from edgellm_sdk.steps.examples import inherited_data
from edgellm_sdk.steps.step import Outcome, prepare, size_of
from edgellm_sdk.types import Metric


def finetune(
    plugin: str,
    model: str,
    data: str,
    output: str | Path,
    *,
    clients: int = 1,
    rounds: int = 0,
    clients_per_round: int = 0,
    partition: str = "iid",
    seed: int = 0,
    device: str = "cpu",
    aggregate: str = "",
    around: str = "",
    balance: bool = False,
    task_prompt: str = "",
    resume: bool = False,
    dry_run: bool = False,
    profiles: str | Path = "",
    quorum: float = 0.5,
    memory: int = 0,
    hidden: str | Path = "",
    watch: int = 10,
    personalise: int = 0,
    kept_aside: float = 0.2,
    engine: str = "process",
    keep_wire: bool = False,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Federated fine-tuning on this machine: rounds over clients, then an adapter on the base model in `output/model`.

    `rounds` 0 means 100; `clients_per_round` 0 means all; `memory` is a budget in MB, 0 for none; the folder
    `hidden` keeps hidden states of frozen layers for later runs; every `watch` rounds the state is measured on held-out
    data (0: never). A stopped run goes on with `resume` and ends in the same bytes, whatever the `engine`: `process`
    does one client after the other here, `simulation` is Flower's. `keep_wire` keeps every update as it was sent.
    `personalise` local steps give every client an adapter of its own in `output/users`, where it helps on what the
    client kept aside of its examples; `output/users.json` tells who got what.
    `around` names plugins that work around the method, the outermost last. `options` are the method's; those of the
    `device`, of the plugin that aggregates and of those around are tables in it, under their names:
    `{"rank": 4, "llama_cpp": {"contexts": 2}}`.
    """
    given = {
        "plugin": plugin, "model": model, "data": data, "output": str(output), "clients": clients, "rounds": rounds,
        "clients_per_round": clients_per_round, "partition": partition, "seed": seed, "device": device,
        "aggregate": aggregate, "around": around, "balance": balance, "task_prompt": task_prompt, "resume": resume,
        "dry_run": dry_run, "quorum": quorum, "memory": memory, "hidden": str(hidden), "watch": watch,
        "engine": engine, "keep_wire": keep_wire, "profiles": str(profiles),
        "personalise": personalise, "kept_aside": kept_aside,
    }  # fmt: skip
    job = federated.checked(config.build(settings.Finetune, given, "finetune"), options or {}, quiet)
    train, valid = job.data()
    indices = job.dealt(train)
    if clients_per_round > len(indices):
        raise ConfigError(f"{clients_per_round} clients per round of {len(indices)}", "clients-per-round")
    if personalise:
        alone(job.relay, personalise)
    told = read_profiles(Path(profiles), list(indices)) if profiles else {}
    if dry_run:
        return job.step.plan()
    simulated = engine == "simulation"
    if simulated and personalise:
        raise ConfigError("--personalise is for the engine process", "engine", "leave --engine out")
    place = federated.in_simulation(job, indices, told) if simulated else federated.here(job, train, indices, told)
    return federated.train(job, place, valid)


def compress(
    plugin: str,
    model: str,
    output: str | Path,
    *,
    data: str = "",
    task_prompt: str = "",
    seed: int = 0,
    resume: bool = False,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """A smaller model in `output/model`. `data` calibrates it; without, the data the model was tuned on, if known."""
    data, task_prompt = inherited_data(model, data, task_prompt)
    asked = {"model": model, "data": data, "task_prompt": task_prompt, "seed": seed}
    config.build(settings.Compress, asked, "compress")
    step = prepare("compress", plugin, "compress", asked, Path(output), seed, options or {})
    calibration = read(data, "train", task_prompt or None) if data else None
    if dry_run:
        return step.plan()
    handle = models.resolve(model)
    with step.own(resume) as done:
        if done is not None:
            return done
        report = step.report()
        report.resumed = int((step.folder / "checkpoint").is_dir())
        with Meter() as meter:
            relay = Relay([step.loaded], {step.loaded.plugin.name: step.settings})
            ctx = Context(step.folder, seed, quiet=quiet, configs=relay.configs)
            smaller = relay.compress(handle, calibration, ctx)
        report.finish(meter, ctx)
        report.metrics |= {
            "size": Metric(size_of(smaller), "bytes"),
            "size before": Metric(size_of(handle), "bytes"),
        }
        relay.report(report, ctx)
        return step.publish(smaller, report)


def aggregate(
    plugin: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Combine updates or adapters carried by hand: wire updates, safetensors files or adapter folders."""
    paths = [Path(path) for path in inputs]
    asked = {"inputs": [str(path) for path in paths]}
    step = prepare("aggregate", plugin, "aggregate", asked, Path(output), 0, options or {})
    relay = Relay([step.loaded], {step.loaded.plugin.name: step.settings})
    report = step.report()
    with store.run_folder(step.folder), Meter() as meter:
        ctx = Context(step.folder, quiet=quiet, configs=relay.configs)
        rejected = combine(relay, paths, step.folder, ctx)
    report.rejected = [{"client": client, "round": 1, "reason": reason} for client, reason in rejected.items()]
    report.finish(meter, ctx)
    report.write(step.folder)
    return Outcome(report, step.folder)

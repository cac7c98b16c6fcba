"""The verbs that make a model: finetune, aggregate, compress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk import companions, config, models, registry, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate.by_hand import combine
from edgellm_sdk.federate.engine import in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.partition import partition as deal
from edgellm_sdk.federate.personal import INDEX, USERS, alone, require_adapter
from edgellm_sdk.federate.profiles import read as read_profiles
from edgellm_sdk.federate.rounds import Plan, Watch, resumed, run_rounds
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter, Report
from edgellm_sdk.steps.examples import inherited_data, training_data
from edgellm_sdk.steps.fleet import Fleet, describe
from edgellm_sdk.steps.step import Outcome, prepare, size_of
from edgellm_sdk.types import Metric, State

DEFAULT_ROUNDS = 100


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
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Federated fine-tuning in process: rounds over clients, then an adapter on the base model in `output/model`.

    `rounds` 0 means 100; `clients_per_round` 0 means all; `memory` is a budget in MB, 0 for none; the folder
    `hidden` keeps hidden states of frozen layers for later runs; every `watch` rounds the state is measured on held-out
    data (0: never). A stopped run goes on with `resume` and ends in the same bytes.
    `personalise` local steps give every client an adapter of its own in `output/users`, where it helps on what the
    client kept aside of its examples; `output/users.json` tells who got what.
    `around` names plugins that work around the method, the outermost last. `options` are the method's; those of the
    `device`, of the plugin that aggregates and of those around are tables in it, under their names:
    `{"rank": 4, "llama_cpp": {"contexts": 2}}`.
    """
    rounds = rounds or DEFAULT_ROUNDS
    asked: dict[str, Any] = {
        "model": model, "data": data, "clients": clients, "rounds": rounds, "clients_per_round": clients_per_round,
        "partition": partition, "seed": seed, "device": device, "aggregate": aggregate, "around": around,
        "balance": balance, "task_prompt": task_prompt, "quorum": quorum, "watch": watch, "hidden": str(hidden),
        "profiles": str(profiles), "personalise": personalise, "kept_aside": kept_aside,
    }  # fmt: skip
    config.build(settings.Finetune, asked | {"memory": memory}, "finetune")
    method = registry.get(plugin, "finetune")
    others = companions.of_training(device, aggregate, around)
    configs = companions.configs(method, others, options or {})
    own, theirs = companions.separated(options or {}, others)
    asked |= companions.flat(theirs, configs)
    step = prepare("finetune", plugin, "finetune", asked, Path(output), seed, own)
    relay = Relay([method, *(other for other in others if "edgellm_objective" not in other.hooks)], configs)
    if relay.answers("edgellm_aggregate") is None:
        raise ConfigError(f"{plugin!r} does not aggregate", "finetune", "add --aggregate fedavg")
    train, valid = training_data(data, task_prompt, balance, seed)
    indices = deal(train, partition, clients, Stream(seed, "partition"))
    if clients_per_round > len(indices):
        raise ConfigError(f"{clients_per_round} clients per round of {len(indices)}", "clients-per-round")
    if personalise:
        alone(relay, personalise)
    told = read_profiles(Path(profiles), list(indices)) if profiles else {}
    if dry_run:
        return step.plan()
    handle = models.resolve(model)
    if not companions.is_torch(device):
        handle = models.as_file(handle, model)
    with step.own(resume) as done:
        if done is not None:
            return done
        report = step.report()
        with Meter() as meter:
            ctx = Context(
                step.folder, seed, device, memory=memory << 20 or None, quiet=quiet, rounds=rounds,
                configs=relay.configs, hidden=Path(hidden).expanduser() if hidden else None, model=handle,
                profiles=told,
            )  # fmt: skip
            shards = {client: train.select(rows) for client, rows in indices.items()}
            fleet = Fleet(shards, kept_aside, personalise, ctx) if personalise else None
            shards = fleet.training if fleet else shards
            plan = Plan(
                {client: len(shard) for client, shard in shards.items()}, clients_per_round or len(shards), rounds,
                quorum, watch_every=watch,
            )  # fmt: skip
            state = resumed(ctx, handle.digest)
            report.resumed = int(state is not None)
            book = Ledger(step.folder / "ledger.jsonl")
            book.keep_until(state.round if state else 0)
            start = state if state is not None else relay.initialise(handle, ctx)
            if fleet:
                require_adapter(relay, handle, start, step.folder / "model", ctx)
            observe: Watch | None = (lambda s: relay.measure(s, valid, ctx)) if valid is not None and watch else None
            final = run_rounds(relay, start, plan, in_process(relay, handle, shards, ctx), ctx, book, observe)
            tuned = relay.personalise(handle, final, step.folder / "model", ctx)
            measured = relay.measure(final, valid, ctx) if valid is not None else {}
            records = fleet.personalised(relay, handle, final) if fleet else []
        report.finish(meter, ctx)
        _describe_federation(report, book, final, measured, {c: p.kind for c, p in told.items()})
        if records:
            describe(report, records)
        relay.report(report, ctx)
        return step.publish(tuned, report, (USERS, INDEX) if fleet else ())


def _describe_federation(
    report: Report, book: Ledger, final: State, measured: Mapping[str, Metric], kinds: Mapping[str, str]
) -> None:
    totals = book.totals()
    report.federation = book.overview(kinds)
    report.bytes = totals
    report.rejected = [
        {"client": row["client"], "round": row["round"], "reason": row["rejected"]}
        for row in book.rows()
        if row["rejected"]
    ]
    report.metrics |= measured
    up = sum(t["up_payload"] for t in totals.values())
    report.metrics |= {
        "rounds": Metric(final.round, "rounds"),
        "uploaded": Metric(up, "bytes", len(totals)),
        "downloaded": Metric(sum(t["down_payload"] for t in totals.values()), "bytes", len(totals)),
    }
    for name in ("forwards", "steps"):
        if isinstance(final.scalars.get(name), int):
            report.metrics[name] = Metric(final.scalars[name], name)


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

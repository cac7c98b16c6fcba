"""One run of rounds over clients, wherever they are: what is asked, checked once, then trained by any engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import companions, models, registry
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate.engine import Crowd, Gather, in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.partition import partition as deal
from edgellm_sdk.federate.personal import INDEX, USERS, require_adapter
from edgellm_sdk.federate.rounds import Plan, Watch, resumed, run_rounds
from edgellm_sdk.federate.sent import Sent, recorded
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter, Report
from edgellm_sdk.settings import Finetune
from edgellm_sdk.steps import fleet
from edgellm_sdk.steps.examples import training_data
from edgellm_sdk.steps.fleet import Fleet
from edgellm_sdk.steps.step import Outcome, Step, prepare
from edgellm_sdk.types import Dataset, Metric, ModelHandle, Profile, State

if TYPE_CHECKING:
    from edgellm_sdk.federate.flower.simulation import Worker

DEFAULT_ROUNDS = 100
KEPT_WIRE = 1 << 40
NOT_IN_THE_RESULT = ("plugin", "output", "resume", "dry_run", "memory", "engine", "keep_wire")


@dataclass(frozen=True)
class Job:
    """What was asked, with its plugins loaded and their options checked."""

    asked: Finetune
    options: Mapping[str, Any]
    step: Step
    relay: Relay
    quiet: bool = True

    @property
    def rounds(self) -> int:
        return self.asked.rounds or DEFAULT_ROUNDS

    def model(self) -> ModelHandle:
        handle = models.resolve(self.asked.model)
        return handle if companions.is_torch(self.asked.device) else models.as_file(handle, self.asked.model)

    def context(self, model: ModelHandle) -> Context:
        asked = self.asked
        return Context(
            self.step.folder, asked.seed, asked.device, memory=asked.memory << 20 or None, quiet=self.quiet,
            rounds=self.rounds, configs=self.relay.configs,
            hidden=Path(asked.hidden).expanduser() if asked.hidden else None, model=model,
        )  # fmt: skip

    def data(self) -> tuple[Dataset, Dataset | None]:
        asked = self.asked
        return training_data(asked.data, asked.task_prompt, asked.balance, asked.seed)

    def dealt(self, train: Dataset) -> dict[str, list[int]]:
        return deal(train, self.asked.partition, self.asked.clients, Stream(self.asked.seed, "partition"))


def checked(asked: Finetune, options: Mapping[str, Any], quiet: bool = True, verb: str = "finetune") -> Job:
    """Load the plugins and check their options. Nothing is read or written."""
    method = registry.get(asked.plugin, "finetune")
    others = companions.of_training(asked.device, asked.aggregate, asked.around)
    configs = companions.configs(method, others, options)
    own, theirs = companions.separated(options, others)
    named = {name: value for name, value in dataclasses.asdict(asked).items() if name not in NOT_IN_THE_RESULT}
    named |= {"rounds": asked.rounds or DEFAULT_ROUNDS, **companions.flat(theirs, configs)}
    step = prepare(verb, asked.plugin, "finetune", named, Path(asked.output), asked.seed, own)
    relay = Relay([method, *(other for other in others if "edgellm_objective" not in other.hooks)], configs)
    if relay.answers("edgellm_aggregate") is None:
        raise ConfigError(f"{asked.plugin!r} does not aggregate", verb, "add --aggregate fedavg")
    return Job(asked, options, step, relay, quiet)


def here(job: Job, train: Dataset, indices: Mapping[str, list[int]], profiles: Mapping[str, Profile]) -> Gather:
    """Every client in this process."""

    @contextmanager
    def gather(relay: Relay, model: ModelHandle, ctx: Context) -> Iterator[Crowd]:
        shards = {client: train.select(rows) for client, rows in indices.items()}
        steps = job.asked.personalise
        own = Fleet(shards, job.asked.kept_aside, steps, ctx) if steps else None
        shards = own.training if own else shards
        sizes = {client: len(shard) for client, shard in shards.items()}
        yield Crowd(sizes, in_process(relay, model, shards, ctx), profiles, fleet=own)

    return gather


def in_simulation(job: Job, indices: Mapping[str, list[int]], profiles: Mapping[str, Profile]) -> Gather:
    """The same clients in Flower's simulation engine."""
    from edgellm_sdk.federate import flower

    flower.prepare(simulation=True)
    from edgellm_sdk.federate.flower.simulation import simulated

    @contextmanager
    def gather(relay: Relay, model: ModelHandle, ctx: Context) -> Iterator[Crowd]:
        description = {"asked": dataclasses.asdict(job.asked), "options": dict(job.options)}
        cores = len(os.sched_getaffinity(0))
        sizes = {client: len(rows) for client, rows in indices.items()}
        with simulated(description, len(sizes), cores, job.asked.device.startswith("cuda"), ctx.spent) as engine:
            yield Crowd(sizes, engine, profiles)

    return gather


def as_worker(description: Mapping[str, Any]) -> Worker:
    """What `in_simulation` describes, in the process that does the work."""
    from edgellm_sdk.federate.flower.simulation import Worker

    job = checked(Finetune(**description["asked"]), description["options"])
    train, _ = job.data()
    indices = job.dealt(train)
    model = job.model()
    return Worker(job.relay, model, lambda client: train.select(indices[client]), job.context(model))


def train(job: Job, gather: Gather, valid: Dataset | None) -> Outcome:
    """All rounds, then the personalised model in the step's folder."""
    asked, step, relay = job.asked, job.step, job.relay
    handle = job.model()
    with step.own(asked.resume) as done:
        if done is not None:
            return done
        report = step.report()
        with Meter() as meter:
            ctx = job.context(handle)
            state = resumed(ctx, handle.digest)
            report.resumed = int(state is not None)
            book = Ledger(step.folder / "ledger.jsonl")
            book.keep_until(state.round if state else 0)
            watch: Watch | None = (lambda s: relay.measure(s, valid, ctx)) if valid is not None else None
            with gather(relay, handle, ctx) as crowd:
                ctx.profiles = crowd.profiles
                start = state if state is not None else relay.initialise(handle, ctx)
                if crowd.fleet:
                    require_adapter(relay, handle, start, step.folder / "model", ctx)
                per_round = min(asked.clients_per_round, len(crowd.clients)) or len(crowd.clients)
                plan = Plan(crowd.clients, per_round, job.rounds, asked.quorum, watch_every=asked.watch)
                engine = recorded(crowd.engine, Sent(step.folder, KEPT_WIRE)) if asked.keep_wire else crowd.engine
                final = run_rounds(relay, start, plan, engine, ctx, book, watch if asked.watch else None)
                if last := crowd.finished(final):
                    book.add(final.round + 1, 0, last, 0.0)
                report.tables += crowd.tables()
            tuned = relay.personalise(handle, final, step.folder / "model", ctx)
            measured = relay.measure(final, valid, ctx) if valid is not None else {}
            records = crowd.fleet.personalised(relay, handle, final) if crowd.fleet else []
        report.finish(meter, ctx)
        describe(report, book, final, measured, {client: told.kind for client, told in ctx.profiles.items()})
        if records:
            fleet.describe(report, records)
        relay.report(report, ctx)
        return step.publish(tuned, report, (USERS, INDEX) if crowd.fleet else ())


def describe(
    report: Report, book: Ledger, final: State, measured: Mapping[str, Metric], kinds: Mapping[str, str]
) -> None:
    """What the rounds cost and what they gave."""
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

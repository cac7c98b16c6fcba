"""The verbs of a federation over a network: keys, serve, join."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgellm_sdk import config, models, settings
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.errors import ConfigError, EdgeLLMError, FederationError, PluginError
from edgellm_sdk.federate import flower
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.engine import Crowd
from edgellm_sdk.federate.personal import INDEX, USERS, Record, alone
from edgellm_sdk.federate.sent import Sent
from edgellm_sdk.federate.told import cost_to_bytes, gains_to_bytes
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter, environment
from edgellm_sdk.steps import federated, fleet, recipe
from edgellm_sdk.steps.examples import balanced
from edgellm_sdk.steps.fleet import Elsewhere, Fleet
from edgellm_sdk.steps.step import Outcome
from edgellm_sdk.types import Dataset, Metric, ModelHandle, State

KNOCK = 1.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def keys(folder: str | Path, *, clients: int = 0, hosts: Sequence[str] = (), revoke: Sequence[str] = ()) -> list[str]:
    """Make the certificates and keys of a federation in `folder`; returns the names of the clients admitted."""
    flower.prepare()
    from edgellm_sdk.federate.flower import keys as made

    return made.make(Path(folder), clients, hosts, revoke)


def serve(
    source: str | Path,
    output: str | Path,
    *,
    address: str = "127.0.0.1:9092",
    keys: str | Path = "",
    insecure: bool = False,
    wait: float = 300.0,
    deadline: float = 3600.0,
    grace: float = 15.0,
    limit: int = 1024,
    keep_wire: bool = False,
    resume: bool = False,
    quiet: bool = True,
) -> Outcome:
    """Run the one `finetune` step of the recipe `source` over a network, with clients that `join`.

    The recipe's `clients` says how many are waited for, its `data`, if any, only measures. Times are in seconds,
    `limit` in MB. The model is the same, byte for byte, as with the same clients in process. With `personalise` each
    client then makes an adapter of its own, which stays with it; the report has what it told of its gain.
    """
    given = {
        "output": str(output), "address": address, "keys": str(keys), "insecure": insecure, "wait": wait,
        "deadline": deadline, "grace": grace, "limit": limit, "keep_wire": keep_wire, "resume": resume,
    }  # fmt: skip
    asked = config.build(settings.Serve, given, "federation serve")
    flower.prepare()
    from edgellm_sdk.federate.flower.network import Terms, check, gathered

    step, options = _finetune_step(Path(source))
    chosen = config.build(
        settings.Finetune, {**step, "output": str(output), "resume": resume, "keep_wire": keep_wire}, "finetune"
    )
    if chosen.engine != "process" or chosen.profiles:
        raise ConfigError("engine and profiles are for one machine", str(source), "leave them out")
    job = federated.checked(chosen, options, quiet)
    if chosen.personalise:
        alone(job.relay, chosen.personalise)
    terms = Terms(
        address, str(keys), insecure, chosen.clients, chosen.quorum, asked.wait, asked.deadline, asked.grace,
        limit * 1_000_000, _offer(job),
    )  # fmt: skip
    check(terms)
    valid = job.data()[1] if chosen.data else None

    @contextmanager
    def gather(relay: Relay, model: ModelHandle, ctx: Context) -> Iterator[Crowd]:
        elsewhere = Elsewhere(ctx) if chosen.personalise else None
        hiding = [name for name, loaded in relay.plugins.items() if loaded.plugin.hides]
        if elsewhere and hiding:
            ctx.note(f"{hiding[0]} hides what clients have: what personalising gained stays with them")
        with gathered(terms, ctx, model.digest, elsewhere) as crowd:
            yield crowd

    return federated.train(job, gather, valid)


def _finetune_step(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, options) of a recipe's only step."""
    steps = recipe.read(path, optional=("data",))
    if len(steps) != 1 or steps[0]["verb"] != "finetune":
        raise ConfigError("a federation serves a recipe of one finetune step", str(path))
    step = {name: value for name, value in steps[0].items() if name not in recipe.OURS}
    options = step.pop("options", {})
    return step, options


def _offer(job: federated.Job) -> dict[str, Any]:
    """What a client must know to do its part. The server's paths and its backend are its own business."""
    asked = job.asked
    own = {name: value for name, value in job.options.items() if name.replace("-", "_") != asked.device}
    public = asked.model == models.ALIAS or (_HUB_ID.fullmatch(asked.model) and not Path(asked.model).exists())
    return {
        "plugin": asked.plugin, "aggregate": asked.aggregate, "around": asked.around, "options": own,
        "model": asked.model if public else "", "seed": asked.seed, "rounds": job.rounds,
        "task_prompt": asked.task_prompt, "balance": asked.balance, "partition": asked.partition,
        "personalise": asked.personalise, "kept_aside": float(asked.kept_aside),
    }  # fmt: skip


def join(
    address: str,
    data: str,
    output: str | Path,
    *,
    model: str = "",
    keys: str | Path = "",
    insecure: bool = False,
    name: str = "",
    plugin: str = "",
    shard: str = "",
    device: str = "cpu",
    memory: int = 0,
    patience: float = 600.0,
    keep: int = 1024,
    resume: bool = False,
    quiet: bool = True,
) -> Outcome:
    """Take part in the federation at `address` (HOST:PORT) with `data`, which stays here.

    The work is done by the plugins installed here, on the model found here, whose digest must be the server's. All
    that is sent is listed in `output/wire` (see `edgellm audit wire`). Ends with the personalised model in `output`.
    Where the recipe has `personalise` there is an adapter of this client's own too, if that helps; `export --users`
    writes both. Only what it gained is told, and nothing where a plugin of the run hides what clients have.
    """
    given = {
        "data": data, "output": str(output), "model": model, "keys": str(keys), "insecure": insecure, "name": name,
        "plugin": plugin, "shard": shard, "device": device, "memory": memory, "patience": patience, "keep": keep,
        "resume": resume,
    }  # fmt: skip
    asked = config.build(settings.Join, given, "federation join")
    part = _part(asked.shard)
    flower.prepare()
    from edgellm_sdk.federate.flower import keys as made
    from edgellm_sdk.federate.flower.guest import Guest
    from edgellm_sdk.federate.flower.link import Link, split_address
    from edgellm_sdk.federate.flower.network import LOOPBACK

    if insecure and (keys or split_address(address)[0] not in LOOPBACK):
        raise ConfigError("--insecure is for loopback only, and without --keys", address)
    if not insecure and not keys:
        raise ConfigError("needs --keys", "federation join", "ask the operator for this client's folder")
    if insecure and not name:
        raise ConfigError("needs --name without keys", "federation join")
    identity = made.read(Path(keys)) if keys else None
    if identity is not None and name and name != identity.name:
        raise ConfigError(f"the keys are those of {identity.name!r}, not {name!r}", str(keys))
    who = identity.name if identity is not None else name
    if identity is not None:
        _knock(address, Path(keys), asked.patience)
    link = Link(address, identity, asked.patience)
    try:
        link.activate()
        guest = Guest(link, who)
        offer = guest.offer()
        try:
            job, handle, mine = _accept(asked, offer, part, quiet)
        except EdgeLLMError as error:
            guest.reply("refused", f"{type(error).__name__}, exit code {error.exit_code}".encode())
            raise
        return _take_part(guest, job, handle, mine, asked)
    finally:
        link.close()


def _part(shard: str) -> tuple[int, int] | None:
    """(I, N) of `I/N`."""
    number, slash, count = shard.partition("/")
    if not shard:
        return None
    plain = all(text.isascii() and text.isdigit() and len(text) < 8 for text in (number, count))
    if not slash or not plain or not int(number) < int(count):
        raise ConfigError(f"{shard[:20]!r} is no part", "shard", "write I/N, as 0/2")
    return int(number), int(count)


def _knock(address: str, folder: Path, patience: float) -> None:
    """Wait until somebody listens, then find out in plain words whether TLS will work."""
    from edgellm_sdk.federate.flower import keys as made
    from edgellm_sdk.federate.flower.link import check_door

    until = time.monotonic() + patience
    while True:
        try:
            check_door(address, *(str(folder / name) for name in (made.CA, made.CERT, made.KEY)))
            return
        except OSError as error:
            if time.monotonic() > until:
                raise FederationError(f"nobody listens: {error.strerror or error}", address) from None
        time.sleep(KNOCK)


def _accept(
    asked: settings.Join, offer: Mapping[str, Any], part: tuple[int, int] | None, quiet: bool
) -> tuple[federated.Job, ModelHandle, Dataset]:
    """The offered work with what this client has. An error of its class when something does not fit."""
    if asked.plugin and asked.plugin.replace("_", "-") != offer["plugin"].replace("_", "-"):
        raise PluginError(f"the server wants {offer['plugin']!r}, not {asked.plugin!r}", "federation join")
    model = asked.model or offer["model"]
    if not model:
        raise ConfigError("needs --model", "federation join", "the server's is a folder of its own")
    chosen = config.build(
        settings.Finetune,
        {
            **{name: offer[name] for name in ("plugin", "aggregate", "around", "seed", "rounds", "task_prompt",
               "balance", "partition", "personalise", "kept_aside")},
            "model": model, "data": asked.data, "output": asked.output, "device": asked.device,
            "memory": asked.memory, "resume": asked.resume, "clients": part[1] if part else 1,
        },
        "the server's offer",
    )  # fmt: skip
    job = federated.checked(chosen, offer["options"], quiet, "join")
    handle = job.model()
    if handle.digest != offer["digest"]:
        raise ConfigError("the model is not the server's", model, "its files must be the same")
    if part is not None:
        train = job.data()[0]
        name = sorted(job.dealt(train))[part[0]]
        return job, handle, train.select(job.dealt(train)[name])
    train = read(asked.data, "train", chosen.task_prompt or None)
    return job, handle, balanced(train, chosen.seed) if chosen.balance else train


def _take_part(guest: Any, job: federated.Job, handle: ModelHandle, data: Dataset, asked: settings.Join) -> Outcome:
    from edgellm_sdk.federate.flower.enrol import answer

    step, relay = job.step, job.relay
    with step.own(asked.resume) as done:
        if done is not None:
            raise ConfigError("this folder has been through a federation", asked.output, "use another --output")
        report = step.report()
        with Meter() as meter:
            ctx = job.context(handle)
            if asked.insecure:
                ctx.note("insecure: no TLS and no authentication, on loopback")
            sent = Sent(step.folder, asked.keep * 1_000_000)
            about = environment()
            machine = {name: about[name] for name in ("cores", "memory_bytes", "platform")} | {"device": asked.device}
            if asked.memory:
                machine["memory_bytes"] = asked.memory << 20
            steps = job.asked.personalise
            own = Fleet({guest.name: data}, job.asked.kept_aside, steps, ctx) if steps else None
            data = own.training[guest.name] if own else data
            enrolment = answer(guest.name, len(data), handle.digest, machine)
            hidden = any(loaded.plugin.hides for loaded in relay.plugins.values())
            records: list[Record] = []

            def turn(message: bytes) -> Any:
                return work(relay, handle, data, guest.name, message, ctx)

            def cost() -> bytes:
                return b"" if hidden else cost_to_bytes(ctx.spent.get(guest.name))

            def last(final: State) -> bytes:
                if own is None:
                    return b""
                records[:] = own.personalised(relay, handle, final)
                return b"" if hidden else gains_to_bytes(records[0])

            with ctx.progress("federated rounds", job.rounds) as progress:
                final = guest.work(enrolment, turn, sent, progress, last, cost)
            tuned = relay.personalise(handle, final, step.folder / "model", ctx)
        report.finish(meter, ctx)
        report.metrics |= {
            "rounds": Metric(final.round, "rounds"),
            "messages sent": Metric(sent.count, "messages"),
            "sent": Metric(sent.total, "bytes"),
        }
        if records:
            fleet.describe(report, records)
        return step.publish(tuned, report, (USERS, INDEX) if records else ())

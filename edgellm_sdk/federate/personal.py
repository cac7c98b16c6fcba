"""One adapter for each user: short training from the federation's result on one's own examples, shipped if it helps.

Every user keeps a share of its own examples aside before the federation starts, and nothing trains on them. One half of
that share decides what the user gets, the base, the federation's adapter or one of its own; the other half reports what
that brought, so the figure is not the one that was selected on. The more general of two stays unless the other is
better by more than the standard error of their difference over up to five parts of the deciding half.

Local training is the method's own turn in a federation of one: the learning rate's schedule starts anew, and what works
around the method on its way to a server (clipping, noise, masks, another rule of aggregation) has no part in it, since
nothing leaves the device. In a real network `personal` runs on each user's device, with the state the server sent.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgellm_sdk import config, registry, store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, EdgeLLMError, ModelError, StorageError
from edgellm_sdk.federate.client import NOT_THE_CLIENTS_FAULT
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Dataset, ModelHandle, State

USERS, INDEX = "users", "users.json"
BASE, GLOBAL, OWN = CANDIDATES = ("base", "global", "own")  # from general to particular
LOSS = "validation loss"
FOLDS = 5
MAX_STEM = 40
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}", re.ASCII)
_SUFFIXED = re.compile(r".*-[0-9a-f]{16}", re.ASCII)
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.ASCII)

Record = dict[str, Any]


def safe_name(user: str) -> str:
    """A file name for `user`: at most 57 characters of a-z, 0-9, - and _, and another one for every other user.

    A name that is such already stays; any other keeps its letters and gets 64 bits of its sha256, an ending that no
    plain name may have.
    """
    if _PLAIN.fullmatch(user) and not _SUFFIXED.fullmatch(user) and not _DEVICES.fullmatch(user):
        return user
    letters = unicodedata.normalize("NFKD", user).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", letters)[:MAX_STEM].strip("-") or "user"
    return f"{stem}-{hashlib.sha256(user.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


@dataclass(frozen=True)
class Parts:
    """Indices of one user's examples, ascending: what it trains on, and what it keeps aside. Both of the latter are
    empty where there are too few examples to keep some of each."""

    training: tuple[int, ...]
    deciding: tuple[int, ...] = ()
    reporting: tuple[int, ...] = ()


def parted(data: Dataset, share: float, ctx: Context, user: str) -> Parts:
    """About `share` of the examples kept aside, half to decide and half to report, drawn by the run's seed and `user`.

    Equal examples stay together, so that none of those kept aside is trained on in another copy.
    """
    copies: dict[str, list[int]] = {}
    for index, example in enumerate(data.examples):
        copies.setdefault(repr((example.prompt, example.completion)), []).append(index)
    groups = list(copies.values())
    wanted = max(2, round(share * len(data)))
    rooms = (wanted - wanted // 2, wanted // 2)
    training: list[int] = []
    aside: tuple[list[int], list[int]] = ([], [])
    for place in ctx.stream(f"kept aside/{user}").permutation(len(groups)).tolist():
        group = groups[place]
        fits = [part for part, room in zip(aside, rooms, strict=True) if len(part) + len(group) <= room]
        (fits[0] if fits else training).extend(group)
    if not training or not all(aside):
        return Parts(tuple(range(len(data))))
    return Parts(tuple(sorted(training)), *(tuple(sorted(part)) for part in aside))


def alone(relay: Relay, steps: int) -> tuple[Relay, int]:
    """The method of a run by itself, and its rounds: one of `steps` local steps, or that many where it has no steps.

    ConfigError for a method that does not measure.
    """
    name = relay.answers("edgellm_finetune")
    if name is None or "edgellm_measure" not in relay.plugins[name].hooks:
        fix = "choose another method, or leave it out"
        raise ConfigError(f"{name or 'nobody'!r} does not measure, so no gain could be told", "personalise", fix)
    method, settings, rounds = relay.plugins[name], relay.configs[name], steps
    if any(option.name == "steps" for option in config.options(type(settings))):
        settings, rounds = config.overridden(settings, {"steps": steps}, name), 1
    plugins, configs = [method], {name: settings}
    if "edgellm_aggregate" not in method.hooks:
        rule = registry.get("fedavg", "aggregate")
        plugins.append(rule)
        configs[rule.plugin.name] = config.build(rule.plugin.config, {}, rule.plugin.name)
    return Relay(plugins, configs), rounds


def require_adapter(relay: Relay, model: ModelHandle, state: State, folder: Path, ctx: Context) -> None:
    """ConfigError when the method makes whole models, told before any round; `folder` is where the result will be."""
    if relay.personalise(model, state, folder, ctx).adapters == model.adapters:
        name = relay.answers("edgellm_finetune")
        what = f"{name!r} trains whole models here, and one of those for each user is no adapter"
        raise ConfigError(what, "personalise", "train a LoRA")


@dataclass(frozen=True)
class Personal:
    """What one user gets. Losses are nats per scored token, by candidate; `own` is missing where training failed, for
    the reason `why`. `tokens` were scored to report."""

    chosen: str
    deciding: Mapping[str, float]
    reporting: Mapping[str, float]
    tokens: int
    own: State | None
    why: str = ""


@dataclass(frozen=True)
class Measured:
    """Nats per scored token over all `tokens`, and in each part of the examples; infinite where not finite."""

    loss: float
    folds: tuple[float, ...]
    tokens: int


def better(candidate: Measured, current: Measured) -> bool:
    """Whether `candidate` is better by more than the standard error of the mean difference, paired by part."""
    gains = [old - new for old, new in zip(current.folds, candidate.folds, strict=True)]
    mean = sum(gains) / len(gains)
    if len(gains) < 2 or not math.isfinite(mean):
        return mean > 0
    return mean > math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))


def _turn_of(user: str) -> str:
    """The client that a user is by itself: with streams of its own, so with other minibatches and directions than in
    the federation."""
    return f"{user}/own"


class Personaliser:
    """Personalises one user after the other from `state`, the federation's result, with `steps` local steps each."""

    def __init__(self, relay: Relay, model: ModelHandle, state: State, steps: int, ctx: Context) -> None:
        self.relay, rounds = alone(relay, steps)
        self.model, self.start = model, replace(state, arrays=state.sent, round=0, cohort=0)
        self.digest = hashlib.sha256(wire.state_to_bytes(self.start)).hexdigest()
        self.ctx = replace(
            ctx, rounds=rounds, configs=self.relay.configs, curves={}, notes=[], assigned={}, drift=None, foretold={},
            spent={}, profiles={_turn_of(user): profile for user, profile in ctx.profiles.items()},
        )  # fmt: skip
        self.untrained = self.relay.initialise(model, self.ctx)

    def personal(self, user: str, training: Dataset, deciding: Dataset, reporting: Dataset) -> Personal:
        """Train, decide, report. Training that raises for a reason in the data or the numbers leaves `own` out."""
        states = {BASE: self.untrained, GLOBAL: self.start}
        why = ""
        try:
            states[OWN] = self._trained(user, training)
        except NOT_THE_CLIENTS_FAULT:
            raise
        except EdgeLLMError as error:
            why = error.what
        decided = {name: self._measured(state, deciding) for name, state in states.items()}
        chosen = BASE
        for name in CANDIDATES[1:]:
            if name in decided and better(decided[name], decided[chosen]):
                chosen = name
        told = {name: self._measured(state, reporting) for name, state in states.items()}
        return Personal(
            chosen,
            {name: found.loss for name, found in decided.items()},
            {name: found.loss for name, found in told.items()},
            told[BASE].tokens,
            states[OWN] if chosen == OWN else None,
            why,
        )

    def _trained(self, user: str, training: Dataset) -> State:
        state, ctx = self.start, self.ctx
        client = _turn_of(user)
        for _ in range(ctx.rounds):
            assigned = self.relay.assign(state, [client], {client: len(training)}, ctx)
            ctx.assigned = assigned
            update = self.relay.finetune(self.model, training, assigned[client], ctx)
            state = self.relay.aggregate(state, [update], ctx)
        return state

    def _measured(self, state: State, data: Dataset) -> Measured:
        """ConfigError when nothing says a loss."""
        count = min(FOLDS, len(data))
        folds, tokens = [], []
        for k in range(count):
            part = data.select(range(k * len(data) // count, (k + 1) * len(data) // count))
            metric = self.relay.measure(state, part, self.ctx).get(LOSS)
            if metric is None:
                raise ConfigError("the method measures no loss, so no gain could be told", "personalise")
            folds.append(metric.value if math.isfinite(metric.value) else math.inf)
            tokens.append(metric.n)
        whole = sum(loss * n for loss, n in zip(folds, tokens, strict=True) if n) / max(1, sum(tokens))
        return Measured(whole, tuple(folds), sum(tokens))


def everyone(found: Personaliser, shards: Mapping[str, tuple[Dataset, Parts]], folder: Path) -> Iterator[Record]:
    """Personalise all users in name order: adapters in `folder / "users"`, one record each.

    `shards` are each user's examples, all of them, and which of those are kept aside. A user that is done, from the
    same state, is not done again after a stop: its record is on disk, written after its adapter.
    """
    for user in sorted(shards):
        record = _done(folder, user, found.digest)
        if record is None:
            data, parts = shards[user]
            record = one(found, user, data, parts, folder)
            store.write_json(record_path(folder, user), record)
        yield record


def one(found: Personaliser, user: str, data: Dataset, parts: Parts, folder: Path) -> Record:
    """Personalise one user; its adapter, if it gets one of its own, is in `folder / "users" / safe_name(user)`.

    Of a user with too few examples to keep some aside nothing is known, so it keeps the base.
    """
    examples = {name: len(getattr(parts, name)) for name in ("training", "deciding", "reporting")}
    record: Record = {"user": user, "chosen": BASE, "adapter": "", "examples": examples, "digests": {}}
    record["start"] = found.digest
    if not parts.deciding:
        return record | {"deciding": {}, "reporting": {}, "tokens": 0, "why": "too few examples to keep some aside"}
    told = found.personal(user, *(data.select(rows) for rows in (parts.training, parts.deciding, parts.reporting)))
    place = folder / USERS / safe_name(user)
    if told.own is not None:
        with store.replacing(place) as temp:
            found.relay.personalise(found.model, told.own, temp, found.ctx)
        record["digests"] = {path.name: store.digest_file(path) for path in sorted(place.iterdir())}
    return record | {
        "chosen": told.chosen,
        "adapter": {BASE: "", GLOBAL: "model", OWN: f"{USERS}/{place.name}"}[told.chosen],
        "deciding": _finite(told.deciding),
        "reporting": _finite(told.reporting),
        "tokens": told.tokens,
        "why": told.why,
    }


def _finite(losses: Mapping[str, float]) -> dict[str, float | None]:
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


def record_path(folder: Path, user: str) -> Path:
    """Where the record of a user lies once it is done."""
    return folder / "checkpoint" / USERS / f"{safe_name(user)}.json"


def _done(folder: Path, user: str, start: str) -> Record | None:
    """The record of a user that is done: whole, of this user, from this state, and its adapter as it was written."""
    path = record_path(folder, user)
    if not path.is_file():
        return None
    try:
        record: Record = store.read_json(path)
        whole = record["user"] == user and record["start"] == start and intact(folder, record)
    except (ModelError, KeyError, TypeError):
        return None
    return record if whole else None


def intact(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the files of a user's own adapter are there and are those that were written."""
    try:
        return all(
            store.digest_file(folder / record["adapter"] / name) == digest for name, digest in record["digests"].items()
        )
    except StorageError:
        return False


def gain(record: Mapping[str, Any], over: str) -> float | None:
    """The reported loss of `over` minus that of what the user ships, nats per token; None where nobody knows. A user in
    a network tells no losses but its `gains`."""
    if "gains" in record:
        told: float | None = record["gains"].get(over)
        return told
    losses = record["reporting"]
    if not losses or losses[over] is None or losses[record["chosen"]] is None:
        return None
    return float(losses[over] - losses[record["chosen"]])


def gains(records: Sequence[Mapping[str, Any]], over: str) -> list[float]:
    """Of every measured user in order, its `gain`."""
    return [found for record in records if (found := gain(record, over)) is not None]

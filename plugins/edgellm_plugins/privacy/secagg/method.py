"""Secure aggregation of any method whose rule needs no more than the mean of the updates; the protocol is `protocol`.

A client's vector, modulo 2^32: w x on a grid (x its change of theta or its scalars, all arrays together clipped to C),
w times its losses, and w, its number of examples up to a cap. Of the sum S the rule is given sum(w x) / sum(w), as one
update; the sum of the integers is exact, and the mean is off by half a step of the grid for each client at most.

The ordinary messages of a round become four (`edgellm_exchange`), each of which any client may leave unanswered: who
shared keys and then vanished is taken out of the sum by the others' shares, and below the threshold a round is given
up with nothing unmasked. Clients keep their secrets on their own disk between messages and drop them with the last.

The server still sees who takes part and finishes, the sizes clients enrolled with, steps and forwards, and the sum. It
cannot screen single updates: a client can move the mean by C w / sum(w), whatever it sends within its clip, and an
update that is not clipped can wreck a round, for the grid wraps around.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from edgellm_plugins.privacy import masks, protocol, rules
from edgellm_plugins.privacy.clipping import clipped
from edgellm_plugins.privacy.secagg import PLUGIN, Config
from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, ModelError, PrivacyError
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.kit import averaging
from edgellm_sdk.report import Report
from edgellm_sdk.types import Array, Assignment, Dataset, State, Update

KEY = "secagg"
ROWS = f"{KEY}/sealed"
LEAST = 3
LOSSES = 64.0
"""The grid of losses reaches this far: nats."""
COUNTS = ("steps", "forwards", "alone")
NOTE = "secure aggregation: only sums were seen, so that no single update was screened"
Terms: TypeAlias = Mapping[str, Any]


# A client's vector


def laid_out(update: Update, start: Mapping[str, Array], terms: Terms) -> tuple[Array, dict[str, Any]]:
    """(the vector (d,) uint32, what the server must know to read the sum). FederationError for what has no sum."""
    for name, array in update.arrays.items():
        if "/" in name or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise FederationError(f"{name[:60]} is no finite number that secagg could add up", update.client)
    change = {name: array for name, array in update.arrays.items() if name != "loss"}
    if update.kind.startswith("weights"):
        change = {name: array.astype(np.float64) - start[name] for name, array in change.items()}
    losses = [np.ravel(update.arrays.get("loss", np.empty(0))), np.ravel(update.scalars.get("loss", []))]
    weight = min(update.examples, terms["heaviest"]) if terms["weighting"] == "examples" else 1
    share = weight / terms["heaviest"]
    vector = clipped(change, terms["clip"])
    flat = np.concatenate([vector[name].reshape(-1) for name in sorted(vector)])
    parts = [
        masks.quantised(share * flat, terms["clip"], terms["levels"]),
        masks.quantised(share * np.concatenate(losses), LOSSES, terms["levels"]),
        np.array([weight], np.uint32),
    ]
    shapes = {name: [list(a.shape), a.dtype.str] for name, a in sorted(update.arrays.items())}
    told = {name: update.scalars[name] for name in COUNTS if name in update.scalars}
    told |= {name: 0 for name in ("loss", "dropped") if name in update.scalars}
    return np.concatenate(parts), {"kind": update.kind, "shapes": shapes, "scalars": told}


def read_off(total: Array, form: Mapping[str, Any], terms: Terms) -> tuple[dict[str, Array], float | None, int]:
    """(the mean of the arrays float64, the mean loss, the sum of the weights) from the sum of vectors."""
    weight = int(total[-1])
    scale = terms["heaviest"] / weight
    sizes = {name: math.prod(shape) for name, (shape, _) in form["shapes"].items()}
    count = sum(size for name, size in sizes.items() if name != "loss")
    values = masks.restored(total[:count], terms["clip"], terms["levels"]) * scale
    losses = masks.restored(total[count:-1], LOSSES, terms["levels"]) * scale
    arrays, place = {}, 0
    for name in sorted(sizes):
        shape = form["shapes"][name][0]
        if name == "loss":
            arrays[name] = losses[: sizes[name]].reshape(shape)
        else:
            arrays[name] = values[place : place + sizes[name]].reshape(shape)
            place += sizes[name]
    return arrays, float(losses[-1]) if "loss" in form["scalars"] else None, weight


# Clients


def _memory(assignment: Assignment, asked: Mapping[str, Any], ctx: Context) -> protocol.Memory:
    found = ctx.recall(assignment.client, KEY, assignment.round + 1)
    memory: protocol.Memory = found[1] if found else {}
    if memory.get("session") != asked["session"]:
        raise FederationError("secure aggregation: this session is not known", assignment.client)
    return memory


def answer(data: Dataset, assignment: Assignment, ctx: Context) -> Update | None:
    """The reply to every message but the one that asks for the vector."""
    asked, me = assignment.scalars.get(KEY), assignment.client
    if asked is None or asked["phase"] == "masked":
        return None
    if asked["phase"] == "keys":
        memory, told = protocol.advertise(asked["session"])
    elif asked["phase"] == "shares":
        keys = assignment.arrays["public"]
        memory, told = protocol.share(_memory(assignment, asked, ctx), me, asked["clients"], keys, asked["threshold"])
    elif asked["phase"] == "unmask":
        memory, told = protocol.unmask(_memory(assignment, asked, ctx), me, asked["survivors"])
    else:
        raise FederationError("secure aggregation: no such message", me)
    ctx.remember(me, KEY, assignment.round, {}, memory)
    return Update(assignment.base, assignment.round, me, KEY, {"rows": told}, 1)


def prepare(assignment: Assignment, ctx: Context) -> Assignment:
    """The assignment without what is for `under_masks`, which is kept for it. A client under secagg answers nothing
    else, or a server could simply ask for the update itself."""
    asked = assignment.scalars.get(KEY)
    if asked is None:
        raise FederationError("was asked for an update without masks", assignment.client)
    ctx.drop("secagg turn")
    ctx.keep("secagg turn", lambda: (asked, assignment.arrays[ROWS]))
    arrays = {name: array for name, array in assignment.arrays.items() if name != ROWS}
    scalars = {name: value for name, value in assignment.scalars.items() if name != KEY}
    return replace(assignment, arrays=arrays, scalars=scalars)


def under_masks(update: Update, assignment: Assignment, ctx: Context) -> Update:
    """What leaves the client in the place of `update`."""
    turn: tuple[Mapping[str, Any], Array] = ctx.keep("secagg turn", lambda: ({}, np.empty(0)))
    ctx.drop("secagg turn")
    asked, rows = turn
    vector, form = laid_out(update, averaging.theta(assignment.arrays), asked["terms"])
    memory = _memory(assignment, asked, ctx)
    memory, hidden = protocol.masked(memory, update.client, vector, asked["clients"], rows)
    ctx.remember(update.client, KEY, update.round, {}, memory)
    return Update(update.base, update.round, update.client, KEY, {"rows": hidden}, 1, update.rng, {"form": form})


# The server


def before_the_round(clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context) -> None:
    """PrivacyError, before anyone works, where masks would hide nothing or a sum would not do."""
    masks.available()
    if NOTE not in ctx.notes:
        ctx.note(NOTE)
    if reason := rules.not_linear(ctx):
        raise PrivacyError(f"a sum does not serve this rule: {reason}"[:200], KEY)
    for name in ctx.configs:
        if name != PLUGIN.name and "edgellm_incoming" in registry.get(name).hooks:
            raise PrivacyError(f"{name} looks at single updates, which secagg hides", "around", "use one of them")
    if len(clients) < LEAST:
        raise PrivacyError(f"among {len(clients)} clients a sum hides nobody", KEY, f"use at least {LEAST} a round")
    levels = (1 << config.bits) - 1
    heaviest = config.cap or max(data[client] for client in clients)
    heaviest = heaviest if config.weighting == "examples" else 1
    if len(clients) * max(levels, heaviest) >= masks.MODULUS:
        what = f"the sum of {len(clients)} clients' {config.bits} bits does not fit into 32"
        raise PrivacyError(what, KEY, "use fewer bits, a smaller cap, or fewer clients a round")
    terms = {"clip": config.clip, "levels": levels, "heaviest": heaviest, "weighting": config.weighting}
    ctx.drop("secagg terms")
    ctx.keep("secagg terms", lambda: terms)


class Conversation:
    """The messages of one round. `ask` sends one and gives the usable replies by client, sorted."""

    def __init__(self, engine: Engine, state: State, clients: Sequence[str], config: Config) -> None:
        self.engine, self.state, self.session = engine, state, secrets.token_hex(16)
        self.clients = sorted(clients)
        self.threshold = max(2, math.ceil(config.threshold * len(clients)))
        self.reasons: dict[str, str] = {}

    def message(self, client: str, phase: str, asked: Terms, arrays: Mapping[str, Array]) -> Assignment:
        told = {KEY: {"phase": phase, "session": self.session, **asked}}
        return Assignment(self.state.base, self.state.round + 1, client, arrays, told)

    def ask(self, messages: Mapping[str, Assignment], good: Callable[[Array], bool]) -> dict[str, Update]:
        """FederationError when fewer than the threshold give rows that are `good`."""
        found: dict[str, Update] = {}
        for client, reply in self.engine({c: wire.assignment_to_bytes(m) for c, m in messages.items()}):
            if client in found or client in self.reasons or client not in messages:
                continue
            try:
                if isinstance(reply, Failure):
                    raise FederationError(reply.reason)
                update = wire.update_from_bytes(reply, client)
                problem = wire.check_update(update, self.state, client)
                if problem or update.kind != KEY or set(update.arrays) != {"rows"} or not good(update.arrays["rows"]):
                    raise FederationError(problem or "secure aggregation: did not answer what it was asked")
                found[client] = update
            except (FederationError, ModelError) as error:
                self.reasons[client] = error.what
        if len(found) < self.threshold:
            what = f"secure aggregation: {len(found)} of {self.threshold} needed answered, nothing was unmasked"
            raise FederationError(what)
        return {client: found[client] for client in sorted(found)}


def exchange(
    messages: Mapping[str, bytes], engine: Engine, state: State, config: Config, ctx: Context
) -> Iterator[tuple[str, bytes | Failure]]:
    """For every client that finished the mean of all that did, under its name; for the others why they did not."""
    talk = Conversation(engine, state, list(messages), config)
    terms: Terms = ctx.keep("secagg terms", lambda: {})
    try:
        survivors, mean, weight = _sum(talk, terms, ctx)
    except FederationError as error:
        yield from ((client, Failure(talk.reasons.get(client, error.what))) for client in talk.clients)
        return
    ctx.drop("secagg weight")
    ctx.keep("secagg weight", lambda: weight)
    for client in talk.clients:
        if client in survivors:
            yield client, wire.update_to_bytes(replace(mean, client=client))
        else:
            yield client, Failure(talk.reasons.get(client, "did not answer"))


def _sum(talk: Conversation, terms: Terms, ctx: Context) -> tuple[list[str], Update, int]:
    """(who finished, the mean of them, the sum of their weights). FederationError with nothing unmasked."""

    def asking(clients: Sequence[str], phase: str, asked: Terms, arrays: Mapping[str, Array]) -> dict[str, Assignment]:
        return {client: talk.message(client, phase, asked, arrays) for client in clients}

    def sized(*shape: int, dtype: str = "|u1") -> Callable[[Array], bool]:
        return lambda rows: rows.shape == shape and rows.dtype.str == dtype

    keys = talk.ask(asking(talk.clients, "keys", {}, {}), sized(2, 32))
    public, clients = {client: reply.arrays["rows"] for client, reply in keys.items()}, list(keys)
    asked = {"clients": clients, "threshold": talk.threshold}
    lists = asking(clients, "shares", asked, {"public": np.stack([public[client] for client in clients])})
    sealed = {c: u.arrays["rows"] for c, u in talk.ask(lists, sized(len(clients), protocol.SEALED)).items()}
    senders = list(sealed)

    work = {}
    for client in senders:
        rows = np.stack([sealed[other][clients.index(client)] for other in senders])
        told = {KEY: {"phase": "masked", "session": talk.session, "clients": senders, "terms": dict(terms)}}
        given = ctx.assigned[client]
        work[client] = replace(given, arrays={**given.arrays, ROWS: rows}, scalars={**given.scalars, **told})
    vectors = talk.ask(work, lambda rows: rows.ndim == 1 and rows.dtype.str == "<u4")
    costs = dict(ctx.spent)
    first = vectors[next(iter(vectors))]
    form, size = first.scalars.get("form"), len(first.arrays["rows"])
    survivors = [c for c, u in vectors.items() if u.scalars.get("form") == form and len(u.arrays["rows"]) == size]
    for client in set(vectors) - set(survivors):
        talk.reasons[client] = "sends another form than the first client"
    if len(survivors) < talk.threshold:
        raise FederationError("secure aggregation: the clients' vectors are not of one form, nothing was unmasked")

    row = sized(len(senders), masks.SHARE)
    answers = talk.ask(asking(survivors, "unmask", {"survivors": survivors}, {}), row)
    ctx.spent.update(costs)  # what the work took, not what the last message did
    total = np.zeros(size, np.uint32)
    for client in survivors:
        total += vectors[client].arrays["rows"]
    held = {client: reply.arrays["rows"] for client, reply in answers.items()}
    total = protocol.unmasked(total, talk.session, clients, public, senders, survivors, talk.threshold, held)
    return survivors, *_mean(total, form, first, terms, ctx)


def _mean(total: Array, form: Any, first: Update, terms: Terms, ctx: Context) -> tuple[Update, int]:
    try:
        arrays, loss, weight = read_off(total, form, terms)
        start = averaging.theta(ctx.assigned[first.client].arrays) if form["kind"].startswith("weights") else {}
        arrays = {name: (a + start.get(name, 0)).astype(form["shapes"][name][1]) for name, a in arrays.items()}
        scalars = dict(form["scalars"])
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError):
        raise FederationError("secure aggregation: the sum does not have the form that was told") from None
    scalars |= {"loss": loss} if loss is not None else {}
    return Update(first.base, first.round, first.client, form["kind"], arrays, 1, first.rng, scalars), weight


def merged(updates: Sequence[Update], ctx: Context) -> list[Update]:
    """One update for all of them, which are alike, with the mean of their examples and the sum of their forwards."""
    first, count = updates[0], len(updates)
    weight = ctx.keep("secagg weight", lambda: count)
    scalars = dict(first.scalars)
    scalars |= {"forwards": scalars["forwards"] * count} if "forwards" in scalars else {}
    return [replace(first, examples=max(1, round(weight / count)), scalars=scalars)]


def describe(report: Report, config: Config) -> None:
    """The claim, in the report."""
    report.notes += [] if NOTE in report.notes else [NOTE]
    report.privacy = {
        "seen by the server": "sums over the clients of a round, who took part, sizes, steps and forwards",
        "against": "a server that is curious and follows the protocol, and clients fewer than the threshold",
        "threshold": f"{config.threshold:g} of a round's clients",
        "clip": f"{config.clip:g}, on a grid of {config.bits} bits",
        "not covered": "what the sums and the model tell: no differential privacy; single updates are not screened",
    }

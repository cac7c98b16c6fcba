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

import json
import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgellm_plugins.privacy import masks, protocol, rules
from edgellm_plugins.privacy.secagg import PLUGIN, Config
from edgellm_plugins.privacy.vectors import Terms, laid_out, public, read_off
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
NOTE = "secure aggregation: only sums were seen, so that no single update was screened"


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
    told = {"form": form, "public": public(update)}
    return Update(update.base, update.round, update.client, KEY, {"rows": hidden}, 1, update.rng, told)


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
    ctx.drop("secagg sizes")
    ctx.keep("secagg sizes", lambda: dict(data))
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
        finished, mean, weight = _sum(talk, terms, ctx)
    except FederationError as error:
        yield from ((client, Failure(talk.reasons.get(client, error.what))) for client in talk.clients)
        return
    ctx.drop("secagg weight")
    ctx.keep("secagg weight", lambda: weight)
    sizes: dict[str, int] = ctx.keep("secagg sizes", lambda: {})
    for client in talk.clients:
        if client in finished:
            told = finished[client].scalars.get("public")
            scalars = {**(told if isinstance(told, dict) else {}), **mean.scalars}
            yield client, wire.update_to_bytes(replace(mean, client=client, examples=sizes[client], scalars=scalars))
        else:
            yield client, Failure(talk.reasons.get(client, "did not answer"))


def _sum(talk: Conversation, terms: Terms, ctx: Context) -> tuple[dict[str, Update], Update, int]:
    """(who finished, the mean of them, the sum of their weights). FederationError with nothing unmasked."""

    def asking(clients: Sequence[str], phase: str, asked: Terms, arrays: Mapping[str, Array]) -> dict[str, Assignment]:
        return {client: talk.message(client, phase, asked, arrays) for client in clients}

    def sized(*shape: int, dtype: str = "|u1") -> Callable[[Array], bool]:
        return lambda rows: rows.shape == shape and rows.dtype.str == dtype

    keys = talk.ask(asking(talk.clients, "keys", {}, {}), sized(2, 32))
    shown, clients = {client: reply.arrays["rows"] for client, reply in keys.items()}, list(keys)
    asked = {"clients": clients, "threshold": talk.threshold}
    lists = asking(clients, "shares", asked, {"public": np.stack([shown[client] for client in clients])})
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
    forms = {c: (json.dumps(u.scalars.get("form"), sort_keys=True), u.arrays["rows"].size) for c, u in vectors.items()}
    most, _ = Counter(forms.values()).most_common(1)[0]
    survivors = [client for client, form in forms.items() if form == most]
    first = vectors[survivors[0]]
    for client in set(vectors) - set(survivors):
        talk.reasons[client] = "sends another form than most"
    if len(survivors) < talk.threshold:
        raise FederationError("secure aggregation: the clients' vectors are not of one form, nothing was unmasked")

    row = sized(len(senders), masks.SHARE)
    answers = talk.ask(asking(survivors, "unmask", {"survivors": survivors}, {}), row)
    ctx.spent.update(costs)  # what the work took, not what the last message did
    total = np.zeros(most[1], np.uint32)
    for client in survivors:
        total += vectors[client].arrays["rows"]
    held = {client: reply.arrays["rows"] for client, reply in answers.items()}
    total = protocol.unmasked(total, talk.session, clients, shown, senders, survivors, talk.threshold, held)
    return {client: vectors[client] for client in survivors}, *_mean(total, first, terms, talk.state, ctx)


def _mean(total: Array, first: Update, terms: Terms, state: State, ctx: Context) -> tuple[Update, int]:
    form: Any = first.scalars.get("form")
    try:
        arrays, loss, weight = read_off(total, form, terms)
        start = averaging.sent(first.client, state, ctx) if form["kind"].startswith("weights") else {}
        arrays = {name: (a + start.get(name, 0)).astype(form["shapes"][name][1]) for name, a in arrays.items()}
        update = Update(first.base, first.round, first.client, form["kind"], arrays, 1, form["rng"])
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError):
        raise FederationError("secure aggregation: the sum does not have the form that was told") from None
    return replace(update, scalars={} if loss is None else {"loss": loss}), weight


def merged(updates: Sequence[Update], ctx: Context) -> list[Update]:
    """One update for all of them, which are alike, with the mean of their weights, the sum of their forwards and the
    most of their steps."""
    first, count = updates[0], len(updates)
    weight = ctx.keep("secagg weight", lambda: count)
    scalars = dict(first.scalars)
    for name, joined in (("forwards", sum), ("steps", max)):
        if name in scalars:
            scalars[name] = joined(update.scalars[name] for update in updates)
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

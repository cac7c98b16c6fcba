"""The engine over Flower's network, and everything around it that the server of a federation needs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, EdgeLLMError, Interrupted, printable
from edgellm_sdk.federate.engine import Crowd
from edgellm_sdk.federate.flower import keys
from edgellm_sdk.federate.flower.enrol import FINISHED, HEARD, PAUSE, STOPPED, UPDATE, WORK, Roster
from edgellm_sdk.federate.flower.hub import Hub
from edgellm_sdk.federate.flower.link import split_address
from edgellm_sdk.federate.ledger import FINAL, Line
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.federate.sent import round_of
from edgellm_sdk.federate.told import cost_from_bytes
from edgellm_sdk.types import Profile, State

if TYPE_CHECKING:
    from edgellm_sdk.steps.fleet import Elsewhere

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MEMBERS = "clients.json"
FAREWELL = 30.0


@dataclass(frozen=True)
class Terms:
    """`wait` and `deadline` in seconds, for all clients to come and for one round; a client that is away for `grace`
    seconds has left the round. `limit` is that of a message, in bytes."""

    address: str
    keys: str
    insecure: bool
    clients: int
    quorum: float
    wait: float
    deadline: float
    grace: float
    limit: int
    offer: Mapping[str, Any]


def check(terms: Terms) -> None:
    """ConfigError for terms that cannot be met. Nothing is opened."""
    host, _ = split_address(terms.address)
    if terms.insecure and host not in LOOPBACK:
        raise ConfigError("--insecure is for loopback only", terms.address, "make keys: edgellm federation keys")
    if terms.insecure and terms.keys:
        raise ConfigError("--insecure and --keys exclude each other", "federation serve")
    if not terms.insecure and not terms.keys:
        raise ConfigError("needs --keys", "federation serve", "make some: edgellm federation keys FOLDER --clients 2")
    if terms.keys:
        keys.read(Path(terms.keys))
        count = len(keys.admitted(Path(terms.keys)))
        if count < terms.clients:
            raise ConfigError(f"{count} clients have keys, the recipe wants {terms.clients}", terms.keys)


@contextmanager
def gathered(terms: Terms, ctx: Context, digest: str, elsewhere: Elsewhere | None = None) -> Iterator[Crowd]:
    """Open the port, wait for the clients, and lend them to the rounds; tell them when it is over.

    With `elsewhere` they personalise then, within the deadline of a round, and it is given what they tell.
    """
    folder = Path(terms.keys) if terms.keys else None
    identity = keys.read(folder) if folder else None
    admitted = keys.admitted(folder) if folder else {}
    host, port = split_address(terms.address)
    known = store.read_json(ctx.folder / MEMBERS) if (ctx.folder / MEMBERS).is_file() else {}
    examples = {name: entry["examples"] for name, entry in known.items()}
    hub = Hub(host, port, identity, admitted, terms.limit, 4 * max(terms.clients, len(admitted)) + 64)
    try:
        if identity is None:
            ctx.note("insecure: no TLS and no authentication, on loopback")
        ctx.note(f"listening on {terms.address}")
        roster = Roster(hub, {**terms.offer, "digest": digest, "limit": terms.limit}, examples, ctx)
        before = elsewhere.told(examples) if elsewhere else {}
        wanted = len(examples.keys() - before) if examples else terms.clients
        with ctx.progress("clients", wanted) as progress:
            seen = [0]

            def look(count: int) -> None:
                progress.advance(count - seen[0], ", ".join(sorted(roster.members)))
                seen[0] = count

            if wanted:
                roster.wait(wanted, max(1, math.ceil(terms.quorum * wanted)), terms.wait, look)
        if not known:
            known = {
                name: {"examples": member.examples, "machine": roster.machines.get(name, {})}
                for name, member in sorted(roster.members.items())
            }
            store.write_json(ctx.folder / MEMBERS, known)
        sizes = {name: entry["examples"] for name, entry in known.items()}
        machines = {name: entry["machine"] for name, entry in known.items()}

        def finished(final: State) -> list[Line]:
            body = wire.state_to_bytes(replace(final, arrays=final.sent))
            if elsewhere is None:
                told = dict.fromkeys(roster.tell(FINISHED, body, FAREWELL), 0)
            else:
                told = before | personalised(roster, terms, sorted(sizes.keys() - before), body, elsewhere)
            return [Line(client, len(body), 0, up, 0, kind=FINAL) for client, up in told.items()]

        try:
            yield Crowd(sizes, over(roster, terms), profiles(machines), finished, lambda: traffic(roster), elsewhere)
        except Interrupted:
            raise  # the clients wait for --resume
        except EdgeLLMError as error:
            roster.tell(STOPPED, error.what.encode(), 5.0)
            raise
    finally:
        hub.close()


def personalised(
    roster: Roster, terms: Terms, clients: Sequence[str], body: bytes, elsewhere: Elsewhere
) -> dict[str, int]:
    """Give `clients` the last state and wait for what each tells: bytes of that by client, of those reached."""
    told = {}
    with roster.ctx.progress("one adapter for each user, on their machines", len(clients)) as progress:
        for client, reply in over(roster, terms, FINISHED, FINISHED)(dict.fromkeys(clients, body)):
            progress.advance(1, client)
            if isinstance(reply, Failure):
                roster.ctx.note(f"{client} did not tell what personalising gained: {printable(reply.reason)}")
                if not reply.reached:
                    continue
            elif reply:
                elsewhere.add(client, reply)
                roster.hub.send(roster.members[client].node, HEARD, b"")
            told[client] = 0 if isinstance(reply, Failure) else len(reply)
    roster.tell(HEARD, b"", FAREWELL)  # also to those who had told before the server was started again
    return dict(sorted(told.items()))


def over(roster: Roster, terms: Terms, kind: str = WORK, wanted: str = UPDATE) -> Engine:
    """An engine over the members of `roster`. Who is silent at the deadline, or away too long, is left out. `kind` is
    that of the messages, `wanted` that of the replies. What turns cost goes to `ctx.spent`, as far as clients tell."""
    hub, spent = roster.hub, roster.ctx.spent
    away: set[str] = set()  # nobody waits again for who did not come back

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        began = time.monotonic()
        waiting: dict[str, tuple[int, str]] = {}
        there = {client: -math.inf if client in away else began for client in messages}
        left = set(messages)
        for client in left:
            spent.pop(client, None)
        try:
            while left:
                roster.poll()
                now = time.monotonic()
                for client in sorted(left):
                    member = roster.members.get(client)
                    if member is not None and hub.present(member.node):
                        there[client] = now
                        away.discard(client)
                        if waiting.get(client, (0, ""))[0] != member.session:
                            if client in waiting:
                                hub.forget(waiting[client][1])
                            body = messages[client]
                            message = hub.send(member.node, kind, body, round_of(body))
                            if message is not None:
                                waiting[client] = (member.session, message)
                    elif now - there[client] > terms.grace:
                        left.discard(client)
                        away.add(client)
                        sent = client in waiting
                        yield client, Failure("went away" if sent else "is not there", reached=sent)
                found = hub.replies(message for client, (_, message) in waiting.items() if client in left)
                for client in sorted(left):
                    reply = found.get(waiting[client][1]) if client in waiting else None
                    if reply is not None:
                        left.discard(client)
                        if (cost := cost_from_bytes(reply.cost)) is not None:
                            spent[client] = cost
                        reason = reply.body[:300].decode(errors="replace")
                        yield client, reply.body if reply.kind == wanted else Failure(reason)
                if left and time.monotonic() - began > terms.deadline:
                    for client in sorted(left):
                        yield client, Failure(f"was silent for {terms.deadline:.0f} s")
                    return
                if not found:
                    time.sleep(PAUSE)
        finally:
            for _, message in waiting.values():
                hub.forget(message)

    return exchange


def profiles(machines: Mapping[str, Mapping[str, Any]]) -> dict[str, Profile]:
    """What clients said of themselves when they enrolled, as far as it can be used."""

    def number(machine: Mapping[str, Any], name: str) -> int:
        value = machine.get(name, 0)
        return value if type(value) is int and 0 <= value < 1 << 50 else 0

    return {
        client: Profile(
            printable(str(machine.get("device", "")))[:40], number(machine, "memory_bytes"), number(machine, "cores")
        )
        for client, machine in machines.items()
    }


def traffic(roster: Roster) -> list[dict[str, Any]]:
    """For the report: bytes on the socket by client, TLS and framing included."""
    sums = roster.hub.front.traffic()
    rows = [[client, *sums.get(str(member.node), (0, 0))] for client, member in sorted(roster.members.items())]
    other = sums.get("", (0, 0))
    rows.append([f"others ({roster.hub.front.refused} refused)", *other])
    return [{"title": "On the socket, in bytes", "columns": ["client", "up", "down"], "rows": rows}]

"""Who takes part: the server offers the work to each node that arrives, and the node answers who it is, or no.

A client answers with its name, its number of examples and what its machine is. Nothing else is learnt of its data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, printable
from edgellm_sdk.federate.flower.hub import Hub, Reply
from edgellm_sdk.wire import strict_json

OFFER, ENROLLED, REFUSED, WORK, UPDATE, FAILURE, STOPPED, FINISHED, GAINS, HEARD = (
    "offer", "enrolled", "refused", "work", "update", "failure", "stopped", "finished", "gains", "heard",
)  # fmt: skip
MAX_ANSWER = 64 << 10
PAUSE = 0.05


@dataclass
class Member:
    """A client that takes part. `session` counts how often it has come; its work of an earlier one is lost."""

    node: int
    examples: int
    session: int = 1


def answer(name: str, examples: int, digest: str, machine: Mapping[str, Any]) -> bytes:
    """A client's answer to an offer."""
    said = {"client": name, "examples": examples, "digest": digest, "machine": dict(machine)}
    return json.dumps(said, sort_keys=True).encode()


class Roster:
    """Everybody who takes part, by name. `poll` handles those who arrive; call it whenever nothing else is to do.

    `known` are the members of a run that is resumed, with their number of examples: nobody else is let in then.
    """

    def __init__(self, hub: Hub, offer: Mapping[str, Any], known: Mapping[str, int], ctx: Context) -> None:
        self.hub, self.ctx, self.known = hub, ctx, dict(known)
        self.members: dict[str, Member] = {}
        self.machines: dict[str, Any] = {}
        self.closed = False
        self._offer = json.dumps(dict(offer), sort_keys=True).encode()
        self._asked: dict[str, int] = {}

    def poll(self) -> None:
        for node in self.hub.arrived():
            message = self.hub.send(node, OFFER, self._offer)
            if message is None:
                self.hub.fresh.add(node)  # its activation is still on its way
            else:
                self._asked[message] = node
        for message, reply in self.hub.replies(self._asked).items():
            self._answered(self._asked.pop(message), reply)

    def _answered(self, node: int, reply: Reply) -> None:
        sure = self.hub.names.get(node, "")
        if reply.kind == REFUSED:
            self.ctx.note(f"{sure or 'a client'} does not take part: {printable(reply.body.decode(errors='replace'))}")
            return
        try:
            said = strict_json(reply.body[:MAX_ANSWER].decode())
            name, examples, machine = said["client"], said["examples"], said["machine"]
            problem = "" if isinstance(name, str) and 0 < len(name.encode()) <= 255 and name.isprintable() else "name"
            problem = problem or ("" if type(examples) is int and 0 < examples < 1 << 40 else "examples")
            problem = problem or ("" if isinstance(machine, dict) else "machine")
        except (ValueError, KeyError, TypeError):
            name, examples, machine, problem = "", 0, {}, "answer"
        if not problem and sure and name != sure:
            problem = "name"
        member = self.members.get(name)
        if not problem and member is not None and member.node != node and self.hub.present(member.node):
            problem = "name, which another one has,"
        if problem:
            self._turn_away(node, f"the {problem} is not acceptable")
            return
        before = self.known.get(name) if member is None else member.examples
        late = before is None and (self.closed or self.known)
        if late or (before is not None and before != examples):
            self._turn_away(node, "the federation began without it" if late else "it came with other data before")
            return
        if member is None:
            self.members[name] = Member(node, examples)
        else:
            member.node, member.session = node, member.session + 1
        self.machines[name] = machine

    def _turn_away(self, node: int, reason: str) -> None:
        self.ctx.note(f"turned away {self.hub.names.get(node, 'a client')}: {reason}")
        self.hub.send(node, STOPPED, reason.encode())

    def _here(self, client: str) -> bool:
        return self.hub.present(self.members[client].node)

    def wait(self, wanted: int, least: int, seconds: float, look: Callable[[int], None]) -> None:
        """Until `wanted` have enrolled, or `least` of them at the deadline. FederationError below that."""
        until = time.monotonic() + seconds
        while len(self.members) < wanted and time.monotonic() < until:
            self.poll()
            look(len(self.members))
            time.sleep(PAUSE)
        self.closed = True
        if len(self.members) < least:
            what = f"{len(self.members)} of {wanted} clients came within {seconds:.0f} s, {least} are needed"
            raise FederationError(what, "enrolment", "start more with edgellm federation join")
        if len(self.members) < wanted:
            self.ctx.note(f"{len(self.members)} of {wanted} clients came within {seconds:.0f} s")

    def tell(self, kind: str, body: bytes, seconds: float) -> list[str]:
        """Leave everybody present a last message and wait until it is answered or they leave; returns who answered."""
        left = {
            message: client
            for client, member in self.members.items()
            if self._here(client) and (message := self.hub.send(member.node, kind, body)) is not None
        }
        told = []
        until = time.monotonic() + seconds
        while left and time.monotonic() < until:
            told += [left.pop(message) for message in self.hub.replies(left)]
            for message in [message for message, client in left.items() if not self._here(client)]:
                self.hub.forget(message)
                del left[message]
            time.sleep(PAUSE)
        return sorted(told)

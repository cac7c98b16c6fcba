"""A client in a federation: wait for the offer, enrol, work until the server says that it is over."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from flwr.app import Message

from edgellm_sdk import wire
from edgellm_sdk.context import Progress
from edgellm_sdk.errors import EdgeLLMError, FederationError, ModelError, printable
from edgellm_sdk.federate.flower.enrol import ENROLLED, FAILURE, FINISHED, GAINS, HEARD, OFFER, STOPPED, UPDATE, WORK
from edgellm_sdk.federate.flower.link import Link, Lost
from edgellm_sdk.federate.flower.parts import COST, from_records, to_records
from edgellm_sdk.federate.rounds import Failure
from edgellm_sdk.federate.sent import Sent, round_of
from edgellm_sdk.types import State

MAX_OFFER = 1 << 20
QUICK, SLOW, SHARE = 0.05, 3.0, 0.1  # seconds between two looks, and that as a share of the wait so far
NAMES = {"plugin": str, "aggregate": str, "around": str, "options": dict, "model": str, "digest": str, "seed": int,
         "rounds": int, "task_prompt": str, "balance": bool, "partition": str, "limit": int, "personalise": int,
         "kept_aside": float}  # fmt: skip
Done = TypeVar("Done")
Turn = Callable[[bytes], "bytes | Failure"]
Last = Callable[[State], bytes]
"""What a client does with the last state by itself, and tells."""
Spent = Callable[[], bytes]
"""What the last turn cost, as it is told."""


def read_offer(body: bytes) -> dict[str, Any]:
    """What the server wants done. FederationError when it is not an offer of this protocol."""
    try:
        offer = wire.strict_json(body.decode())
        if isinstance(offer, dict) and all(type(offer.get(name)) is kind for name, kind in NAMES.items()):
            return {name: offer[name] for name in NAMES}
    except ValueError:
        pass
    raise FederationError("the server's offer cannot be read", fix="do both sides have the same edgellm?")


class Guest:
    """One client's part in the conversation. `limit` of a message is 1 MiB until an offer names another."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name
        self.limit = MAX_OFFER
        self._offer = b""
        self._asked: Message | None = None

    def _next(self) -> tuple[str, bytes]:
        """(kind, body) of the next message; waits for it. `stopped` becomes a FederationError."""
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                message = self.link.fetch()
            except Lost:
                self.link.activate()
                continue
            if message is None:
                if time.monotonic() - asked < 1:  # else the server made the call wait
                    time.sleep(min(SLOW, max(QUICK, SHARE * (asked - began))))
                continue
            try:
                kind, body = from_records(message.content, self.limit, "the server's message")
            except ModelError as error:
                raise FederationError(f"the server's message {error.what}", self.link.address) from None
            self._asked = message
            if kind == STOPPED:
                self.reply(STOPPED, b"")
                raise FederationError(f"the server stopped: {printable(body[:300].decode(errors='replace'))}")
            return kind, body

    def reply(self, kind: str, body: bytes, cost: bytes = b"") -> None:
        """Answer the message at hand. If the server has been started again meanwhile, it will ask again."""
        if self._asked is None:
            raise ValueError("there is nothing to answer")
        try:
            self.link.answer(Message(to_records(kind, body, cost), reply_to=self._asked))
        except Lost:
            self.link.activate()

    def offer(self) -> dict[str, Any]:
        """Wait for the first offer."""
        kind, body = self._next()
        if kind != OFFER:
            raise FederationError(f"the server began with {kind[:20]!r}", self.link.address)
        self._offer = body
        offer = read_offer(body)
        self.limit = offer["limit"]
        return offer

    def work(
        self,
        enrolment: bytes,
        turn: Turn,
        sent: Sent,
        progress: Progress,
        last: Last | None = None,
        cost: Spent | None = None,
    ) -> State:
        """Enrol, then do every turn that is asked, and `last` at the end; returns the state there.

        A turn that was done is not done again when a restarted server asks for it once more. Beside each answer goes
        its `cost`.
        """
        kind, body = OFFER, self._offer
        digest, said, told, took = "", UPDATE, b"", b""
        seen = 0
        while True:
            if kind == OFFER:
                self._enrol(body, enrolment, sent)
            elif kind == WORK:
                if hashlib.sha256(body).hexdigest() != digest:
                    said, told = self._turn(turn, body)
                    took = cost() if cost else b""
                    digest = hashlib.sha256(body).hexdigest()
                number = round_of(body)
                if took:
                    sent.add(COST, self.name, number, took)
                sent.add(said, self.name, number, told)
                self.reply(said, told, took)
                progress.advance(max(0, number - seen), f"round {number}")
                seen = max(seen, number)
            elif kind == FINISHED:
                final = wire.state_from_bytes(body, "the server's state")
                mine = self._done(partial(last, final)) if last else b""
                if mine:
                    self._tell(mine, final.round + 1, enrolment, sent)
                else:
                    self.reply(FINISHED, b"")
                return final
            else:
                raise FederationError(f"the server sent {printable(kind[:20])!r}", self.link.address)
            kind, body = self._next()

    def _enrol(self, body: bytes, enrolment: bytes, sent: Sent) -> None:
        if body != self._offer:
            raise FederationError("the server offers other work now", self.link.address, "join again")
        sent.add(ENROLLED, self.name, 0, enrolment)
        self.reply(ENROLLED, enrolment)

    def _tell(self, told: bytes, round: int, enrolment: bytes, sent: Sent) -> None:
        """Tell what the end brought until the server has it on its disk, or has been away for too long: what was made
        is this client's, whoever hears of it."""
        kind, body = FINISHED, b""
        with contextlib.suppress(FederationError):
            while kind != HEARD:
                if kind == FINISHED:
                    sent.add(GAINS, self.name, round, told)
                    self.reply(FINISHED, told)
                elif kind == OFFER:
                    self._enrol(body, enrolment, sent)
                kind, body = self._next()
            self.reply(HEARD, b"")

    def _turn(self, turn: Turn, body: bytes) -> tuple[str, bytes]:
        """(kind, body) of the answer. What is wrong with this machine or its settings ends its part in it."""
        done = self._done(lambda: turn(body))
        return (FAILURE, done.reason[:300].encode()) if isinstance(done, Failure) else (UPDATE, done)

    def _done(self, work: Callable[[], Done]) -> Done:
        """`work()`; if that raises, the server is told the class of the error first."""
        try:
            return work()
        except EdgeLLMError as error:
            with contextlib.suppress(EdgeLLMError):
                self.reply(FAILURE, type(error).__name__.encode())
            raise

"""Verbs in threads, for tests of a network on one machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from edgellm_sdk.steps import Outcome


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Aside(threading.Thread):
    """A verb in a thread; `outcome` is what it gave or raised."""

    def __init__(self, call: Callable[..., Outcome], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self.call = lambda: call(*args, **kwargs)
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.call()
        except BaseException as error:
            self.outcome = error

    def result(self, seconds: float = 90) -> Outcome:
        self.join(seconds)
        assert isinstance(self.outcome, Outcome), self.outcome
        return self.outcome

"""Clients of one federation in one process."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edgellm_sdk.steps import federation


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of these tests are threads of one process, and transformers loads models through global state."""
    lock, real = threading.Lock(), federation.work

    def work(*args: Any) -> Any:
        with lock:
            return real(*args)

    monkeypatch.setattr(federation, "work", work)

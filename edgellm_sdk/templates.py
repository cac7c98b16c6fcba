"""Chat templates, rendered in a child process with limits (see `template_child`)."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk import template_child
from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.types import Message

MAX_TEMPLATE = 256 << 10
MAX_ANSWER = 8 * template_child.MAX_OUTPUT
START_SECONDS = 30.0
WALL_SECONDS = 10.0  # a backstop: the child's own limit is one second of processor time


def _folder_of(module: str) -> str:
    """The folder from which the child can import `module`, without relying on this process's environment."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"{module} is not installed", "chat template", "reinstall edgellm-sdk")
    return str(Path(spec.origin).parent.parent)


class Renderer:
    """One chat template and the special tokens it may name, with its child process, started on first use.

    Safe to share between threads; a forked process starts a child of its own. `close` is called at exit.
    """

    def __init__(self, template: str, special: Mapping[str, str]) -> None:
        if len(template) > MAX_TEMPLATE:
            raise ModelError(f"is larger than {MAX_TEMPLATE >> 10} KiB", "chat template")
        self.template = template
        self.special = dict(special)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text a model is fed for `messages`. ModelError when the template fails, or goes over its limits."""
        variables: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special,
        }
        with self._lock:
            answer = self._ask({"template": self.template, "variables": variables})
        if not isinstance(answer.get("text"), str):
            raise ModelError(f"the template fails: {printable(str(answer.get('error')))[:160]}", "chat template")
        return str(answer["text"])

    def close(self) -> None:
        """End the child process, if there is one; the next render starts another."""
        child, self._child = self._child, None
        atexit.unregister(self.close)
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # the child may be gone already
                    pipe.close()
        if self._owner == os.getpid():
            child.kill()
            child.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():
            command = [sys.executable, "-I", "-S", "-B", template_child.__file__]
            command += sorted({_folder_of("jinja2"), _folder_of("markupsafe")})
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ},
                cwd="/",
            )
            self._owner = os.getpid()
            atexit.register(self.close)
        return self._child

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        seconds = WALL_SECONDS if self._child is not None else START_SECONDS
        child = self._start()
        raw = json.dumps(request).encode()
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(struct.pack("<I", len(raw)) + raw)
            child.stdin.flush()
            deadline = time.monotonic() + seconds
            (size,) = struct.unpack("<I", _read(child.stdout.fileno(), 4, deadline))
            if size > MAX_ANSWER:
                raise EOFError
            answer = json.loads(_read(child.stdout.fileno(), size, deadline))
        except TimeoutError:
            cause = f"takes longer than {seconds:g} s"
        except (EOFError, BrokenPipeError, ValueError, struct.error):
            cause = f"takes more than {template_child.SECONDS:g} s of processor time or more memory than it may"
        else:
            if isinstance(answer, dict):
                return answer
            cause = "answers nonsense"
        self.close()
        raise ModelError(f"the template {cause} and was stopped", "chat template")

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(descriptor: int, count: int, deadline: float) -> bytes:
    """Exactly `count` bytes; EOFError when the writer is gone, TimeoutError at the deadline."""
    parts, missing = [], count
    while missing:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)

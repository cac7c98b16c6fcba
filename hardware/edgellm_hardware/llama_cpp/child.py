"""A child process that answers frames, and what its death means. Knows nothing of llama.cpp but its messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgellm_hardware.llama_cpp.frames import PREFIX, frame, lengths, parse
from edgellm_sdk.errors import DataError, DeviceError, EdgeLLMError, ModelError

_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031  # Linux; named in fcntl from Python 3.10 only where the headers have it
_NO_MEMORY = re.compile(
    r"failed to allocate|unable to allocate|bad_alloc|cannot allocate|out of memory|std::length_error", re.I
)
_ERRORS = {"model": ModelError, "device": DeviceError, "data": DataError}


def environment() -> dict[str, str]:
    """What the child may know: where code lies and how many threads to use, but no token or key of the user's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH", "OMP_NUM_THREADS")
    }
    code = os.pathsep.join(path for path in sys.path if Path(path).is_absolute())
    return {
        **kept,
        "PYTHONPATH": code,
        "GGML_NO_BACKTRACE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Child:
    """One worker. `where` names what it works on in errors; `patience` is the longest silence in seconds; `variables`
    are added to its environment."""

    def __init__(
        self,
        module: str,
        where: str,
        patience: float,
        deadline: float | None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._where, self._patience, self._deadline = where, patience, deadline
        self._loading, self._closed = True, False
        self._noise: deque[str] = deque(maxlen=20)
        self._received = bytearray()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**environment(), **(variables or {})}, cwd="/", bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise DeviceError(f"cannot start the worker: {error.strerror}", where) from None
        assert self._process.stdin and self._process.stdout and self._process.stderr  # PIPE was asked for
        self._input = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        self._errors = self._process.stderr.fileno()
        for descriptor in (self._input, self._output, self._errors):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(
        self,
        header: Mapping[str, Any],
        parts: list[tuple[dict[str, Any], bytearray]] | None = None,
        expected: int = 0,
    ) -> Any:
        """Send `header`, collect the frames before the last one in `parts`, return what the last one answers.

        `expected`: the payload bytes the answer may have. The errors of the exit-code table, one line each, for
        refusals, death, silence and nonsense. A call that is interrupted ends the child: its answer would be taken for
        the next one's.
        """
        if self._closed:
            raise DeviceError("the session is closed", self._where)
        if not self.alive:
            raise self._obituary()
        answered = False
        try:
            for answer, payload in self._answers(frame(header)):
                expected -= len(payload)
                if expected < 0:
                    raise self._nonsense()
                if "done" in answer or "error" in answer:
                    answered = True
                    break
                if parts is not None and "sequence" in answer:
                    parts.append((answer, payload))
        finally:
            if not answered:
                self.kill()
        if "error" in answer:
            raise self._refusal(answer)
        self._loading = False
        return answer["done"]

    def _answers(self, request: bytes) -> Iterator[tuple[dict[str, Any], bytearray]]:
        """Frames as they come, while the request goes out and stderr is read."""
        outgoing, spoken = memoryview(request), time.monotonic()
        with selectors.DefaultSelector() as ready:
            ready.register(self._input, selectors.EVENT_WRITE)
            ready.register(self._output, selectors.EVENT_READ)
            ready.register(self._errors, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select(self._wait(spoken)):
                    if key.fd == self._input:
                        outgoing = self._write(outgoing)
                        if not outgoing:
                            ready.unregister(self._input)
                        continue
                    raw = os.read(key.fd, _PIPE_BYTES)
                    if not raw:
                        ready.unregister(key.fd)
                        if key.fd == self._output:
                            raise self._obituary()
                    elif key.fd == self._errors:
                        self._hear(raw)
                    else:
                        self._received += raw
                        spoken = time.monotonic()
                yield from self._frames()

    def _wait(self, spoken: float) -> float:
        """Seconds that may still pass; kills the child and raises when none are left."""
        now = time.monotonic()
        left = spoken + self._patience - now
        if self._deadline is not None and self._deadline - now < left:
            left, what = self._deadline - now, "the deadline passed while llama.cpp was working"
        else:
            what = f"llama.cpp gave no sign of life for {self._patience:g} s"
        if left > 0:
            return left
        self.kill()
        raise (ModelError if self._loading else DeviceError)(what, self._where, "the worker was ended")

    def _write(self, outgoing: memoryview) -> memoryview:
        try:
            return outgoing[os.write(self._input, outgoing) :]
        except BlockingIOError:
            return outgoing
        except OSError:  # it died; its last words are still to be read
            return outgoing[len(outgoing) :]

    def _hear(self, raw: bytes) -> None:
        for line in raw.decode("utf-8", "replace").splitlines():
            if line.strip():
                self._noise.append(line.strip()[:300])

    def _frames(self) -> list[tuple[dict[str, Any], bytearray]]:
        """The whole frames received so far."""
        found, start, view = [], 0, self._received
        try:
            while len(view) - start >= PREFIX.size:
                header, payload = lengths(view[start : start + PREFIX.size])
                body = start + PREFIX.size + header
                if len(view) < body + payload:
                    break
                found.append((parse(bytes(view[start + PREFIX.size : body])), view[body : body + payload]))
                start = body + payload
        except (ValueError, UnicodeDecodeError):
            raise self._nonsense() from None
        del view[:start]
        return found

    def _nonsense(self) -> EdgeLLMError:
        self.kill()
        return DeviceError("the llama.cpp worker answers nonsense", self._where)

    def _refusal(self, answer: Mapping[str, Any]) -> EdgeLLMError:
        """What the worker could not do. While loading, the library's last error line says why."""
        text, kind = str(answer.get("text", ""))[:300], _ERRORS.get(str(answer.get("error")), DeviceError)
        if self._loading:
            self._drain()
            if any(_NO_MEMORY.search(line) for line in [*self._noise, text]):
                kind = DeviceError
            text += self._last_words()
        return kind(text, self._where)

    def _obituary(self) -> EdgeLLMError:
        """Why the child is dead: ModelError for what a file can cause, DeviceError for memory."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._drain()
        code = self._process.poll()
        self.kill()
        how = f"exit {code}" if code is None or code >= 0 else signal.Signals(-code).name
        if code == -signal.SIGKILL or any(_NO_MEMORY.search(line) for line in self._noise):
            return DeviceError(f"llama.cpp ran out of memory or was killed ({how})", self._where, "give it more memory")
        return ModelError(f"llama.cpp died ({how}){self._last_words()}", self._where)

    def _last_words(self) -> str:
        """`: ` and the most telling line of stderr, or nothing."""
        telling = [line for line in self._noise if re.search(r"error|fail|assert|invalid|unknown|missing", line, re.I)]
        line = (telling or list(self._noise) or [""])[0 if telling else -1]
        return f": {line[:200]}" if line else ""

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while raw := os.read(self._errors, _PIPE_BYTES):
                self._hear(raw)

    def kill(self) -> None:
        """End the child now and free its pipes. Harmless when repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let the child go: it ends when its stdin closes."""
        self._closed = True
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

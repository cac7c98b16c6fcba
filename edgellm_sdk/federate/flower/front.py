"""The port that clients reach: an asyncio relay in front of the gRPC server, which listens on loopback only.

It counts the bytes that cross each connection, TLS and HTTP/2 framing included, lets only TLS 1.3 through, drops
connections on which nobody authenticates in time, and holds no more of them than it was told. It reads no key and
decrypts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from dataclasses import dataclass, field
from time import monotonic

from edgellm_sdk.errors import FederationError

BLOCK = 1 << 16
HELLO_SECONDS = 10.0
CLAIM_SECONDS = 20.0
HELLO_BYTES = 1 << 14
GREETING = 1024  # connections that have not said hello; with more the oldest goes
TLS13 = 0x0304


@dataclass
class Connection:
    """`up` and `down` are bytes from and to the other side; `client` is who has authenticated on it."""

    writer: asyncio.StreamWriter
    client: str = ""
    up: int = 0
    down: int = 0
    began: float = field(default_factory=monotonic)


def offers_tls13(hello: bytes) -> bool:
    """Whether a ClientHello (a TLS record with its 5-byte header) lists TLS 1.3 (RFC 8446, 4.1.2 and 4.2.1)."""
    try:
        if hello[0] != 0x16 or hello[5] != 1:
            return False
        at = 5 + 4 + 2 + 32
        at += 1 + hello[at]
        at += 2 + struct.unpack_from(">H", hello, at)[0]
        at += 1 + hello[at]
        end = at + 2 + struct.unpack_from(">H", hello, at)[0]
        at += 2
        while at < min(end, len(hello)):
            kind, length = struct.unpack_from(">HH", hello, at)
            if kind == 43:
                versions = hello[at + 5 : at + 4 + length]
                return struct.pack(">H", TLS13) in [versions[i : i + 2] for i in range(0, len(versions), 2)]
            at += 4 + length
    except (IndexError, struct.error):
        pass
    return False


class Front:
    """Start with `open`; `claim` names the client of a connection, `traffic` sums what its connections carried."""

    def __init__(self, host: str, port: int, tls: bool, limit: int) -> None:
        self.host, self.port, self.tls, self.limit = host, port, tls, limit
        self.refused = 0
        self._inner = 0
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Future[None] | None = None
        self._open: dict[int, Connection] = {}
        self._past: dict[str, list[int]] = {}
        self._greeting: dict[asyncio.StreamWriter, None] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="federation-front", daemon=True)

    def open(self, inner: int) -> int:
        """Listen in front of the loopback port `inner`; returns the port. FederationError when it cannot be had."""
        self._inner = inner
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        except OSError as error:
            self.close()
            where = f"{self.host}:{self.port}"
            raise FederationError(f"cannot listen: {error.strerror}", where, "choose another --address") from None
        return self.port

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=BLOCK, backlog=GREETING)
        self._sweeper = asyncio.ensure_future(self._sweep())
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            for one in self._unclaimed():
                if monotonic() - one.began > CLAIM_SECONDS:
                    self._drop(one)

    def _unclaimed(self) -> list[Connection]:
        with self._lock:
            return sorted((one for one in self._open.values() if not one.client), key=lambda one: one.began)

    def _drop(self, one: Connection) -> None:
        self.refused += 1
        one.writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner: asyncio.StreamWriter | None = None
        key = 0
        try:
            self._greeting[writer] = None
            if len(self._greeting) > GREETING:
                next(iter(self._greeting)).transport.abort()
            first = await self._hello(reader)
            self._greeting.pop(writer, None)
            if first is None:
                self.refused += 1
                return
            if len(self._open) >= self.limit:
                oldest = self._unclaimed()[:1]
                if not oldest:
                    self.refused += 1
                    return
                self._drop(oldest[0])
            back, inner = await asyncio.open_connection("127.0.0.1", self._inner, limit=BLOCK)
            key = inner.get_extra_info("sockname")[1]
            one = Connection(writer, up=len(first))
            with self._lock:
                self._open[key] = one
            inner.write(first)
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pump(reader, inner, one, "up")),
                    asyncio.ensure_future(self._pump(back, writer, one, "down")),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.TimeoutError):
            pass  # the other side went away; what it carried is counted below
        finally:
            self._greeting.pop(writer, None)
            with self._lock:
                gone = self._open.pop(key, None)
                if gone is not None:
                    past = self._past.setdefault(gone.client, [0, 0])
                    past[0] += gone.up
                    past[1] += gone.down
            for end in (inner, writer):
                if end is not None:
                    end.transport.abort()

    async def _hello(self, reader: asyncio.StreamReader) -> bytes | None:
        """The first bytes, or None when they are not what this port speaks."""
        if not self.tls:
            return b""
        head = await asyncio.wait_for(reader.readexactly(5), HELLO_SECONDS)
        length = struct.unpack(">H", head[3:])[0]
        if head[0] != 0x16 or length > HELLO_BYTES:
            return None
        hello = head + await asyncio.wait_for(reader.readexactly(length), HELLO_SECONDS)
        return hello if offers_tls13(hello) else None

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, one: Connection, way: str) -> None:
        with contextlib.suppress(OSError):
            while block := await source.read(BLOCK):
                setattr(one, way, getattr(one, way) + len(block))
                sink.write(block)
                await sink.drain()

    def claim(self, peer: str, client: str) -> None:
        """`peer` is gRPC's name for the other end, `ipv4:127.0.0.1:PORT`."""
        with self._lock:
            one = self._open.get(int(peer.rpartition(":")[2] or 0))
            if one is not None and not one.client:
                one.client = client

    def connected(self, client: str) -> bool:
        with self._lock:
            return any(one.client == client for one in self._open.values())

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Client -> (bytes from it, bytes to it); those of nobody under the empty name."""
        with self._lock:
            sums = {client: list(past) for client, past in self._past.items()}
            for one in self._open.values():
                entry = sums.setdefault(one.client, [0, 0])
                entry[0] += one.up
                entry[1] += one.down
        return {client: (up, down) for client, (up, down) in sums.items()}

    def close(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        self._loop.close()

    async def _end(self) -> None:
        """Stop listening, drop every connection, let their tasks run out."""
        if self._server is not None:
            self._server.close()
        for one in list(self._open.values()):
            one.writer.transport.abort()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

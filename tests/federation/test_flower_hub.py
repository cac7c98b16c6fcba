"""Messages through the hub: whole, in parts, counted on the socket; clients that vanish, lie or declare too much."""

from __future__ import annotations

import importlib.util
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, ModelError
from edgellm_sdk.federate import flower

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)
flower.prepare()

from flwr.app import ConfigRecord, RecordDict  # noqa: E402
from repeated import times  # noqa: E402

from edgellm_sdk.federate.flower import enrol, keys, link, network, parts  # noqa: E402
from edgellm_sdk.federate.flower.guest import Guest  # noqa: E402
from edgellm_sdk.federate.flower.hub import Hub  # noqa: E402
from edgellm_sdk.federate.rounds import Failure  # noqa: E402
from edgellm_sdk.federate.sent import Sent  # noqa: E402

LIMIT = 8 << 20
OFFER = {
    "plugin": "p", "aggregate": "", "around": "", "options": {}, "model": "", "digest": "d", "seed": 0, "rounds": 1,
    "task_prompt": "", "balance": False, "partition": "iid", "limit": LIMIT, "personalise": 0, "kept_aside": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys.make(folder, 3, [])
    return folder


@pytest.fixture
def hub(made: Path) -> Iterator[Hub]:
    hub = Hub("127.0.0.1", 0, keys.read(made / "server"), keys.admitted(made / "server"), LIMIT, 64)
    yield hub
    hub.close()


class Client(threading.Thread):
    """A client that answers with what `turn` says."""

    def __init__(self, hub: Hub, made: Path, number: int, folder: Path, turn: Any = None, examples: int = 5) -> None:
        super().__init__(daemon=True)
        self.name = f"client-{number:03d}"
        identity = keys.read(made / "clients" / self.name)
        self.guest = Guest(link.Link(f"127.0.0.1:{hub.port}", identity, 10), self.name)
        self.turn, self.examples = turn or (lambda message: message[::-1]), examples
        self.sent = Sent(folder / self.name, 1 << 30)
        self.problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.guest.link.activate()
            offer = self.guest.offer()
            said = enrol.answer(self.name, self.examples, offer["digest"], {"cores": 1})
            with Context(Path()).progress("", None) as progress:
                self.guest.work(said, self.turn, self.sent, progress)
        except BaseException as error:
            self.problem = error
        finally:
            self.guest.link.close()


def roster(hub: Hub, ctx: Context, wanted: int, known: dict[str, int] | None = None) -> enrol.Roster:
    found = enrol.Roster(hub, OFFER, known or {}, ctx)
    found.wait(wanted, wanted, 20, lambda count: None)
    return found


def terms(grace: float = 2.0, deadline: float = 20.0) -> network.Terms:
    return network.Terms("127.0.0.1:1", "", False, 2, 0.5, 20, deadline, grace, LIMIT, OFFER)


@contextmanager
def clients(hub: Hub, made: Path, folder: Path, turns: list[Any]) -> Iterator[tuple[enrol.Roster, list[Client]]]:
    started = [Client(hub, made, number, folder, turn) for number, turn in enumerate(turns)]
    people = roster(hub, Context(folder), len(turns))
    yield people, started
    people.tell(enrol.STOPPED, b"that is all", 5)
    for one in started:
        one.join(2)


def test_parts_are_whole_or_refused() -> None:
    for size in (0, 1, parts.PART, parts.PART + 1):
        body = bytes(i % 251 for i in range(size % 1000)) * (size // 1000 or 1)
        assert parts.from_records(parts.to_records("k", body), 1 << 24, "x") == ("k", body)
    records = parts.to_records("k", b"abc")
    for name, bad in (("data", b"abd"), ("bytes", 2), ("protocol", 9), ("kind", 7), ("sha256", "")):
        changed = RecordDict({"000000": ConfigRecord({**records["000000"], name: bad})})
        with pytest.raises(ModelError):
            parts.from_records(changed, 1 << 20, "x")
    with pytest.raises(ModelError, match="more than the limit"):
        parts.from_records(records, 2, "x")
    with pytest.raises(ModelError):
        parts.from_records(RecordDict(), 2, "x")


def test_messages_arrive_and_the_socket_agrees_within_one_percent(hub: Hub, made: Path, tmp_path: Path) -> None:
    bodies = {f"client-00{i}": np.random.default_rng(i).bytes(5 << 20) for i in range(2)}
    with clients(hub, made, tmp_path, [None, None]) as (people, started):
        before = hub.front.traffic()
        found = dict(network.over(people, terms())(bodies))
        assert found == {name: body[::-1] for name, body in bodies.items()}
        time.sleep(0.2)
        after = hub.front.traffic()
        for member in people.members.values():
            up, down = (now - then for now, then in zip(after[str(member.node)], before[str(member.node)], strict=True))
            assert 5 << 20 < up < (5 << 20) * 1.01 and 5 << 20 < down < (5 << 20) * 1.01
        assert len(hub.store) <= 1  # nothing of the round is left
    assert all("that is all" in str(one.problem) for one in started)
    assert {p.read_bytes() for p in (tmp_path / "client-000" / "wire").glob("*.bin")} >= {bodies["client-000"][::-1]}


@pytest.mark.parametrize("number", times("B6", 20))
def test_a_client_that_vanishes_mid_upload_is_left_out_and_the_others_finish(
    hub: Hub, made: Path, tmp_path: Path, number: int
) -> None:
    """Killed before the part `number` modulo those of its answer."""
    answer = np.random.default_rng(number).bytes(3 * parts.PART)
    with clients(hub, made, tmp_path, [None, lambda message: answer]) as (people, started):
        doomed = started[1].guest.link
        push, sent = doomed._stub.PushObject, []

        def cut(request: Any, timeout: float) -> Any:
            if len(sent) == number % 4:
                raise FederationError("killed")
            sent.append(request)
            return push(request, timeout=timeout)

        doomed._stub.PushObject = cut
        began = time.monotonic()
        found = dict(network.over(people, terms(grace=1.0))({"client-000": b"ab", "client-001": b"cd"}))
        assert found == {"client-000": b"ba", "client-001": Failure("went away")}
        assert len(sent) == number % 4
        again = dict(network.over(people, terms(grace=1.0))({"client-001": b"cd"}))
        assert again == {"client-001": Failure("is not there", reached=False)}
        assert time.monotonic() - began < 5


@pytest.mark.row("B3")
def test_the_deadline_is_kept(hub: Hub, made: Path, tmp_path: Path) -> None:
    free = threading.Event()
    with clients(hub, made, tmp_path, [None, lambda message: free.wait(30) and b"late"]) as (people, _):
        began = time.monotonic()
        found = dict(network.over(people, terms(deadline=2.0))({"client-000": b"ab", "client-001": b"cd"}))
        assert 2.0 <= time.monotonic() - began < 3.0
        assert found["client-000"] == b"ba" and "silent" in found["client-001"].reason  # type: ignore[union-attr]
        free.set()
        assert dict(network.over(people, terms())({"client-000": b"x"})) == {"client-000": b"x"}


def test_a_client_that_comes_again_gets_its_work_again(hub: Hub, made: Path, tmp_path: Path) -> None:
    stuck = threading.Event()
    with clients(hub, made, tmp_path, [lambda message: stuck.wait(30) and b"never"]) as (people, _):
        second: list[Client] = []

        def again() -> None:
            time.sleep(0.5)
            second.append(Client(hub, made, 0, tmp_path / "again"))

        threading.Thread(target=again, daemon=True).start()
        assert dict(network.over(people, terms(grace=10))({"client-000": b"ab"})) == {"client-000": b"ba"}
        assert people.members["client-000"].session == 2
        stuck.set()
    second[0].join(5)


@pytest.mark.parametrize("number", times("B6", 20))
def test_a_message_over_the_limit_is_refused_and_costs_no_memory(
    hub: Hub, made: Path, tmp_path: Path, number: int
) -> None:
    big = bytes(LIMIT + (1 << (number % 20 + 7)))
    with clients(hub, made, tmp_path, [lambda message: big, None]) as (people, _):
        found = dict(network.over(people, terms(grace=1.0))({"client-000": b"ab", "client-001": b"cd"}))
        assert found["client-001"] == b"dc" and isinstance(found["client-000"], Failure)


@pytest.mark.parametrize("number", times("B6", 20))
def test_a_declared_body_of_many_gigabytes_takes_no_memory(hub: Hub, made: Path, tmp_path: Path, number: int) -> None:
    """HTTP/2 by hand: content-length 10 GiB, a gRPC frame of 4 GiB - 1, of which 1 MiB is sent."""
    place = made / "clients" / "client-002"
    context = ssl.create_default_context(cafile=str(place / "ca.pem"))
    context.load_cert_chain(str(place / "cert.pem"), str(place / "key.pem"))
    context.set_alpn_protocols(["h2"])
    before = psutil.Process().memory_info().rss

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    fields = {
        ":method": "POST", ":scheme": "https", ":path": "/flwr.proto.Fleet/PushObject", ":authority": "127.0.0.1",
        "content-type": "application/grpc", "te": "trailers", "content-length": str(10 << 30),
    }  # fmt: skip
    block = b"".join(b"\x00" + text(name) + text(value) for name, value in fields.items())

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    import socket

    with socket.create_connection(("127.0.0.1", hub.port), 5) as plain:
        door = context.wrap_socket(plain, server_hostname="127.0.0.1")
        door.sendall(link.PREFACE + frame(1, 4, 1, block) + frame(0, 0, 1, b"\x00" + struct.pack(">I", 0xFFFFFFFF)))
        door.settimeout(5)
        try:
            for _ in range(64):
                door.sendall(frame(0, 0, 1, bytes(1 << 14)))
            answer = door.recv(1 << 16)
        except OSError:
            answer = b""
        door.close()
    assert b"flwr" not in answer
    assert psutil.Process().memory_info().rss - before < 32 << 20
    with clients(hub, made, tmp_path, [None]) as (people, _):
        assert dict(network.over(people, terms())({"client-000": b"ab"})) == {"client-000": b"ba"}


def test_enrolment_is_by_key_and_closes(hub: Hub, made: Path, tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    first = Client(hub, made, 0, tmp_path)
    people = roster(hub, ctx, 1)
    late = Client(hub, made, 1, tmp_path)
    until = time.monotonic() + 10
    while late.is_alive() and time.monotonic() < until:
        people.poll()
        time.sleep(0.02)
    assert "began without it" in str(late.problem) and list(people.members) == ["client-000"]
    liar = Client(hub, made, 2, tmp_path)
    liar.name = "client-000"
    while liar.is_alive() and time.monotonic() < until:
        people.poll()
        time.sleep(0.02)
    assert "name is not acceptable" in str(liar.problem)
    people.tell(enrol.STOPPED, b"done", 5)
    first.join(5)


def test_too_few_clients_end_with_exit_code_8(hub: Hub, tmp_path: Path) -> None:
    people = enrol.Roster(hub, OFFER, {}, Context(tmp_path))
    with pytest.raises(FederationError, match="0 of 2 clients came within 1 s") as caught:
        people.wait(2, 1, 1, lambda count: None)
    assert caught.value.exit_code == 8

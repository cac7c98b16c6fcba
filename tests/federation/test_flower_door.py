"""Who gets in: TLS 1.3, certificates of both sides, keys that are admitted, calls that are signed now."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.federate import flower

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)
flower.prepare()

import grpc  # noqa: E402
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: E402
from flwr.client.grpc_rere_client import node_auth_client_interceptor as signing  # noqa: E402
from flwr.proto.fleet_pb2 import PullMessagesRequest  # noqa: E402
from flwr.proto.node_pb2 import Node  # noqa: E402
from repeated import times  # noqa: E402

from edgellm_sdk.federate.flower import front, keys, link  # noqa: E402
from edgellm_sdk.federate.flower.hub import Hub  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    assert keys.make(folder, 2, ["edge.example"]) == ["client-000", "client-001"]
    return folder


@pytest.fixture(scope="module")
def hub(made: Path) -> Iterator[Hub]:
    hub = Hub("0.0.0.0", 0, keys.read(made / "server"), keys.admitted(made / "server"), 1 << 20, 64)
    yield hub
    hub.close()


def files(folder: Path) -> tuple[str, str, str]:
    return str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem")


def knock(hub: Hub, folder: Path, host: str = "127.0.0.1") -> None:
    link.check_door(f"{host}:{hub.port}", *files(folder))


def forged(made: Path, place: Path, days: int = 1, usage: Any = ExtendedKeyUsageOID.CLIENT_AUTH) -> Path:
    """An identity of this federation's authority with other dates or another use."""
    authority = made / "authority"
    ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    ca = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    cert = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client-000")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(end - datetime.timedelta(days=9))
        .not_valid_after(end)
        .add_extension(x509.ExtendedKeyUsage([usage]), True)
        .sign(ca_key, hashes.SHA384())  # type: ignore[arg-type]
    )
    place.mkdir()
    (place / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (place / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (place / "key.pem").write_bytes(key.private_bytes(*pem))
    (place / "key.pem").chmod(0o600)
    return place


@pytest.mark.row("S1")
def test_an_admitted_client_gets_in(made: Path, hub: Hub) -> None:
    knock(hub, made / "clients" / "client-000")
    own = link.Link(f"127.0.0.1:{hub.port}", keys.read(made / "clients" / "client-000"), 5)
    own.activate()
    assert hub.names[own.node.node_id] == "client-000"
    own.close()


@pytest.mark.row("S1")
def test_another_authority_is_refused_by_both_sides(made: Path, hub: Hub, tmp_path: Path) -> None:
    keys.make(tmp_path, 1, [])
    with pytest.raises(FederationError, match="not the server of this federation"):
        knock(hub, tmp_path / "clients" / "client-000")  # a rogue server, as seen from there
    mixed = shutil.copytree(tmp_path / "clients" / "client-000", tmp_path / "mixed")
    shutil.copy(made / "server" / "ca.pem", mixed / "ca.pem")
    with pytest.raises(FederationError, match="the server refused"):
        knock(hub, mixed)


@pytest.mark.row("S1")
def test_no_certificate_is_refused(made: Path, hub: Hub) -> None:
    context = ssl.create_default_context(cafile=str(made / "server" / "ca.pem"))
    with socket.create_connection(("127.0.0.1", hub.port), 5) as plain:
        door = context.wrap_socket(plain, server_hostname="127.0.0.1")
        door.sendall(link.PREFACE)
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert door.recv(1) == b""
    channel = grpc.secure_channel(
        f"127.0.0.1:{hub.port}", grpc.ssl_channel_credentials((made / "server" / "ca.pem").read_bytes())
    )
    with pytest.raises(grpc.RpcError) as caught:
        link.FleetStub(channel).PullMessages(PullMessagesRequest(node=Node(node_id=1)), timeout=3)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    channel.close()


@pytest.mark.parametrize("fault", ["expired", "usage"])
@pytest.mark.row("S1")
def test_a_certificate_that_is_no_longer_or_not_a_clients_is_refused(
    made: Path, hub: Hub, tmp_path: Path, fault: str
) -> None:
    forgery = forged(made, tmp_path / "f", -1) if fault == "expired" else forged(
        made, tmp_path / "f", 1, ExtendedKeyUsageOID.SERVER_AUTH
    )  # fmt: skip
    with pytest.raises(FederationError, match="the server refused"):
        knock(hub, forgery)


@pytest.mark.row("S1")
def test_the_servers_name_is_checked(made: Path, hub: Hub) -> None:
    with pytest.raises(FederationError, match="not the server of this federation"):
        knock(hub, made / "clients" / "client-000", "127.0.0.2")


@pytest.mark.row("S1")
def test_plain_text_and_tls_1_2_are_refused(made: Path, hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", hub.port), 5) as plain:
        plain.sendall(link.PREFACE)
        assert plain.recv(1) == b""
    context = ssl.create_default_context(cafile=str(made / "server" / "ca.pem"))
    context.load_cert_chain(*files(made / "clients" / "client-000")[1:])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", hub.port), 5) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.row("S1")
def test_a_revoked_key_is_turned_away(tmp_path: Path) -> None:
    keys.make(tmp_path, 2, [])
    assert keys.make(tmp_path, 0, [], ["client-001"]) == ["client-000"]
    hub = Hub("127.0.0.1", 0, keys.read(tmp_path / "server"), keys.admitted(tmp_path / "server"), 1 << 20, 64)
    try:
        own = link.Link(f"127.0.0.1:{hub.port}", keys.read(tmp_path / "clients" / "client-001"), 5)
        with pytest.raises(FederationError, match="does not admit this client"):
            own.activate()
        own.close()
    finally:
        hub.close()


@pytest.mark.parametrize("minutes", [-10, 10])
@pytest.mark.row("S1")
def test_a_clock_ten_minutes_off_is_refused(
    made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    real = signing.now
    monkeypatch.setattr(signing, "now", lambda: real() + datetime.timedelta(minutes=minutes))
    own = link.Link(f"127.0.0.1:{hub.port}", keys.read(made / "clients" / "client-000"), 5)
    with pytest.raises(FederationError, match="does not admit this client"):
        own.activate()
    own.close()


@pytest.mark.row("S1")
def test_another_nodes_signature_is_worth_nothing(made: Path, hub: Hub) -> None:
    """client-001's valid signature under client-000's node id, and an answer in another's name."""
    address = f"127.0.0.1:{hub.port}"
    first, second = (link.Link(address, keys.read(made / "clients" / f"client-00{i}"), 5) for i in range(2))
    first.activate()
    second.activate()
    with pytest.raises(grpc.RpcError) as caught:
        second._stub.PullMessages(PullMessagesRequest(node=first.node), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    message = hub.send(first.node.node_id, "work", b"for the first alone")
    assert message is not None
    thing = next(iter(hub._objects[first.node.node_id]))
    with pytest.raises(grpc.RpcError) as caught:
        second._stub.PullObject(link.PullObjectRequest(node=second.node, run_id=hub.run, object_id=thing), timeout=5)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    asked = first.fetch()
    assert asked is not None
    asked.metadata.__dict__["_dst_node_id"] = first.node.node_id
    second.node, own = second.node, second.node
    forged_reply = link.Message(link_records(), reply_to=asked)
    with pytest.raises(FederationError, match="speaks for itself"):
        second.answer(forged_reply)
    assert second.node == own
    for one in (first, second):
        one.close()


def link_records() -> Any:
    from edgellm_sdk.federate.flower.parts import to_records

    return to_records("update", b"a lie")


def test_keys_that_others_may_read_are_refused(made: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(made / "clients" / "client-000", tmp_path / "copied")
    (copied / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        keys.read(copied)
    for name in ("authority/ca.key", "server/key.pem", "clients/client-000/key.pem"):
        assert (made / name).stat().st_mode & 0o777 == 0o600


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    keys.make(tmp_path, 1, ["a.example"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    assert keys.make(tmp_path, 2, []) == ["client-000", "client-001"]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_client_hello_is_read_for_its_versions() -> None:
    for limit, offered in ((ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)):
        context = ssl.create_default_context()
        context.maximum_version = limit
        out = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="edge.example").do_handshake()
        hello = out.read()
        assert front.offers_tls13(hello) is offered
        assert not any(front.offers_tls13(hello[:cut]) for cut in range(40))


@pytest.mark.parametrize("number", times("B6", 20))
def test_silent_and_slow_connections_make_room(
    made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """1000 connections that say nothing, one that says a byte a second: a client still gets in."""
    monkeypatch.setattr(front, "HELLO_SECONDS", 1.0)
    idle = [socket.create_connection(("127.0.0.1", hub.port), 5) for _ in range(1000)]
    slow = socket.create_connection(("127.0.0.1", hub.port), 5)
    slow.sendall(b"\x16")
    knock(hub, made / "clients" / "client-000")
    slow.settimeout(10)
    assert slow.recv(1) == b""
    for one in (*idle, slow):
        one.close()
    assert threading.active_count() < 200

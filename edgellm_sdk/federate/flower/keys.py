"""Certificates and keys of a federation: one authority, one server, one key for every client.

    FOLDER/authority/{ca.pem, ca.key}          stays with the operator
    FOLDER/server/{ca.pem, cert.pem, key.pem, clients.json}
    FOLDER/clients/NAME/{ca.pem, cert.pem, key.pem}

A client's key signs its calls (Flower's node authentication) and is that of its TLS certificate. `clients.json` maps
the name of each admitted client to its public key; who is not in it is turned away.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgellm_sdk import store
from edgellm_sdk.errors import ConfigError

CA, CERT, KEY, CLIENTS = "ca.pem", "cert.pem", "key.pem", "clients.json"
YEARS = 2
Key: TypeAlias = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Identity:
    """PEM bytes: the authority's certificate, one's own and its key. `name` is what the certificate says."""

    ca: bytes
    cert: bytes
    key: bytes
    name: str

    @property
    def private(self) -> Key:
        return _private(self.key, self.name)


def read(folder: Path) -> Identity:
    """The identity in a folder made by `make`. ConfigError when it is not there, malformed or readable by others."""
    path = folder / KEY
    try:
        ca, cert, key = ((folder / name).read_bytes() for name in (CA, CERT, KEY))
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"no keys: {error.strerror}", str(error.filename), "see edgellm federation keys") from None
    if mode & 0o077:
        raise ConfigError("others may read the private key", str(path), f"chmod 600 {path.name}")
    _private(key, str(path))
    return Identity(ca, cert, key, _name(cert, folder / CERT))


def admitted(folder: Path) -> dict[str, bytes]:
    """The public key (PEM) of every client that may take part, by name."""
    try:
        table = store.read_json(folder / CLIENTS)
        return {str(name): str(pem).encode() for name, pem in table.items()}
    except (AttributeError, ValueError):
        raise ConfigError("is no table of clients", str(folder / CLIENTS)) from None


def make(folder: Path, clients: int, hosts: Sequence[str], revoke: Sequence[str] = ()) -> list[str]:
    """Make what is missing in `folder`, never overwriting a key; returns the names of all clients admitted.

    `hosts` are the names and addresses under which clients will reach the server; a new list makes a new certificate.
    """
    authority = folder / "authority"
    server = folder / "server"
    if not (authority / "ca.key").is_file():
        key = ec.generate_private_key(ec.SECP384R1())
        cert = _certificate("edgellm federation", key, None, None)
        _write(authority / "ca.key", _pem(key), 0o600)
        _write(authority / CA, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    ca_key = _private((authority / "ca.key").read_bytes(), str(authority / "ca.key"))
    ca_raw = (authority / CA).read_bytes()
    ca = x509.load_pem_x509_certificate(ca_raw)
    if hosts or not (server / KEY).is_file():
        names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
        _issue(server, "server", ca_key, ca, names)
    known: dict[str, bytes] = admitted(server) if (server / CLIENTS).is_file() else {}
    width = max(3, len(str(clients - 1)))
    for number in range(clients):
        name = f"client-{number:0{width}d}"
        place = folder / "clients" / name
        if not (place / KEY).is_file():
            known[name] = _issue(place, name, ca_key, ca, None)
    unknown = [name for name in revoke if name not in known]
    if unknown:
        raise ConfigError(f"there is no client {unknown[0]!r}", str(server / CLIENTS))
    kept = {name: pem.decode() for name, pem in sorted(known.items()) if name not in revoke}
    store.write_json(server / CLIENTS, kept)
    return list(kept)


def _issue(place: Path, name: str, ca_key: Key, ca: x509.Certificate, hosts: Sequence[str] | None) -> bytes:
    """Write an identity; returns its public key (PEM)."""
    key = ec.generate_private_key(ec.SECP384R1())
    cert = _certificate(name, key, (ca_key, ca), hosts)
    _write(place / KEY, _pem(key), 0o600)
    _write(place / CERT, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(place / CA, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    return public_pem(key)


def _certificate(
    name: str, key: Key, issuer: tuple[Key, x509.Certificate] | None, hosts: Sequence[str] | None
) -> x509.Certificate:
    """Self-signed authority without `issuer`; a server's with `hosts`; else a client's."""
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if hosts is None else ExtendedKeyUsageOID.SERVER_AUTH
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[1].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=10))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), True)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), False)
    return builder.sign(issuer[0] if issuer else key, hashes.SHA384())


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError:
        raise ConfigError(f"{text[:60]!r} is neither a host name nor an address", "host") from None


def _private(pem: bytes, where: str) -> Key:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise ConfigError("is not a private key", where) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("is not an elliptic-curve key", where)
    return key


def _name(cert: bytes, path: Path) -> str:
    try:
        names = x509.load_pem_x509_certificate(cert).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        raise ConfigError("is not a certificate", str(path)) from None
    return str(names[0].value) if names else ""


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write(path: Path, data: bytes, mode: int) -> None:
    with store.atomic(path, mode) as file:
        file.write(data)

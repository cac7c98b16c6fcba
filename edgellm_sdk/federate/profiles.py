"""What clients have, read from a TOML file: memory, cores, link.

[[kind]]            # dealt to all clients in order of their names, by share
name = "phone"
share = 0.75
memory = 700
up = 10

[client.anna]       # this client, whatever its kind says
memory = 4000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellm_sdk import config
from edgellm_sdk.config import nearest, opt
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.types import Profile


@dataclass(frozen=True)
class Declared:
    """A client's words; 0 is not known."""

    name: str = opt("", "what the kind is called")
    memory: float = opt(0.0, "what a training process may use", unit="MB", ge=0)
    cores: int = opt(0, "processor cores", ge=0)
    up: float = opt(0.0, "uplink", unit="Mbit/s", ge=0)
    down: float = opt(0.0, "downlink", unit="Mbit/s", ge=0)


@dataclass(frozen=True)
class Kind(Declared):
    share: float = opt(1.0, "share of the clients, against the other kinds'", ge=0)


def read(path: Path, clients: Sequence[str]) -> dict[str, Profile]:
    """The profile of every client that the file tells of. ConfigError with all problems, naming the file."""
    tree, problems = config.read_toml(path), []
    for key in tree:
        if key not in ("kind", "client"):
            problems.append(f"unknown key {key!r}{nearest(key, ('kind', 'client'))}")
    kinds = _tables(tree.get("kind", []), Kind, "kind", problems)
    named = tree.get("client", {})
    for name in named if isinstance(named, dict) else ():
        if name not in clients:
            problems.append(f"client.{name}: takes no part{nearest(name, clients)}")
    own = _tables(list(named.values()) if isinstance(named, dict) else named, Declared, "client", problems)
    if problems:
        raise ConfigError("; ".join(problems), str(path), problems=tuple(problems))
    found = dict(zip(sorted(clients), _dealt(kinds, len(clients)), strict=False))
    found |= dict(zip(named, map(_profile, own), strict=True))
    return found


def _tables(given: Any, declared: type, where: str, problems: list[str]) -> list[Any]:
    if not isinstance(given, list) or not all(isinstance(table, dict) for table in given):
        problems.append(f"{where}: is not a table")
        return []
    found: list[Any] = []
    for number, table in enumerate(given, 1):
        try:
            found.append(config.build(declared, table, f"{where} {number}"))
        except ConfigError as error:
            problems += [f"{where} {number}: {problem}" for problem in error.problems or (error.what,)]
    return found


def _dealt(kinds: Sequence[Kind], clients: int) -> list[Profile]:
    """A kind for each place, the first kinds first, as near to the shares as whole clients can be."""
    whole = sum(kind.share for kind in kinds)
    if not whole:
        return []
    ends, reached = [], 0.0
    for kind in kinds:
        reached += kind.share / whole
        ends.append(reached)
    places = [(place + 0.5) / clients for place in range(clients)]
    return [_profile(next((k for k, end in zip(kinds, ends, strict=True) if at <= end), kinds[-1])) for at in places]


def _profile(declared: Declared) -> Profile:
    told = asdict(declared)
    return Profile(told["name"], round(told["memory"] * 1e6), told["cores"], told["up"] * 1e6, told["down"] * 1e6)

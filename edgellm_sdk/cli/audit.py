"""`audit wire`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_sdk.cli.screen import cell, facts, size, table
from edgellm_sdk.cli.verb import Answer, Request, Verb

MAX_ARRAYS = 400  # of one message, on the screen


def wire(request: Request) -> Answer:
    from edgellm_sdk.steps.audit import wire_of

    found = wire_of(request.words[0])
    parts = [text for message in found["messages"] for text in _told(message)]
    clients = [(client, size(count)) for client, count in found["clients"].items()]
    total = f"{size(found['bytes'])} in {len(found['messages'])} messages; from {found['source']}"
    return Answer(found, "\n\n".join([*parts, facts([*clients, ("total", total)])]))


def _told(message: Mapping[str, Any]) -> list[str]:
    if "file" not in message:
        return [f"round {message['round']}  {cell(message['client'])}  {message['kind']}  {message['bytes']} bytes"]
    head = f"{message['time']}  round {message['round']}  {cell(message['client'])}  {cell(message['kind'])}"
    lines = [f"{head}  {message['bytes']} bytes  sha256 {message['sha256'][:16]}  {cell(message['file'])}"]
    if not message["kept"]:
        return [lines[0] + "  (no longer kept)"]
    if "says" in message:
        lines.append(f"  {cell(str(message['says']))[:1000]}")
    rows = [
        [a["name"], "x".join(map(str, a["shape"])) or "scalar", a["dtype"], a["bytes"], *_range(a)]
        for a in message.get("arrays", [])[:MAX_ARRAYS]
    ]
    if rows:
        lines.append(table(("array", "shape", "type", "bytes", "min", "max", "norm"), rows))
    lines += [f"  {cell(name)} = {cell(str(value))[:300]}" for name, value in message.get("scalars", {}).items()]
    return ["\n".join(lines)]


def _range(about: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return about.get("min"), about.get("max"), about.get("norm")


VERBS = (
    Verb(
        "audit wire",
        "List and decode everything that left a client: arrays, scalars, sizes.",
        wire,
        words="RUN",
        least=1,
        most=1,
    ),
)

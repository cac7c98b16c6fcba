"""Secure aggregation in four exchanges, arXiv 1611.04482 (Bonawitz et al., CCS 2017), against an honest but curious
server: it follows the protocol and learns the sum of the vectors of those who finished, and nothing else.

keys      u draws two X25519 pairs: for masks, and for sealing what goes to other clients through the server
shares    u draws b_u and sends everyone a share of b_u and one of its mask secret, sealed for the receiver
masked    y_u = x_u + mask(b_u) + sum_{v > u} mask(k_uv) - sum_{v < u} mask(k_uv) modulo 2^32, over those who shared
unmask    for who finished everyone gives the share of b, for who did not that of the mask secret: never both

With `threshold` answers the server takes all masks off the sum. A client's `memory` between exchanges is JSON.

Left out: the signatures and the consistency check of the paper's version for a malicious server, which could put its
own keys in the place of clients' and tell them different lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgellm_plugins.privacy import masks
from edgellm_sdk.errors import FederationError
from edgellm_sdk.types import Array

Memory = dict[str, Any]
SEALED = 2 * masks.SHARE + 16
"""Bytes of two shares, sealed."""


def _purpose(*words: str) -> str:
    return json.dumps(words)


def _bytes(array: Array) -> bytes:
    return np.asarray(array, np.uint8).tobytes()


def _rows(rows: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def _require(true: bool, otherwise: str, who: str) -> None:
    if not true:
        raise FederationError(f"secure aggregation: {otherwise}", who)


# Clients


def advertise(session: str) -> tuple[Memory, Array]:
    """Fresh keys for one session: (memory, the two public keys (2, 32) uint8)."""
    (hidden, shown), (sealing, seal) = masks.key_pair(), masks.key_pair()
    return {"session": session, "mask": hidden.hex(), "seal": sealing.hex()}, _rows([shown, seal])


def share(memory: Memory, me: str, clients: Sequence[str], public: Array, threshold: int) -> tuple[Memory, Array]:
    """`public` (n, 2, 32) are the keys of the sorted `clients`: (memory, a sealed row for each (n, SEALED) uint8, one's
    own zeros). FederationError for lists that would weaken the protocol."""
    n = len(clients)
    _require("mask" in memory and "held" not in memory, "keys were shared before", me)
    _require(list(clients) == sorted(set(clients)) and me in clients, "the list of clients is not one", me)
    _require(public.shape == (n, 2, 32) and public.dtype == np.uint8, "the keys are not one pair a client", me)
    _require(n // 2 < threshold <= n and threshold >= 2, f"{threshold} of {n} clients is no threshold", me)
    _require(len({_bytes(pair) for pair in public}) == n, "two clients have one key", me)
    mine = public[list(clients).index(me)]
    _require(_bytes(mine[0]) == masks.public_of(bytes.fromhex(memory["mask"])), "my key was exchanged", me)
    own, session = masks.key_pair()[0], memory["session"]
    parts = [masks.shares(secret, n, threshold) for secret in (own, bytes.fromhex(memory["mask"]))]
    rows = []
    for place, other in enumerate(clients):
        plain = parts[0][place] + parts[1][place]
        if other == me:
            kept, row = plain, bytes(SEALED)
        else:
            key = _agreed(memory["seal"], _bytes(public[place][1]).hex(), _purpose(session, "seal", me, other), me)
            row = masks.sealed(key, plain)
        rows.append(row)
    keys = {client: [_bytes(key).hex() for key in pair] for client, pair in zip(clients, public, strict=True)}
    more = {"self": own.hex(), "keys": keys, "threshold": threshold, "held": {me: kept.hex()}}
    return memory | more, _rows(rows)


def _agreed(secret: str, public: str, purpose: str, who: str) -> bytes:
    try:
        return masks.agreed(bytes.fromhex(secret), bytes.fromhex(public), purpose)
    except ValueError:
        raise FederationError("secure aggregation: a public key is not one", who) from None


def masked(memory: Memory, me: str, vector: Array, senders: Sequence[str], rows: Array) -> tuple[Memory, Array]:
    """`vector` (d,) uint32 under all masks; `rows` (len(senders), SEALED) are what the others sealed for `me`.

    The secrets of one's own masks end here: a second vector under them would give away the difference of the two.
    """
    _require("self" in memory, "a vector was sent before", me)
    _require(set(senders) <= set(memory["keys"]) and me in senders, "strangers have shared", me)
    _require(list(senders) == sorted(set(senders)), "the list of clients is not one", me)
    _require(len(senders) >= memory["threshold"], f"only {len(senders)} have shared", me)
    _require(rows.shape == (len(senders), SEALED), "a sealed share is missing", me)
    held, total = dict(memory["held"]), vector + masks.mask(bytes.fromhex(memory["self"]), len(vector))
    for other, row in zip(senders, rows, strict=True):
        if other == me:
            continue
        key = _agreed(memory["seal"], memory["keys"][other][1], _purpose(memory["session"], "seal", other, me), me)
        try:
            held[other] = masks.opened(key, _bytes(row)).hex()
        except ValueError:
            raise FederationError("secure aggregation: a sealed share was changed", me) from None
        pair = masks.mask(_pair(memory["mask"], memory["keys"][other][0], memory["session"], me), len(vector))
        total = total + pair if me < other else total - pair
    rest = {name: memory[name] for name in ("session", "threshold")}
    return rest | {"held": held, "senders": list(senders)}, total


def _pair(secret: str, public: str, session: str, who: str) -> bytes:
    return _agreed(secret, public, _purpose(session, "mask"), who)


def unmask(memory: Memory, me: str, survivors: Sequence[str]) -> tuple[Memory, Array]:
    """One share for each sender, (senders, 66) uint8: of b for a survivor, else of the mask secret.

    A second list in one session is refused, for the two together would uncover a client; what is left of the memory is
    no secret.
    """
    _require("senders" in memory, "this session is over or never was", me)
    senders = memory["senders"]
    _require(set(survivors) <= set(senders) and me in survivors, "strangers have finished", me)
    _require(len(set(survivors)) >= memory["threshold"], f"only {len(set(survivors))} have finished", me)
    rows = []
    for client in senders:
        both = bytes.fromhex(memory["held"][client])
        rows.append(both[: masks.SHARE] if client in survivors else both[masks.SHARE :])
    return {"session": memory["session"]}, _rows(rows)


# The server


def unmasked(
    total: Array,
    session: str,
    clients: Sequence[str],
    public: Mapping[str, Array],
    senders: Sequence[str],
    survivors: Sequence[str],
    threshold: int,
    answers: Mapping[str, Array],
) -> Array:
    """The sum of the survivors' vectors, from the sum `total` (d,) uint32 of what they sent.

    `clients` are those of the share lists, `answers` what `unmask` gave by client. FederationError with less than
    `threshold` answers, and for shares that are not of the secrets they should be of.
    """
    _require(len(answers) >= threshold, f"{len(answers)} of {threshold} needed have unmasked", "server")
    used = sorted(answers)[:threshold]
    places = [list(clients).index(client) + 1 for client in used]
    known = masks.weights(places)
    for row, client in enumerate(senders):
        held = {place: _bytes(answers[other][row]) for place, other in zip(places, used, strict=True)}
        try:
            secret = masks.joined(held, known)
        except ValueError:
            raise FederationError("secure aggregation: shares do not fit together", client) from None
        if client in survivors:
            total = total - masks.mask(secret, len(total))
            continue
        _require(masks.public_of(secret) == _bytes(public[client][0]), "shares do not give the key", client)
        for other in survivors:
            pair = masks.mask(_pair(secret.hex(), _bytes(public[other][0]).hex(), session, client), len(total))
            total = total - pair if other < client else total + pair
    return total

"""What secure aggregation is made of: integers modulo 2^32, agreed keys, masks, and shares of secrets.

X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305 are those of `cryptography`. Secrets are shared over the field of
2^521 - 1 elements (Shamir, 1979): fewer than `threshold` shares say nothing, so many give the secret back.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence

import numpy as np

from edgellm_sdk.errors import PluginError
from edgellm_sdk.types import Array

MODULUS = 1 << 32
PRIME = (1 << 521) - 1
SHARE = 66
"""Bytes of a share."""


def available() -> None:
    """PluginError, with what to do, where `cryptography` is not installed."""
    if importlib.util.find_spec("cryptography") is None:
        fix = "pip install 'edgellm-sdk[privacy]'"
        raise PluginError("masks need the package cryptography", "secagg", fix)


# Numbers


def quantised(values: Array, bound: float, levels: int) -> Array:
    """`values` within +-`bound`, on a grid of `levels` (odd) around 0, as uint32 modulo 2^32."""
    half = (levels - 1) // 2
    whole = np.rint(np.clip(np.asarray(values, np.float64).reshape(-1), -bound, bound) * (half / bound))
    return whole.astype(np.int64).astype(np.uint32)


def restored(total: Array, bound: float, levels: int) -> Array:
    """The sum of what was `quantised`: float64. Exact for the sum of the integers, while it stays within 2^31."""
    return total.view(np.int32).astype(np.float64) * (bound / ((levels - 1) // 2))


# Keys and masks


def key_pair() -> tuple[bytes, bytes]:
    """(secret, public), 32 bytes each, of X25519."""
    secret = os.urandom(32)
    return secret, public_of(secret)


def public_of(secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The 32-byte key that two parties have in common for one purpose. ValueError for a public key of low order."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), 32, None, purpose.encode()).derive(shared)


def mask(key: bytes, count: int) -> Array:
    """`count` words of ChaCha20's stream under a key that is used once: (count,) uint32."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), "<u4").astype(np.uint32)


def sealed(key: bytes, plain: bytes) -> bytes:
    """Encrypted and authenticated under a key that is used once; 16 bytes longer."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, None)


def opened(key: bytes, raw: bytes) -> bytes:
    """The inverse of `sealed`. ValueError when it was not made under `key`."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), raw, None)
    except InvalidTag:
        raise ValueError("is not what was sealed") from None


# Shares


def shares(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """`count` shares of a secret of at most 64 bytes; share k belongs to place k + 1."""
    numbers = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    found = []
    for place in range(1, count + 1):
        value = 0
        for number in reversed(numbers):
            value = (value * place + number) % PRIME
        found.append(value.to_bytes(SHARE, "big"))
    return found


def weights(places: Sequence[int]) -> list[int]:
    """Lagrange's weights at 0 of distinct places (from 1)."""
    found = []
    for i in places:
        above, below = 1, 1
        for j in places:
            if j != i:
                above, below = above * j % PRIME, below * (j - i) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def joined(held: Mapping[int, bytes], known: Sequence[int], size: int = 32) -> bytes:
    """The secret behind the shares `held` by place; `known` are `weights` of the places in that order. ValueError when
    the shares are not of one secret of `size` bytes."""
    total = sum(w * int.from_bytes(share, "big") for w, share in zip(known, held.values(), strict=True)) % PRIME
    if total >> (8 * size):
        raise ValueError("the shares are not those of one secret")
    return total.to_bytes(size, "big")

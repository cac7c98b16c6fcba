"""Random streams that are pure functions of (seed, name, index), equal on every platform and release.

The generator is Philox4x32-10 (Salmon et al., 2011): output block i of a key is a function of (key, i) alone, so a
resumed run needs no generator state, and any element can be computed without its predecessors. `kit/noise.py` is the
same generator in torch. Normal variates are quantiles: each takes 16 bits as an index into a shipped table of 65 536
equiprobable standard-normal quantiles, scaled to unit variance (largest magnitude 4.33).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from edgellm_sdk.types import Array, Float32

RNG_ID = "philox4x32-10/normal16/1"
TABLE_SHA256 = "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"
Item = TypeVar("Item")

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def key(seed: int, name: str, index: int = 0) -> int:
    """The 64-bit key of a named stream (blake2b over seed, name and index)."""
    text = f"{seed}\0{name}\0{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def philox(key: int, counters: Sequence[Array]) -> Array:
    """Philox4x32-10 of a key at many counters: four arrays (n,) uint64 of 32-bit words, low first -> (n, 4) uint32."""
    import numpy as np

    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counters
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)
        c0, c1, c2, c3 = (
            (p1 >> high) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> high) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def blocks(key: int, start: int, count: int) -> Array:
    """Philox4x32-10 blocks start .. start+count-1 of a key: (count, 4) uint32."""
    import numpy as np

    counter = np.arange(start, start + count, dtype=np.uint64)
    zeros = np.zeros_like(counter)
    return philox(key, (counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32), zeros, zeros))


@lru_cache(maxsize=1)
def normal_table() -> Float32:
    """The 65 536 quantiles, float32, ascending; entry i and entry 65535 - i are opposite."""
    import numpy as np

    raw = (resources.files("edgellm_sdk") / "assets" / "normal16.f32").read_bytes()
    if hashlib.sha256(raw).hexdigest() != TABLE_SHA256:
        raise RuntimeError("assets/normal16.f32 is damaged; reinstall edgellm-sdk")
    upper = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    return np.concatenate([-upper[::-1], upper])


def normal(key: int, count: int, offset: int = 0) -> Float32:
    """Standard normal variates offset .. offset+count-1 of a key: (count,) float32."""
    import numpy as np

    first = offset // 8
    words = blocks(key, first, (offset + count + 7) // 8 - first)
    indices = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=2).reshape(-1)
    return np.asarray(normal_table()[indices[offset - 8 * first :][:count]])


class Stream:
    """Draws from one named stream, in order. Two streams with one key give the same draws."""

    def __init__(self, seed: int, name: str, index: int = 0) -> None:
        self.key = key(seed, name, index)
        self._block = 0

    def bits(self, count: int) -> Array:
        """The next `count` 64-bit words: (count,) uint64. Unused words of the last block are discarded."""
        import numpy as np

        words = blocks(self.key, self._block, (count + 1) // 2)
        self._block += len(words)
        pairs = words.astype(np.uint64).reshape(-1, 2)
        return np.asarray((pairs[:, 0] | (pairs[:, 1] << np.uint64(32)))[:count])

    def seeds(self, count: int) -> Array:
        """`count` seeds for other streams: uint64."""
        return self.bits(count)

    def uniform(self, count: int) -> Array:
        """Uniform in [0, 1): (count,) float64 on a grid of 2^-53."""
        import numpy as np

        return np.asarray((self.bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, count: int) -> Float32:
        """Standard normal variates: (count,) float32."""
        drawn = normal(self.key, count, 8 * self._block)
        self._block += (count + 7) // 8
        return drawn

    def permutation(self, count: int) -> Array:
        """A permutation of range(count): int64, by sorting random words."""
        import numpy as np

        return np.argsort(self.bits(count), kind="stable")

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` of `items` without replacement, in their original order."""
        chosen = sorted(self.permutation(len(items))[:count].tolist())
        return [items[i] for i in chosen]

    def gamma(self, alpha: float, count: int) -> Array:
        """Gamma(alpha, 1) variates, float64 (Marsaglia and Tsang, 2000, with the boost for alpha < 1)."""
        import numpy as np

        shape = alpha if alpha >= 1 else alpha + 1
        d = shape - 1 / 3
        c = 1 / (9 * d) ** 0.5
        out = np.empty(count)
        filled = 0
        while filled < count:
            x = self.normal(2 * (count - filled)).astype(np.float64)
            u = self.uniform(len(x))
            v = (1 + c * x) ** 3
            with np.errstate(invalid="ignore", divide="ignore"):
                keep = (v > 0) & (np.log(u) < 0.5 * x * x + d - d * v + d * np.log(v))
            got = (d * v)[keep][: count - filled]
            out[filled : filled + len(got)] = got
            filled += len(got)
        if alpha < 1:
            out *= self.uniform(count) ** (1 / alpha)
        return out

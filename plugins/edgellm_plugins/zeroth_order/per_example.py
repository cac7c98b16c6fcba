"""Directions that differ by signs alone, so that every example of a batch can have one of its own (GRZO).

z = U * (s r^T) for a matrix, U * s for a vector, with a gaussian U for all seeds of one base, and fair signs s of the
rows and r of the columns for every seed. A layer applies them to a batch in one more product
(`edgellm_sdk.kit.rowwise`), and their sum is U times a matrix of low rank, so that a step reads U once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.zeroth_order.samplers import Dense, Memoryless, Shapes
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.types import Array, Float32

INDEX_BITS = 16
"""Low bits of a per-example seed: the example's place in its minibatch. The others are the base, which gives U."""


def example_seeds(seed: int, count: int) -> list[int]:
    """Seeds of `count` directions that share a U."""
    base = seed >> INDEX_BITS << INDEX_BITS
    return [base | i for i in range(count)]


def base_of(seed: int) -> int:
    return seed >> INDEX_BITS << INDEX_BITS


class PerExample(Memoryless):
    """z = U * (s r^T) for a matrix, U * s for a vector: U gaussian from the seed's base, fair signs s of the rows and r
    of the columns from the whole seed (arXiv 2606.02857). Each z is N(0, I); those of one base have |z| in common."""

    def __init__(self, shapes: Shapes, device: str | torch.device = "cpu", share: float = 1.0) -> None:
        self.dense = Dense("gaussian", shapes, device, share=share)
        self.noise, self.device = self.dense.noise, torch.device(device)
        self._block = torch.empty(noise.BLOCK, device=self.device)
        self.id = f"{self.dense.id}/signs {INDEX_BITS}"

    def active(self, name: str, seed: int) -> bool:
        return self.dense.active(name, base_of(seed))

    def base(self, name: str, seed: int, start: int, out: Tensor) -> Tensor:
        """U from its element `start` on, in `out` and its dtype."""
        self.noise.shifted(out.zero_(), base_of(seed), name, 1.0, out, start)
        return out

    def signs(self, name: str, shape: Sequence[int], seeds: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(s, r) of each seed: (S, rows) and (S, columns), the latter ones for a vector."""
        rows, columns = _matrix(shape)
        count = rows + columns if columns > 1 else rows
        where, signs = noise.places(seeds, f"{name}/signs", count)
        values, drawn = noise.bank("rademacher"), np.empty((len(seeds), count), np.float32)
        for b in range(where.shape[1]):
            for out, place, sign in zip(drawn, where[:, b].tolist(), signs[:, b], strict=True):
                part = out[b * noise.BLOCK : (b + 1) * noise.BLOCK]
                np.multiply(values[place : place + part.size], sign, out=part)
        both = torch.from_numpy(drawn).to(self.device, dtype)
        return both[:, :rows], both[:, rows:] if columns > 1 else torch.ones_like(both[:, :1])

    def flips(self, seeds: Sequence[int], c: float) -> _Flips:
        """theta + c z(seeds[i]) for row i of a batch, all of one base."""
        return _Flips(self, tuple(seeds), c)

    def _z(self, name: str, weight: Tensor, seed: int, begin: int, out: Tensor) -> Tensor:
        """Rows begin, ... of z, in `out`."""
        rows, columns = _matrix(weight.shape)
        s, r = self.signs(name, (rows, columns), [seed], weight.dtype)
        z = self.base(name, seed, begin * columns, out).view(-1, columns)
        z.mul_(s[0, begin : begin + len(z), None]).mul_(r[0])
        return out

    def shift(self, name: str, weight: Tensor, seed: int, c: float, out: Tensor) -> Tensor:
        return self.part(name, weight, 0, seed, c, out)

    def part(self, name: str, weight: Tensor, begin: int, seed: int, c: float, out: Tensor) -> Tensor:
        rows = weight[begin : begin + len(out)]
        if not self.active(name, seed):
            return rows
        return torch.add(rows, self._z(name, weight, seed, begin, out), alpha=c, out=out)

    def rows(self, name: str, weight: Tensor, rows: Tensor, seed: int, c: float) -> Tensor:
        picked = weight[rows]
        if not self.active(name, seed):
            return picked
        s, r = self.signs(name, weight.shape, [seed], torch.float32)
        z = self.noise.rows(base_of(seed), name, weight.shape[1], rows) * s[0, rows, None] * r[0]
        return (picked.float() + c * z).to(weight.dtype)

    def move(self, name: str, weight: Tensor, move: Move) -> None:
        """theta + sum_k a_k z_k = theta + U * (S diag(a) R^T) for each base, U read once.

        The signed coefficients are summed in float64 without any rounding (`_exactly`), so neither the order of the
        sum nor a fused multiply-add can change a bit of S diag(a) R^T, which is rounded to float32 once.
        """
        rows, columns = _matrix(weight.shape)
        bases: dict[int, list[int]] = {}
        for k, seed in enumerate(move.seeds):
            if self.active(name, seed):
                bases.setdefault(base_of(seed), []).append(k)
        factors = []
        for base, chosen in bases.items():
            s, r = self.signs(name, (rows, columns), [move.seeds[k] for k in chosen], torch.float64)
            a = torch.from_numpy(_exactly([move.first[k] for k in chosen])).to(self.device)
            factors.append((base, (s * a[:, None]).T, r))
        if not factors and not move.decay:
            return
        flat, kept = weight.view(rows, columns), float(np.float32(1 - move.decay))
        width = min(columns, noise.BLOCK)
        height = noise.BLOCK // width
        tiles = [(top, left) for top in range(0, rows, height) for left in range(0, columns, width)]
        for place, (top, left) in zip(noise.rounding_places(move, name, len(tiles)), tiles, strict=True):
            part = flat[top : top + height, left : left + width]
            u = self._block[: part.numel()].view(part.shape)
            total = torch.zeros_like(part, dtype=torch.float32)
            for base, s, r in factors:
                flips = (s[top : top + height] @ r[:, left : left + width]).float()
                total.add_(flips.mul_(self.base(name, base, top * columns + left, u)))
            self.noise.add(part, total, kept, place)

    def draw(self, name: str, theta: Float32, seed: int) -> Float32:
        if not self.active(name, seed):
            return np.zeros_like(theta)
        s, r = (both[0].cpu().numpy() for both in self.signs(name, theta.shape, [seed], torch.float32))
        u = noise.take("gaussian", base_of(seed), name, theta.size).reshape(_matrix(theta.shape))
        z: Float32 = (u * s[:, None] * r).reshape(theta.shape)
        return z


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor; a vector has one column."""
    return shape[0], math.prod(shape[1:])


def _exactly(coefficients: Sequence[float]) -> Array:
    """float32 coefficients on a grid so fine that only those far below the largest change, and so coarse that their
    sums with any signs are exact in float64."""
    wide = np.array(coefficients, np.float32).astype(np.float64)
    grid = 2.0 ** (math.frexp(float(np.abs(wide).max()))[1] + len(wide).bit_length() - 52)
    return np.asarray(np.rint(wide / grid) * grid)


@dataclass(frozen=True)
class _Flips:
    """`theta + c z_i` for `edgellm_sdk.kit.rowwise`."""

    sampler: PerExample
    seeds: tuple[int, ...]
    c: float

    def moves(self, name: str) -> bool:
        return self.sampler.active(name, self.seeds[0])

    def base(self, name: str, weight: Tensor, begin: int, out: Tensor) -> Tensor:
        return self.sampler.base(name, self.seeds[0], begin * _matrix(weight.shape)[1], out)

    def base_rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        return self.sampler.noise.rows(base_of(self.seeds[0]), name, weight.shape[1], rows)

    def signs(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.sampler.signs(name, weight.shape, self.seeds, weight.dtype)

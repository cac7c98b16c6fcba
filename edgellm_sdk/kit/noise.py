"""Noise for billions of weights at the price of adding an array, with the same bits everywhere.

A direction z is addressed by (seed, tensor name, offset). It is cut from a bank of 2^20 values that every machine
derives from the same key: element i of a tensor lies in its block i // 262 144, and each block has its own place in the
bank and its own sign, drawn by Philox from (seed, name, block). So z costs one read of 4 bytes that is mostly in cache.

    z[i] = sign_b * bank[(place_b + i mod 262144) mod 2^20],  b = i // 262144

Statistics. Blocks, tensors and seeds are independent; signs make every mean 0 and every covariance between blocks 0.
Within a block, E[z_i z_j] is the bank's circular autocorrelation at lag i - j: 1 at lag 0, and of the order of
2^-10 elsewhere, where independent draws have 0. `gaussian` is the portable normal of `edgellm_sdk.random`, `rademacher`
are fair signs.

Arithmetic. A product and a sum, each rounded to float32 once, in a fixed order; never a fused multiply-add, whose use
depends on the machine. So numpy, torch with any number of threads, and CUDA end in the same bits.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_sdk import random
from edgellm_sdk.kit import native
from edgellm_sdk.types import Array, Float32

BANK = 1 << 20
BLOCK_BITS = 18
BLOCK = 1 << BLOCK_BITS
KINDS = ("gaussian", "rademacher")
_SIGN_BIT = 20
_AT_ONCE = 1 << 16  # values drawn in one go: what that takes for a while is more than the bank
_PLACES = random.key(0, "noise places")
ADAM_EPSILON = 1e-8


@lru_cache(maxsize=len(KINDS))
def noise_id(kind: str) -> str:
    """What an Update must name so that its seeds can be replayed: the scheme, and a checksum of this machine's bank."""
    return f"bank20-{kind}/2/{zlib.crc32(bank(kind).data):08x}"


@lru_cache(maxsize=len(KINDS))
def bank(kind: str) -> Float32:
    """The bank, and its first block again so that every block is one slice: (2^20 + 262 144,) float32."""
    key, values = random.key(0, f"noise bank {kind}"), np.empty(BANK + BLOCK, np.float32)
    if kind == "gaussian":
        for start in range(0, BANK, _AT_ONCE):
            values[start : start + _AT_ONCE] = random.normal(key, _AT_ONCE, start)
    elif kind == "rademacher":
        bits = np.unpackbits(random.blocks(key, 0, BANK // 128).astype("<u4").view(np.uint8), bitorder="little")
        values[:BANK] = bits.astype(np.float32) * 2 - 1
    else:
        raise ValueError(f"noise {kind!r} is not one of {', '.join(KINDS)}")
    values[BANK:] = values[:BLOCK]
    return values


@lru_cache(maxsize=1)
def rounding_bank() -> Array:
    """Uniform 16-bit integers for stochastic rounding, laid out like `bank`: (2^20 + 262 144,) uint16."""
    key, values = random.key(0, "noise bank rounding"), np.empty(BANK + BLOCK, np.uint16)
    for start in range(0, BANK, _AT_ONCE):
        words = random.blocks(key, start // 8, _AT_ONCE // 8).astype("<u4").view("<u2")
        values[start : start + _AT_ONCE] = words.reshape(-1)
    values[BANK:] = values[:BLOCK]
    return values


def _name_hash(name: str) -> int:
    return random.key(0, name) >> 20


def _draw(seeds: Sequence[int], names: Sequence[str], blocks: Sequence[int]) -> tuple[Array, Float32]:
    """Places and signs of the blocks of several tensors, one after the other: (S, sum of blocks) int64 and float32.

    One Philox key; the counter is (block // 4, 44 bits of the name's hash, 64 bits of the seed).
    """
    quads = [-(-count // 4) for count in blocks]
    quad = np.concatenate([np.arange(count, dtype=np.uint64) for count in quads])
    hashed = np.repeat(np.array([_name_hash(name) for name in names], np.uint64), quads)
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0 = np.tile(quad | (hashed >> high) << np.uint64(20), len(seeds))
    c1 = np.tile(hashed & low, len(seeds))
    seed = np.repeat(np.array([s & (1 << 64) - 1 for s in seeds], np.uint64), len(quad))
    words = random.philox(_PLACES, (c0, c1, seed & low, seed >> high)).reshape(len(seeds), -1).astype(np.int64)
    starts = 4 * np.cumsum([0, *quads[:-1]])
    kept = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, blocks, strict=True)])
    words = words[:, kept]
    return words & (BANK - 1), np.where(words >> _SIGN_BIT & 1, -1.0, 1.0).astype(np.float32)


def places(seeds: Sequence[int], name: str, elements: int) -> tuple[Array, Float32]:
    """Where each block of a tensor lies in the bank, and its sign: (S, blocks) int64 and float32."""
    return _draw(seeds, [name], [-(-elements // BLOCK)])


def take(kind: str, seed: int, name: str, elements: int) -> Float32:
    """One tensor's direction: (elements,) float32."""
    (where,), (signs,) = places([seed], name, elements)
    values, out = bank(kind), np.empty(elements, np.float32)
    for b, (place, sign) in enumerate(zip(where.tolist(), signs, strict=True)):
        part = out[b * BLOCK : (b + 1) * BLOCK]
        np.multiply(values[place : place + part.size], sign, out=part)
    return out


@dataclass(frozen=True)
class Move:
    """theta <- (1 - decay) theta + sum_k first_k z(seed_k), divided by sqrt(sum_k second_k z(seed_k)^2) + 1e-8 if there
    are `second` coefficients. Sums are float32, in the order given."""

    seeds: tuple[int, ...]
    first: tuple[float, ...]
    second: tuple[float, ...] = ()
    decay: float = 0.0


def move(kind: str, weight: Float32, name: str, move: Move, limit: float = inf) -> None:
    """`Noise.move` of a float32 array in numpy, in place: the same bits, for checks and for machines without torch."""
    flat, values = weight.reshape(-1), bank(kind)
    where, signs = places(move.seeds, name, flat.size)
    first, second = signs * np.array(move.first, np.float32)[:, None], np.array(move.second, np.float32)
    for b in range(where.shape[1]):
        part = flat[b * BLOCK : (b + 1) * BLOCK]
        drawn = [values[place : place + part.size] for place in where[:, b]]
        total = drawn[0] * first[0, b]
        for z, factor in zip(drawn[1:], first[1:, b], strict=True):
            total += z * factor
        if move.second:
            square = drawn[0] * second[0] * drawn[0]
            for z, factor in zip(drawn[1:], second[1:], strict=True):
                square += z * factor * z
            total /= np.sqrt(square) + np.float32(ADAM_EPSILON)
        if limit < inf:
            total *= np.abs(part) <= np.float32(limit)
        if move.decay:
            part *= np.float32(1 - move.decay)
        part += total


class Noise:
    """Directions over the tensors of one model on one device; `sizes` maps each name to its number of elements.

    Memory: the bank (5 MiB, and 7.5 more for 16-bit weights) and four blocks of float32 (4 MiB). On the CPU, sets of at
    least a bank's size are swept by `native` where it can be had; the first one may wait for its compiler.
    """

    def __init__(self, kind: str, sizes: Mapping[str, int], device: str | torch.device = "cpu") -> None:
        self.kind, self.device = kind, torch.device(device)
        self._bank = torch.from_numpy(bank(kind)).to(self.device)
        self._banks = {torch.float32: self._bank}
        self._rounding: dict[int, Tensor] = {}
        self._scratch = torch.empty(4, BLOCK, dtype=torch.float32, device=self.device)
        self._names = list(sizes)
        self._blocks = [-(-size // BLOCK) for size in sizes.values()]
        starts = np.cumsum([0, *self._blocks]).tolist()
        self._spans = {
            name: slice(*span) for name, span in zip(sizes, zip(starts, starts[1:], strict=False), strict=True)
        }
        self._drawn: OrderedDict[tuple[int, ...], tuple[Array, Float32]] = OrderedDict()
        self._scaled: OrderedDict[tuple[tuple[int, ...], tuple[float, ...]], native.Directions] = OrderedDict()
        compiled = native.library() if self.device.type == "cpu" and sum(sizes.values()) >= BANK else None
        self._sweeps = native.Sweeps(compiled, rounding_bank, BLOCK) if compiled else None

    def _signed(self, seeds: tuple[int, ...]) -> tuple[Array, Float32]:
        """Places and signs of all tensors' blocks."""
        if seeds not in self._drawn:
            self._drawn[seeds] = _draw(seeds, self._names, self._blocks)
            _trim(self._drawn)
        return self._drawn[seeds]

    def _along(self, seeds: tuple[int, ...], coefficients: tuple[float, ...]) -> native.Directions:
        """The same, with signs times coefficients."""
        key = seeds, coefficients
        if key not in self._scaled:
            where, signs = self._signed(seeds)
            factors = signs * np.array(coefficients, np.float32)[:, None]
            self._scaled[key] = native.Directions(where, factors, _scrambled(where[-1]))
            _trim(self._scaled)
        return self._scaled[key]

    def shifted(
        self, weight: Tensor, seed: int, name: str, coefficient: float, out: Tensor, start: int = 0, limit: float = inf
    ) -> None:
        """out = weight + coefficient * z, of one shape and dtype; `weight` is left as it is.

        `weight` may be a slice of the tensor that begins at its element `start`. Where |weight| > limit z is 0.
        """
        along, blocks, noise = self._along((seed,), (coefficient,)), self._spans[name], self._in(weight.dtype)
        if self._sweeps and self._sweeps.takes(weight.dtype):
            return self._sweeps.shift(weight, out, start, noise, along, blocks, limit)
        flat, result = weight.view(-1), out.view(-1)
        where, factors = along.places[0, blocks], along.factors[0, blocks]
        begin = 0
        while begin < flat.numel():
            b, within = divmod(start + begin, BLOCK)
            end = min(begin + BLOCK - within, flat.numel())
            place = int(where[b]) + within
            part, z = flat[begin:end], noise[place : place + end - begin]
            if limit < inf:
                z = z * (part.abs() <= limit)
            torch.add(part, z, alpha=float(factors[b]), out=result[begin:end])
            begin = end
        return None

    def _in(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._banks:
            self._banks[dtype] = self._bank.to(dtype)
        return self._banks[dtype]

    def rows(self, seed: int, name: str, columns: int, rows: Tensor) -> Tensor:
        """z of some rows of a matrix: (n,) int64 -> (n, columns) float32."""
        (where,), (signs,) = (drawn[:, self._spans[name]] for drawn in self._signed((seed,)))
        at = rows * columns
        block, within = at >> BLOCK_BITS, at & BLOCK - 1
        place = torch.from_numpy(where).to(self.device)[block] + within
        sign = torch.from_numpy(signs).to(self.device)[block]
        z = self._bank.unfold(0, columns, 1)[place.clamp_max(BANK + BLOCK - columns)].mul_(sign[:, None])
        for row in torch.nonzero(within + columns > BLOCK).view(-1).tolist():
            self.shifted(z[row].zero_(), seed, name, 1.0, z[row], int(at[row]))  # in more than one block
        return z

    def move(self, weight: Tensor, name: str, move: Move, limit: float = inf) -> None:
        """`move` of one tensor, in place; where |weight| > limit it stays.

        A 16-bit weight is rounded stochastically, because steps far below its spacing would all be lost. The random
        bits belong to the move, so a replay rounds alike.
        """
        along, blocks = self._along(move.seeds, move.first), self._spans[name]
        if self._sweeps and self._sweeps.takes(weight.dtype) and not move.second and not move.decay:
            return self._sweeps.move(weight, self._bank, along, blocks, limit)
        where, first = along.places[:, blocks], along.factors[:, blocks]
        rounding = along.rounding[blocks].tolist()
        flat, kept = weight.view(-1), float(np.float32(1 - move.decay))
        for b in range(where.shape[1]):
            part = flat[b * BLOCK : (b + 1) * BLOCK]
            places_of_b = where[:, b].tolist()
            total = self._sum(places_of_b, first[:, b].tolist(), len(part), 1)
            if move.second:
                square = self._sum(places_of_b, np.array(move.second, np.float32).tolist(), len(part), 3, squared=True)
                # torch's float32 root may be one bit off, by platform; a float64 one rounded is not.
                total.div_(square.double().sqrt_().float().add_(ADAM_EPSILON))
            if limit < inf:
                total.mul_(part.abs() <= limit)
            self.add(part, total, kept, rounding[b])
        return None

    def _sum(
        self, where: Sequence[int], factors: Sequence[float], count: int, slot: int, squared: bool = False
    ) -> Tensor:
        """sum_k factor_k z_k (or z_k^2) over one block, in the order given, in one of the scratch blocks: float32."""
        product, total = self._scratch[0, :count], self._scratch[slot, :count]
        for k, (place, factor) in enumerate(zip(where, factors, strict=True)):
            z = self._bank[place : place + count]
            made = torch.mul(z, factor, out=product if k else total)
            if squared:
                made.mul_(z)
            if k:
                total.add_(made)
        return total

    def add(self, part: Tensor, total: Tensor, kept: float, place: int) -> None:
        """part = kept * part + total in float32, then rounded to part's dtype, a 16-bit one stochastically.

        Adding an integer drawn uniformly from all values of the dropped bits, and dropping them, goes up in size with
        the probability that keeps the mean; what is zero stays so.
        """
        dtype = part.dtype
        if dtype == torch.float32:
            (part.mul_(kept) if kept != 1 else part).add_(total)
            return
        new = self._scratch[2, : part.numel()].view(part.shape)
        if kept == 1:
            torch.add(part, total, out=new)
        else:
            new.copy_(part).mul_(kept).add_(total)
        dropped = 23 - round(-math.log2(torch.finfo(dtype).eps))
        if dropped not in self._rounding:
            self._rounding[dropped] = torch.from_numpy((rounding_bank() >> (16 - dropped)).astype(np.int32)).to(
                self.device
            )
        bits = new.view(torch.int32).view(-1)
        bits.add_(self._rounding[dropped][place : place + bits.numel()]).bitwise_and_(-1 << dropped)
        part.copy_(new)


def _scrambled(places: Array) -> Array:
    """Other places in a bank, one for each: where a block's rounding bits lie, given where its noise does."""
    return (places * 0x9E3779B1 + 0x7F4A7C15) & (BANK - 1)


def _trim(kept: OrderedDict[Any, Any], most: int = 4) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def rounding_places(move: Move, name: str, blocks: int) -> list[int]:
    """Where in the rounding bank the bits for each part of a move lie, for directions that are no blocks of a bank."""
    found: list[int] = _scrambled(places([move.seeds[-1]], name, blocks * BLOCK)[0][0]).tolist()
    return found

"""Zeroth-order gradient estimation that the methods of this family share.

theta is a mapping name -> float32 array. A direction v has theta's shapes and is addressed by numbers, never stored: it
is cut from the family's bank of noise (`edgellm_sdk.kit.noise`) at the seed key(pool, index), equal on every platform.
A loss is any function of theta, directions and steps, so the same code drives torch, a quantised base or an engine that
can only infer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgellm_sdk import random
from edgellm_sdk.kit import noise
from edgellm_sdk.types import Array, Arrays, Float32

Values: TypeAlias = dict[str, Float32]
Loss: TypeAlias = Callable[[Arrays, Sequence[Arrays], Sequence[float]], Array]
"""(theta, directions, steps) -> losses at theta + steps[k] * directions[k], (n,) float64."""


def noise_id() -> str:
    """What an Update names, so that its directions can be drawn again."""
    return noise.noise_id("gaussian")


def part(name: str, elements: int, pool: int, index: int) -> Float32:
    """The tensor `name` of the index-th direction of a pool: (elements,) float32."""
    return noise.take("gaussian", random.key(pool, "direction", index), name, elements)


def direction(shapes: Mapping[str, tuple[int, ...]], pool: int, picks: Mapping[str, int] | int) -> Values:
    """One direction v ~ N(0, I). `picks` selects the candidate of each tensor, or one candidate for all."""
    return {
        name: part(name, math.prod(shape), pool, picks if isinstance(picks, int) else picks[name]).reshape(shape)
        for name, shape in shapes.items()
    }


def shapes_of(theta: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: theta[name].shape for name in sorted(theta)}


@dataclass(frozen=True)
class Estimate:
    """`jvp` (n,) float32 directional derivatives, `loss` (n,) float32 losses near theta, `forwards` losses computed.

    Where a loss was not finite jvp is 0 and the loss is the mean of the others, NaN when there is none: `dropped`.
    """

    jvp: Float32
    loss: Float32
    forwards: int
    dropped: int = 0


def probe(loss: Loss, theta: Arrays, directions: Sequence[Values], h: float, difference: str = "central") -> Estimate:
    """Directional derivatives of `loss` at theta along each direction.

    central: (f(theta + h v) - f(theta - h v)) / 2h, error O(h^2), 2n forwards;
    forward: (f(theta + h v) - f(theta)) / h, error O(h), n + 1 forwards.
    """
    n = len(directions)
    if difference == "central":
        pairs = [d for v in directions for d in (v, v)]
        values = loss(theta, pairs, [h, -h] * n)
        plus, minus = values[0::2], values[1::2]
        with np.errstate(invalid="ignore"):
            jvp, near = (plus - minus) / (2 * h), (plus + minus) / 2
    else:
        base = loss(theta, directions[:1], [0.0])[0]
        plus = loss(theta, directions, [h] * n)
        values = np.append(plus, base)
        with np.errstate(invalid="ignore"):
            jvp, near = (plus - base) / h, (plus + base) / 2
    usable = np.isfinite(jvp)
    jvp = np.where(usable, jvp, 0.0)
    near = np.where(usable, near, near[usable].mean() if usable.any() else math.nan)
    return Estimate(jvp.astype(np.float32), near.astype(np.float32), len(values), int((~usable).sum()))


def scaled(v: Values, jvp: float) -> Values:
    """The forward gradient jvp * v, float32."""
    return {name: array * np.float32(jvp) for name, array in v.items()}


def mean_gradient(directions: Sequence[Arrays], jvp: Sequence[float] | Array) -> Values:
    """mean_k(jvp_k v_k), float32: all that a replay needs besides the step rule."""
    share = [float(j) / len(directions) for j in jvp]
    parts = [scaled(dict(v), s) for v, s in zip(directions, share, strict=True)]
    return {name: np.sum([part[name] for part in parts], axis=0, dtype=np.float32) for name in directions[0]}


class HalfSums:
    """Running weighted sums of forward gradients in two halves, float64: their mean, and the variance of that mean.

    With N gradients of element variance s^2 and equal weights, E[variance()] = 2 s^2 / N.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sums = tuple({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
        self.counts = [0, 0]
        self.weights = [0, 0]

    def add(self, gradient: Arrays, half: int, weight: int = 1) -> None:
        for name, total in self.sums[half].items():
            total += weight * gradient[name].astype(np.float64)
        self.counts[half] += 1
        self.weights[half] += weight

    @property
    def count(self) -> int:
        return sum(self.counts)

    def mean(self) -> Values:
        """The mean of everything added: float32."""
        total = sum(self.weights)
        return {n: ((self.sums[0][n] + self.sums[1][n]) / total).astype(np.float32) for n in self.sums[0]}

    def variance(self, names: Sequence[str] | None = None) -> float:
        """mean over elements of (m1 - m2)^2 / 2 for the half means m1, m2; infinite while a half is empty."""
        if min(self.counts) == 0:
            return math.inf
        squares, elements = 0.0, 0
        for name in names or sorted(self.sums[0]):
            difference = self.sums[0][name] / self.weights[0] - self.sums[1][name] / self.weights[1]
            squares += float(np.square(difference).sum())
            elements += difference.size
        return squares / (2 * elements)


def most_aligned(target: Arrays, pool: int, candidates: int, keep: int, absolute: bool = False) -> dict[str, list[int]]:
    """For each tensor on its own, the `keep` of `candidates` directions of `pool` closest in angle to `target`.

    Best first, by signed cosine, or by its magnitude. A tensor of zeros keeps the first candidates.
    """
    picks = {}
    for name in sorted(target):
        goal = target[name].ravel().astype(np.float64)
        norm = float(np.linalg.norm(goal))
        cosines = np.zeros(candidates)
        for index in range(candidates if norm > 0 else 0):
            v = part(name, goal.size, pool, index)
            cosines[index] = float(v @ goal) / (norm * float(np.linalg.norm(v)))
        ranking = -np.abs(cosines) if absolute else -cosines
        picks[name] = np.argsort(ranking, kind="stable")[:keep].tolist()
    return picks

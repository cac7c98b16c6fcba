"""Which random directions a zeroth-order method moves along. Every direction is a function of a 64-bit seed.

A sampler shifts tensors out of place (`shift`, `part`, `rows`: the `Shift` of `edgellm_sdk.kit.whole`), moves them in
place, and draws whole directions for parameter sets small enough to hold them. What it keeps between steps (masks,
bases, layer subsets) is itself a function of theta_0 and of seeds, so (seed, scalar) replays everything.

| sampler    | z                                                                                 |
|------------|-----------------------------------------------------------------------------------|
| gaussian   | N(0, 1) for each weight                                                           |
| rademacher | -1 or 1 for each weight                                                           |
| sparse     | gaussian where |theta| is at most a percentile of |theta_0|, else 0               |
| layers     | gaussian in a share of the tensors drawn for each seed, else 0 (LeZO)             |
| low-rank   | U V^T with gaussian U for each seed, V kept for `refresh` steps (LOZO); 1-d: gaussian |

`per_example.py` has another: one gaussian tensor for a whole minibatch, signs for each example (GRZO).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgellm_sdk import random
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move, Noise
from edgellm_sdk.types import Array, Float32

Shapes = Mapping[str, tuple[int, ...]]


class Sampler(Protocol):
    id: str
    """Names the directions: what an Update carries so that its seeds are not replayed with other noise."""

    def shift(self, name: str, weight: Tensor, seed: int, c: float, out: Tensor) -> Tensor:
        """weight + c * z(seed), in `out`; or `weight` itself where z is 0."""

    def part(self, name: str, weight: Tensor, begin: int, seed: int, c: float, out: Tensor) -> Tensor:
        """The same of the rows begin .. begin + len(out) - 1 of a matrix."""

    def rows(self, name: str, weight: Tensor, rows: Tensor, seed: int, c: float) -> Tensor:
        """The same of some rows (n,) of a matrix: (n, columns)."""

    def move(self, name: str, weight: Tensor, move: Move) -> None:
        """theta after `move`, in place."""

    def draw(self, name: str, theta: Float32, seed: int) -> Float32:
        """z(seed) of one tensor, with theta's shape."""

    def at(self, step: int) -> None:
        """Directions as they are at this step."""

    def restart(self) -> None:
        """Forget what moving has left behind: theta is theta_0 again."""

    def save(self) -> object:
        """What moving has left behind, for `load`."""

    def load(self, saved: object) -> None: ...


class Memoryless:
    """A sampler whose directions depend on seeds alone, at every step."""

    def at(self, step: int) -> None:
        return None

    def restart(self) -> None:
        return None

    def save(self) -> object:
        return None

    def load(self, saved: object) -> None:
        return None


def numbers(shapes: Shapes) -> dict[str, int]:
    """Elements of each tensor."""
    return {name: math.prod(shape) for name, shape in shapes.items()}


class Dense(Memoryless):
    """`gaussian` and `rademacher`; with `limits` `sparse`; with a `share` below 1 `layers`."""

    def __init__(
        self,
        kind: str,
        shapes: Shapes,
        device: str | torch.device = "cpu",
        limits: Mapping[str, float] | None = None,
        share: float = 1.0,
    ) -> None:
        self.kind, self.share, self.limits = kind, share, dict(limits or {})
        self.noise = Noise(kind, numbers(shapes), device)
        self.id = noise.noise_id(kind)
        if limits is not None:
            edges = np.array([value for _, value in sorted(limits.items())])
            self.id += f"/sparse {zlib.crc32(edges.tobytes()):08x}"
        if share < 1:
            self.id += f"/layers {share:g}"

    def _limit(self, name: str) -> float:
        return self.limits.get(name, math.inf)

    def active(self, name: str, seed: int) -> bool:
        """Whether this tensor moves along z(seed): whole layers are in or out, what is in no layer counts as one."""
        if self.share >= 1:
            return True
        found = re.search(r"\.(\d+)\.", name)
        layer = found.group(1) if found else "rest"
        return random.key(seed, f"layer {layer}") < self.share * 2**64

    def shift(self, name: str, weight: Tensor, seed: int, c: float, out: Tensor) -> Tensor:
        if not self.active(name, seed):
            return weight
        self.noise.shifted(weight, seed, name, c, out, 0, self._limit(name))
        return out

    def part(self, name: str, weight: Tensor, begin: int, seed: int, c: float, out: Tensor) -> Tensor:
        rows = weight[begin : begin + len(out)]
        if not self.active(name, seed):
            return rows
        self.noise.shifted(rows, seed, name, c, out, begin * weight.shape[1], self._limit(name))
        return out

    def rows(self, name: str, weight: Tensor, rows: Tensor, seed: int, c: float) -> Tensor:
        picked = weight[rows]
        if not self.active(name, seed):
            return picked
        z = self.noise.rows(seed, name, weight.shape[1], rows)
        if name in self.limits:
            z = z * (picked.abs() <= self.limits[name])
        return (picked.float() + c * z).to(weight.dtype)

    def move(self, name: str, weight: Tensor, move: Move) -> None:
        if self.share < 1:
            kept = [k for k, seed in enumerate(move.seeds) if self.active(name, seed)]
            if not kept and not move.decay:
                return
            move = replace(
                move,
                seeds=tuple(move.seeds[k] for k in kept) or move.seeds[:1],
                first=tuple(move.first[k] for k in kept) or (0.0,),
                second=tuple(move.second[k] for k in kept) if move.second else (),
            )
        self.noise.move(weight, name, move, self._limit(name))

    def draw(self, name: str, theta: Float32, seed: int) -> Float32:
        if not self.active(name, seed):
            return np.zeros_like(theta)
        z = noise.take(self.kind, seed, name, theta.size).reshape(theta.shape)
        if name in self.limits:
            z *= np.abs(theta) <= np.float32(self.limits[name])
        return z


def percentiles(theta: Mapping[str, Tensor], keep: float) -> dict[str, float]:
    """The |weight| that a share `keep` of each matrix does not exceed; vectors are not masked (Sparse-MeZO)."""
    limits = {}
    for name, weight in theta.items():
        if weight.dim() > 1:
            k = max(1, math.ceil(keep * weight.numel()))
            limits[name] = float(weight.detach().abs().float().view(-1).kthvalue(k).values)
    return limits


@dataclass(frozen=True)
class _Basis:
    """Where V comes from at one time: it changes when `epoch` does."""

    master: int
    epoch: int

    def of(self, name: str, columns: int, rank: int) -> Float32:
        seed = random.key(self.master, "low-rank basis", self.epoch)
        return noise.take("gaussian", seed, f"{name}/V", columns * rank).reshape(rank, columns)


class LowRank:
    """z = U V^T of rank r: U (rows, r) from the seed, V (columns, r) from a stream of its own, so that a step on which
    V changes replays like any other (arXiv 2410.07698). Vectors get gaussian noise."""

    def __init__(
        self,
        rank: int,
        shapes: Shapes,
        master: int,
        refresh: int,
        device: str | torch.device = "cpu",
        momentum: float = 0.0,
    ) -> None:
        self.rank, self.refresh, self.momentum, self.device = rank, refresh, momentum, torch.device(device)
        self._shapes = dict(shapes)
        self._dense = Dense("gaussian", shapes, device)
        self._basis = _Basis(master, 0)
        self._held: dict[str, Tensor] = {}
        self._left_momentum: dict[str, Tensor] = {}
        self.id = f"{noise.noise_id('gaussian')}/rank {rank}/refresh {refresh}/basis {master:x}"
        if momentum:
            self.id += f"/momentum {momentum:g}"

    def save(self) -> object:
        """What moving has left behind, for `load`."""
        return self._basis.epoch, {name: left.clone() for name, left in self._left_momentum.items()}

    def load(self, saved: object) -> None:
        assert isinstance(saved, tuple)
        self._basis = _Basis(self._basis.master, saved[0])
        self._left_momentum = {name: left.clone() for name, left in saved[1].items()}
        self._held.clear()

    def restart(self) -> None:
        """Forget the momentum: theta is theta_0 again."""
        self._left_momentum.clear()
        self.at(0)

    def at(self, step: int) -> None:
        """Use the V of this step. Momentum N V_old^T goes over to the new basis as N (V_old^T V_new) / columns."""
        epoch = step // self.refresh
        if epoch == self._basis.epoch:
            return
        old, self._basis = self._basis, _Basis(self._basis.master, epoch)
        for name, left in self._left_momentum.items():
            columns = self._shapes[name][1]
            was, new = (basis.of(name, columns, self.rank).astype(np.float64) for basis in (old, self._basis))
            turned = left.cpu().numpy().astype(np.float64) @ (was @ new.T / columns)
            self._left_momentum[name] = torch.from_numpy(turned.astype(np.float32)).to(self.device)
        self._held.clear()

    def basis(self, name: str) -> Tensor:
        """V^T of a matrix: (r, columns) float32."""
        if name not in self._held:
            value = self._basis.of(name, self._shapes[name][1], self.rank)
            self._held[name] = torch.from_numpy(value).to(self.device)
        return self._held[name]

    def _left(self, name: str, seed: int, rows: int) -> Tensor:
        value = noise.take("gaussian", seed, f"{name}/U", rows * self.rank).reshape(rows, self.rank)
        return torch.from_numpy(value).to(self.device)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right as a sum of outer products in a fixed order: the same bits on every machine."""
        total = left[:, :1] * right[0]
        for k in range(1, self.rank):
            total.add_(left[:, k : k + 1] * right[k])
        return total

    def shift(self, name: str, weight: Tensor, seed: int, c: float, out: Tensor) -> Tensor:
        if weight.dim() != 2:
            return self._dense.shift(name, weight, seed, c, out)
        return self.part(name, weight, 0, seed, c, out)

    def part(self, name: str, weight: Tensor, begin: int, seed: int, c: float, out: Tensor) -> Tensor:
        left = self._left(name, seed, len(weight))[begin : begin + len(out)]
        return torch.add(weight[begin : begin + len(out)], (left * c) @ self.basis(name), out=out)

    def rows(self, name: str, weight: Tensor, rows: Tensor, seed: int, c: float) -> Tensor:
        left = self._left(name, seed, len(weight))[rows]
        return (weight[rows].float() + (left * c) @ self.basis(name)).to(weight.dtype)

    def move(self, name: str, weight: Tensor, move: Move) -> None:
        if weight.dim() != 2:
            return self._dense.move(name, weight, move)
        left = torch.zeros(len(weight), self.rank, device=self.device)
        for seed, c in zip(move.seeds, move.first, strict=True):
            left.add_(self._left(name, seed, len(weight)).mul_(float(np.float32(c))))
        if self.momentum:
            held = self._left_momentum.get(name)
            new = left.mul_(1 - self.momentum)
            left = new if held is None else held.mul_(self.momentum).add_(new)
            self._left_momentum[name] = left
        height = max(1, noise.BLOCK // weight.shape[1])
        rounding = noise.rounding_places(move, f"{name}/U", -(-len(weight) // height))
        for k, begin in enumerate(range(0, len(weight), height)):
            total = self._product(left[begin : begin + height], self.basis(name))
            self._dense.noise.add(weight[begin : begin + height], total, float(np.float32(1 - move.decay)), rounding[k])
        return None

    def draw(self, name: str, theta: Float32, seed: int) -> Float32:
        if theta.ndim != 2:
            return noise.take("gaussian", seed, name, theta.size).reshape(theta.shape)
        z: Array = self._product(self._left(name, seed, len(theta)).cpu(), self.basis(name).cpu()).numpy()
        return z

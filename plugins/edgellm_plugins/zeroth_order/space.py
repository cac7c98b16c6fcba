"""Where theta lives: a few tensors on a frozen model, or a whole model. One interface, and exact replay in both.

Evaluations never change theta; `step` is the only thing that does, with arithmetic that gives the same bits on every
machine. So theta_t is a function of theta_0 and of the moves, and a log of moves is a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.zeroth_order.samplers import LowRank, Sampler
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.objective import Objective, written
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Array, Dataset, Float32, Metric, ModelHandle

Point = tuple[int, float]
"""(seed, c): the candidate theta + c * z(seed)."""


class Space(Protocol):
    sampler: Sampler

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        """Mean cross-entropy of the batch `name` at each candidate: (n,) float64."""

    def step(self, move: Move) -> None: ...

    def restart(self) -> None:
        """theta_0."""

    def save(self) -> object:
        """A copy of theta for `load`."""

    def load(self, saved: object) -> None: ...

    def measure(self, data: Dataset) -> dict[str, Metric]: ...

    def write(self, folder: Path, model: ModelHandle) -> ModelHandle:
        """theta as a model that `edgellm` can go on with."""

    def digest(self) -> str:
        """sha256 over theta's bytes, tensor by tensor in name order."""


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + b"\0")
        sha.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Small:
    """The tensors of an `Objective`, float32."""

    def __init__(self, objective: Objective, sampler: Sampler) -> None:
        self.objective, self.sampler = objective, sampler
        self.theta: dict[str, Float32] = {}
        self.restart()

    def restart(self) -> None:
        self.theta = {name: np.array(value, np.float32) for name, value in sorted(self.objective.initial.items())}
        if isinstance(self.sampler, LowRank):
            self.sampler.restart()

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        drawn = {
            seed: {n: self.sampler.draw(n, value, seed) for n, value in self.theta.items()}
            for seed in dict.fromkeys(seed for seed, _ in points)
        }
        return self.objective.evaluate(
            name, make, self.theta, [drawn[seed] for seed, _ in points], [c for _, c in points]
        )

    def step(self, move: Move) -> None:
        for name, value in self.theta.items():
            self.sampler.move(name, torch.from_numpy(value), move)

    def save(self) -> object:
        return {name: value.copy() for name, value in self.theta.items()}

    def load(self, saved: object) -> None:
        assert isinstance(saved, dict)
        self.theta = {name: value.copy() for name, value in saved.items()}

    def measure(self, data: Dataset) -> dict[str, Metric]:
        return self.objective.measure(self.theta, data)

    def write(self, folder: Path, model: ModelHandle) -> ModelHandle:
        return written(self.objective, folder, self.theta, model)

    def digest(self) -> str:
        return _digest({name: torch.from_numpy(value) for name, value in self.theta.items()})


@dataclass(frozen=True)
class _Shift:
    """`theta + c * z(seed)` for `Whole`."""

    sampler: Sampler
    seed: int
    c: float

    def weight(self, name: str, weight: Tensor, out: Tensor) -> Tensor:
        return self.sampler.shift(name, weight, self.seed, self.c, out)

    def part(self, name: str, weight: Tensor, begin: int, out: Tensor) -> Tensor:
        return self.sampler.part(name, weight, begin, self.seed, self.c, out)

    def rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        return self.sampler.rows(name, weight, rows, self.seed, self.c)


class Full:
    """Every weight of a model, in its dtype."""

    def __init__(self, whole: Whole, sampler: Sampler) -> None:
        self.whole, self.sampler = whole, sampler
        self._batches: dict[str, list[prompts.Encoded]] = {}

    def restart(self) -> None:
        self.whole.reload()
        if isinstance(self.sampler, LowRank):
            self.sampler.restart()

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        if name not in self._batches:
            self._batches[name] = prompts.encode(self.whole.tokenizer, make().examples, self.whole.max_length)
        batch = self._batches[name]
        return np.array([self.whole.loss(batch, _Shift(self.sampler, *p) if p[1] else None) for p in points])

    @torch.no_grad()
    def step(self, move: Move) -> None:
        for name, parameter in self.whole.parameters.items():
            self.sampler.move(name, parameter.data, move)

    def save(self) -> object:
        return [parameter.data.clone() for parameter in self.whole.parameters.values()]

    def load(self, saved: object) -> None:
        assert isinstance(saved, list)
        for parameter, value in zip(self.whole.parameters.values(), saved, strict=True):
            parameter.data.copy_(value)

    def measure(self, data: Dataset) -> dict[str, Metric]:
        return self.whole.measure(data)

    def write(self, folder: Path, model: ModelHandle) -> ModelHandle:
        self.whole.write(folder)
        return resolve(str(folder))

    def digest(self) -> str:
        return _digest(self.whole.parameters)


class Follower:
    """Keeps one Space at the place that a log of moves describes, with as little recomputation as it can."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._at = b""
        self._saved: tuple[bytes, object] | None = None

    def goto(self, moves: Sequence[Move], come_back: bool) -> None:
        """theta after `moves`. With `come_back` a copy is kept, because others will start from here as well."""
        chain = [b""]
        for move in moves:
            chain.append(_link(chain[-1], move))
        places = {link: k for k, link in enumerate(chain)}
        if self._at not in places:
            if self._saved is not None and self._saved[0] in places:
                self.space.load(self._saved[1])
                self._at = self._saved[0]
            else:
                self.space.restart()
                self._at = b""
        for t in range(places[self._at], len(moves)):
            self.step(t, moves[t])
        if come_back and (self._saved is None or self._saved[0] != self._at):
            self._saved = None
            self._saved = (self._at, self.space.save())

    def step(self, t: int, move: Move) -> None:
        """One move, the t-th."""
        self.aim(t)
        if move.seeds:
            self.space.step(move)
        self._at = _link(self._at, move)

    def aim(self, t: int) -> None:
        """Directions as they are at step t."""
        if isinstance(self.space.sampler, LowRank):
            self.space.sampler.at(t)


def _link(before: bytes, move: Move) -> bytes:
    sha = hashlib.blake2b(before, digest_size=16)
    sha.update(np.array(move.seeds, np.uint64).tobytes())
    for values in (move.first, move.second, (move.decay,)):
        sha.update(np.array(values, np.float64).tobytes() + b"/")
    return sha.digest()

"""Where theta lives: a few tensors on a frozen model, or a whole model. One interface, and exact replay in both.

Evaluations never change theta; `step` is the only thing that does, with arithmetic that gives the same bits on every
machine. So theta_t is a function of theta_0 and of the moves, and a log of moves is a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.zeroth_order.per_example import PerExample
from edgellm_plugins.zeroth_order.samplers import Sampler
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.objective import Objective, evaluate_each, written
from edgellm_sdk.kit.scoring import AnswerKey, answer_key
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Array, Dataset, Float32, Metric, ModelHandle

Point = tuple[int, float]
"""(seed, c): the candidate theta + c * z(seed)."""


class Space(Protocol):
    sampler: Sampler

    @property
    def cheap(self) -> bool:
        """Whether a copy of theta is small beside the model."""

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        """What is minimised, on the batch `name` at each candidate: (n,) float64. Mean cross-entropy, unless the method
        has another goal."""

    def step(self, move: Move) -> None: ...

    def restart(self) -> None:
        """theta_0."""

    def save(self) -> object:
        """A copy of theta for `load`."""

    def load(self, saved: object) -> None: ...

    def measure(self, data: Dataset) -> dict[str, Metric]: ...

    def write(self, folder: Path, model: ModelHandle) -> ModelHandle:
        """theta as a model that `edgellm` can go on with."""

    def finite(self) -> bool:
        """Whether all of theta is."""

    def digest(self) -> str:
        """sha256 over theta's bytes, tensor by tensor in name order."""


@runtime_checkable
class ExampleSpace(Space, Protocol):
    def each(self, name: str, make: Callable[[], Dataset], seeds: Sequence[int], steps: Sequence[float]) -> Array:
        """What is minimised, on example i alone at theta + c * z(seeds[i]), for every c of `steps`: (S, n) float64 for
        the n examples of the batch, of which there may be fewer than seeds."""


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + b"\0")
        sha.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Small:
    """The tensors of an `Objective`, float32."""

    cheap = True

    def __init__(self, objective: Objective, sampler: Sampler) -> None:
        self.objective, self.sampler = objective, sampler
        self.theta: dict[str, Float32] = {}
        self.restart()

    def restart(self) -> None:
        self.theta = {name: np.array(value, np.float32) for name, value in sorted(self.objective.initial.items())}
        self.sampler.restart()

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        drawn = {
            seed: {n: self.sampler.draw(n, value, seed) for n, value in self.theta.items()}
            for seed in dict.fromkeys(seed for seed, _ in points)
        }
        return self.objective.evaluate(
            name, make, self.theta, [drawn[seed] for seed, _ in points], [c for _, c in points]
        )

    def each(self, name: str, make: Callable[[], Dataset], seeds: Sequence[int], steps: Sequence[float]) -> Array:
        drawn = [{n: self.sampler.draw(n, value, seed) for n, value in self.theta.items()} for seed in seeds]
        return evaluate_each(self.objective, name, make, self.theta, drawn, steps)

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

    def finite(self) -> bool:
        return all(bool(np.isfinite(value).all()) for value in self.theta.values())

    def digest(self) -> str:
        return digest_of({name: torch.from_numpy(value) for name, value in self.theta.items()})


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

    cheap = False

    def __init__(self, whole: Whole, sampler: Sampler) -> None:
        self.whole, self.sampler = whole, sampler
        self._batches: dict[str, list[prompts.Encoded]] = {}
        self._keys: dict[str, AnswerKey] = {}

    def restart(self) -> None:
        self.whole.reload()
        self.sampler.restart()

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        batch, key = self._batch(name, make)
        shifts = [_Shift(self.sampler, *point) if point[1] else None for point in points]
        return np.array([self.whole.evaluate(batch, key, shift) for shift in shifts])

    def each(self, name: str, make: Callable[[], Dataset], seeds: Sequence[int], steps: Sequence[float]) -> Array:
        batch, key = self._batch(name, make)
        if isinstance(self.sampler, PerExample):
            shifts = [self.sampler.flips(seeds[: len(batch)], c) for c in steps]
            return np.stack([self.whole.evaluate_each(batch, key, flips) for flips in shifts])
        raise TypeError("directions of other samplers differ by more than signs")

    def _batch(self, name: str, make: Callable[[], Dataset]) -> tuple[list[prompts.Encoded], AnswerKey]:
        if name not in self._batches:
            data = make()
            self._keys[name] = answer_key(self.whole.goal, data, self.whole.encode)
            self._batches[name] = prompts.encode(self.whole.tokenizer, data.examples, self.whole.max_length)
        return self._batches[name], self._keys.get(name, AnswerKey())

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

    def finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.whole.parameters.values())

    def digest(self) -> str:
        return digest_of(self.whole.parameters)


@runtime_checkable
class Marked(Protocol):
    """Moves whose history can be told from another's without making every move."""

    def mark(self, count: int) -> bytes:
        """A digest of the first `count` moves."""


class Follower:
    """Keeps one Space at the place that a log of moves describes, with as little recomputation as it can.

    A place that will be returned to is copied at once where theta is small. A whole model is copied only when a place
    is asked for a second time, as in a simulation of several clients: a device is one client, and trains in the memory
    of one model.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._at: tuple[int, bytes] | None = None
        self._saved: tuple[tuple[int, bytes], object, object] | None = None
        self._asked = (-1, b"")

    def goto(self, moves: Sequence[Move], come_back: bool) -> None:
        """theta after `moves`; `come_back`: others will start from here as well."""
        target = (len(moves), _mark(moves, len(moves)))
        if not self._on(self._at, moves) or (
            self._saved is not None and self._on(self._saved[0], moves) and self._saved[0] > (self._at or (0, b""))
        ):
            self._begin(moves)
        assert self._at is not None
        began, self._at = self._at[0], None
        for t in range(began, len(moves)):
            self.step(t, moves[t])
        self._at = target
        again, self._asked = self._asked == target, target
        if come_back and (self.space.cheap or again) and (self._saved is None or self._saved[0] != target):
            self._saved = None
            self._saved = (target, self.space.save(), self.space.sampler.save())

    def _on(self, place: tuple[int, bytes] | None, moves: Sequence[Move]) -> bool:
        return place is not None and place[0] <= len(moves) and _mark(moves, place[0]) == place[1]

    def _begin(self, moves: Sequence[Move]) -> None:
        """At the copy if it lies on the way, else at theta_0."""
        if self._saved is not None and self._on(self._saved[0], moves):
            self._at, theta, kept = self._saved
            self.space.load(theta)
            self.space.sampler.load(kept)
        else:
            self.space.restart()
            self._at = (0, _mark(moves, 0))

    def step(self, t: int, move: Move) -> None:
        """One move, the t-th; where that leads is known after `goto` or `arrived`."""
        self._at = None
        self.aim(t)
        if move.seeds:
            self.space.step(move)
        elif move.decay:
            self.space.step(replace(move, seeds=(t,), first=(0.0,)))  # along nothing, with bits to round by

    def arrived(self, moves: Sequence[Move]) -> None:
        """The steps taken since `goto` were the last of `moves`."""
        self._at = (len(moves), _mark(moves, len(moves)))

    def aim(self, t: int) -> None:
        """Directions as they are at step t."""
        self.space.sampler.at(t)


def _mark(moves: Sequence[Move], count: int) -> bytes:
    if isinstance(moves, Marked):
        return moves.mark(count)
    sha = hashlib.blake2b(digest_size=16)
    for move in moves[:count]:
        sha.update(np.array(move.seeds, np.uint64).tobytes() + b"/")
        for values in (move.first, move.second, (move.decay,)):
            sha.update(np.array(values, np.float64).tobytes() + b"/")
    return sha.digest()

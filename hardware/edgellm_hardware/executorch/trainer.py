"""Driving a training program from Python as an application on a phone would: one execution a step, g fed back.

Beside `train.pte` lies `train.safetensors` with what a file of weights cannot say: the sizes, A, the base model. This
module needs the runtime, numpy and the tensor type that the runtime's binding exchanges; it keeps no gradient, loads
no model and never evaluates the network in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellm_hardware.executorch import INSTALL
from edgellm_hardware.executorch.llama import Layout
from edgellm_hardware.executorch.program import STATE, Shape, quiet
from edgellm_sdk import random, store
from edgellm_sdk.errors import ConfigError, DataError, DeviceError, ModelError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.types import Array, Float32

_NO_NOISE = 1e-20  # an eps that leaves float32 values of any adapter as they are, and divides without overflow


def companion(program: Path) -> Path:
    return program.with_suffix(".safetensors")


class Program:
    """One method of a `.pte`, loaded afresh: state starts as it was exported. ModelError for an unusable file."""

    def __init__(self, source: Path | bytes) -> None:
        try:
            with quiet():
                from executorch.extension.pybindings import (  # type: ignore[import-not-found, unused-ignore]
                    portable_lib,
                )

                self._source = source  # the runtime reads its constants from these bytes for as long as it lives
                if isinstance(source, bytes):
                    self._program = portable_lib._load_program_from_buffer(source)
                else:
                    self._program = portable_lib._load_program(str(source))
                self._method = self._program.load_method("forward")
        except ImportError:
            raise DeviceError("executorch is not installed", "", INSTALL) from None
        except RuntimeError as error:
            where = "" if isinstance(source, bytes) else str(source)
            raise ModelError(f"ExecuTorch cannot load it: {str(error)[:120]}", where) from None

    def state(self) -> torch.Tensor:
        """A live view of the state: what is written here, the next call reads."""
        return self._method.get_attribute(STATE)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Float32:
        try:
            (losses,) = self._method.call(list(inputs))
        except RuntimeError as error:
            raise DeviceError(f"ExecuTorch failed: {str(error)[:160]}") from None
        return np.array(losses.numpy(), np.float32)


def batch_inputs(rows: Sequence[Encoded], shape: Shape) -> tuple[torch.Tensor, ...]:
    """(tokens (b, T), places (N,), targets (N,), weights (N,)) for at most b rows; unused rows and slots weigh nothing.

    DataError when the rows do not fit the program's sizes.
    """
    if not 0 < len(rows) <= shape.batch:
        raise DataError(f"{len(rows)} examples do not fit a program for {shape.batch}")
    tokens = np.zeros((shape.batch, shape.tokens), np.int64)
    places, targets = [], []
    for index, row in enumerate(rows):
        if len(row.tokens) > shape.tokens:
            raise DataError(f"an example of {len(row.tokens)} tokens does not fit a program for {shape.tokens}")
        tokens[index, : len(row.tokens)] = row.tokens
        for position in range(max(row.start, 1), len(row.tokens)):
            places.append(index * shape.tokens + position - 1)
            targets.append(row.tokens[position])
    if not 0 < len(places) <= shape.labels:
        found = f"{len(places)} scored tokens do not fit a program for {shape.labels}"
        raise DataError(found, fix="export with more labels")
    unused = shape.labels - len(places)
    weights = np.array([1.0] * len(places) + [0.0] * unused, np.float32)
    arrays = (tokens, np.array(places + [0] * unused), np.array(targets + [0] * unused), weights)
    return tuple(torch.from_numpy(array) for array in arrays)


class Trainer:
    """A training program with its state. `eps` and `eta` as in `program`; `eps` stays what it is for the whole run.

    `seed` gives the noise of a `host` program: direction k of step t is the portable normal of
    (seed, tensor name, t * q + k). A `graph` program draws its own, and the runtime seeds it from the machine.
    """

    def __init__(self, program: Path, learning_rate: float, step: float = 0.01, seed: int = 0) -> None:
        if not companion(program).is_file():
            raise ModelError("has no companion file", str(program), f"keep {companion(program).name} beside it")
        arrays, self.facts = store.load_arrays(companion(program))
        if self.facts.get("kind") not in ("graph", "host"):
            raise ModelError("is not a training program", str(program), "edgellm export --plugin executorch makes one")
        self.frozen = {name: np.asarray(array) for name, array in arrays.items()}
        self.shape = Shape(**self.facts["shape"])
        self.layout = Layout({name: (size[0], size[1]) for name, size in self.facts["layout"]})
        self.eta, self.eps, self.seed = learning_rate, step, seed
        self.g = np.zeros(self.shape.queries, np.float32)
        self.steps = 0
        self._program = Program(program)

    @property
    def state(self) -> torch.Tensor:
        """The live (2q, D) float32 state."""
        return self._program.state()

    def noise(self, step: int) -> Float32:
        """z of a `host` program's step, (q, D) float32."""
        q, rows = self.shape.queries, []
        for k in range(q):
            drawn = {
                name: random.normal(random.key(self.seed, name, step * q + k), out * r).reshape(out, r)
                for name, (out, r) in self.layout.shapes.items()
            }
            rows.append(self.layout.pack(drawn))
        return np.stack(rows)

    def _call(self, rows: Sequence[Encoded], g: Float32, eta: float, eps: float, z: Float32 | None) -> Float32:
        scalars = (torch.from_numpy(g), torch.tensor([eta]), torch.tensor([eps]))
        noise = () if z is None else (torch.from_numpy(z),)
        return self._program((*batch_inputs(rows, self.shape), *scalars, *noise))

    def step(self, rows: Sequence[Encoded]) -> Float32:
        """Apply the last g, perturb, evaluate: losses (2q,), plus then minus. DataError unless all are finite."""
        z = self.noise(self.steps) if self.facts["kind"] == "host" else None
        losses = self._call(rows, self.g, self.eta, self.eps, z)
        if not np.isfinite(losses).all():
            raise DataError(f"the loss of step {self.steps + 1} is not finite", fix="lower the learning rate")
        q = self.shape.queries
        self.g = (losses[:q] - losses[q:]) / np.float32(2 * self.eps)
        self.steps += 1
        return losses

    def evaluate(self, rows: Sequence[Encoded]) -> float:
        """Loss of the adapter as it stands; the state and the pending update are as before afterwards."""
        kept = self.state.clone()
        try:
            self.state.copy_(torch.from_numpy(self._centre()).expand_as(kept))
            z = np.zeros((self.shape.queries, self.layout.size), np.float32) if self.facts["kind"] == "host" else None
            losses = self._call(rows, np.zeros_like(self.g), 0.0, _NO_NOISE, z)
        finally:
            self.state.copy_(kept)
        return float(losses.mean())

    def _centre(self) -> Float32:
        """B with the last g applied: (D,) float32."""
        q, state = self.shape.queries, self.state.numpy().astype(np.float64)
        plus, minus = state[:q], state[q:]
        centre = (plus + minus).mean(0) / 2
        moved = centre - self.eta / q * (self.g.astype(np.float64) @ (plus - minus)) / (2 * self.eps)
        return np.asarray(moved, np.float32)

    def adapter(self) -> dict[str, Float32]:
        """What has been learned, the noise removed and the last update made: name -> (out, r) float32."""
        return self.layout.unpack(self._centre())

    def finalise(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder on its base; `edgellm_sdk.models.resolve` accepts it."""
        if not self.steps:
            raise ConfigError("no step was made: there is nothing to write")
        spec = adapters.Spec(**{**self.facts["spec"], "targets": tuple(self.facts["spec"]["targets"])})
        trained = adapters.Trainables(spec, 0, torch.device("cpu"))
        trained.frozen.update(self.frozen)
        values = self.adapter()
        trained.initial.update(values)
        adapters.write(folder, trained, values, self.facts["base"])


def train(program: Path, batches: Sequence[Sequence[Encoded]], steps: int, learning_rate: float, step: float = 0.01,
          seed: int = 0) -> tuple[Trainer, list[float]]:  # fmt: skip
    """`steps` steps over `batches` in turn: the trainer, and the mean loss of each step's candidates."""
    trainer = Trainer(program, learning_rate, step, seed)
    losses = [float(trainer.step(batches[k % len(batches)]).mean()) for k in range(steps)]
    return trainer, losses


def facts(kind: str, shape: Shape, layout: Layout, spec: adapters.Spec, base: Mapping[str, str]) -> dict[str, Any]:
    """The companion's scalars."""
    return {
        "kind": kind,
        "shape": {"queries": shape.queries, "batch": shape.batch, "tokens": shape.tokens, "labels": shape.labels},
        "layout": [[name, list(size)] for name, size in layout.shapes.items()],
        "spec": {"kind": spec.kind, "layers": spec.layers, "rank": spec.rank, "alpha": spec.alpha,
                 "targets": list(spec.targets)},
        "base": dict(base),
    }  # fmt: skip


def write_companion(program: Path, frozen: Mapping[str, Array], scalars: Mapping[str, Any]) -> Path:
    path = companion(program)
    store.save_arrays(path, dict(frozen), dict(scalars))
    return path

"""theta as the scales of a quantised model: codes never change, so what is trained deploys as the same codes.

A block's 32 weights are d * k (+ m). theta is d of every block of every matrix in the decoder layers, float32, named
like its matrix, (rows, blocks); k and m stay. So do token embedding and output head: `compress` leaves them in floating
point, and most of their rows belong to tokens that no example holds, which would take the noise of every step.

Unit. Formats differ in how far their levels reach: 8 in q4_0, 15 in q4_1, 127 in q8_0 and iq4_nl. Directions are
divided by that reach K, so eps is how far the outermost weight of a block moves, as in a method that moves weights,
and one eps and one eta fit all formats. For a model of one format this is a step eps / K and a rate eta / K^2 for d.

Storage. A block has room for an fp16 d. Estimates are taken at the float32 theta, which is within 2^-11 of what is
stored, below any useful perturbation; rounding at every step would lose the steps. What is measured and what is written
is d rounded to fp16, so a curve of held-out loss is that of the file.

Sign and floor. ggml takes d from the element of largest magnitude, with its sign, so d may be negative. After a move
|d| is at least `floor` and d keeps its sign; a block that began below the floor stays above where it began, and a
block with d = 0 stays 0. `floor` is rounded up to fp16, so storing cannot undercut it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgellm_plugins.zeroth_order import packed
from edgellm_plugins.zeroth_order.packed import Packed
from edgellm_plugins.zeroth_order.samplers import Sampler
from edgellm_plugins.zeroth_order.space import Full, Point, digest_of
from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Array, Dataset, Metric, ModelHandle

ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def trained(model: Packed) -> dict[str, Tensor]:
    """theta_0. ModelError when no matrix of the decoder layers is in blocks."""
    found = {name: matrix.scales.float() for name, matrix in model.matrices.items() if name not in ENDS}
    if not found:
        raise ModelError("only its embedding or output head is in blocks", str(model.handle.path))
    return found


class Scales(Full):
    """A Space over `trained(model)`."""

    cheap = True

    def __init__(self, model: Packed, sampler: Sampler, floor: float) -> None:
        super().__init__(model, sampler)
        self.packed, self.floor = model, _half_above(floor)
        self.theta = trained(model)

    def restart(self) -> None:
        self.theta = trained(self.packed)

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[Point]) -> Array:
        batch, key = self._batch(name, make)
        return np.array([self.packed.evaluate(batch, key, Decoding(self, *point)) for point in points])

    def step(self, move: Move) -> None:
        for name, value in self.theta.items():
            matrix = self.packed.matrices[name]
            began = matrix.scales.float()
            self.sampler.move(name, value, replace(move, first=tuple(c / matrix.largest for c in move.first)))
            sizes = torch.maximum(value.mul_(began.sign()), began.abs().clamp_(max=self.floor))
            torch.copysign(sizes, began, out=value)

    def save(self) -> object:
        return {name: value.clone() for name, value in self.theta.items()}

    def load(self, saved: object) -> None:
        assert isinstance(saved, dict)
        self.theta = {name: value.clone() for name, value in saved.items()}

    def measure(self, data: Dataset) -> dict[str, Metric]:
        """At the scales as they would be stored."""
        return self.packed.measure(data, Decoding(self, stored=True))

    def finite(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.theta.values())

    def digest(self) -> str:
        return digest_of(self.theta)

    def write(self, folder: Path, model: ModelHandle) -> ModelHandle:
        """A block-quantised folder like its source: the same bytes but for the trained scales.

        ModelError when a scale does not fit fp16, StorageError when the disk says no.
        """
        source, shapes = self.packed.handle.path, {}
        for name, rows in self.packed.rows.items():
            height, columns = self.packed.matrices[name].shape
            shapes[name] = rows.format, (height, blocks.block_format(rows.format).row_bytes(columns))
        tensors = {}
        for name, tensor in checkpoint.inspect(source).tensors.items():
            if name not in shapes:
                with safe_open(tensor.parts[0].path, framework="pt") as file:
                    tensors[name] = file.get_tensor(name)
        with store.replacing(folder) as temp:
            for name in checkpoint.SIDE_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, temp / name)
            save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
            packed.write(temp / checkpoint.QUANTIZED, shapes, self._stored)
        return resolve(str(folder))

    def _stored(self, name: str) -> Array:
        """The matrix's blocks, (rows, row bytes) uint8, with the scales of theta."""
        rows = self.packed.rows[name]
        found = rows.read()
        if name in self.theta:
            scales = self.theta[name].half().cpu().numpy()
            if not np.isfinite(scales).all():
                raise ModelError("a scale grew beyond fp16", name[:80], "lower the learning rate")
            grid = found.reshape(*scales.shape, blocks.block_format(rows.format).bytes)
            grid[:, :, :2] = scales.astype("<f2")[:, :, None].view(np.uint8)
        return found


@dataclass(frozen=True)
class Decoding:
    """The weights at theta + c * z(seed), or at theta as `stored`: a `Shift` for `Packed`."""

    space: Scales
    seed: int = 0
    c: float = 0.0
    stored: bool = False

    def weight(self, name: str, weight: Tensor, out: Tensor) -> Tensor:
        matrix = self.space.packed.matrices.get(name)
        return weight if matrix is None else matrix.decode(self._scales(name), out)

    def part(self, name: str, weight: Tensor, begin: int, out: Tensor) -> Tensor:
        matrix = self.space.packed.matrices.get(name)
        if matrix is None:
            return weight[begin : begin + len(out)]
        return matrix.decode(matrix.scales[begin : begin + len(out)].float(), out, begin)

    def rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        matrix = self.space.packed.matrices.get(name)
        return weight[rows] if matrix is None else matrix.pick(rows, weight.dtype)

    def _scales(self, name: str) -> Tensor:
        """(rows, blocks) float32."""
        theta, matrix = self.space.theta.get(name), self.space.packed.matrices[name]
        if theta is None:
            return matrix.scales.float()
        if self.stored:
            return theta.half().float()
        if not self.c:
            return theta
        return self.space.sampler.shift(name, theta, self.seed, self.c / matrix.largest, torch.empty_like(theta))


def _half_above(value: float) -> float:
    """The least fp16 number that is not below `value`, and above 0."""
    half = np.float16(value)
    if float(half) < value or half == 0:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)

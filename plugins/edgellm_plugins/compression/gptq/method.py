"""The arithmetic of GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: arXiv 2210.17323, Algorithm 1).

Symbols of the paper: W (rows = outputs r, columns = inputs c), H = 2 X X^T + lambda I, quant(.) the nearest grid point,
B the lazy block. U is upper triangular with H^-1 = U^T U; its row j is the inverse Hessian of the columns that are left
after column j, divided by the root of its diagonal. Matrices are held transposed here, (c, r), so that a column of the
paper is contiguous.

Where we differ from the paper and its code, and why:
* U comes from one Cholesky factor of the reversed H and one triangular inverse, in float64, not from
  Cholesky - inverse - Cholesky in float32: the same matrix, less work, better conditioned.
* A group's scale is read from the current, compensated values of all its columns. The code reads values that are up to
  a block old when groups are smaller than B.
* Scales are chosen in the precision they are stored in, before any column is rounded, by a search weighted with
  omega_j = 1 / U_jj^2, the price of an error in column j. (The paper: min and max.)
* With the codes fixed, all scales of a row are refitted at once against H. Linears of one input share one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.gptq import INTEGERS, Config, folder
from edgellm_plugins.compression.gptq.uniform import Uniform
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks, gptq_format
from edgellm_sdk.kit.blocks import Parameters

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays, Dataset, Float32, ModelHandle

TILE = 32  # columns updated one by one; the rest of a block follows with one product


class Grid(Protocol):
    """What a group of `group` columns can be rounded to. Tensors (columns, rows); see `edgellm_sdk.kit.blocks`."""

    group: int

    def fit(self, columns: Tensor, omega: Tensor) -> Parameters: ...
    def level(self, weights: Tensor, p: Parameters) -> Tensor: ...
    def basis(self, levels: Tensor) -> Tensor: ...
    def value(self, levels: Tensor, p: Parameters) -> Tensor: ...


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, H + lambda I): U upper with (H + lambda I)^-1 = U^T U, lambda = `damping` x mean diagonal.

    (c, c) -> two (c, c) in H's dtype. When H is not positive definite lambda is raised tenfold at a time; ModelError
    when even ten times the mean diagonal does not help.
    """
    base = float(hessian.diagonal().mean())
    fraction = damping
    while True:
        damped = hessian.double()
        damped.diagonal().add_(fraction * base)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and torch.isfinite(lower).all():
            break
        fraction = max(10 * fraction, 1e-3)
        if fraction > 10:
            raise ModelError("the Hessian of a layer is not usable", fix="calibrate on more or other text")
    # H reversed = L L^T, so H = R R^T with R = L reversed, upper; H^-1 = R^-T R^-1 and U = R^-1
    identity = torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor.to(hessian.dtype), damped.to(hessian.dtype)


@dataclass(frozen=True)
class Swept:
    """Levels (c, r), the parameters of every group and each row's sum of squared compensated errors, (r,)."""

    levels: Tensor
    parameters: list[Parameters]
    loss: Tensor

    def values(self, grid: Grid) -> Tensor:
        """The quantised weights, (c, r)."""
        parts = self.levels.split(grid.group)
        return torch.cat([grid.value(part, p) for part, p in zip(parts, self.parameters, strict=True)])


def sweep(weights: Tensor, factor: Tensor, grid: Grid, block: int) -> Swept:
    """Algorithm 1 over all rows at once: weights (c, r) and U (c, c) of one dtype; the weights are not changed.

    The lazy block is rounded up to whole groups. Σ loss = tr((W - Q) H (W - Q)^T) for the H behind U.
    """
    w, columns = weights.clone(), len(weights)
    group = min(grid.group, columns)
    block = math.ceil(block / group) * group
    tile = math.gcd(group, TILE)
    omega = factor.diagonal().pow(-2)
    steps = factor.diagonal().tolist()
    levels, loss = torch.empty_like(w), torch.zeros_like(w[0])
    parameters: list[Parameters] = []
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(w[start:stop])
        for left in range(start, stop, tile):
            right = min(left + tile, stop)
            if left % group == 0:
                parameters.append(p := grid.fit(w[left : left + group], omega[left : left + group]))
            for j in range(left, right):
                levels[j] = level = grid.level(w[j], p)
                error = torch.sub(w[j], grid.value(level, p), out=errors[j - start]).div_(steps[j])
                if j + 1 < right:
                    w[j + 1 : right].addr_(factor[j, j + 1 : right], error, alpha=-1)
            w[right:stop].addmm_(factor[left:right, right:stop].t(), errors[left - start : right - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.square().sum(0)
    return Swept(levels, parameters, loss)


def refit(weights: Tensor, hessian: Tensor, swept: Swept, grid: Grid) -> Swept:
    """Scales (and minima) of a row refitted jointly with its codes fixed: d = (Z^T H Z)^-1 Z^T H w, Z block-diagonal.

    All in the layout of `sweep`. The result is rounded to fp16; a row keeps its old scales unless its error
    (w - q)^T H (w - q) falls, so no row gets worse.
    """
    columns, rows = weights.shape
    group = min(grid.group, columns)
    count = len(swept.parameters)
    free = swept.parameters[0].shift is not None
    z = grid.basis(swept.levels)
    regressors = [z, torch.ones_like(z)] if free else [z]
    pad = count * group - columns

    def by_group(product: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(product, (0, 0, 0, pad)) if pad else product
        return whole.view(-1, group, rows).sum(1)

    size = count * len(regressors)
    normal = weights.new_empty(size, size, rows)  # symmetric: only one side of it is computed
    for a, left in enumerate(regressors):
        for g in range(count):
            part, row = slice(g * group, min((g + 1) * group, columns)), a * count + g
            for b, right in enumerate(regressors[a:], start=a):
                first = g if a == b else 0  # the first group not known from the other side
                image = hessian[first * group :, part] @ left[part]
                strip = by_group(image.mul_(right[first * group :]))
                normal[row, b * count + first : (b + 1) * count] = strip
                normal[b * count + first : (b + 1) * count, row] = strip
    normal = normal.permute(2, 0, 1).contiguous()
    pull = hessian @ weights
    wanted = torch.cat([by_group(pull * right) for right in regressors]).t()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-7 * diagonal.mean(1, keepdim=True)).masked_fill_(diagonal == 0, 1)  # groups whose levels are all 0
    factor, failed = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(wanted[:, :, None], factor)[:, :, 0].t().half().to(weights.dtype)
    scales, shifts = solution[:count], solution[count:]
    fresh = [Parameters.of(scales[g], shifts[g] if free else None, swept.parameters[g].zero) for g in range(count)]
    candidate = Swept(swept.levels, fresh, swept.loss)
    after, before = (row_errors(weights - one.values(grid), hessian) for one in (candidate, swept))
    better = (failed == 0) & (after < before)  # false where the solution overflowed
    return Swept(swept.levels, [p.where(better, q) for p, q in zip(fresh, swept.parameters, strict=True)], swept.loss)


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """The layer objective per output: delta (c, r), H (c, c) -> (r,)."""
    return (delta * (hessian @ delta)).sum(0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: a sweep is thousands of small operations, and sharing each out costs more than it saves, up
    to a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Gptq:
    """`layerwise.Method`: solve a group of linears, restore a weight from what was stored."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.bits = INTEGERS.get(config.format)

    def grid(self, columns: int, search: bool) -> blocks.Lattice | Uniform:
        if self.bits is None:
            return blocks.Lattice(self.config.format)
        return Uniform(self.bits, self.config.symmetric, self.config.group_size or columns, search)

    def solve(self, group: layerwise.Group) -> layerwise.Solved:
        """Quantise; the records hold the relative output error tr(D H D^T) / tr(W H W^T) against round-to-nearest."""
        weights = torch.cat(group.weights).t().contiguous()
        columns, hessian = len(weights), group.hessian
        self._check(group, columns)
        dead = hessian.diagonal() == 0
        solvable = hessian + torch.diag(dead.to(hessian.dtype))  # a fresh matrix: damping must not touch the caller's
        target = weights.masked_fill(dead[:, None], 0)
        order = torch.arange(columns)
        if self.config.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            solvable, target = solvable[order][:, order].contiguous(), target[order]
        grid = self.grid(columns, self.config.search)
        with _one_thread():
            factor, damped = inverse_factor(solvable, self.config.damping)
            swept = sweep(target, factor, grid, self.config.block)
            if self.config.refit:
                swept = refit(target, damped, swept, grid)
        arrays: dict[str, Array] = {}
        first = 0
        for name, weight in zip(group.names, group.weights, strict=True):
            arrays.update(self._store(name, swept, slice(first, first + len(weight)), order))
            first += len(weight)
        return layerwise.Solved(arrays, tuple(self._records(group, arrays)))

    def _check(self, group: layerwise.Group, columns: int) -> None:
        sizes = [columns] if self.bits is None else [columns, *map(len, group.weights)]
        unit = blocks.WIDTH if self.bits is None else 32 // math.gcd(32, self.bits)  # a block, or whole 32-bit words
        odd = next((size for size in sizes if size % unit), None)
        if odd is not None:
            raise ModelError(f"its side of {odd} is no multiple of {unit}", group.names[0], "use another format")

    def _store(self, name: str, swept: Swept, rows: slice, order: Tensor) -> dict[str, Array]:
        """One layer's arrays: `NAME.weight` as blocks, or the four of a GPTQ checkpoint."""
        levels = swept.levels[:, rows]
        scales = torch.stack([p.scale[rows] for p in swept.parameters])
        shifts = [p.shift[rows] for p in swept.parameters if p.shift is not None]
        if self.bits is None:
            lattice = blocks.Lattice(self.config.format)
            return {f"{name}.weight": lattice.pack(levels, scales, torch.stack(shifts) if shifts else None)}
        zeros = torch.stack([p.zero[rows] for p in swept.parameters if p.zero is not None])
        position = torch.arange(len(levels)) // (self.config.group_size or len(levels))
        codes = torch.empty(levels.shape, dtype=torch.uint8)
        codes[order] = (levels + zeros[position]).to(torch.uint8)
        g_idx = torch.empty(len(levels), dtype=torch.int32)
        g_idx[order] = position.to(torch.int32)
        return {
            f"{name}.qweight": gptq_format.pack_codes(codes.numpy(), self.bits),
            f"{name}.qzeros": gptq_format.pack_zeros(zeros.to(torch.uint8).numpy(), self.bits, 2),
            f"{name}.scales": scales.half().numpy(),
            f"{name}.g_idx": g_idx.numpy(),
        }

    def restore(self, name: str, arrays: Arrays) -> Float32:
        if self.bits is None:
            return blocks.decode(arrays[f"{name}.weight"], self.config.format)
        stored = [arrays[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        return gptq_format.decode(stored[0], stored[1], stored[2], stored[3], self.bits, 2)

    def _nearest(self, weight: Tensor) -> Tensor:
        """The same format without GPTQ: llama.cpp's own rounding, or the paper's min-max grid. (r, c) -> (r, c)."""
        if self.bits is None:
            fmt = self.config.format
            return torch.from_numpy(blocks.decode(blocks.nearest(weight.numpy(), fmt), fmt))
        group = self.config.group_size or weight.shape[1]
        return Uniform(self.bits, self.config.symmetric, group, search=False).nearest(weight)

    def _records(self, group: layerwise.Group, arrays: Arrays) -> list[dict[str, Any]]:
        rows = []
        for name, weight in zip(group.names, group.weights, strict=True):
            quantised = torch.from_numpy(self.restore(name, arrays))
            size = float(row_errors(weight.t(), group.hessian).sum().clamp(min=1e-30))
            error, plain = (
                float(row_errors((weight - other).t(), group.hessian).sum().clamp(min=0)) / size
                for other in (quantised, self._nearest(weight))
            )
            rows.append(
                {"name": name, "shape": list(weight.shape), "gptq": error, "rtn": plain, "tokens": group.tokens}
            )
        return rows


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """Quantise every linear of every block into `ctx.folder / "model"`; embeddings, norms and head stay as they are.

    Adapters are merged in float32 first. ModelError for a model that is already quantised or has no blocks to walk,
    DataError for too little calibration text.
    """
    folder.refuse_quantised(model)
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    )
    method = Gptq(config)
    key = folder.job_key(model, config, windows.numpy())
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    arrays, records = layerwise.walk(
        loaded.model, windows, method, ctx, title="gptq", key=key, dtype=dtype, sequential=config.sequential
    )
    folder.summarise(records, config, ctx)
    handle = folder.write(model, loaded.model, arrays, config, ctx)
    layerwise.forget(ctx, "gptq")
    return handle

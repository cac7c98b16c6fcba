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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.columnwise import (
    Grid,
    Pruner,
    Swept,
    inverse_factor,
    one_thread,
    row_errors,
    sweep,
)
from edgellm_plugins.compression.gptq import INTEGERS, PLUGIN, Config, folder
from edgellm_plugins.compression.gptq.uniform import Uniform
from edgellm_plugins.compression.stored import job_key, refuse_quantised
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks, gptq_format
from edgellm_sdk.kit.blocks import Parameters

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays, Dataset, Float32, ModelHandle


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


class Gptq:
    """`layerwise.Method`: solve a group of linears, restore a weight from what was stored.

    `pruning(group)` says which weights of a group become zero in the same sweep, or None.
    """

    def __init__(
        self, config: Config, pruning: Callable[[layerwise.Group], Pruner | None] = lambda group: None
    ) -> None:
        self.config, self.pruning = config, pruning
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
        with one_thread():
            factor, damped = inverse_factor(solvable, self.config.damping)
            swept = sweep(target, factor, grid, self.config.block, self.pruning(group))
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
    refuse_quantised(model)
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    )
    method = Gptq(config)
    key = job_key(model, PLUGIN.version, config, windows.numpy())
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    arrays, records = layerwise.walk(
        loaded.model, windows, method, ctx, title="gptq", key=key, dtype=dtype, sequential=config.sequential
    )
    folder.summarise(records, config, ctx)
    handle = folder.write(model, loaded.model, arrays, config, ctx)
    layerwise.forget(ctx, "gptq")
    return handle

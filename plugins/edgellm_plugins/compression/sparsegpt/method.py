"""The arithmetic of SparseGPT (Frantar, Alistarh: arXiv 2301.00774, Algorithm 1).

Symbols of the paper: W (rows = outputs r, columns = inputs c), H = 2 X X^T + lambda I, H^-1 = U^T U, s the sparsity, B
the lazy block, B_s the block of columns whose mask is chosen at once, from weights that already compensate what was
pruned to their left. A weight costs W_ij^2 / U_jj^2, U_jj^2 being the inverse Hessian of the columns from j on: those
before it cannot change any more. Matrices are held transposed, (c, r), as in `compression/columnwise.py`.

Where we differ from the paper and its code, and why:
* Exactly floor(r B_s s) weights of a layer's block go. The code takes one more, and all of equal cost.
* B and B_s are two options, as in the paper; the code has one.
* N:M keeps N of every M. The code's arguments count what is pruned.
* Jointly with quantisation, a group's grid is fitted to what is left of its current weights. The code's is fitted once
  to the dense weights before the sweep. Our grids are those of the format that is written (`gptq`).
* `refit` (not in the paper) solves for a row's kept weights exactly, min_w (w - w_0) H (w - w_0)^T over them. The sweep
  only moves weights to the right of a pruned one.
* New weights are rounded to the type the model is stored in before later layers are calibrated on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgellm_plugins.compression import gptq, layerwise, sparsity
from edgellm_plugins.compression.columnwise import TILE, inverse_factor, one_thread, sweep
from edgellm_plugins.compression.gptq import folder
from edgellm_plugins.compression.gptq.method import Gptq
from edgellm_plugins.compression.sparsegpt import FLOAT, PLUGIN, Config
from edgellm_plugins.compression.stored import write_plain
from edgellm_sdk.kit.blocks import Frame, Parameters

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Arrays, Dataset, Float32, ModelHandle


class Unrounded:
    """`columnwise.Grid` of all floats: only what a pruner chooses moves."""

    group = span = TILE

    def frame(self, columns: Tensor, omega: Tensor) -> Frame | None:
        return None

    def fit(self, columns: Tensor, omega: Tensor, frame: Frame | None = None) -> Parameters:
        return Parameters.of(torch.ones_like(columns[0]))

    def level(self, weights: Tensor, p: Parameters) -> Tensor:
        return weights

    def basis(self, levels: Tensor) -> Tensor:
        return levels

    def value(self, levels: Tensor, p: Parameters) -> Tensor:
        return levels


def refit(weights: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Per row the best weights with its zeros fixed: w_S = H_SS^-1 (H w_0)_S, S what is kept.

    weights (c, r), kept (c, r) bool, H (c, c) positive definite -> (c, r). A row whose system cannot be solved keeps
    its dense weights, masked.
    """
    pull = hessian @ weights
    result = weights.masked_fill(~kept, 0)
    for row in range(weights.shape[1]):
        chosen = kept[:, row].nonzero().flatten()
        factor, failed = torch.linalg.cholesky_ex(hessian[chosen][:, chosen])
        if len(chosen) and not failed:
            result[chosen, row] = torch.cholesky_solve(pull[chosen, row, None], factor)[:, 0]
    return result


class SparseGpt:
    """`layerwise.Method`: prune a group of linears, and quantise what is left if a format is asked for."""

    def __init__(self, config: Config, stored: sparsity.Stored) -> None:
        self.config, self.stored = config, stored
        self.gptq = None if config.format == FLOAT else Gptq(quantiser(config), pruning=self.pruner)

    def pruner(self, group: layerwise.Group) -> sparsity.Cheapest | None:
        return sparsity.pruner(group, self.config, self.config.mask_block)

    def solve(self, group: layerwise.Group) -> layerwise.Solved:
        if self.gptq is not None:
            arrays = self.gptq.solve(group).arrays
            made = {name: self.gptq.restore(name, arrays) for name in group.names}
        else:
            made = {
                name: self.stored.array(name, weight)
                for name, weight in zip(group.names, self._prune(group), strict=True)
            }
            arrays = {f"{name}.weight": array for name, array in made.items()}
        return layerwise.Solved(arrays, tuple(sparsity.errors(group, "sparsegpt", made, self.config)))

    def _prune(self, group: layerwise.Group) -> list[Tensor]:
        """The new weights of a group, (out, in) each; what the options leave out stays bit for bit as it is."""
        pruner = self.pruner(group)
        if pruner is None:
            return list(group.weights)
        weights, hessian = torch.cat(group.weights).t().contiguous(), group.hessian
        silent = hessian.diagonal() == 0
        target = weights.masked_fill(silent[:, None], 0)
        with one_thread():
            factor, damped = inverse_factor(hessian + torch.diag(silent.to(hessian.dtype)), self.config.damping)
            swept = sweep(target, factor, Unrounded(), self.config.block, pruner).levels
        if self.config.refit:
            swept = refit(target, swept != 0, damped)
        parts = swept.t().split([len(weight) for weight in group.weights])
        return [
            part if share else weight for part, weight, share in zip(parts, group.weights, pruner.shares, strict=True)
        ]

    def restore(self, name: str, arrays: Arrays) -> Float32:
        return sparsity.restore(name, arrays) if self.gptq is None else self.gptq.restore(name, arrays)


def quantiser(config: Config) -> gptq.Config:
    """GPTQ's options for the second half of a joint sweep."""
    return gptq.Config(
        format=config.format, calibration_samples=config.calibration_samples,
        calibration_length=config.calibration_length, calibration_text=config.calibration_text,
        sequential=config.sequential, damping=config.damping, block=config.block, group_size=config.group_size,
        symmetric=config.symmetric, dtype=config.dtype,
    )  # fmt: skip


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """Prune the linears of every block into `ctx.folder / "model"`; embeddings, norms and head stay as they are.

    Adapters are merged in float32 first. ModelError for a model that is quantised or has no blocks to walk, DataError
    for too little calibration text.
    """
    loaded = sparsity.load(model, config)
    method = SparseGpt(config, sparsity.Stored(model.path))
    arrays, records = sparsity.walk(loaded, data, config, ctx, method, "sparsegpt", PLUGIN.version)
    extra = f"; the {config.format} file is small because of its format alone"
    if method.gptq is None:
        extra = "; quantising later fills some of them again, --format here does not"
    sparsity.summarise("sparsegpt", records, model.parameters, config, ctx, extra)
    if method.gptq is None:
        handle = write_plain(model, loaded.model, arrays, ctx)
    else:
        handle = folder.write(model, loaded.model, arrays, method.gptq.formats, method.gptq.config, ctx)
    layerwise.forget(ctx, "sparsegpt")
    return handle

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
* With `equal_tokens` inputs are scaled to one norm before they enter H: tokens count by their relative error. They
  differ widely (in block 11 of SmolLM2 one has 370 000 times the median's energy), but a cap on the largest is not
  enough: it left the model's divergence where it was.
* With the codes fixed, all scales of a row are refitted at once against H; then each code is set anew given all others,
  and so on for some passes (`refit.py`). Linears of one input and one format share one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.columnwise import (
    Pruner,
    Swept,
    inverse_factor,
    one_thread,
    row_errors,
    sweep,
)
from edgellm_plugins.compression.gptq import BLOCKS, INTEGERS, PLUGIN, Config, ends, folder
from edgellm_plugins.compression.gptq.refit import descend, refit
from edgellm_plugins.compression.gptq.uniform import Uniform
from edgellm_plugins.compression.stored import job_key, refuse_quantised
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import blocks, gptq_format, overrides

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays, Dataset, Float32, ModelHandle

ROWS = 4096  # in work at once: rows do not depend on each other
FALLBACK = {
    "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip


class Gptq:
    """`layerwise.Method`: solve a group of linears, restore a weight from what was stored.

    `plan` gives weights (`NAME.weight`) the block format that someone else chose; the rest is up to the config. What
    was given which format is in `formats`, and in `fallen` those whose rows do not divide into the blocks asked for.
    `pruning(group)` says which weights of a group become zero in the same sweep, or None.
    """

    def __init__(
        self,
        config: Config,
        plan: Mapping[str, str] | None = None,
        pruning: Callable[[layerwise.Group], Pruner | None] = lambda group: None,
    ) -> None:
        self.config, self.plan, self.pruning = config, plan or {}, pruning
        self.bits = INTEGERS.get(config.format)
        self.overrides = overrides.parse(config.formats, BLOCKS, "formats")
        self.formats: dict[str, str] = {}
        self.fallen: dict[str, str] = {}

    def format_of(self, name: str, columns: int) -> str:
        """The block format of the linear `name`, or intN. Wide blocks fall back as llama.cpp's quantiser does, but to
        iq4_nl where that takes q4_0, which is no smaller."""
        weight = f"{name}.weight"
        asked = self.plan.get(weight) or overrides.chosen(self.overrides, name) or self.config.format
        given = asked
        if self.bits is None and columns % blocks.any_format(asked).width and not columns % blocks.WIDTH:
            given = FALLBACK[asked]
            self.fallen[weight] = f"{asked} -> {given}"
        self.formats[weight] = given
        return given

    def grid(self, columns: int, search: bool, fmt: str = "") -> blocks.Lattice | Uniform:
        if self.bits is None:
            return blocks.lattice(fmt or self.config.format)
        return Uniform(self.bits, self.config.symmetric, self.config.group_size or columns, search)

    def solve(self, group: layerwise.Group) -> layerwise.Solved:
        """Quantise; the records hold the relative output error tr(D H D^T) / tr(W H W^T) against round-to-nearest."""
        columns, hessian = len(group.hessian), group.hessian
        self._check(group, columns)
        dead = hessian.diagonal() == 0
        solvable = hessian + torch.diag(dead.to(hessian.dtype))  # a fresh matrix: damping must not touch the caller's
        order = torch.arange(columns)
        if self.config.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            solvable = solvable[order][:, order].contiguous()
        arrays: dict[str, Array] = {}
        alike: dict[str, list[int]] = {}  # linears of one format share a sweep
        for place, name in enumerate(group.names):
            alike.setdefault(self.format_of(name, columns), []).append(place)
        with one_thread():
            factor, damped = inverse_factor(solvable, self.config.damping)
            for fmt, places in alike.items():
                weights = torch.cat([group.weights[place] for place in places]).t()
                target = weights[order].masked_fill(dead[order][:, None], 0)
                grid = self.grid(columns, self.config.search, fmt)
                names, same = tuple(group.names[k] for k in places), tuple(group.weights[k] for k in places)
                pruner = self.pruning(replace(group, names=names, weights=same))
                at_once = target.shape[1] if pruner else ROWS  # a pruner compares rows
                parts = [self.quantise(some, factor, damped, grid, pruner) for some in target.split(at_once, dim=1)]
                swept, first = Swept.joined(parts), 0
                for place in places:
                    rows = slice(first, first := first + len(group.weights[place]))
                    arrays.update(self._store(group.names[place], swept.rows(rows), order, grid))
        arrays = {key: arrays[key] for name in group.names for key in arrays if key.startswith(f"{name}.")}
        return layerwise.Solved(arrays, tuple(self._records(group, arrays)))

    def quantise(
        self, target: Tensor, factor: Tensor, damped: Tensor, grid: blocks.Lattice | Uniform, pruner: Pruner | None
    ) -> Swept:
        """The sweep, and what follows it: target (c, r) in the order of U and H. A weight of level 0 stays so in what
        follows a sweep that prunes."""
        target = target.contiguous()
        swept = sweep(target, factor, grid, self.config.block, pruner)
        if self.config.refit:
            swept = refit(target, damped, swept, grid)
        for _ in range(self.config.passes):
            swept = descend(target, damped, swept, grid, keep_zeros=pruner is not None)
            if self.config.refit:
                swept = refit(target, damped, swept, grid)
        return swept

    def _check(self, group: layerwise.Group, columns: int) -> None:
        sizes = [columns] if self.bits is None else [columns, *map(len, group.weights)]
        unit = blocks.WIDTH if self.bits is None else 32 // math.gcd(32, self.bits)  # a block, or whole 32-bit words
        odd = next((size for size in sizes if size % unit), None)
        if odd is not None:
            raise ModelError(f"its side of {odd} is no multiple of {unit}", group.names[0], "use another format")

    def _store(self, name: str, swept: Swept, order: Tensor, grid: blocks.Lattice | Uniform) -> dict[str, Array]:
        """One layer's arrays: `NAME.weight` as blocks, or the four of a GPTQ checkpoint."""
        levels = swept.levels
        if isinstance(grid, blocks.Lattice):
            return {f"{name}.weight": grid.pack_all(levels, swept.parameters)}
        scales = torch.stack([p.scale for p in swept.parameters])
        zeros = torch.stack([p.zero for p in swept.parameters if p.zero is not None])
        position = torch.arange(len(levels)) // (self.config.group_size or len(levels))
        codes = torch.empty(levels.shape, dtype=torch.uint8)
        codes[order] = (levels + zeros[position]).to(torch.uint8)
        g_idx = torch.empty(len(levels), dtype=torch.int32)
        g_idx[order] = position.to(torch.int32)
        return {
            f"{name}.qweight": gptq_format.pack_codes(codes.numpy(), grid.bits),
            f"{name}.qzeros": gptq_format.pack_zeros(zeros.to(torch.uint8).numpy(), grid.bits, 2),
            f"{name}.scales": scales.half().numpy(),
            f"{name}.g_idx": g_idx.numpy(),
        }

    def restore(self, name: str, arrays: Arrays) -> Float32:
        if self.bits is None:
            stored = arrays[f"{name}.weight"]
            return blocks.decode(stored, self.formats[f"{name}.weight"])
        parts = [arrays[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        return gptq_format.decode(parts[0], parts[1], parts[2], parts[3], self.bits, 2)

    def _nearest(self, name: str, weight: Tensor) -> Tensor:
        """The same format without GPTQ: llama.cpp's own rounding, or the paper's min-max grid. (r, c) -> (r, c)."""
        if self.bits is None:
            fmt = self.formats[f"{name}.weight"]
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
                for other in (quantised, self._nearest(name, weight))
            )
            rows.append(
                {
                    "name": name, "format": self.formats[f"{name}.weight"], "shape": list(weight.shape),
                    "gptq": error, "rtn": plain, "tokens": group.tokens,
                }
            )  # fmt: skip
        return rows


def compress(
    model: ModelHandle, data: Dataset | None, config: Config, ctx: Context, plan: Mapping[str, str] | None = None
) -> ModelHandle:
    """Quantise every linear of every block, and the ends if asked, into `ctx.folder / "model"`; the rest stays.

    `plan` maps weights to block formats, and goes before what the config says. Adapters are merged in float32 first.
    ModelError for a model that is already quantised or has no blocks to walk, DataError for too little calibration
    text, ConfigError for patterns of formats that match nothing.
    """
    refuse_quantised(model)
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    method = Gptq(config, plan)
    wrong = overrides.idle(method.overrides, [name for name, _ in loaded.model.named_modules()])
    if wrong:
        raise ConfigError(f"formats: {wrong[0]!r} matches no layer", fix="see `edgellm models info` for the names")
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    )
    key = job_key(model, PLUGIN.version, config, windows.numpy(), method.plan)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    for name, module in layerwise.decoder(loaded.model)[0].named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            method.format_of(name, module.in_features)  # also for blocks that an earlier run has finished
    arrays, records = layerwise.walk(
        loaded.model, windows, method, ctx, title="gptq", key=key, dtype=dtype, sequential=config.sequential,
        equal_tokens=config.equal_tokens,
    )  # fmt: skip
    more, rows = ends.quantise(loaded.model, arrays, windows, method, ctx)
    arrays.update(more)
    folder.summarise([*records, *rows], method.fallen, config, ctx)
    handle = folder.write(model, loaded.model, arrays, method.formats, config, ctx)
    layerwise.forget(ctx, "gptq")
    return handle

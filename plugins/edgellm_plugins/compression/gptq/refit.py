"""A row's scales, chosen anew for the Hessian-weighted error once its codes are fixed.

With the codes fixed the weights of a row are linear in its scales and minima: w' = Z theta, Z block-diagonal. The error
(w - Z theta)^T H (w - Z theta) is a quadratic form in theta with the matrix N = Z^T H Z, small enough to hold for many
rows at once. Formats of 32 weights store theta in fp16, so N theta = Z^T H w is solved and rounded. In a super-block
theta is whole multiples of two fp16 units: the multiples are changed one at a time to the best whole value given all
others (which cannot raise the error), then the units are solved for with the multiples fixed, and so on.

Tensors are as in `columnwise.sweep`: weights and levels (c, r), H (c, c). Not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm_plugins.compression.columnwise import Grid, Swept, row_errors
from edgellm_sdk.kit.blocks import Frame, Parameters
from edgellm_sdk.kit.super_blocks import SuperLattice

AT_ONCE = 1 << 25  # numbers of N held for the rows in work
ROUNDS = 3


def refit(weights: Tensor, hessian: Tensor, swept: Swept, grid: Grid) -> Swept:
    """The swept rows with better scales and the same codes. A row keeps its old scales unless its error falls."""
    size = len(swept.parameters) * (1 if swept.parameters[0].shift is None else 2)
    rows, step = weights.shape[1], max(AT_ONCE // (size * size), 1)
    parts = []
    for first in range(0, rows, step):
        part = slice(first, first + step)
        parts.append(_some(weights[:, part], hessian, swept.rows(part), grid))
    joined = [Parameters.joined([part[g] for part in parts]) for g in range(len(swept.parameters))]
    return Swept(swept.levels, joined, swept.loss)


def _some(weights: Tensor, hessian: Tensor, swept: Swept, grid: Grid) -> list[Parameters]:
    normal, wanted = normal_equations(weights, hessian, swept, grid)
    if isinstance(grid, SuperLattice):
        fresh = _in_frames(normal, wanted, swept.parameters, grid)
    else:
        solution = _solved(normal, wanted).t().half().to(weights.dtype)
        count = len(swept.parameters)
        scales, shifts = solution[:count], solution[count:]
        fresh = [
            Parameters.of(scales[g], shifts[g] if len(shifts) else None, swept.parameters[g].zero) for g in range(count)
        ]
    candidate = Swept(swept.levels, fresh, swept.loss)
    after, before = (row_errors(weights - one.values(grid), hessian) for one in (candidate, swept))
    better = after < before  # false where the solution overflowed
    return [p.where(better, q) for p, q in zip(fresh, swept.parameters, strict=True)]


def normal_equations(weights: Tensor, hessian: Tensor, swept: Swept, grid: Grid) -> tuple[Tensor, Tensor]:
    """N (r, n, n) and Z^T H w (r, n): the scales of all groups, then, where there are any, the shifts of all groups."""
    columns, rows = weights.shape
    group = min(grid.group, columns)
    count = len(swept.parameters)
    z = grid.basis(swept.levels)
    regressors = [z] if swept.parameters[0].shift is None else [z, torch.ones_like(z)]
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
    pull = hessian @ weights
    wanted = torch.cat([by_group(pull * right) for right in regressors]).t()
    return normal.permute(2, 0, 1).contiguous(), wanted.contiguous()


def _solved(normal: Tensor, wanted: Tensor) -> Tensor:
    """N^-1 b for every row, (r, n); not finite where N is not positive definite."""
    normal = normal.clone()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-7 * diagonal.mean(1, keepdim=True)).masked_fill_(diagonal == 0, 1)  # groups whose levels are all 0
    factor, failed = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(wanted[:, :, None], factor)[:, :, 0]
    return solution.masked_fill(failed[:, None] != 0, torch.nan)


def _in_frames(normal: Tensor, wanted: Tensor, parameters: list[Parameters], grid: SuperLattice) -> list[Parameters]:
    """Whole scales one at a time, then the units, `ROUNDS` times."""
    per, count = grid.span // grid.group, len(parameters)
    minimum = grid.format.minimum
    frames = [p.frame for p in parameters[::per] if p.frame is not None]
    units = torch.stack([f.d for f in frames] + [-f.dmin for f in frames if f.dmin is not None], 1)  # (r, k)
    owner = torch.arange(count).div(per, rounding_mode="floor")
    owner = torch.cat([owner, owner + len(frames)]) if minimum else owner
    low = torch.full((len(owner),), float(grid.whole[0]))
    low[count:] = 0
    theta = torch.stack([p.scale for p in parameters] + [p.shift for p in parameters if p.shift is not None], 1)
    inverse = units.reciprocal().masked_fill(units == 0, 0)[:, owner]
    whole = (theta * inverse).round()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    select = torch.nn.functional.one_hot(owner, units.shape[1]).to(normal.dtype)  # (n, k)
    for _ in range(ROUNDS):
        theta = whole * units[:, owner]
        inverse = units.reciprocal().masked_fill(units == 0, 0)[:, owner]
        rest = wanted - (normal @ theta[:, :, None])[:, :, 0]  # -1/2 of the gradient
        for a in range(len(owner)):
            curve = diagonal[:, a].clamp(min=1e-30)
            best = ((theta[:, a] + rest[:, a] / curve) * inverse[:, a]).round().clamp(float(low[a]), grid.whole[1])
            best = torch.where((diagonal[:, a] > 0) & (inverse[:, a] != 0), best, whole[:, a])
            step = (best - whole[:, a]) * units[:, owner[a]]
            rest -= normal[:, :, a] * step[:, None]
            whole[:, a], theta[:, a] = best, theta[:, a] + step
        shape = whole[:, :, None] * select  # (r, n, k): theta = shape @ units
        found = _solved(shape.mT @ normal @ shape, (shape.mT @ wanted[:, :, None])[:, :, 0]).half().to(units.dtype)
        usable = torch.isfinite(found).all(1) & (found[:, len(frames) :] <= 0).all(1)
        found = torch.where(usable[:, None], found, units)
        before, after = (_objective(normal, wanted, whole * u[:, owner]) for u in (units, found))
        units = torch.where((after < before)[:, None], found, units)
    made = [
        Frame(units[:, k].contiguous(), -units[:, len(frames) + k] if minimum else None) for k in range(len(frames))
    ]
    theta = (whole * units[:, owner]).t().contiguous()
    return [Parameters.of(theta[g], theta[count + g] if minimum else None, frame=made[g // per]) for g in range(count)]


def _objective(normal: Tensor, wanted: Tensor, theta: Tensor) -> Tensor:
    """The error less what no scale changes, (r,)."""
    return (theta * ((normal @ theta[:, :, None])[:, :, 0] - 2 * wanted)).sum(1)


def descend(weights: Tensor, hessian: Tensor, swept: Swept, grid: Grid, keep_zeros: bool = False) -> Swept:
    """One pass over the columns, each set to its best level given all others and the scales: no row gets worse.

    The sweep decides a column before it knows the ones behind it; this looks back once they are known. With
    `keep_zeros` levels of 0 stay, as those of pruned weights must.
    """
    values = swept.values(grid)
    levels = swept.levels.clone()
    pull = hessian @ (weights - values)
    diagonal = hessian.diagonal().clamp(min=1e-30).tolist()
    group = min(grid.group, len(weights))
    for j in range(len(weights)):
        p = swept.parameters[j // group]
        level = grid.level(values[j] + pull[j] / diagonal[j], p)
        levels[j] = level = level.masked_fill(levels[j] == 0, 0) if keep_zeros else level
        step = grid.value(level, p) - values[j]
        values[j] += step
        pull.addr_(hessian[j], step, alpha=-1)
    return Swept(levels, swept.parameters, swept.loss)

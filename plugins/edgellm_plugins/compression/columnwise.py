"""What methods share that go through a layer column by column, pushing each column's error onto those still to come.

Optimal Brain Surgeon in a fixed column order, the same for all rows (GPTQ, arXiv 2210.17323, Algorithm 1; SparseGPT,
arXiv 2301.00774, Algorithm 1): W (rows = outputs r, columns = inputs c), H = 2 X X^T + lambda I, and U upper triangular
with H^-1 = U^T U. Row j of U is the inverse Hessian of the columns that are left after column j, divided by the root of
its diagonal. Matrices are held transposed here, (c, r), so that a column of the papers is contiguous.

A `Grid` says what a column can be rounded to, a `Pruner` which of its weights become zero; either error is compensated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.blocks import Frame, Parameters

TILE = 32  # columns updated one by one; the rest of a block follows with one product


class Grid(Protocol):
    """What a group of `group` columns can be rounded to. Tensors (columns, rows); see `edgellm_sdk.kit.blocks`."""

    group: int
    span: int  # columns of a super-block, a multiple of `group`

    def frame(self, columns: Tensor, omega: Tensor) -> Frame | None: ...
    def fit(self, columns: Tensor, omega: Tensor, frame: Frame | None = None) -> Parameters: ...
    def level(self, weights: Tensor, p: Parameters) -> Tensor: ...
    def basis(self, levels: Tensor) -> Tensor: ...
    def value(self, levels: Tensor, p: Parameters) -> Tensor: ...


class Pruner(Protocol):
    """Which weights become zero, chosen for `span` neighbouring columns at a time from their current values."""

    @property
    def span(self) -> int: ...

    def choose(self, columns: Tensor, omega: Tensor) -> Tensor:
        """columns (s, r), omega (s,), s = `span` or what is left at the end -> (s, r) bool, True where a weight goes.

        omega_j = 1 / U_jj^2 is the price of an error in column j once the columns before it cannot change any more.
        """
        ...


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

    def rows(self, part: slice) -> Swept:
        """The same for some of the rows."""
        return Swept(self.levels[:, part], [p.rows(part) for p in self.parameters], self.loss[part])

    @classmethod
    def joined(cls, parts: list[Swept]) -> Swept:
        """The inverse of `rows`."""
        groups = zip(*(part.parameters for part in parts), strict=True)
        levels, loss = torch.cat([part.levels for part in parts], 1), torch.cat([part.loss for part in parts])
        return cls(levels, [Parameters.joined(list(group)) for group in groups], loss)


def sweep(weights: Tensor, factor: Tensor, grid: Grid, block: int, pruner: Pruner | None = None) -> Swept:
    """Algorithm 1 over all rows at once: weights (c, r) and U (c, c) of one dtype; the weights are not changed.

    The lazy block is rounded up to whole groups and spans. Σ loss = tr((W - Q) H (W - Q)^T) for the H behind U. What
    `pruner` chooses is set to zero, its error compensated like one of rounding. A grid is fitted to what is left of
    its group; where spans are shorter than the group, to what would be left as the weights stand at its start.
    """
    w, columns = weights.clone(), len(weights)
    group, wide = min(grid.group, columns), min(grid.span, columns)
    span = min(pruner.span, columns) if pruner else group
    whole = math.lcm(wide, span)
    block = math.ceil(block / whole) * whole
    tile = math.gcd(group, TILE)
    tile = math.gcd(tile, span) if tile % span else tile  # a span begins a tile or lies in one
    gone = torch.zeros_like(w, dtype=torch.bool) if pruner else None
    omega = factor.diagonal().pow(-2)
    steps = factor.diagonal().tolist()
    levels, loss = torch.empty_like(w), torch.zeros_like(w[0])
    parameters: list[Parameters] = []
    frame: Frame | None = None

    def left_of(first: int, count: int) -> Tensor:
        """Columns as they are now, without what goes."""
        current = w[first : first + count]
        return current if gone is None else current.masked_fill(gone[first : first + count], 0)

    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(w[start:stop])
        for left in range(start, stop, tile):
            right = min(left + tile, stop)
            if pruner and gone is not None and left % group == 0:
                ahead = min(left + (group if left % wide else wide), columns)
                for k in range(math.ceil(left / span) * span, ahead, span):
                    gone[k : k + span] = pruner.choose(w[k : k + span], omega[k : k + span])
            if left % wide == 0:
                frame = grid.frame(left_of(left, wide), omega[left : left + wide])
            if left % group == 0:
                parameters.append(p := grid.fit(left_of(left, group), omega[left : left + group], frame))
            for j in range(left, right):
                column = w[j]
                if pruner and gone is not None:
                    if j % span == 0 and j % group:
                        gone[j : j + span] = pruner.choose(w[j : j + span], omega[j : j + span])
                    column = column.masked_fill(gone[j], 0)
                levels[j] = level = grid.level(column, p)
                error = torch.sub(w[j], grid.value(level, p), out=errors[j - start]).div_(steps[j])
                if j + 1 < right:
                    w[j + 1 : right].addr_(factor[j, j + 1 : right], error, alpha=-1)
            w[right:stop].addmm_(factor[left:right, right:stop].t(), errors[left - start : right - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        loss += errors.square().sum(0)
    return Swept(levels, parameters, loss)


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """The layer objective per output: delta (c, r), H (c, c) -> (r,)."""
    return (delta * (hessian @ delta)).sum(0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: a sweep is thousands of small operations, and sharing each out costs more than it saves, up
    to a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

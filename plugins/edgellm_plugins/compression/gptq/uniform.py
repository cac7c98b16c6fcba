"""The integer grid of a GPTQ checkpoint, as the sweep needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.blocks import Frame, Parameters


class Uniform:
    """Integer grid of a GPTQ checkpoint: scale * level, level = code - zero, fp16 scale, code and zero in 0..2^b - 1.

    Asymmetric as in the paper: the range of the group, extended to contain 0. Symmetric: zero = 2^(b-1). With `search`
    the range is also tried shrunk to 95, 90, ... 20 %.
    """

    def __init__(self, bits: int, symmetric: bool, group: int, search: bool) -> None:
        self.bits = bits
        self.top, self.symmetric, self.group, self.span = (1 << bits) - 1, symmetric, group, group
        self.shrinks = [1 - step / 20 for step in range(17 if search else 1)]

    def frame(self, columns: Tensor, omega: Tensor) -> Frame | None:
        return None

    def fit(self, columns: Tensor, omega: Tensor, frame: Frame | None = None) -> Parameters:
        """columns (g, r), omega (g,) -> parameters (r,). A group of zeros gets the range -1..1."""
        low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = (high == 0) & (low == 0)
        low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)
        best = torch.full_like(low, torch.inf)
        scale, zero = torch.zeros_like(low), torch.zeros_like(low)
        for shrink in self.shrinks:
            step = ((high - low) * (shrink / self.top)).half().to(columns.dtype)
            p = self._parameters(step, low * shrink)
            error = omega @ (self.value(self.level(columns, p), p) - columns).square_()
            better = error < best
            assert p.zero is not None
            best, scale = torch.where(better, error, best), torch.where(better, step, scale)
            zero = torch.where(better, p.zero, zero)
        if not torch.isfinite(best).all():
            raise ModelError("weights too large for an fp16 scale, or not finite")
        return Parameters.of(scale, zero=zero)

    def _parameters(self, scale: Tensor, low: Tensor) -> Parameters:
        p = Parameters.of(scale)
        if self.symmetric:
            zero = torch.full_like(scale, (self.top + 1) / 2)
        else:
            zero = (-low * p.inverse).round_().clamp_(0, self.top)
        return Parameters(p.scale, p.inverse, None, zero)

    def level(self, weights: Tensor, p: Parameters) -> Tensor:
        assert p.zero is not None
        return torch.minimum(torch.maximum((weights * p.inverse).round_(), -p.zero), self.top - p.zero)

    def nearest(self, weights: Tensor) -> Tensor:
        """Plain rounding of whole rows, group by group: (r, c) -> (r, c)."""
        rounded = []
        for columns in weights.t().split(self.group):
            p = self.fit(columns, torch.ones_like(columns[:, 0]))
            rounded.append(self.value(self.level(columns, p), p))
        return torch.cat(rounded).t()

    def basis(self, levels: Tensor) -> Tensor:
        return levels

    def value(self, levels: Tensor, p: Parameters) -> Tensor:
        return levels * p.scale

"""What was chosen for a group of weights that share a scale, in values that survive storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The units of a super-block for r rows, (r,), fp16-exact, and their safe inverses (0 where a unit is 0)."""

    d: Tensor
    dmin: Tensor | None

    @property
    def inverse(self) -> Tensor:
        return _safe_inverse(self.d)

    @property
    def least(self) -> Tensor | None:
        """The inverse of dmin."""
        return None if self.dmin is None else _safe_inverse(self.dmin)


def _safe_inverse(values: Tensor) -> Tensor:
    return values.reciprocal().masked_fill_(values == 0, 0)


@dataclass(frozen=True)
class Parameters:
    """A group's lattice for r rows: `scale`, its safe inverse (0 where the scale is 0), and for formats that have them
    a `shift` (a stored minimum) or a `zero` (an integer zero point), each (r,); `frame` in a super-block.

    They hold values that survive storage exactly, in the dtype that is computed with.
    """

    scale: Tensor
    inverse: Tensor
    shift: Tensor | None = None
    zero: Tensor | None = None
    frame: Frame | None = None

    @classmethod
    def of(
        cls, scale: Tensor, shift: Tensor | None = None, zero: Tensor | None = None, frame: Frame | None = None
    ) -> Parameters:
        return cls(scale, _safe_inverse(scale), shift, zero, frame)

    def where(self, mask: Tensor, other: Parameters) -> Parameters:
        """These parameters for the rows in `mask`, (r,) bool, and those of `other` for the rest."""

        def mixed(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else mine.where(mask, theirs)

        frame = None
        if self.frame is not None and other.frame is not None:
            frame = Frame(self.frame.d.where(mask, other.frame.d), mixed(self.frame.dmin, other.frame.dmin))
        return Parameters.of(self.scale.where(mask, other.scale), mixed(self.shift, other.shift), self.zero, frame)

    def rows(self, part: slice) -> Parameters:
        """These parameters for some of the rows."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[part]

        frame = None if self.frame is None else Frame(self.frame.d[part], some(self.frame.dmin))
        return Parameters(self.scale[part], self.inverse[part], some(self.shift), some(self.zero), frame)

    @classmethod
    def joined(cls, parts: list[Parameters]) -> Parameters:
        """The inverse of `rows` over all parts, in order."""
        import torch

        def all_of(values: list[Tensor | None]) -> Tensor | None:
            found = [value for value in values if value is not None]
            return torch.cat(found) if found else None

        frames = [p.frame for p in parts if p.frame is not None]
        frame = Frame(torch.cat([f.d for f in frames]), all_of([f.dmin for f in frames])) if frames else None
        scale = torch.cat([p.scale for p in parts])
        return cls.of(scale, all_of([p.shift for p in parts]), all_of([p.zero for p in parts]), frame)

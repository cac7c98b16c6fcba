"""A direction of its own for every row of a batch, at the price of one more product for each matrix.

Row i sees theta + c z_i with z_i = U * (s_i r_i^T): one tensor U for all rows, signs s_i of a tensor's rows and r_i of
its columns. For a linear layer x (U * (s r^T))^T = ((x * r) U^T) * s, so no z_i is ever made (Flipout, as in GRZO,
arXiv 2606.02857).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm_sdk.errors import ModelError


@runtime_checkable
class Flips(Protocol):
    """c, U and the signs. A vector's z_i is U * s_i."""

    @property
    def c(self) -> float: ...

    def moves(self, name: str) -> bool:
        """Whether U is anything but 0 for this tensor."""

    def base(self, name: str, weight: Tensor, begin: int, out: Tensor) -> Tensor:
        """Rows begin .. begin + len(out) - 1 of U, in `out`."""

    def base_rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        """Some rows (n,) of a matrix's U: (n, columns) float32."""

    def signs(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """s (B, rows) and r (B, columns), in the tensor's dtype; r (B, 1) for a vector."""


Named = Callable[[Tensor], str]


def _along(rows: Tensor, x: Tensor) -> Tensor:
    """(B, n) so that it broadcasts over x (B, ..., n)."""
    if len(rows) != len(x):
        raise ModelError(f"{len(x)} rows reach a layer where {len(rows)} are in the batch", fix="train a small set")
    return rows.view(len(rows), *[1] * (x.dim() - 2), rows.shape[1])


@contextmanager
def rowwise(
    modules: Iterable[nn.Module], embed: nn.Module, name: Named, flips: Flips, scratch: Tensor
) -> Iterator[None]:
    """Inside this block `modules` (linear layers and norms) and `embed` give row i of their input theta + c z_i.

    `scratch` holds a tensor of the largest module. ModelError for a module of another kind.
    """

    def base(parameter: Any) -> Tensor:
        out = scratch[: parameter.numel()].view(parameter.shape)
        return flips.base(name(parameter), parameter.data, 0, out)

    def linear(module: Any, x: Tensor) -> Tensor:
        y: Tensor = type(module).forward(module, x)
        if flips.moves(name(module.weight)):
            s, r = flips.signs(name(module.weight), module.weight)
            moved = F.linear(x * _along(r, x), base(module.weight))
            y = torch.add(y, moved.mul_(_along(s, moved)), alpha=flips.c)
        if module.bias is not None and flips.moves(name(module.bias)):
            y = torch.add(y, _vector(module.bias, y), alpha=flips.c)
        return y

    def norm(module: Any, x: Tensor) -> Tensor:
        y: Tensor = type(module).forward(module, x)
        if flips.moves(name(module.weight)):
            gain = module.weight.data
            try:  # the output is linear in the gain, so its slope is what the input is normalised to
                module.weight.data = torch.ones_like(gain)
                slope = type(module).forward(module, x)
                module.weight.data = torch.zeros_like(gain)
                slope = slope - type(module).forward(module, x)
            finally:
                module.weight.data = gain
            y = torch.add(y, slope * _vector(module.weight, y), alpha=flips.c)
        if getattr(module, "bias", None) is not None and flips.moves(name(module.bias)):
            y = torch.add(y, _vector(module.bias, y), alpha=flips.c)
        return y

    def _vector(parameter: Any, y: Tensor) -> Tensor:
        s, _ = flips.signs(name(parameter), parameter)
        return _along(s * base(parameter), y)

    def look_up(module: Any, ids: Tensor) -> Tensor:
        weight = module.weight.data
        found: Tensor = weight[ids]
        if not flips.moves(name(module.weight)):
            return found
        s, r = flips.signs(name(module.weight), module.weight)
        z = flips.base_rows(name(module.weight), weight, ids.flatten()).view(*ids.shape, -1)
        z = z * s.gather(1, ids)[..., None] * r[:, None]
        return torch.add(found.float(), z, alpha=flips.c).to(weight.dtype)

    changed = [(module, types.MethodType(linear if _is_linear(module) else norm, module)) for module in modules]
    changed.append((embed, types.MethodType(look_up, embed)))
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


def _is_linear(module: nn.Module) -> bool:
    """True for a linear layer, False for a norm. ModelError for anything else that has weights."""
    if isinstance(module, nn.Linear):
        return True
    own = dict(module.named_parameters(recurse=False))
    if "norm" in type(module).__name__.lower() and "weight" in own and all(p.dim() == 1 for p in own.values()):
        return False
    raise ModelError(f"{type(module).__name__} cannot be perturbed row by row", fix="train a small set, or use mezo")

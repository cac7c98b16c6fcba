"""Frozen modules with trainable slots, the pieces that `adapters.install` puts into a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Probed(nn.Module):
    """A frozen module with trainable slots; `slots[name]` is (P, *shape) float32."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.slots: dict[str, Tensor] = {}


def _by_probe(x: Tensor, probes: int) -> Tensor:
    """(P * batch, ..., d) seen as (P, batch * ..., d)."""
    return x.reshape(probes, -1, x.shape[-1])


class LoRALinear(Probed):
    def __init__(self, base: nn.Module, scale: float) -> None:
        super().__init__(base)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        a, b = self.slots["lora_A"], self.slots["lora_B"]
        low = _by_probe(x, len(b)).float() @ a.mT
        return y + ((low @ b.mT) * self.scale).to(y.dtype).view(y.shape)


class FullLinear(Probed):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.slots["weight"], getattr(self.base, "bias", None)
        y = (_by_probe(x, len(weight)) @ weight.to(x.dtype).mT).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Biased(Probed):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        shift = self.slots["bias"] - self.base.bias.float()  # type: ignore[operator]
        return (_by_probe(y, len(shift)) + shift[:, None].to(y.dtype)).view(y.shape)


class Norm(Probed):
    """RMSNorm whose gain is the slot: normalise with the gain divided out."""

    def forward(self, x: Tensor) -> Tensor:
        gain = self.slots["weight"]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.base.variance_epsilon)  # type: ignore[operator]
        return (_by_probe(wide, len(gain)) * gain[:, None]).to(x.dtype).view(x.shape)


class Bottleneck(Probed):
    """`h + up(relu(down(h)))` on the output h of the FFN (Pfeiffer)."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        down, up = self.slots["down"], self.slots["up"]
        low = F.relu(_by_probe(h, len(down)).float() @ down.mT + self.slots["down_bias"][:, None])
        return h + (low @ up.mT + self.slots["up_bias"][:, None]).to(h.dtype).view(h.shape)

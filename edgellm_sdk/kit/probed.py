"""Frozen modules with trainable slots, the pieces that `adapters.install` puts into a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Probed(nn.Module):
    """A frozen module with trainable slots; `slots[name]` is (P, *shape) float32."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.slots: dict[str, Tensor] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Slots follow the module to a device."""
        super()._apply(fn, recurse)
        self.slots = {name: fn(slot) for name, slot in self.slots.items()}
        return self


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
        y = _by_probe(x, len(weight)) @ weight.to(x.dtype).mT
        if "bias" in self.slots:
            y = y + self.slots["bias"][:, None].to(x.dtype)
        elif bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], -1)


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


class LayerNorm(Probed):
    """LayerNorm whose gain, bias or both are slots."""

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        gain, shift = (self.slots.get(name, getattr(base, name)[None].float()) for name in ("weight", "bias"))
        wide = F.layer_norm(x.float(), x.shape[-1:], eps=base.eps)
        wide = _by_probe(wide, max(len(gain), len(shift))) * gain[:, None] + shift[:, None]
        return wide.to(x.dtype).view(x.shape)


class Bottleneck(Probed):
    """`h + up(relu(down(h)))` on the output h of a module: of the FFN (Pfeiffer), or of both sublayers (Houlsby)."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        down, up = self.slots["down"], self.slots["up"]
        low = F.relu(_by_probe(h, len(down)).float() @ down.mT + self.slots["down_bias"][:, None])
        return h + (low @ up.mT + self.slots["up_bias"][:, None]).to(h.dtype).view(h.shape)


class _Prepended:
    """Stands for a cache: gives an attention the prefix before the keys and values that it would have had."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer)
        return torch.cat([self.keys.to(keys.dtype), keys], 2), torch.cat([self.values.to(values.dtype), values], 2)


class Prefixed(Probed):
    """An attention whose every position also sees m learned keys and values, `prefix_key` and `prefix_value`, each
    (P, m, key heads x head width). They are not rotated, and the text keeps its positions."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **others: Any
    ) -> Any:
        base: Any = self.base
        rows, length = hidden_states.shape[:2]
        keys, values = (self._heads(self.slots[name], rows) for name in ("prefix_key", "prefix_value"))
        count = keys.shape[2]
        if attention_mask is None and length > 1 and base.is_causal:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(base.layer_idx)
            seen = torch.ones((length, past + length), dtype=torch.bool, device=hidden_states.device)
            attention_mask = _additive(seen.tril(past)[None, None], hidden_states.dtype)
        if attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                attention_mask = _additive(attention_mask, hidden_states.dtype)
            attention_mask = F.pad(attention_mask, (count, 0))
        cache = _Prepended(past_key_values, keys, values)
        return base(hidden_states, attention_mask=attention_mask, past_key_values=cache, **others)

    def _heads(self, slot: Tensor, rows: int) -> Tensor:
        """(P, m, heads x width) as (rows, heads, m, width)."""
        base: Any = self.base
        width = getattr(base, "head_dim", 0) or base.attention_head_size
        split = slot.view(*slot.shape[:2], -1, width).transpose(1, 2)
        return split.repeat_interleave(rows // len(slot), 0)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where `seen`, the least number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

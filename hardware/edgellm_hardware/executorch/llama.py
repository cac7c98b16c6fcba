"""A frozen Llama that `torch.export` turns into a program of static shapes, with P copies of a LoRA-FA adapter on it.

No cache, no mask input: rows are padded on the right and attention is causal, so a label position never sees padding.
Logits exist only at the N label positions. The P adapters are one array (P, D) of all modules' B^T, each (r, out) in
row-major order: one randn and one update cover every module, and slices need no transposition.

Layers below the lowest trained one see the same rows for every candidate, so they run on b rows; from there on there
are P * b, candidate-major.

Shapes: b examples, T tokens, N label positions, P candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.adapters import Trainables
from edgellm_sdk.types import Arrays, Float32


@dataclass(frozen=True)
class Layout:
    """Where each module's B lies in a row of D numbers. `shapes` maps name -> (out, r), in this order."""

    shapes: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        return sum(out * r for out, r in self.shapes.values())

    def pack(self, values: Arrays) -> Float32:
        """name -> (out, r) as one row: (D,) float32."""
        parts = [np.asarray(values[name], np.float32).T.ravel() for name in self.shapes]
        return np.concatenate(parts)

    def unpack(self, row: Float32) -> dict[str, Float32]:
        """(D,) as name -> (out, r) float32."""
        found, at = {}, 0
        for name, (out, r) in self.shapes.items():
            found[name] = np.ascontiguousarray(row[at : at + out * r].reshape(r, out).T)
            at += out * r
        return found


def layout_of(initial: Arrays) -> Layout:
    return Layout({name: (initial[name].shape[0], initial[name].shape[1]) for name in sorted(initial)})


class _Linear(nn.Module):
    """x W^T + bias, and s (x A^T) B_p^T for the rows of candidate p where the module has an adapter."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None

    def __init__(self, linear: Any, a: Float32 | None, place: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("a", None if a is None else torch.from_numpy(a))
        self.place, self.scale = place, scale

    def forward(self, x: Tensor, adapters: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.a is None:
            return y
        r, out, candidates = len(self.a), y.shape[-1], adapters.shape[0]
        low = F.linear(x, self.a).view(candidates, -1, r)
        b = adapters[:, self.place : self.place + r * out].view(candidates, r, out)
        return y + (torch.bmm(low, b) * self.scale).view(y.shape)


class _Norm(nn.Module):
    weight: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach())
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class Llama(nn.Module):
    """`model` (a live transformers Llama, float32, with `trainables` installed) as a plain function of its adapters.

    ModelError for architectures that this forward does not compute.
    """

    embedding: Tensor
    head: Tensor
    cosine: Tensor
    sine: Tensor
    mask: Tensor

    def __init__(self, model: Any, trainables: Trainables, tokens: int) -> None:
        super().__init__()
        config, where = model.config, type(model).__name__
        if config.model_type not in ("llama", "mistral") or config.hidden_act != "silu":
            raise ModelError(f"{where} cannot be exported as a training program", fix="use a Llama-type model")
        if getattr(config, "sliding_window", None):
            raise ModelError(f"{where} uses sliding-window attention, which the training program does not compute")
        keys = [getattr(layer.self_attn.k_proj, "base", layer.self_attn.k_proj) for layer in model.model.layers]
        if len({key.out_features for key in keys}) > 1:
            raise ModelError(f"{where} has layers with different numbers of heads, which it does not compute")
        self.layout, self.lowest = layout_of(trainables.initial), trainables.lowest
        places, at = {}, 0
        for name, (out, r) in self.layout.shapes.items():
            places[name.removesuffix(".lora_B")] = at
            at += out * r

        def linear(path: str) -> _Linear:
            module = model.get_submodule(path)
            base = getattr(module, "base", module)
            return _Linear(base, trainables.frozen.get(f"{path}.lora_A"), places.get(path, 0), trainables.spec.scale)

        self.layers = nn.ModuleList()
        for index, layer in enumerate(model.model.layers):
            own = nn.ModuleDict({"input_norm": _Norm(layer.input_layernorm)})
            own["middle_norm"] = _Norm(layer.post_attention_layernorm)
            for parent, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                for name in names:
                    own[name] = linear(f"model.layers.{index}.{parent}.{name}_proj")
            self.layers.append(own)
        self.norm = _Norm(model.model.norm)
        self.register_buffer("embedding", model.model.embed_tokens.weight.detach())
        self.register_buffer("head", model.lm_head.weight.detach())
        with torch.no_grad():
            cosine, sine = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(tokens)[None])
        self.register_buffer("cosine", cosine[0].float().clone())
        self.register_buffer("sine", sine[0].float().clone())
        self.register_buffer("mask", torch.full((tokens, tokens), -1e9).triu(1))
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def _blocks(self) -> list[Any]:
        return list(self.layers)

    def _rotate(self, x: Tensor) -> Tensor:
        half = self.width // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cosine + turned * self.sine

    def _attention(self, own: Any, x: Tensor, adapters: Tensor) -> Tensor:
        rows, t, groups = x.shape[0], x.shape[1], self.heads // self.kv
        q, k, v = (
            own[name](x, adapters).view(rows, t, count, self.width).transpose(1, 2)
            for name, count in (("q", self.heads), ("k", self.kv), ("v", self.kv))
        )
        q = self._rotate(q).reshape(rows * self.kv, groups * t, self.width)  # heads that share a key, one below another
        k = self._rotate(k).reshape(rows * self.kv, t, self.width)
        scores = torch.bmm(q, k.transpose(1, 2)) * self.width**-0.5
        scores = scores.view(rows * self.kv, groups, t, t) + self.mask
        weights = torch.softmax(scores, -1).view(rows * self.kv, groups * t, t)
        mixed = torch.bmm(weights, v.reshape(rows * self.kv, t, self.width))
        mixed = mixed.view(rows, self.heads, t, self.width).transpose(1, 2).reshape(rows, t, -1)
        return own["o"](mixed, adapters)

    def forward(self, tokens: Tensor, places: Tensor, targets: Tensor, adapters: Tensor) -> Tensor:
        """Negative log-likelihood of every label for each candidate: (P, N) float32, nats.

        tokens (b, T) int64; places (N,) int64 = row * T + column of what predicts; targets (N,) int64; adapters (P, D)
        float32.
        """
        candidates = adapters.shape[0]
        x = F.embedding(tokens, self.embedding)
        for index, own in enumerate(self._blocks()):
            if index == self.lowest:
                x = x.repeat(candidates, 1, 1)
            x = x + self._attention(own, own["input_norm"](x), adapters)
            y = own["middle_norm"](x)
            gate = own["gate"](y, adapters)
            inner = gate * torch.sigmoid(gate) * own["up"](y, adapters)
            x = x + own["down"](inner, adapters)
        scored = torch.index_select(x.view(candidates, -1, x.shape[-1]), 1, places)
        logits = F.linear(self.norm(scored), self.head)
        wanted = targets.view(1, -1, 1).expand(candidates, -1, -1)
        return -torch.gather(torch.log_softmax(logits, -1), 2, wanted).squeeze(-1)

"""What prefix tuning, Houlsby's adapters, BitFit and full tuning put into a model, layer by layer.

`adapters` installs, saves and applies it. A decoder has layers and nothing else that trains here; an encoder also has
biases beside its embeddings, and a classification head, which always trains (as in arXiv 2212.10025).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit.probed import Biased, Bottleneck, FullLinear, LayerNorm, Norm, Prefixed, Probed
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Array, Float32

if TYPE_CHECKING:
    from edgellm_sdk.kit.adapters import Spec

KINDS = ("houlsby", "prefix", "bitfit", "full")
SLOTS = {"houlsby": ("down", "down_bias", "up", "up_bias"), "prefix": ("prefix_key", "prefix_value")}
"""Of the kinds that add something to a model, what they add at one place."""


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its layers and, within one, its attention and what ends attention and FFN."""

    layers: str
    attention: str
    outputs: tuple[str, str]
    embeddings: str = ""
    head: str = ""


LAYOUTS = (
    Layout("model.layers", "self_attn", ("self_attn.o_proj", "mlp.down_proj")),
    *(
        Layout(
            f"{name}.encoder.layer", "attention.self", ("attention.output.dense", "output.dense"),
            f"{name}.embeddings", "classifier",
        )
        for name in ("roberta", "bert")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A module that takes the place of the one at `path` below its root; `slots` start as they say, float32."""

    path: str
    module: Probed
    slots: dict[str, Float32]


def layout(model: Any) -> Layout:
    """The layout of a causal language model or an encoder. ModelError for an unknown one."""
    for found in LAYOUTS:
        try:
            layers = model.get_submodule(found.layers)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList):
            return found
    raise ModelError(f"{type(model).__name__} has no list of decoder layers", fix="use a Llama-type model")


def pieces(layer: nn.Module, where: Layout, spec: Spec, stream: Stream) -> Iterator[Piece]:
    """What `spec` puts into one layer. ConfigError when the layer has no place for it."""
    if spec.kind == "prefix":
        yield _prefix(layer, where.attention, spec, stream)
        return
    if spec.kind == "houlsby":
        for path in where.outputs:
            yield _bottleneck(layer, path, spec, stream)
    yield from trained(layer, spec.kind, spec.norms)


def outside(model: Any, where: Layout, spec: Spec) -> Iterator[Piece]:
    """What trains besides the layers, at paths from the model: nothing of a decoder."""
    if where.embeddings and spec.kind == "bitfit" and not spec.layers:
        yield from _below(model, where.embeddings, "bitfit", spec.norms)
    if where.head and hasattr(model, where.head):
        yield from _below(model, where.head, "full", True)


def _below(model: Any, root: str, kind: str, norms: bool) -> Iterator[Piece]:
    for piece in trained(model.get_submodule(root), kind, norms):
        yield replace(piece, path=f"{root}.{piece.path}".rstrip("."))


def trained(root: nn.Module, kind: str, norms: bool) -> Iterator[Piece]:
    """Modules of `root` with their own weights or biases as slots: all for `full`, biases for `bitfit`; with `norms`
    also those of norms."""
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Linear):
            wanted = {"full": ("weight", "bias"), "bitfit": ("bias",)}.get(kind, ())
        elif _is_norm(module):
            wanted = ("weight", "bias") if kind == "full" or norms else ("bias",) if kind == "bitfit" else ()
        else:
            continue
        slots = {slot: floats(getattr(module, slot)) for slot in wanted if getattr(module, slot, None) is not None}
        if not slots:
            continue
        if isinstance(module, nn.Linear):
            yield Piece(path, FullLinear(module) if "weight" in slots else Biased(module), slots)
        else:
            yield Piece(path, LayerNorm(module) if isinstance(module, nn.LayerNorm) else Norm(module), slots)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or hasattr(module, "variance_epsilon")


def _bottleneck(layer: nn.Module, path: str, spec: Spec, stream: Stream) -> Piece:
    """`down` (w, d) normal with variance 1 / d, `up` (d, w) zero, biases zero: the model starts unchanged."""
    linear = place(layer, path)
    width = int(linear.out_features)
    down = (stream.normal(spec.size * width) * np.float32(1 / math.sqrt(width))).reshape(spec.size, width)
    zeros = np.zeros((width, spec.size), np.float32)
    starts = (down, np.zeros(spec.size, np.float32), zeros, np.zeros(width, np.float32))
    return Piece(path, Bottleneck(linear), dict(zip(SLOTS["houlsby"], starts, strict=True)))


def _prefix(layer: nn.Module, path: str, spec: Spec, stream: Stream) -> Piece:
    """Keys and values (m, key heads x head width), normal with deviation 0.02. Any start changes the model: attention
    shares itself with what it did not see before."""
    attention = place(layer, path)
    keys = getattr(attention, "k_proj", None) or getattr(attention, "key", None)
    if not isinstance(keys, nn.Linear):
        raise ConfigError(f"{type(attention).__name__} has no keys to put a prefix before", "prefix")
    shape = (spec.size, keys.out_features)
    drawn = [(stream.normal(math.prod(shape)) * np.float32(0.02)).reshape(shape) for _ in SLOTS["prefix"]]
    return Piece(path, Prefixed(attention), dict(zip(SLOTS["prefix"], drawn, strict=True)))


def place(layer: nn.Module, path: str) -> Any:
    """The module at `path`. ModelError when the layer has none."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{type(layer).__name__} has no {path}", fix="use a Llama-type model") from None


def floats(tensor: Any) -> Float32:
    """A copy, float32; zeros for a tensor on the meta device, which has a shape and no values."""
    if tensor.is_meta:
        return np.broadcast_to(np.float32(0), tuple(tensor.shape))
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def swap(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the one at `path` below `root`."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def restore(model: Any, kind: str, saved: dict[str, Array]) -> None:
    """Houlsby's adapters or a prefix where they were, and what else was saved in place of the model's own values.
    Takes what it uses out of `saved`. ModelError when the rest is not in the model."""
    where = layout(model)
    for index, layer in enumerate(model.get_submodule(where.layers)):
        for path in where.outputs if kind == "houlsby" else (where.attention,):
            prefix = f"{where.layers}.{index}.{path}."
            if prefix + SLOTS[kind][0] not in saved:
                continue
            module = (Bottleneck if kind == "houlsby" else Prefixed)(place(layer, path))
            for slot in SLOTS[kind]:
                module.slots[slot] = torch.from_numpy(saved.pop(prefix + slot).copy())[None]
            swap(layer, path, module)
    parameters = dict(model.named_parameters())
    if missing := sorted(saved.keys() - parameters.keys()):
        raise ModelError(f"the model has no {missing[0]}", fix="the adapter belongs to another model")
    for name, array in saved.items():
        parameters[name].data.copy_(torch.from_numpy(array.copy()))

"""Small sets of trainable tensors on a frozen model, and the folders they are saved in.

`install` puts them into a live model for methods that evaluate many candidate values: every tensor carries a leading
probe dimension, so P candidates share one forward of the frozen weights (inputs of P * batch rows, probe-major).
Gradient-free methods need that and nothing else; methods that back-propagate use peft's own layers instead.

On disk an adapter is a folder with `edgellm_adapter.json` (its kind) and safetensors. LoRA kinds are plain PEFT
adapters beside that, so peft, transformers and the GGUF exporter read them.

| kind    | trainable                                                   | mergeable |
|---------|-------------------------------------------------------------|-----------|
| lora    | A (r, d_in), B (d_out, r) of each target, arXiv 2106.09685   | yes       |
| lora-fa | B alone, A frozen at its random start, arXiv 2308.03303      | yes       |
| adapter | bottleneck after the FFN, Pfeiffer style, arXiv 2005.00247   | no        |
| norm    | biases (arXiv 2106.10199); all norm gains where it has none  | yes       |
| layers  | every linear weight of the chosen layers                     | yes       |
| houlsby | bottlenecks after attention and after the FFN, 1902.00751    | no        |
| prefix  | keys and values before those of the text, arXiv 2101.00190   | no        |
| bitfit  | all biases, arXiv 2106.10199                                 | yes       |
| full    | every weight, bias and norm gain of the chosen layers        | yes       |

Those from `houlsby` on are in `inserted`, for encoders as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgellm_sdk import store
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import inserted
from edgellm_sdk.kit.probed import Biased, Bottleneck, FullLinear, LoRALinear, Norm, Probed
from edgellm_sdk.random import Stream
from edgellm_sdk.types import FOLDED, Array, Arrays, Float32

KINDS = ("lora", "lora-fa", "adapter", "norm", "layers")
KNOWN = (*KINDS, *inserted.KINDS)
UNMERGEABLE = {"adapter": "a bottleneck adapter", "houlsby": "a bottleneck adapter", "prefix": "a prefix"}
"""Kinds that no change of the weights can express, and what they are."""
WEIGHTY = ("norm", "layers", "bitfit", "full")
"""Kinds whose tensors are the model's own, under its names."""
MARK = "edgellm_adapter.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Spec:
    """Which tensors train. `layers` counts from the top, 0 means all; `targets` are module name endings. `size` is the
    width of a bottleneck (houlsby) or the length of a prefix; with `norms` gains train too (houlsby, bitfit)."""

    kind: str = "lora"
    layers: int = 4
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    reduction: int = 16
    size: int = 16
    norms: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def module_names(text: str) -> tuple[str, ...]:
    """Module name endings written with commas, as options hold them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, None for one outside of all."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in order. ModelError for an unknown layout."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of decoder layers", fix="use a Llama-type model")
    return layers


class Trainables:
    """The trainable tensors of one model. `initial` maps name -> (shape) float32; `frozen` what they rest on."""

    def __init__(self, spec: Spec, lowest: int, device: torch.device) -> None:
        self.spec, self.lowest, self.device = spec, lowest, device
        self.initial: dict[str, Float32] = {}
        self.frozen: dict[str, Float32] = {}
        self._places: dict[str, tuple[Probed, str]] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self.initial)

    @property
    def size(self) -> int:
        """How many scalars train: d."""
        return sum(array.size for array in self.initial.values())

    def add(self, name: str, probed: Probed, slot: str, value: Float32, train: bool = True) -> None:
        (self.initial if train else self.frozen)[name] = value
        self._places[name] = (probed, slot)
        probed.slots[slot] = torch.from_numpy(value.copy())[None].to(self.device)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Use these values, each (P, *shape) float32, from the next forward on. All must have one P.

        A LoRA may be of another rank than it started with, and may rest on a folded one (`types.FOLDED`), (1, *shape).
        """
        own = {name: value for name, value in values.items() if not name.endswith(FOLDED)}
        if own.keys() != self.initial.keys():
            raise ValueError(f"expected tensors {self.names}")
        probes = {len(value) for value in own.values()}
        if len(probes) != 1:
            raise ValueError("every tensor needs the same number of probes")
        (count,) = probes
        for name, value in own.items():
            probed, slot = self._places[name]
            probed.slots[slot] = value.to(self.device)
        for name, array in self.frozen.items():
            probed, slot = self._places[name]
            probed.slots[slot] = torch.from_numpy(array)[None].to(self.device)
        for name in values.keys() - own.keys():
            module, _, side = name.rpartition(".")
            if side == FOLDED[0]:
                slots = self._places[f"{module}.lora_B"][0].slots
                a, b = (values[f"{module}.{end}"].to(self.device) for end in FOLDED)
                slots["lora_A"] = torch.cat([slots["lora_A"], a.expand(len(slots["lora_A"]), -1, -1)], 1)
                slots["lora_B"] = torch.cat([slots["lora_B"], (b / self.spec.scale).expand(count, -1, -1)], 2)

    def untrained(self) -> int:
        """How many layers from `lowest` on have no tensor that collects a gradient and none below them that does."""
        places = [layer_of(name) for name, (probed, slot) in self._places.items() if probed.slots[slot].requires_grad]
        known = [place for place in places if place is not None]
        return min(known) - self.lowest if known and len(known) == len(places) else 0

    def set_one(self, values: Arrays) -> None:
        """Use one set of values, each of its own shape."""
        self.set({name: torch.from_numpy(np.array(value, dtype=np.float32))[None] for name, value in values.items()})


def install(model: Any, spec: Spec, stream: Stream) -> Trainables:
    """Put a spec's trainable tensors into `model` (in place). Random starts come from `stream`, in name order.

    ConfigError when the model has nothing the spec names.
    """
    where = inserted.layout(model)
    layers = model.get_submodule(where.layers)
    if spec.layers > len(layers):
        raise ConfigError(f"layers: {spec.layers} asked for, the model has {len(layers)}")
    lowest = len(layers) - (spec.layers or len(layers))
    trainables = Trainables(spec, lowest, next(model.parameters()).device)
    for index in range(lowest, len(layers)):
        prefix = f"{where.layers}.{index}."
        if spec.kind in inserted.KINDS:
            _insert(layers[index], prefix, inserted.pieces(layers[index], where, spec, stream), trainables)
        else:
            _install_layer(layers[index], prefix, trainables, stream)
    if spec.kind == "norm" and all(name.endswith("norm.weight") for name in trainables.initial):
        _train_gain(model.model, "norm", "model.", trainables)
    if not trainables.initial:
        if spec.kind == "bitfit":
            raise ConfigError("the model has no biases to train", "bitfit", "train the norm gains too, or a LoRA")
        raise ConfigError(f"no module ends in {', '.join(spec.targets)}", "targets")
    _insert(model, "", inserted.outside(model, where, spec), trainables)
    return trainables


def _insert(root: nn.Module, prefix: str, pieces: Iterator[inserted.Piece], out: Trainables) -> None:
    for piece in pieces:
        for slot, value in piece.slots.items():
            out.add(f"{prefix}{piece.path}.{slot}", piece.module, slot, value)
        inserted.swap(root, piece.path, piece.module)


def _train_gain(parent: nn.Module, path: str, prefix: str, out: Trainables) -> None:
    norm = parent.get_submodule(path)
    gain = Norm(norm)
    out.add(f"{prefix}{path}.weight", gain, "weight", inserted.floats(norm.weight))
    inserted.swap(parent, path, gain)


def lora_start(rank: int, d_in: int, d_out: int, stream: Stream) -> tuple[Float32, Float32]:
    """A (r, d_in) kaiming-uniform with a = sqrt(5), as peft starts, and B (d_out, r) zero: both float32."""
    bound = 1 / math.sqrt(d_in)
    draw = stream.uniform(rank * d_in) * 2 * bound - bound
    return draw.astype(np.float32).reshape(rank, d_in), np.zeros((d_out, rank), np.float32)


def _install_layer(layer: nn.Module, prefix: str, out: Trainables, stream: Stream) -> None:
    spec = out.spec
    linears = [(path, m) for path, m in layer.named_modules() if isinstance(m, nn.Linear)]
    if spec.kind in ("lora", "lora-fa"):
        for path, linear in linears:
            if path.endswith(spec.targets):
                module = LoRALinear(linear, spec.scale)
                a, b = lora_start(spec.rank, linear.in_features, linear.out_features, stream)
                out.add(f"{prefix}{path}.lora_A", module, "lora_A", a, train=spec.kind == "lora")
                out.add(f"{prefix}{path}.lora_B", module, "lora_B", b)
                inserted.swap(layer, path, module)
    elif spec.kind == "layers":
        for path, linear in linears:
            full = FullLinear(linear)
            out.add(f"{prefix}{path}.weight", full, "weight", inserted.floats(linear.weight))
            inserted.swap(layer, path, full)
    elif spec.kind == "norm":
        biased = [(path, linear) for path, linear in linears if linear.bias is not None]
        for path, linear in biased:
            shifted = Biased(linear)
            out.add(f"{prefix}{path}.bias", shifted, "bias", inserted.floats(linear.bias))
            inserted.swap(layer, path, shifted)
        norms = [(p, m) for p, m in layer.named_children() if hasattr(m, "variance_epsilon") and not biased]
        for path, _ in norms:
            _train_gain(layer, path, prefix, out)
    else:
        bottleneck = Bottleneck(layer.get_submodule("mlp"))
        width = next(m for p, m in linears if p.endswith("down_proj")).out_features
        inner = max(1, width // spec.reduction)
        start = (stream.normal(inner * width) * np.float32(1 / math.sqrt(width))).reshape(inner, width)
        out.add(f"{prefix}mlp.down", bottleneck, "down", start)
        out.add(f"{prefix}mlp.down_bias", bottleneck, "down_bias", np.zeros(inner, np.float32))
        out.add(f"{prefix}mlp.up", bottleneck, "up", np.zeros((width, inner), np.float32))
        out.add(f"{prefix}mlp.up_bias", bottleneck, "up_bias", np.zeros(width, np.float32))
        inserted.swap(layer, "mlp", bottleneck)


def write(folder: Path, trainables: Trainables, values: Arrays, base: Mapping[str, str]) -> None:
    """Save trained values as an adapter folder on `base` ({path, digest, name}), whole or not at all."""
    write_arrays(folder, trainables.spec, {**trainables.frozen, **values}, base)


def write_arrays(folder: Path, spec: Spec, arrays: Arrays, base: Mapping[str, str]) -> None:
    """As `write`, from all tensors of the adapter, frozen ones too, under the names that `install` gives them. A LoRA
    and what it rests on become one of the sum of their ranks; smaller ranks are filled up with zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, arrays = joined(spec, arrays)
    if spec.kind in ("lora", "lora-fa"):
        store.write_json(folder / "adapter_config.json", _peft_config(spec, arrays, base["path"]))
        arrays = {f"base_model.model.{name}.weight": array for name, array in arrays.items()}
    store.save_arrays(folder / WEIGHTS, arrays, {})
    store.write_json(folder / MARK, {**asdict(spec), "targets": list(spec.targets)})
    store.write_json(folder / "base.json", dict(base))


def joined(spec: Spec, arrays: Arrays) -> tuple[Spec, Arrays]:
    """Folded LoRAs joined to those that rest on them, all of one rank, at the scale of `spec`."""
    modules = sorted({name.rpartition(".lora_")[0] for name in arrays if ".lora_" in name})
    pairs = {}
    for module in modules:
        a, b = ([arrays[f"{module}.{side}"]] for side in ("lora_A", "lora_B"))
        if f"{module}.{FOLDED[0]}" in arrays:
            a.append(arrays[f"{module}.{FOLDED[0]}"])
            b.append(arrays[f"{module}.{FOLDED[1]}"] / np.float32(spec.scale))
        pairs[module] = np.concatenate(a), np.concatenate(b, axis=1)
    ranks = {len(a) for a, _ in pairs.values()} or {spec.rank}
    if ranks == {spec.rank} and not any(name.endswith(FOLDED) for name in arrays):
        return spec, arrays
    rank = max(ranks)
    found = {name: array for name, array in arrays.items() if name.rpartition(".")[0] not in pairs}
    for module, (low, high) in pairs.items():
        found[f"{module}.lora_A"] = np.pad(low, ((0, rank - len(low)), (0, 0)))
        found[f"{module}.lora_B"] = np.pad(high, ((0, 0), (0, rank - high.shape[1])))
    return replace(spec, rank=rank, alpha=spec.scale * rank), found


def _peft_config(spec: Spec, arrays: Arrays, base: str) -> dict[str, Any]:
    from peft import LoraConfig, TaskType

    modules = sorted({name.rpartition(".lora_")[0] for name in arrays})
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=modules,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def kind(folder: Path) -> str:
    """The kind of a saved adapter; a plain PEFT LoRA folder counts as `lora`. ModelError for anything else."""
    if (folder / MARK).is_file():
        found = store.read_json(folder / MARK).get("kind")
    elif (folder / "adapter_config.json").is_file():
        found = str(store.read_json(folder / "adapter_config.json").get("peft_type", "")).lower()
    else:
        raise ModelError("is no adapter folder", str(folder))
    if found not in KNOWN:
        raise ModelError(f"adapter kind {found!r} is unknown", str(folder), f"known: {', '.join(KNOWN)}")
    return str(found)


@lru_cache(maxsize=8)
def _arrays(path: Path, stamp: tuple[int, int]) -> dict[str, Array]:
    return store.load_arrays(path)[0]


def arrays(folder: Path) -> dict[str, Array]:
    """The saved tensors under their names in the model (PEFT's prefix and suffix removed)."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError("has no adapter_model.safetensors", str(folder))
    stat = path.stat()
    raw = _arrays(path, (stat.st_mtime_ns, stat.st_size))
    prefix = "base_model.model."
    if any(name.startswith(prefix) for name in raw):
        return {name.removeprefix(prefix).removesuffix(".weight"): array for name, array in raw.items()}
    return raw


def lora_scale(folder: Path, module: str) -> float:
    """alpha / r of one module (alpha / sqrt r with rslora), patterns included. ModelError for what cannot merge."""
    config = store.read_json(folder / "adapter_config.json")
    if config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise ModelError("DoRA, modules_to_save and trained biases cannot be merged here", str(folder), "merge in peft")
    rank = _patterned(config.get("rank_pattern"), module, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _patterned(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    hits = [value for key, value in (pattern or {}).items() if module == key or module.endswith("." + key)]
    return float(hits[0] if hits else default)


def merged(folder: Path, name: str, weight: Float32) -> Float32:
    """Base tensor `name` (HF name, float32) with the adapter folded in. ModelError for a kind that cannot merge."""
    what = kind(folder)
    if what in UNMERGEABLE:
        raise ModelError(f"{UNMERGEABLE[what]} cannot be merged into the weights", str(folder), "train a LoRA instead")
    saved = arrays(folder)
    if what in WEIGHTY:
        return saved.get(name, weight)
    module = name.removesuffix(".weight")
    a, b = saved.get(f"{module}.lora_A"), saved.get(f"{module}.lora_B")
    if a is None or b is None:
        return weight
    if (b.shape[0], a.shape[1]) != weight.shape or b.shape[1] != a.shape[0]:
        raise ModelError(f"LoRA factors {b.shape} x {a.shape} do not fit {name} {weight.shape}", str(folder))
    product = b.astype(np.float32) @ a.astype(np.float32)
    return np.asarray(weight + np.float32(lora_scale(folder, module)) * product, dtype=np.float32)


def _targets(model: Any, folder: Path) -> Iterator[tuple[str, Tensor]]:
    saved = arrays(folder)
    touched = {n.rpartition(".lora_")[0] + ".weight" if ".lora_" in n else n for n in saved}
    parameters = dict(model.named_parameters())
    missing = sorted(touched - parameters.keys())
    if missing:
        raise ModelError(f"the model has no {missing[0]}", str(folder), "the adapter belongs to another model")
    yield from ((name, parameters[name]) for name in sorted(touched))


def merge(model: Any, folder: Path) -> None:
    """Fold a saved adapter into a live model, in place; sums in float32."""
    if kind(folder) in UNMERGEABLE:
        merged(folder, "", np.empty(0, np.float32))
    with torch.no_grad():
        for name, parameter in _targets(model, folder):
            parameter.copy_(torch.from_numpy(np.array(merged(folder, name, inserted.floats(parameter)))))


def apply(model: Any, folder: Path) -> None:
    """Put a saved adapter onto a live model, in place, unmerged where its kind allows."""
    what = kind(folder)
    if what in WEIGHTY:
        merge(model, folder)
    elif what in ("lora", "lora-fa"):
        model.load_adapter(str(folder), adapter_name=f"edgellm-{len(getattr(model, 'peft_config', {}))}")
        model.eval().requires_grad_(False)
    elif what in inserted.SLOTS:
        inserted.restore(model, what, dict(arrays(folder)))
    else:
        saved = arrays(folder)
        for index, layer in enumerate(decoder_layers(model)):
            prefix = f"model.layers.{index}.mlp."
            if f"{prefix}up" in saved:
                bottleneck = Bottleneck(layer.get_submodule("mlp"))
                for slot in ("down", "down_bias", "up", "up_bias"):
                    bottleneck.slots[slot] = torch.from_numpy(saved[prefix + slot].copy())[None]
                inserted.swap(layer, "mlp", bottleneck)

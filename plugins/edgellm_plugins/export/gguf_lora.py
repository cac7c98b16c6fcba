"""One LoRA adapter as a GGUF adapter file, to be loaded beside a base model of the same architecture.

llama.cpp adds `(adapter.lora.alpha / r) * B A` with r read from B and one alpha for the file. What PEFT allows besides
(rslora, alpha and rank patterns) is folded into B here, with alpha = the adapter's r. For q and k only the rows of B
are reordered: reordering the rows of B A is reordering the rows of B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export import llama_family
from edgellm_plugins.export.gguf_container import Planned, Value
from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.store import read_json

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

MERGE = "export it merged (without `--adapter separate`)"


def check_kind(folder: Path, separate: bool) -> None:
    """ModelError for adapters that cannot be merged, or cannot be a file of their own, with the reason."""
    from edgellm_sdk.kit import adapters

    kind = adapters.kind(folder)
    if kind in adapters.UNMERGEABLE:
        what = "adds keys" if kind == "prefix" else "adds layers"
        raise ModelError(f"{adapters.UNMERGEABLE[kind]} {what} that GGUF lacks", str(folder), "train a LoRA instead")
    if separate and kind in adapters.WEIGHTY:
        raise ModelError(f"trained {kind} are no LoRA and cannot be a file of their own", str(folder), MERGE)
    if kind not in ("lora", "lora-fa"):
        return
    config = _config(folder)
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "target_parameters", "layer_replication", "lora_bias"):
        if config.get(key):
            raise ModelError(f"its {key} cannot be expressed in GGUF", str(folder), "merge it with peft")
    if config.get("bias", "none") != "none":
        raise ModelError("its trained biases cannot be expressed in GGUF", str(folder), "merge it with peft")


def check_places(folder: Path, slots: Mapping[str, llama_family.Slot]) -> None:
    """ModelError when a tensor of an adapter that is to be merged has no place in the model: it would be lost."""
    from edgellm_sdk.kit import adapters

    for name in sorted(adapters.arrays(folder)):
        module, mark, part = name.rpartition(".lora_")
        if (f"{module}.weight" if mark else name) in slots and (not mark or part in ("A", "B")):
            continue
        reason, fix = "the model has no such tensor", "give the model it was trained on"
        if "lm_head" in name:
            reason = "the head of this model is its embedding, and a change of one would change both"
            fix = "untie the model before training, or leave lm_head out"
        elif "lora_embedding" in name:
            reason, fix = "a LoRA on the embedding cannot be merged here", "merge it with peft"
        raise ModelError(f"{printable(name)[:80]} cannot be in the file: {reason}", str(folder), fix)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or type(config.get("r")) is not int or config["r"] < 1:
        raise ModelError("names no rank r", str(folder / "adapter_config.json"))
    return config


def factors(folder: Path, model: llama_family.Llama) -> dict[str, Array]:
    """GGUF name -> float32 factor: `<tensor>.lora_a` (r, in), `<tensor>.lora_b` (out, r) with the true scale in it."""
    import numpy as np

    from edgellm_sdk.kit import adapters

    check_kind(folder, separate=True)
    rank, saved, slots = _config(folder)["r"], adapters.arrays(folder), llama_family.slots(model)
    found: dict[str, Array] = {}
    for name in sorted(saved):
        module, _, part = name.rpartition(".lora_")
        slot = slots.get(f"{module}.weight")
        if part not in ("A", "B") or slot is None or len(slot.shape) != 2 or module == "model.embed_tokens":
            reason = "embeddings and tied heads share one tensor" if "embed" in name or "lm_head" in name else "unknown"
            raise ModelError(f"{printable(name)[:80]} cannot be in a GGUF adapter ({reason})", str(folder), MERGE)
        a, b = saved.get(f"{module}.lora_A"), saved.get(f"{module}.lora_B")
        if a is None or b is None or (b.shape[0], a.shape[1]) != slot.shape or a.shape[0] != b.shape[1]:
            raise ModelError(f"the factors of {printable(module)[:80]} do not fit the model", str(folder))
        if part == "A":
            found[f"{slot.name}.lora_a"] = np.ascontiguousarray(a, np.float32)
            continue
        scale = adapters.lora_scale(folder, module) * b.shape[1] / rank  # alpha / r of the file is rank / columns
        wide = np.asarray(b, np.float32) * np.float32(scale)
        found[f"{slot.name}.lora_b"] = llama_family.permute(wide, slot.heads) if slot.heads else wide
    if not found:
        raise ModelError("holds no LoRA factors", str(folder))
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ModelError(f"{name} is not finite", str(folder), "train again with a smaller step")
    return found


def metadata(folder: Path, name: str, model: llama_family.Llama) -> dict[str, Value]:
    return {
        "general.type": Value("string", "adapter"),
        "general.architecture": Value("string", model.gguf),
        "general.name": Value("string", name),
        "adapter.type": Value("string", "lora"),
        "adapter.lora.alpha": Value("f32", float(_config(folder)["r"])),
    }


def plan(found: Mapping[str, Array], type_name: str) -> tuple[list[Planned], Iterator[tuple[str, Array]]]:
    """The tensor table and the data, in `type_name` F32 or F16."""
    import numpy as np

    dtype = np.float32 if type_name == "F32" else np.float16
    return (
        [Planned(name, array.shape, type_name) for name, array in found.items()],
        ((name, np.ascontiguousarray(array, dtype)) for name, array in found.items()),
    )

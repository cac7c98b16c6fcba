"""Model in, GGUF file out: choose a storage type per tensor, stream the tensors, write, read back.

Every tensor's name, shape and type is known before the first weight is read (`llama_family.slots`), so the file is laid
out first and filled in the order in which the weights come, one tensor in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm_plugins.export import (
    gguf_blocks,
    gguf_container,
    gguf_engine,
    gguf_lora,
    gguf_tokenizer,
    llama_family,
    ollama,
    rotary,
)
from edgellm_plugins.export.gguf_container import Planned, Value
from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.gguf_file import TENSOR_TYPES, TYPE_IDS
from edgellm_sdk.kit import blocks
from edgellm_sdk.types import Artifact

if TYPE_CHECKING:
    from edgellm_plugins.export.gguf import Config
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Float32, ModelHandle

QUANTISATION_VERSION = 2  # of ggml's block layouts
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
ROWS_AT_ONCE = 4096
BYTES_AT_ONCE = 8 << 20
F16_OVERFLOW = 65520.0  # the smallest number that rounds beyond the largest float16


def export(model: ModelHandle, target: Any, config: Config, ctx: Context) -> Artifact:
    """Write `model` to the path `target`; ModelError or ConfigError with the reason when it cannot be done exactly."""
    target = Path(target)
    if model.format != "hf":
        raise ModelError("is a GGUF file already", str(model.path), "deploy it as it is")
    family = llama_family.read(model.path)
    name = config.name or model.name or model.path.name
    if config.adapter == "separate" and not gguf_engine.wanted(model, config):
        return _export_adapter(model, family, target, name, config)
    if gguf_engine.wanted(model, config):
        return _by_the_engine(model, target, config, ctx)
    for folder in model.adapters:
        gguf_lora.check_kind(folder, separate=False)
    slots, found = llama_family.slots(family), checkpoint.inspect(model.path)
    for folder in model.adapters:
        gguf_lora.check_places(folder, slots)
    packed = {hf: kind for hf in found.tensors if (kind := gguf_blocks.packed_type(found, hf))}
    if packed and model.adapters:
        raise ModelError(
            "an adapter cannot be merged into quantised weights without rounding them again",
            str(model.path),
            "compress the model together with its adapter, or export with --adapter separate",
        )
    types = choose_types(slots, packed, config, ctx)
    plan = [Planned(slot.name, slot.shape, types[hf]) for hf, slot in slots.items()]
    factors = rotary.factors(family)
    plan += [Planned(key, array.shape, "F32") for key, array in factors.items()]
    tokenizer, how, unlike = gguf_tokenizer.metadata(model, family.vocabulary)
    limits = [*llama_family.limits(family), *unlike]
    for note in (how, *limits):
        ctx.note(note)
    metadata = general(name, family.gguf, plan) | llama_family.metadata(family) | tokenizer
    with ctx.progress("writing GGUF", len(plan)) as progress:

        def data() -> Iterator[tuple[str, Array | Iterator[Array]]]:
            yield from factors.items()
            for pair in _stored(found, model.adapters, slots, packed, types):
                yield pair
                progress.advance()

        facts = gguf_container.write(target, metadata, plan, data())
    verified = {"reader": facts, "kind": "model", "tokenizer": how, "tensor_types": _census(plan)}
    if limits:
        verified["limits"] = limits
    files = [target]
    if config.modelfile:
        files.append(_modelfile(model.path, target, config.temperature))
    return _artifact(files, model, verified)


def _by_the_engine(model: ModelHandle, target: Path, config: Config, ctx: Context) -> Artifact:
    """A float file first, then llama.cpp's quantiser on it."""
    gguf_engine.check(model, config)
    wide = target.with_name(f".{target.name[:80]}.float.tmp")
    plain = replace(config, type=gguf_engine.float_type(model), embedding="auto", types="", imatrix="none")
    try:
        first = export(model, wide, replace(plain, modelfile=False), ctx)
        facts = gguf_engine.quantise(wide, target, model, config, ctx)
    finally:
        wide.unlink(missing_ok=True)
    files = [target, *([_modelfile(model.path, target, config.temperature)] if config.modelfile else [])]
    return _artifact(files, model, {**first.verified, **facts})


def choose_types(
    slots: Mapping[str, llama_family.Slot], packed: Mapping[str, str], config: Config, ctx: Context
) -> dict[str, str]:
    """ggml type per transformers tensor; `packed` maps those that are blocks already to their type.

    ConfigError when an option would round packed weights a second time.
    """
    quantised = config.type in ("q8_0", "q4_0") or (config.type == "auto" and bool(packed))
    body = "f16" if config.type == "auto" else config.type
    ends = config.embedding if config.embedding != "auto" else "q8_0" if quantised else body
    types = {}
    for name, slot in slots.items():
        wanted = ends if name in ENDS else body
        asked = config.embedding if name in ENDS and config.embedding != "auto" else config.type
        here = packed.get(name, "").lower()
        if here and asked in ("auto", here):
            wanted = here
        elif here and asked in ("q8_0", "q4_0"):
            raise ConfigError(f"{name} is {here} already; {asked} would round it again", fix="use --type auto")
        if len(slot.shape) == 1:
            wanted = "f32"
        elif slot.shape[-1] % TENSOR_TYPES[TYPE_IDS[wanted.upper()]][1]:
            ctx.note(f"{slot.name}: rows of {slot.shape[-1]} do not divide into {wanted} blocks, stored as f16")
            wanted = "f16"
        types[name] = wanted.upper()
    return types


def _stored(
    found: checkpoint.Checkpoint,
    adapters: Sequence[Path],
    slots: Mapping[str, llama_family.Slot],
    packed: Mapping[str, str],
    types: Mapping[str, str],
) -> Iterator[tuple[str, Array | Iterator[Array]]]:
    """(GGUF name, array as stored) for every tensor: blocks as they are, floats with the adapters folded in. Floats
    that keep their rows' order come in parts of a few MiB: a large embedding is never in memory as a whole."""
    for name, tensor in found.tensors.items():
        slot = slots.get(name)
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and slot is None):
            continue  # a constant; a tied head, of which the engine takes the embedding
        if slot is None:
            if name.endswith(".bias") and not np.any(found.array(name)):
                continue  # GPTQ tools store biases of zero for layers that have none
            raise ModelError(f"tensor {name[:80]!r} has no place in a GGUF model of its kind", str(found.folder))
        if tensor.shape != slot.shape:
            raise ModelError(f"{name!r} is {tensor.shape}, config.json says {slot.shape}", str(found.folder))
        if packed.get(name) == types[name]:
            yield slot.name, _ordered(gguf_blocks.packed_bytes(found, name), slot)
            continue
        if tensor.stored in checkpoint.DTYPES and not adapters and not slot.heads and len(slot.shape) > 1:
            yield slot.name, _parts(found, name, types[name])
            continue
        array = found.array(name)
        for folder in adapters:
            from edgellm_sdk.kit.adapters import merged

            array = merged(folder, name, array)
        if slot.shift:
            array = array + np.float32(slot.shift)
        yield slot.name, as_type(_ordered(array, slot), types[name], name)


def _parts(found: checkpoint.Checkpoint, name: str, type_name: str) -> Iterator[Array]:
    rows, columns = found.tensors[name].shape
    step = max(1, BYTES_AT_ONCE // (4 * columns))
    for first in range(0, rows, step):
        yield as_type(found.array(name, slice(first, first + step)), type_name, name)


def _ordered(rows: Array, slot: llama_family.Slot) -> Array:
    return llama_family.permute(rows, slot.heads) if slot.heads else np.ascontiguousarray(rows)


def as_type(array: Array, type_name: str, name: str) -> Array:
    """Float weights in storage form: (rows, row bytes) uint8 for blocks, uint16 for BF16, else their own dtype.

    Q8_0 and Q4_0 are rounded as llama.cpp's reference quantisers do. ModelError for weights that are not finite or
    do not fit F16.
    """
    values: Float32 = np.ascontiguousarray(array, np.float32)
    largest = np.maximum(values.max(initial=0), -values.min(initial=0))  # NaN where there is one
    if not np.isfinite(largest):
        raise ModelError(f"{name!r} holds values that are not finite", fix="the model diverged in training")
    if type_name == "F32":
        return values
    if type_name == "F16":
        if largest >= F16_OVERFLOW:
            raise ModelError(f"{name!r} holds values beyond 65504", fix="use --type bf16 or f32")
        return values.astype(np.float16)
    if type_name == "BF16":
        bits = values.view(np.uint32)  # round to nearest, ties to even, on the upper half of the float32
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    parts = [
        blocks.nearest(values[at : at + ROWS_AT_ONCE], type_name.lower()) for at in range(0, len(values), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _census(plan: Sequence[Planned]) -> dict[str, int]:
    """Stored bytes per type."""
    counted: Counter[str] = Counter()
    for tensor in plan:
        counted[tensor.type] += tensor.nbytes
    return dict(counted)


def general(name: str, architecture: str, plan: Sequence[Planned]) -> dict[str, Value]:
    """The `general.*` keys; the file type is the one most weights have."""
    weights: Counter[str] = Counter()
    for tensor in plan:
        if len(tensor.shape) > 1:
            weights[tensor.type] += tensor.shape[0] * tensor.shape[1]
    return {
        "general.architecture": Value("string", architecture),
        "general.type": Value("string", "model"),
        "general.name": Value("string", name),
        "general.file_type": Value("u32", FILE_TYPES[weights.most_common(1)[0][0]]),
        "general.quantization_version": Value("u32", QUANTISATION_VERSION),
    }


def _export_adapter(
    model: ModelHandle, family: llama_family.Llama, target: Path, name: str, config: Config
) -> Artifact:
    if len(model.adapters) != 1:
        raise ConfigError(f"--adapter separate needs one adapter, the model has {len(model.adapters)}", str(model.path))
    if config.type not in ("auto", "f32", "f16"):
        raise ConfigError(f"a GGUF adapter is f32 or f16, not {config.type}")
    folder = model.adapters[0]
    plan, data = gguf_lora.plan(gguf_lora.factors(folder, family), "F16" if config.type == "f16" else "F32")
    facts = gguf_container.write(target, gguf_lora.metadata(folder, name, family), plan, data)
    return _artifact([target], model, {"reader": facts, "kind": "adapter"})


def _modelfile(folder: Path, target: Path, temperature: float) -> Path:
    path = target.with_name(f"{target.stem}.Modelfile")
    text = ollama.modelfile(target.name, gguf_tokenizer.chat_template(folder), (), temperature)
    store.write_bytes(path, text.encode())
    return path


def _artifact(files: list[Path], model: ModelHandle, verified: Mapping[str, Any]) -> Artifact:
    digests = tuple(store.digest_file(file) for file in files)
    return Artifact(tuple(files), digests, "gguf", "llama_cpp", model.digest, verified)

"""Copy a GGUF file while changing something: the seeded faults of the gate's tests and benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from edgellm_sdk.gguf_file import read

_KINDS = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8,
    "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip


@dataclass
class Tensor:
    """`data`: (rows, bytes per row) uint8; `shape`: rows first."""

    data: Any
    type_id: int
    shape: tuple[int, ...]

    @property
    def values(self) -> Any:
        kind = gguf.GGMLQuantizationType(self.type_id)
        if kind == gguf.GGMLQuantizationType.F32:
            return self.data.view("<f4").reshape(self.shape).copy()
        if kind == gguf.GGMLQuantizationType.F16:
            return self.data.view("<f2").astype(np.float32).reshape(self.shape)
        return gguf.quants.dequantize(self.data, kind).reshape(self.shape)

    @values.setter
    def values(self, array: Any) -> None:
        kind = gguf.GGMLQuantizationType(self.type_id)
        rows = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1])
        self.data = np.ascontiguousarray(gguf.quants.quantize(rows, kind)).view(np.uint8).reshape(len(rows), -1)
        self.shape = array.shape


@dataclass
class Draft:
    """A file in memory; `metadata` maps a key to (kind, value)."""

    metadata: dict[str, tuple[str, Any]]
    tensors: dict[str, Tensor]

    def set(self, key: str, value: Any) -> None:
        self.metadata[key] = (self.metadata[key][0], value)


def load(path: Path) -> Draft:
    file = read(path)
    return Draft(
        {key: (file.kinds[key], value) for key, value in file.metadata.items()},
        {
            name: Tensor(np.array(file.tensor_bytes(name)), info.type_id, tuple(reversed(info.shape)))
            for name, info in file.tensors.items()
        },
    )


def save(draft: Draft, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, str(draft.metadata["general.architecture"][1]))
    for key, (kind, value) in draft.metadata.items():
        if key == "general.architecture":
            continue
        if kind.startswith("array"):
            items = list(value) if not hasattr(value, "tolist") else value.tolist()
            inner = gguf.GGUFValueType(_KINDS[kind[6:-1]])
            writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType(_KINDS[kind]))
    for name, tensor in draft.tensors.items():
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            array = tensor.data.view("<f4" if kind == gguf.GGMLQuantizationType.F32 else "<f2").reshape(tensor.shape)
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, tensor.data.reshape(*tensor.shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy(source: Path, target: Path, change: Callable[[Draft], None]) -> Path:
    draft = load(source)
    change(draft)
    return save(draft, target)


def halves(rows: Any, heads: int) -> Any:
    """Undo the interleaving of rotary rows."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows: Any, heads: int) -> Any:
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def kind(draft: Draft) -> str:
    return str(draft.metadata["general.architecture"][1])


def _heads(draft: Draft, name: str) -> int:
    """Heads of a tensor whose rows ggml's llama graph wants as neighbours, else 0."""
    key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[2])
    return int(draft.metadata[f"llama.attention.{key}"][1]) if key and kind(draft) == "llama" else 0


# Faults of the text side and of the layout; each takes a clean file's draft.


def double_bos(draft: Draft) -> None:
    key = "tokenizer.chat_template"
    draft.set(key, "{{ bos_token }}" + draft.metadata[key][1])
    if "tokenizer.ggml.add_bos_token" in draft.metadata:
        draft.set("tokenizer.ggml.add_bos_token", True)


def wrong_template(draft: Draft) -> None:
    draft.set(
        "tokenizer.chat_template",
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    )


def swapped_rope(draft: Draft) -> None:
    """Rows of q and k in the order of the other kind of graph."""
    key = f"{kind(draft)}.attention.head_count"
    q, k = int(draft.metadata[key][1]), int(draft.metadata[f"{key}_kv"][1])
    change = halves if kind(draft) == "llama" else interleaved
    for name, tensor in draft.tensors.items():
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            tensor.data = np.ascontiguousarray(change(tensor.data, q if ".attn_q." in name else k))
        elif ".attn_qkv." in name:
            size = len(tensor.data) // (q + 2 * k)
            both = change(tensor.data[: q * size], q), change(tensor.data[q * size : (q + k) * size], k)
            tensor.data = np.ascontiguousarray(np.concatenate([*both, tensor.data[(q + k) * size :]]))


def wrong_eos(draft: Draft) -> None:
    tokens = draft.metadata["tokenizer.ggml.tokens"][1]
    draft.set("tokenizer.ggml.eos_token_id", next(i for i, text in enumerate(tokens) if text == "e"))


def wrong_block_order(draft: Draft) -> None:
    """Nibbles of 4-bit blocks packed as neighbours instead of as halves."""
    head = {2: 2, 3: 4, 20: 2}
    for tensor in draft.tensors.values():
        if tensor.type_id in head:
            skip = head[tensor.type_id]
            blocks = tensor.data.reshape(-1, skip + 16)
            low, high = blocks[:, skip:] & 15, blocks[:, skip:] >> 4
            order = np.concatenate([low, high], axis=1)
            blocks[:, skip:] = order[:, 0::2] | order[:, 1::2] << 4


def truncated_vocabulary(draft: Draft) -> None:
    """The last sixteen tokens are gone, consistently, so that the file loads."""
    keep = len(draft.metadata["tokenizer.ggml.tokens"][1]) - 16
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in draft.metadata:
            draft.set(key, draft.metadata[key][1][:keep])
    if f"{kind(draft)}.vocab_size" in draft.metadata:
        draft.set(f"{kind(draft)}.vocab_size", keep)
    for name in ("token_embd.weight", "output.weight"):
        if name in draft.tensors:
            tensor = draft.tensors[name]
            draft.tensors[name] = replace(tensor, data=tensor.data[:keep].copy(), shape=(keep, *tensor.shape[1:]))


def wrong_epsilon(draft: Draft) -> None:
    """1e-6 for 1e-5: the usual mistake, and one that hardly moves the logits."""
    key = f"{kind(draft)}.attention.layer_norm_rms_epsilon"
    draft.set(key, draft.metadata[key][1] / 10)


def add_lora(
    folder: Path, base: Path, seed: int, layers: range, spread: float, scale: float, rank: int = 4
) -> dict[str, tuple[Any, Any]]:
    """Write a seeded PEFT LoRA on q (square) and v of `layers` of the HF folder `base`, or on o (square) and the fused
    qkv where there is one; {GGUF name: (A, B)}."""
    draw, tensors, factors = np.random.default_rng(seed), {}, {}
    config = json.loads((base / "config.json").read_text())
    hidden = config["hidden_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    pair = (("q_proj", "attn_q", q), ("v_proj", "attn_v", kv))
    if config["model_type"] == "phi3":
        pair = (("o_proj", "attn_output", hidden), ("qkv_proj", "attn_qkv", q + 2 * kv))
    folder.mkdir()
    for layer in layers:
        for module, short, out in pair:
            a = (spread * draw.standard_normal((rank, hidden))).astype(np.float32)
            b = (spread * draw.standard_normal((out, rank))).astype(np.float32)
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            factors[f"blk.{layer}.{short}.weight"] = (a, b)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "r": rank,
        "lora_alpha": rank * scale, "target_modules": [module for module, _, _ in pair], "bias": "none",
        "layers_to_transform": list(layers),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "edgellm_adapter.json").write_text(json.dumps({"kind": "lora"}))
    return factors


def as_blocks(source: Path, folder: Path, kind: str) -> Path:
    """A copy of an HF folder whose projections are stored as ready blocks of `kind`, as a compression leaves them."""
    from edgellm_sdk.checkpoint import QUANTIZED
    from edgellm_sdk.kit import blocks
    from edgellm_sdk.store import save_arrays

    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "MANIFEST.json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors, packed = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        packed[name] = blocks.nearest(tensors.pop(name).astype(np.float32), kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_arrays(folder / QUANTIZED, packed, {"format": dict.fromkeys(packed, kind)})
    return folder


# Faults of merging. `lora`: {GGUF name: (A (r, in), B (out, r))}, `scale`: what B A is multiplied with.


def _shift(draft: Draft, name: str, delta: Any) -> None:
    """Add `delta`, in the source's row order, to a tensor."""
    heads = _heads(draft, name)
    draft.tensors[name].values = draft.tensors[name].values + (interleaved(delta, heads) if heads else delta)


def dropped_scale(draft: Draft, lora: dict[str, tuple[Any, Any]], scale: float) -> None:
    for name, (a, b) in lora.items():
        _shift(draft, name, (1 - scale) * (b @ a))


def transposed_lora(draft: Draft, lora: dict[str, tuple[Any, Any]], scale: float) -> None:
    for name, (a, b) in lora.items():
        if a.shape[1] == b.shape[0]:
            _shift(draft, name, scale * ((b @ a).T - b @ a))


def unmerged_layer(draft: Draft, lora: dict[str, tuple[Any, Any]], scale: float) -> None:
    last = max(int(name.split(".")[1]) for name in lora)
    for name, (a, b) in lora.items():
        if name.startswith(f"blk.{last}."):
            _shift(draft, name, -scale * (b @ a))


FILE_FAULTS: dict[str, Callable[[Draft], None]] = {
    "double BOS": double_bos,
    "wrong chat template": wrong_template,
    "swapped RoPE permutation": swapped_rope,
    "wrong EOS": wrong_eos,
    "wrong block order": wrong_block_order,
    "truncated vocabulary": truncated_vocabulary,
    "wrong norm epsilon": wrong_epsilon,
}
LORA_FAULTS: dict[str, Callable[[Draft, dict[str, tuple[Any, Any]], float], None]] = {
    "dropped adapter scale": dropped_scale,
    "transposed LoRA": transposed_lora,
    "one layer unmerged": unmerged_layer,
}

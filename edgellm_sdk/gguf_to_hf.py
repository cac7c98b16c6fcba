"""A GGUF file as a model folder: exact float32 weights, configuration, tokenizer, chat template.

The file is read by our own strict reader and decoded with numpy, so no foreign loader meets an untrusted file. What
we cannot convert faithfully (an architecture, a rope scaling, a tokenizer's way of splitting text) is refused: a model
that loads and then speaks in other tokens is worse than none.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import gguf_tokenizer_to_hf, widths
from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.gguf_file import GGUFFile, read
from edgellm_sdk.gguf_tokenizer_to_hf import value
from edgellm_sdk.store import atomic, write_json

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

VERSION = 2
UNEVEN = "deci"  # ggml's llama for layers of different widths
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", UNEVEN: "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM",
}  # fmt: skip
_MODEL_TYPES = {"gemma3": "gemma3_text", UNEVEN: "llama"}
_PERIODS = {"gemma2": 2, "gemma3": 6}  # every n-th layer sees all tokens, unless the file says which
_HIDDEN_OVER_HEADS = {"gemma2": 46, "gemma3": 62}  # depth at which the engine scales attention by that
_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_LAYERS: Mapping[str, dict[str, str]] = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    **dict.fromkeys(_PERIODS, {
        "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }),
}  # fmt: skip


def convert(source: Path, folder: Path, progress: Callable[[float, str], None]) -> None:
    """Write the model in the GGUF file `source` into the existing, empty `folder`. ModelError for what it cannot."""
    file = read(source)
    arch = value(file, "general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"has the architecture {printable(arch[:30])!r}; {known} can be converted", str(source))
    config = _config(file, arch)
    tokens = gguf_tokenizer_to_hf.convert(file, folder)
    if tokens != config["vocab_size"]:
        raise ModelError(f"has {tokens} tokens for {config['vocab_size']} embeddings", str(source))
    _weights(file, arch, config, folder / "model.safetensors", progress)
    write_json(folder / "config.json", config)


def _short(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(file: GGUFFile, arch: str) -> dict[str, Any]:
    hidden = value(file, f"{arch}.embedding_length", int)
    rows = _each_layer(file, arch)
    heads = rows[0].heads
    if not 0 < heads <= hidden:
        raise ModelError(f"has {heads} heads for a width of {hidden}", str(file.path))
    head = value(file, f"{arch}.attention.key_length", int, hidden // heads)
    experts = file.metadata.get(f"{arch}.expert_count", 0)
    if experts or "rope_freqs.weight" in file.tensors:
        what = "experts" if experts else "a rope scaling by a table"
        raise ModelError(f"uses {what}, which is not converted yet", str(file.path), "give the model's HF folder")
    if "token_embd.weight" not in file.tensors:
        raise ModelError("has no tensor 'token_embd.weight'", str(file.path))
    rope = _rope(file, arch, head)
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": _MODEL_TYPES.get(arch, arch),
        "hidden_size": hidden,
        "intermediate_size": rows[0].ffn,
        "num_hidden_layers": value(file, f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": rows[0].kv_heads,
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": value(file, f"{arch}.context_length", int),
        "rms_norm_eps": _short(value(file, f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "vocab_size": file.tensors["token_embd.weight"].shape[1],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": "float32",
    }
    for name in ("bos", "eos", "padding"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int or arch in ("phi3", *_PERIODS):  # whose defaults are ids of another vocabulary
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    if arch == "phi3":
        config["original_max_position_embeddings"] = value(
            file, "phi3.rope.scaling.original_context_length", int, config["max_position_embeddings"]
        )
        config["sliding_window"] = file.metadata.get("phi3.attention.sliding_window") or None
    if arch in _PERIODS:
        config |= _gemma(file, arch, config)
    if widths.uneven(rows):  # transformers wants heads that divide the width, which any layer's own need not
        full = max(rows, key=lambda row: row.heads)
        config |= {"num_attention_heads": hidden // head, "num_key_value_heads": full.kv_heads}
        config = widths.written(config, rows)
        widths.read(config, str(file.path))
    return config


def _each_layer(file: GGUFFile, arch: str) -> list[widths.Widths]:
    """The widths of every layer. ModelError unless a key holds one number above 0, or in `deci` one for each layer."""
    layers = value(file, f"{arch}.block_count", int)
    if not 0 < layers <= len(file.tensors):
        raise ModelError(f"says it has {layers} layers, but holds {len(file.tensors)} tensors", str(file.path))
    columns: list[list[int]] = []
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if key == "attention.head_count_kv" and f"{arch}.{key}" not in file.metadata:
            columns.append(columns[0])
            continue
        stored: Any = file.metadata.get(f"{arch}.{key}")
        numbers = stored.tolist() if arch == UNEVEN and hasattr(stored, "tolist") else []
        if len(numbers) == layers and all(type(number) is int for number in numbers):
            columns.append(numbers)
        else:
            columns.append([value(file, f"{arch}.{key}", int)] * layers)
    return [widths.Widths(*row) for row in zip(*columns, strict=True)]


def _gemma(file: GGUFFile, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Soft caps, windows, the scale of attention and, for gemma3, the rotary base of layers with a window."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    window = file.metadata.get(f"{arch}.attention.sliding_window", 4096 if arch == "gemma2" else 0)
    pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern", _PERIODS[arch])
    if type(pattern) is int:
        slides = [(i + 1) % max(1, pattern) != 0 for i in range(layers)]
    else:
        slides = [bool(each) for each in pattern]
    if type(window) is not int or len(slides) != layers:
        raise ModelError("has a sliding window that does not fit its layers", str(file.path))
    wide = layers == _HIDDEN_OVER_HEADS[arch]
    caps = {name: file.metadata.get(f"{arch}.{name}_logit_softcapping") for name in ("attn", "final")}
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if wide else config["head_dim"],
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if each and window else "full_attention" for each in slides],
        **{f"{name}_logit_softcapping": _short(cap) if cap else None for name, cap in caps.items()},
    }
    if arch == "gemma2":
        return found | {"tie_word_embeddings": True}
    local = _short(value(file, "gemma3.rope.freq_base_swa", float, 10000.0))
    nested = {"sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return found | {"rope_parameters": {**nested, "full_attention": config["rope_parameters"]}}


def _rope(file: GGUFFile, arch: str, head: int) -> dict[str, Any]:
    """`rope_parameters`. ModelError for a scaling that is not converted."""

    def said(key: str) -> float | None:
        name = f"{arch}.rope.scaling.{key}"
        return _short(value(file, name, float)) if name in file.metadata else None

    rope: dict[str, Any] = {
        "rope_type": file.metadata.get(f"{arch}.rope.scaling.type", "none"),
        "rope_theta": _short(value(file, f"{arch}.rope.freq_base", float, 10000.0)),
    }
    rotated = value(file, f"{arch}.rope.dimension_count", int, head)
    if "rope_factors_long.weight" in file.tensors:
        rope["rope_type"] = "longrope"
        for kind in ("long", "short"):
            values = file.tensor_bytes(f"rope_factors_{kind}.weight").view("<f4").ravel()
            rope[f"{kind}_factor"] = [_short(each) for each in values]
        rope["original_max_position_embeddings"] = said("original_context_length")
        rope["attention_factor"] = said("attn_factor") or 1.0
    elif rope["rope_type"] in ("linear", "yarn"):
        rope["factor"] = said("factor")
        if rope["rope_type"] == "yarn":
            rope["original_max_position_embeddings"] = said("original_context_length")
            pairs = (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"))
            rope |= {theirs: said(ours) for theirs, ours in pairs if said(ours) is not None}
            usual = 0.1 * math.log(rope["factor"] or 1.0) + 1
            if said("attn_factor") is not None:
                rope["attention_factor"] = usual * (said("attn_factor") or 1.0)
    elif rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    known = rope["rope_type"] in ("default", "linear", "yarn", "longrope")
    if (
        not known
        or (rotated != head and arch != "phi3")
        or (rope["rope_type"] == "longrope") != ("rope_factors_long.weight" in file.tensors)
    ):
        what = "uses a rope scaling or partial rotation, which is not converted yet"
        raise ModelError(what, str(file.path), "give the model's HF folder")
    if rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    return rope


def _hf_name(name: str, layers: int, arch: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem, re.ASCII)
    named = _LAYER | _OTHER_LAYERS.get(arch, {})
    if match and match[2] in named and int(match[1]) < layers:
        return f"model.layers.{int(match[1])}.{named[match[2]]}.{kind}"
    return None


def _weights(
    file: GGUFFile, arch: str, config: Mapping[str, Any], target: Path, progress: Callable[[float, str], None]
) -> None:
    """Decode tensor by tensor into one safetensors file, so only one is in memory at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    names: dict[str, str] = {}
    for name in file.tensors:
        if name.startswith("rope_factors_"):
            continue  # read with the configuration
        known = _hf_name(name, config["num_hidden_layers"], arch)
        if known is None:
            raise ModelError(f"has the tensor {printable(name)!r}, which this architecture does not", str(file.path))
        names[known] = name
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for known in sorted(names):
        shape = list(reversed(file.tensors[names[known]].shape))
        size = 4 * int(np.prod(shape))
        header[known] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rows = widths.read(config, str(file.path)) if arch in ("llama", UNEVEN) else ()
    with atomic(target) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for done, known in enumerate(sorted(names)):
            info = file.tensors[names[known]]
            try:
                raw = file.tensor_bytes(info.name)
                values = dequantize(_typed(raw, info.type), GGMLQuantizationType(info.type_id))
            except (NotImplementedError, ValueError, KeyError):
                raise ModelError(f"{info.name} is {info.type}, which cannot be decoded", str(file.path)) from None
            values = np.ascontiguousarray(values, "<f4").reshape(header[known]["shape"])
            if not np.isfinite(values).all():
                raise ModelError(f"{info.name} holds values that are not finite", str(file.path))
            part = known.split(".")[-2]
            if rows and part in ("q_proj", "k_proj"):
                row = rows[int(known.split(".")[2])]
                values = _unpermute(values, row.heads if part == "q_proj" else row.kv_heads, file.path)
            if arch in _PERIODS and part.endswith("norm"):
                values = values - np.float32(1)
            out.write(np.ascontiguousarray(values).data)
            progress((done + 1) / len(names), f"decoding {known}")


def _typed(raw: Array, kind: str) -> Array:
    """gguf's decoder wants plain floats as floats and everything else as bytes."""
    plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    return raw.view(plain[kind]) if kind in plain else raw


def _unpermute(values: Array, heads: int, path: Path) -> Array:
    """Undo the row order in which llama.cpp keeps q and k of Llama models: (pairs, 2) back to (2, pairs) per head."""
    import numpy as np

    rows = values.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise ModelError(f"{rows} rows do not divide into {heads} heads", str(path))
    return np.asarray(values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2)).reshape(
        values.shape
    )

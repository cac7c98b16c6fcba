"""A GGUF file as a model folder: exact float32 weights, configuration, tokenizer, chat template.

The file is read by our own strict reader and decoded with numpy, so no foreign loader meets an untrusted file. What
we cannot convert faithfully (an architecture, a rope scaling, a tokenizer's way of splitting text) is refused: a model
that loads and then speaks in other tokens is worse than none.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import widths
from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.gguf_file import GGUFFile, read
from edgellm_sdk.store import atomic, write_bytes, write_json

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

VERSION = 1
UNEVEN = "deci"  # ggml's llama for layers of different widths
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    UNEVEN: "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
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
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}


def _regex(digits: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_GPT2, "use_regex": False}]}


# How each kind of tokenizer cuts text before merging, by llama.cpp's name for it.
SPLITTERS: Mapping[str, dict[str, Any]] = {
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "gpt-2": _GPT2,
    "llama-bpe": _regex(r"\p{N}{1,3}"),
    "llama3": _regex(r"\p{N}{1,3}"),
    "qwen2": _regex(r"\p{N}"),
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3")


def convert(source: Path, folder: Path, progress: Callable[[float, str], None]) -> None:
    """Write the model in the GGUF file `source` into the existing, empty `folder`. ModelError for what it cannot."""
    file = read(source)
    arch = _value(file, "general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"has the architecture {printable(arch[:30])!r}; {known} can be converted", str(source))
    config = _config(file, arch)
    tokens = _tokenizer(file, folder)
    if tokens != config["vocab_size"]:
        raise ModelError(f"has {tokens} tokens for {config['vocab_size']} embeddings", str(source))
    _weights(file, arch, config, folder / "model.safetensors", progress)
    write_json(folder / "config.json", config)


def _value(file: GGUFFile, key: str, kind: type, default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ModelError(f"lacks the {kind.__name__} {key!r}", str(file.path))
    return value


def _short(value: float) -> float:
    """The shortest decimal with the same float32: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(file: GGUFFile, arch: str) -> dict[str, Any]:
    hidden = _value(file, f"{arch}.embedding_length", int)
    rows = _each_layer(file, arch)
    heads = rows[0].heads
    if not 0 < heads <= hidden:
        raise ModelError(f"has {heads} heads for a width of {hidden}", str(file.path))
    head = _value(file, f"{arch}.attention.key_length", int, hidden // heads)
    rotated = _value(file, f"{arch}.rope.dimension_count", int, head)
    scaling = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    experts = file.metadata.get(f"{arch}.expert_count", 0)
    if rotated != head or scaling != "none" or experts or "rope_freqs.weight" in file.tensors:
        what = "experts" if experts else "a rope scaling or partial rotation"
        raise ModelError(f"uses {what}, which is not converted yet", str(file.path), "give the model's HF folder")
    if "token_embd.weight" not in file.tensors:
        raise ModelError("has no tensor 'token_embd.weight'", str(file.path))
    base = _short(_value(file, f"{arch}.rope.freq_base", float, 10000.0))
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": "llama" if arch == UNEVEN else arch,
        "hidden_size": hidden,
        "intermediate_size": rows[0].ffn,
        "num_hidden_layers": _value(file, f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": rows[0].kv_heads,
        "head_dim": head,
        "hidden_act": "silu",
        "max_position_embeddings": _value(file, f"{arch}.context_length", int),
        "rms_norm_eps": _short(_value(file, f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "vocab_size": file.tensors["token_embd.weight"].shape[1],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": "float32",
    }
    for name in ("bos", "eos", "padding"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = token
    if widths.uneven(rows):  # transformers wants heads that divide the width, which any layer's own need not
        full = max(rows, key=lambda row: row.heads)
        config |= {"num_attention_heads": hidden // head, "num_key_value_heads": full.kv_heads}
        config = widths.written(config, rows)
        widths.read(config, str(file.path))
    return config


def _each_layer(file: GGUFFile, arch: str) -> list[widths.Widths]:
    """The widths of every layer. ModelError unless a key holds one number above 0, or in `deci` one for each layer."""
    layers = _value(file, f"{arch}.block_count", int)
    if not 0 < layers <= len(file.tensors):
        raise ModelError(f"says it has {layers} layers, but holds {len(file.tensors)} tensors", str(file.path))
    columns: list[list[int]] = []
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if key == "attention.head_count_kv" and f"{arch}.{key}" not in file.metadata:
            columns.append(columns[0])
            continue
        value: Any = file.metadata.get(f"{arch}.{key}")
        numbers = value.tolist() if arch == UNEVEN and hasattr(value, "tolist") else []
        if len(numbers) == layers and all(type(number) is int for number in numbers):
            columns.append(numbers)
        else:
            columns.append([_value(file, f"{arch}.{key}", int)] * layers)
    return [widths.Widths(*row) for row in zip(*columns, strict=True)]


def _hf_name(name: str, layers: int) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem, re.ASCII)
    if match and match[2] in _LAYER and int(match[1]) < layers:
        return f"model.layers.{int(match[1])}.{_LAYER[match[2]]}.{kind}"
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
        known = _hf_name(name, config["num_hidden_layers"])
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


def _tokenizer(file: GGUFFile, folder: Path) -> int:
    """Write tokenizer.json and its companions; the number of tokens. ModelError for an unknown kind."""
    where = str(file.path)
    kind, pre = _value(file, "tokenizer.ggml.model", str), file.metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in SPLITTERS:
        what = printable(f"{kind}/{pre}"[:40])
        raise ModelError(f"has a tokenizer of kind {what!r}, which is not converted", where, "give its HF folder")
    tokens = _value(file, "tokenizer.ggml.tokens", list)
    merges = _value(file, "tokenizer.ggml.merges", list)
    kinds = [int(k) for k in file.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges]
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise ModelError("has a token twice, a token without a kind or a broken merge", where)
    if any(part not in vocabulary for pair in pairs for part in (*pair, pair[0] + pair[1])):
        raise ModelError("has a merge whose parts are no tokens", where)
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kinds[i] == _CONTROL}
        for i, token in enumerate(tokens)
        if kinds[i] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    special: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(token) is int:
            if not 0 <= token < len(tokens):
                raise ModelError(f"has the {ours} token {token} of {len(tokens)}", where)
            special[f"{ours}_token"] = tokens[token]
    add_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", False)) and "bos_token" in special
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": _NORMALIZERS.get(pre),
            "pre_tokenizer": SPLITTERS[pre],
            "post_processor": _post(special["bos_token"], vocabulary) if add_bos else None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": pre in _WHOLE_WORDS_FIRST, "vocab": vocabulary, "merges": pairs,
            },
        },
    )  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(file, f"{file.metadata['general.architecture']}.context_length", int),
        "add_bos_token": add_bos,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_bytes(folder / "chat_template.jinja", template.encode())
    stops = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = sorted({token for token in stops if type(token) is int})
    generation = {"bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": ids}
    write_json(folder / "generation_config.json", {key: value for key, value in generation.items() if value})
    return len(tokens)


def _post(bos: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], {"SpecialToken": {"id": bos, "type_id": 1}}, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
    }

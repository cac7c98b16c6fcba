"""What a model's source says about itself against what an exported GGUF file says: hyper-parameters and weights.

The gate's first half. It knows the file formats only, not our exporter: names and the rotary row order are written
down a second time here, on purpose, so that one mistake cannot hide behind itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import widths
from edgellm_sdk.store import read_json

if TYPE_CHECKING:
    from edgellm_sdk.gguf_file import GGUFFile
    from edgellm_sdk.types import Array, Float32, ModelHandle

Facts = Mapping[str, Any]
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
_GEMMA_LAYER = _LAYER | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}  # fmt: skip
_UNEVEN = "deci"  # ggml's llama for layers of different widths
_INTERLEAVED = ("llama", _UNEVEN)
_GEMMA = ("gemma2", "gemma3")  # gains are stored plus one, windows and soft caps are applied
_COMPUTED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # from the configuration
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NUMBERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
# A Frobenius distance above these, relative to the tensor, is another tensor and not a rounding. Types whose rounding
# rule is fixed are first rounded the same way, so only flips at ties are left; the others get their usual loss, twice.
_EXACT = {"F32": 1e-6, "F16": 1e-4, "BF16": 1e-4, "Q8_0": 2e-3, "Q5_0": 5e-3, "Q5_1": 5e-3, "Q4_0": 5e-3, "Q4_1": 5e-3}
_LOSSY = {"Q6_K": 0.04, "Q5_K": 0.08, "Q4_K": 0.15, "IQ4_NL": 0.2, "IQ4_XS": 0.2, "Q3_K": 0.3, "Q2_K": 0.5}
_LOSSIEST = 0.8
# With an importance matrix the engine searches scales for these types too: their usual loss, twice.
_WEIGHTED = {"Q8_0": 0.02, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_0": 0.25, "Q4_1": 0.2}
_IMATRIX = "quantize.imatrix.entries_count"


def expected_facts(handle: ModelHandle) -> dict[str, Any]:
    """What a file exported from `handle` must say, by GGUF key without the architecture's name.

    From `config.json`, the tokenizer's files and the chat template of an HF folder, or from the GGUF it came from.
    `eos` and `bos` hold every id that is allowed; a key that the source leaves open is absent.
    """
    if handle.format == "gguf":
        from edgellm_sdk.gguf_file import read

        facts = found_facts(read(handle.path))
        return {**facts, **{name: (facts[name],) for name in ("eos", "bos") if name in facts}}
    folder = handle.path
    config = read_json(folder / "config.json")
    facts = {ours: config[theirs] for ours, theirs in _NUMBERS.items() if config.get(theirs) is not None}
    kind = ARCHITECTURES.get(str((config.get("architectures") or [""])[0]))
    if kind:
        facts["architecture"] = kind
    facts |= _attention_facts(config, kind) | _rope_facts(config)
    if config.get(widths.TABLE):
        facts |= _each_layer(widths.read(config, str(folder)))
    facts |= _tokenizer_facts(folder, config)
    return facts


def _attention_facts(config: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Heads, their sizes and, where the engine applies them, windows and soft caps."""
    facts: dict[str, Any] = {}
    heads = config.get("num_attention_heads")
    if heads:
        size = config.get("head_dim") or config.get("hidden_size", 0) // heads
        rope = config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
        facts["attention.head_count_kv"] = config.get("num_key_value_heads") or heads
        facts["attention.key_length"] = facts["attention.value_length"] = size
        facts["rope.dimension_count"] = int(size * (share or config.get("partial_rotary_factor") or 1))
    if kind in _GEMMA:
        for theirs, ours in (
            ("sliding_window", "attention.sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ):
            if config.get(theirs):
                facts[ours] = config[theirs]
        if "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
            facts.pop("attention.sliding_window", None)
    return facts


def _each_layer(rows: Sequence[widths.Widths]) -> dict[str, Any]:
    """Widths as a file states them: one number, or an array where layers differ in any of the three."""
    columns = zip(*((row.ffn, row.heads, row.kv_heads) for row in rows), strict=True)
    names = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    uneven = widths.uneven(rows)
    found = {name: list(column) if uneven else column[0] for name, column in zip(names, columns, strict=True)}
    return found | ({"architecture": _UNEVEN} if uneven else {})


def _rope_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bases and, for the kinds that are keys, the scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {}
    facts: dict[str, Any] = {}
    local = config.get("rope_local_base_freq")
    if isinstance(rope.get("full_attention"), dict):
        local = (rope.get("sliding_attention") or {}).get("rope_theta", local)
        rope = rope["full_attention"]
    for base, key in ((rope.get("rope_theta", config.get("rope_theta")), "freq_base"), (local, "freq_base_swa")):
        if base is not None:
            facts[f"rope.{key}"] = float(base)
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        facts |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.get("factor", 0))}
    return facts


def _optional(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _token_id(tokenizer: Mapping[str, Any], text: Any) -> int | None:
    """The id of a special token given as text or as {"content": text}."""
    text = text.get("content") if isinstance(text, dict) else text
    for token in tokenizer.get("added_tokens") or ():
        if token.get("content") == text:
            return int(token["id"])
    found = (tokenizer.get("model") or {}).get("vocab")
    return found.get(text) if isinstance(found, dict) and isinstance(text, str) else None


def _tokenizer_facts(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer, settings = _optional(folder / "tokenizer.json"), _optional(folder / "tokenizer_config.json")
    generation = _optional(folder / "generation_config.json")
    facts: dict[str, Any] = {}
    for name in ("eos", "bos"):
        allowed: set[int] = set()
        for value in (generation.get(f"{name}_token_id"), config.get(f"{name}_token_id")):
            allowed.update([value] if isinstance(value, int) else value or [])
        named = _token_id(tokenizer, settings.get(f"{name}_token"))
        if named is not None:  # what the tokenizer names is what the file must name
            allowed = {named}
        if allowed:
            facts[name] = tuple(sorted(allowed))
    template = folder / "chat_template.jinja"
    if template.exists():
        facts["chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), str):
        facts["chat_template"] = settings["chat_template"]
    return facts


def found_facts(file: GGUFFile) -> dict[str, Any]:
    """The same keys from a GGUF file, those it leaves out as the engine takes them. `vocab_size` is the number of
    tokens it lists."""
    metadata = file.metadata
    kind = str(metadata.get("general.architecture", ""))
    facts: dict[str, Any] = {"architecture": kind, "rope.freq_base": 10000.0}
    facts |= {
        key[len(kind) + 1 :]: value.tolist() if hasattr(value, "tolist") else value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }
    heads, width = facts.get("attention.head_count"), facts.get("embedding_length")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        for key in ("attention.key_length", "attention.value_length"):
            facts.setdefault(key, width // heads)
        facts.setdefault("rope.dimension_count", facts["attention.key_length"])
    facts["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[-1] != facts["vocab_size"]:
        facts["vocab_size"] = f"{facts['vocab_size']} tokens but {embedding.shape[-1]} embeddings"
    for name, key in (("eos", "tokenizer.ggml.eos_token_id"), ("bos", "tokenizer.ggml.bos_token_id")):
        if key in metadata:
            facts[name] = int(metadata[key])
    if "tokenizer.chat_template" in metadata:
        facts["chat_template"] = str(metadata["tokenizer.chat_template"])
    if metadata.get("tokenizer.ggml.model", "gpt2") == "gpt2" and "tokenizer.ggml.pre" in metadata:
        facts["pre"] = str(metadata["tokenizer.ggml.pre"])  # the others have no rules to choose from
    if "tokenizer.ggml.add_bos_token" in metadata:
        facts["add_bos"] = bool(metadata["tokenizer.ggml.add_bos_token"])
    return facts


def differences(expected: Facts, found: Facts) -> list[str]:
    """One phrase for each expected fact that the file contradicts or leaves out, in the order of `expected`."""
    problems = []
    for name, want in expected.items():
        have = found.get(name)
        if name == "add_bos" and have is None:
            continue  # the engine's default for the tokenizer; the token-id check sees what it does
        if name in ("eos", "bos"):
            same = have in want
        elif isinstance(want, float) and isinstance(have, (int, float)):
            same = abs(want - have) <= 1e-6 * abs(want)  # the file holds float32
        else:
            same = have == want
        if not same:
            problems.append(f"{name} is {_short(have)}, not {_short(want)}")
    if found.get("pre") == "default" and expected.get("pre") != "default":
        problems.append("the pre-tokenizer is llama.cpp's default, which splits no known model's text right")
    return problems


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    text = "absent" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def gguf_name(name: str, architecture: str = "llama") -> str | None:
    """The GGUF name of a transformers tensor in a file of this architecture, or None for an unknown one."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    layer = _GEMMA_LAYER if architecture in _GEMMA else _LAYER
    if match and match[2] in layer:
        return f"blk.{match[1]}.{layer[match[2]]}.{kind}"
    return None


def interleave(rows: Array, heads: int) -> Array:
    """Rows of q or k from half-split to interleaved rotary order: (heads * d, ...), the same shape."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _interleaved_heads(file: GGUFFile, name: str) -> int:
    """The heads of the tensor `name` where ggml keeps its rows in interleaved order: those of its `llama` graph, which
    is `deci` where layers differ. 0 elsewhere."""
    kind, parts = file.metadata.get("general.architecture"), name.split(".")
    key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(parts[-2])
    found = file.metadata.get(f"{kind}.attention.{key}", 0) if key and kind in _INTERLEAVED else 0
    return int(found[int(parts[1])] if hasattr(found, "__getitem__") else found)


@dataclass(frozen=True)
class WeightReport:
    """`compared` tensors; the `worst` of them by distance / bound with that `ratio`; `rounded`, the types that do not
    hold the source's weights bit for bit; `problems` in words. `ratio` <= 1 and no problems is a pass."""

    compared: int
    worst: str
    ratio: float
    rounded: tuple[str, ...]
    problems: tuple[str, ...]


def compare_weights(handle: ModelHandle, file: GGUFFile) -> WeightReport | None:
    """Every tensor of the file against the source's, one at a time. None for architectures that are not in the table.

    A tensor passes when it decodes to the source's weights or to what its type's rounding makes of them.
    """
    import numpy as np

    kind = str(file.metadata.get("general.architecture"))
    if kind not in (*ARCHITECTURES.values(), _UNEVEN) or handle.format != "hf":
        return None
    problems, seen, rounded, worst, ratio = [], set[str](), set[str](), "", 0.0
    for name, array in handle.tensors():
        target = gguf_name(name, kind)
        if target == "output.weight" and target not in file.tensors:
            continue  # tied: the loader takes the embedding
        if name.endswith("rotary_emb.inv_freq") or (
            name.endswith(".bias") and target not in file.tensors and not np.any(array)
        ):
            continue  # constants, and the zero biases that quantisers store for layers without any
        if target is None or target not in file.tensors:
            problems.append(f"{name} is not in the file")
            continue
        seen.add(target)
        want = np.asarray(array, dtype=np.float32)
        part = target.split(".")[-2]
        if kind in _GEMMA and part.endswith("norm"):
            want = want + np.float32(1)
        if heads := _interleaved_heads(file, target):
            want = interleave(want, heads)
        info = file.tensors[target]
        if tuple(reversed(info.shape)) != want.shape:
            problems.append(f"{target} has shape {info.shape[::-1]}, not {want.shape}")
            continue
        distance, exact = _distance(file, target, want)
        if not exact:
            rounded.add(info.type)
        known = {**_EXACT, **_LOSSY, **(_WEIGHTED if _IMATRIX in file.metadata else {})}
        bound = known.get(info.type, _LOSSIEST)
        if not distance / bound <= ratio:
            worst, ratio = f"{target} ({info.type}) is off by {distance:.2g}, bound {bound:g}", distance / bound
    extra = sorted(set(file.tensors) - seen - _COMPUTED)
    problems += [f"{name} has no source" for name in extra]
    return WeightReport(len(seen), worst, ratio, tuple(sorted(rounded)), tuple(problems))


def compare_adapter(folder: Path | None, base: GGUFFile, file: GGUFFile) -> WeightReport:
    """Both factors of every matrix in a LoRA folder (None: an empty one) against those of an adapter file for `base`,
    alpha / r in B."""
    import numpy as np

    from edgellm_sdk.kit import adapters

    kind = str(base.metadata.get("general.architecture"))
    problems, seen, rounded, worst, ratio = [], set[str](), set[str](), "", 0.0
    for name, array in (adapters.arrays(folder) if folder is not None else {}).items():
        module, _, side = name.rpartition(".lora_")
        stem = gguf_name(f"{module}.weight", kind)
        target = f"{stem}.lora_{side.lower()}"
        if stem is None or target not in file.tensors:
            problems.append(f"{name} is not in the file")
            continue
        seen.add(target)
        want, info = np.asarray(array, np.float32), file.tensors[target]
        if side == "B" and folder is not None:
            rank = want.shape[1]
            want = want * np.float32(adapters.lora_scale(folder, module) * rank / file.metadata["adapter.lora.alpha"])
            heads = _interleaved_heads(base, stem)
            want = interleave(want, heads) if heads else want
        if tuple(reversed(info.shape)) != want.shape:
            problems.append(f"{target} has shape {info.shape[::-1]}, not {want.shape}")
            continue
        distance, exact = _distance(file, target, want)
        if not exact:
            rounded.add(info.type)
        bound = _EXACT.get(info.type, _LOSSIEST)
        if not distance / bound <= ratio:
            worst, ratio = f"{target} ({info.type}) is off by {distance:.2g}, bound {bound:g}", distance / bound
    problems += [f"{name} has no source" for name in sorted(set(file.tensors) - seen)]
    return WeightReport(len(seen), worst, ratio, tuple(sorted(rounded)), tuple(problems))


def _distance(file: GGUFFile, name: str, want: Float32) -> tuple[float, bool]:
    """(relative Frobenius distance to the source or to its rounding, the smaller; whether it is the source exactly)."""
    import gguf
    import numpy as np

    info = file.tensors[name]
    kind = gguf.GGMLQuantizationType(info.type_id)
    have = decode(file.tensor_bytes(name), info.type_id).reshape(want.shape)
    if np.array_equal(have, want):
        return 0.0, True
    size = float(np.linalg.norm(want)) or 1.0
    distance = float(np.linalg.norm(have - want)) / size
    if info.type in _EXACT and info.type != "F32" and np.isfinite(want).all():
        rounded = gguf.quants.dequantize(gguf.quants.quantize(want, kind), kind)
        distance = min(distance, float(np.linalg.norm(have - rounded.reshape(want.shape))) / size)
    return (distance if np.isfinite(distance) else float("inf")), False


def decode(raw: Array, type_id: int) -> Float32:
    """Stored rows (rows, bytes) uint8 of any GGUF tensor type -> (rows, columns) float32."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType(type_id)
    if kind == gguf.GGMLQuantizationType.F32:
        return raw.view("<f4").astype(np.float32, copy=False)
    if kind == gguf.GGMLQuantizationType.F16:
        return raw.view("<f2").astype(np.float32)
    return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)


def tensor_types(file: GGUFFile) -> dict[str, int]:
    """Weights stored in each type, matrices only: {"Q4_0": 106168320, ...}."""
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) > 1:
            counts[info.type] = counts.get(info.type, 0) + info.parameters
    return counts

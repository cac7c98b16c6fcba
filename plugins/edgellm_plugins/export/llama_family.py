"""The Llama family in GGUF: tensor names, hyper-parameters, rotary embedding.

Sources: the GGUF specification for the keys, ggml's `llama` graph for what they mean. The rotary embedding of
transformers rotates the two halves of a head against each other, ggml's rotates neighbours; so the rows of q and k are
written in another order: row 2i of a head is row i of the first half, row 2i + 1 row i of the second. Attention scores
do not change, because q and k change alike.

ggml's `llama` graph takes the head counts of layer 0 for all layers. A model whose layers differ in width is written as
`deci`, the same block with `attention.head_count`, `attention.head_count_kv` and `feed_forward_length` as arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export.gguf_container import Value
from edgellm_sdk import widths
from edgellm_sdk.checkpoint import read_json
from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from edgellm_sdk.types import Array, Float32

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
GGUF_ARCHITECTURE = "llama"
UNEVEN_ARCHITECTURE = "deci"


@dataclass(frozen=True)
class Llama:
    """The hyper-parameters of one model. `head_dim_given`: the config names it, so the file must too. Where layers
    differ in `ffn`, `heads` and `kv_heads`, `per_layer` has those of each."""

    where: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_given: bool
    vocabulary: int
    context: int
    epsilon: float
    rope_base: float
    rope_type: str
    rope: Mapping[str, Any]
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    per_layer: tuple[widths.Widths, ...] = ()

    @property
    def architecture(self) -> str:
        """Its name in the file."""
        return UNEVEN_ARCHITECTURE if self.per_layer else GGUF_ARCHITECTURE

    def width(self, layer: int) -> widths.Widths:
        """The widths of layer 0, 1, ..."""
        return self.per_layer[layer] if self.per_layer else widths.Widths(self.heads, self.kv_heads, self.ffn)


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: GGUF name, shape (rows first), and the heads whose rows are reordered (0 = none)."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def read(folder: Path) -> Llama:
    """Hyper-parameters from `config.json`; ModelError with the reason for a model this family cannot express."""
    path = folder / "config.json"
    config, where = read_json(path), str(path)
    named = config.get("architectures")
    named = named[0] if isinstance(named, list) and named else "unknown"
    if named not in ARCHITECTURES:
        raise ModelError(f"{printable(str(named))[:60]} cannot be exported yet", where, "Llama models can")

    def whole(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not a positive whole number", where)
        return value

    def flag(key: str) -> bool:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not true or false", where)
        return bool(value)

    def refuse(key: str, *allowed: Any) -> None:
        if config.get(key) not in allowed:
            raise ModelError(f"{key} = {printable(repr(config[key]))[:40]} has no counterpart in GGUF llama", where)

    refuse("hidden_act", None, "silu")
    refuse("sliding_window", None)
    refuse("is_causal", None, True)
    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    layers = widths.read(config, where)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError("rope_parameters is not a table", where)
    kind = str(rope.get("rope_type", rope.get("type", "default"))).lower()
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"rotary scaling {printable(kind)[:40]!r} is not supported", where, "default, linear, llama3")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ModelError("rotates only part of a head, which is not supported", where)
    base: Any = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    epsilon: Any = config.get("rms_norm_eps", 1e-6)
    for key, value in (("rope_theta", base), ("rms_norm_eps", epsilon)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not a positive number", where)
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden size {hidden} is no multiple of {heads} heads", where)
    model = Llama(
        where=where, layers=len(layers), hidden=hidden, ffn=layers[0].ffn, heads=layers[0].heads,
        kv_heads=layers[0].kv_heads, head_dim=whole("head_dim", hidden // heads),
        head_dim_given=config.get("head_dim") is not None, vocabulary=whole("vocab_size"),
        context=whole("max_position_embeddings"), epsilon=float(epsilon), rope_base=float(base), rope_type=kind,
        rope=rope, tied=flag("tie_word_embeddings"),
        attention_bias=flag("attention_bias"), mlp_bias=flag("mlp_bias"),
        per_layer=layers if widths.uneven(layers) else (),
    )  # fmt: skip
    if model.head_dim % 2:
        raise ModelError(f"heads of {model.head_dim} cannot be rotated in pairs", where)
    if kind != "default":
        rope_number(model, "factor")
    return model


def rope_number(model: Llama, key: str, default: float | None = None) -> float:
    """A positive number among the rotary parameters; ModelError when it is missing or no number."""
    value = model.rope.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"rotary parameter {key} is {printable(repr(value))[:40]}", model.where)
    return float(value)


def slots(model: Llama) -> dict[str, Slot]:
    """Every tensor the model must have, by its transformers name, in file order."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
    found: dict[str, Slot] = {}

    def add(name: str, shape: tuple[int, ...], heads: int = 0) -> None:
        found[name] = Slot(names.get_name(name, try_suffixes=(".weight", ".bias")), shape, heads)

    add("model.embed_tokens.weight", (model.vocabulary, model.hidden))
    for i in range(model.layers):
        layer = f"model.layers.{i}"
        add(f"{layer}.input_layernorm.weight", (model.hidden,))
        for module, rows, columns, heads, bias in _modules(model, model.width(i)):
            add(f"{layer}.{module}.weight", (rows, columns), heads)
            if bias:
                add(f"{layer}.{module}.bias", (rows,), heads)
        add(f"{layer}.post_attention_layernorm.weight", (model.hidden,))
    add("model.norm.weight", (model.hidden,))
    if not model.tied:
        add("lm_head.weight", (model.vocabulary, model.hidden))
    return found


def _modules(model: Llama, width: widths.Widths) -> list[tuple[str, int, int, int, bool]]:
    """The linear layers of one layer: module, rows, columns, permuted heads, bias."""
    q, kv = width.heads * model.head_dim, width.kv_heads * model.head_dim
    return [
        ("self_attn.q_proj", q, model.hidden, width.heads, model.attention_bias),
        ("self_attn.k_proj", kv, model.hidden, width.kv_heads, model.attention_bias),
        ("self_attn.v_proj", kv, model.hidden, 0, model.attention_bias),
        ("self_attn.o_proj", model.hidden, q, 0, model.attention_bias),
        ("mlp.gate_proj", width.ffn, model.hidden, 0, model.mlp_bias),
        ("mlp.up_proj", width.ffn, model.hidden, 0, model.mlp_bias),
        ("mlp.down_proj", model.hidden, width.ffn, 0, model.mlp_bias),
    ]


def permute(rows: Array, heads: int) -> Array:
    """Rows from transformers' rotary order to ggml's: (heads * d, ...) -> the same shape, contiguous.

    Only whole rows move, so packed blocks of any type, biases and the B of a LoRA can be given as well.
    """
    import numpy as np

    half = len(rows) // heads // 2
    return np.ascontiguousarray(rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def rope_factors(model: Llama) -> Float32 | None:
    """Divisors of the rotary frequencies, (head_dim / 2,) float32, for `llama3` scaling; None for other models.

    Wavelengths below `original context / high_freq_factor` are left alone, those above `original context /
    low_freq_factor` are stretched by `factor`, between them the frequency is interpolated.
    """
    import numpy as np

    if model.rope_type != "llama3":
        return None
    factor = rope_number(model, "factor")
    low, high = rope_number(model, "low_freq_factor", 1.0), rope_number(model, "high_freq_factor", 4.0)
    context = rope_number(model, "original_max_position_embeddings", 8192)
    if high <= low:
        raise ModelError("rotary high_freq_factor is not above low_freq_factor", model.where)
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    wavelength = 2 * math.pi * np.float32(model.rope_base) ** exponents
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def metadata(model: Llama) -> dict[str, Value]:
    """The `llama.*` or `deci.*` keys."""

    def each_layer(name: str) -> Value:
        column = [getattr(model.width(layer), name) for layer in range(model.layers)]
        return Value("array[u32]", column) if model.per_layer else Value("u32", column[0])

    rows: dict[str, Value] = {
        "block_count": Value("u32", model.layers),
        "context_length": Value("u32", model.context),
        "embedding_length": Value("u32", model.hidden),
        "feed_forward_length": each_layer("ffn"),
        "attention.head_count": each_layer("heads"),
        "attention.head_count_kv": each_layer("kv_heads"),
        "rope.freq_base": Value("f32", model.rope_base),
        "attention.layer_norm_rms_epsilon": Value("f32", model.epsilon),
        "vocab_size": Value("u32", model.vocabulary),
        "rope.dimension_count": Value("u32", model.head_dim),
    }
    if model.head_dim_given or model.per_layer:
        rows["attention.key_length"] = rows["attention.value_length"] = Value("u32", model.head_dim)
    if model.rope_type == "linear":
        rows["rope.scaling.type"] = Value("string", "linear")
        rows["rope.scaling.factor"] = Value("f32", rope_number(model, "factor"))
    return {f"{model.architecture}.{key}": value for key, value in rows.items()}

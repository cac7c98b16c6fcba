"""Decoders of Llama's shape in GGUF: tensor names, hyper-parameters, rotary embedding.

Sources: the GGUF specification for the keys, ggml's graphs for what they mean. What is unlike between the architectures
is in `architectures`. The rotary embedding of transformers rotates the two halves of a head against each other, that of
ggml's `llama` graph rotates neighbours; so there the rows of q and k are written in another order: row 2i of a head is
row i of the first half, row 2i + 1 row i of the second. Attention scores do not change, because q and k change alike.

ggml's `llama` graph takes the head counts of layer 0 for all layers. A model whose layers differ in width is written as
`deci`, the same block with `attention.head_count`, `attention.head_count_kv` and `feed_forward_length` as arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export import architectures, rotary
from edgellm_plugins.export.gguf_container import Value
from edgellm_sdk import widths
from edgellm_sdk.checkpoint import read_json
from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

UNEVEN_ARCHITECTURE = "deci"
GEMMA2_ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Llama:
    """The hyper-parameters of one model. `head_dim_given`: the config names it, so the file must too. `rope`: the
    rotary parameters of layers that see everything; `local_rope_base`: of layers that see a window. `slides`: per layer
    whether it sees only the last `window` tokens (0: none does); `soft_caps`: of attention and of the output. Where
    layers differ in `ffn`, `heads` and `kv_heads`, `per_layer` has those of each."""

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
    kind: architectures.Architecture = architectures.LLAMA
    rotated: int = 0
    local_rope_base: float = 0.0
    original_context: int = 0
    window: int = 0
    slides: tuple[bool, ...] = ()
    soft_caps: tuple[float, float] = (0.0, 0.0)
    per_layer: tuple[widths.Widths, ...] = ()

    @property
    def gguf(self) -> str:
        """The architecture's name in the file."""
        return UNEVEN_ARCHITECTURE if self.per_layer else self.kind.gguf

    def width(self, layer: int) -> widths.Widths:
        """The widths of layer 0, 1, ..."""
        return self.per_layer[layer] if self.per_layer else widths.Widths(self.heads, self.kv_heads, self.ffn)

    @property
    def rope_dimensions(self) -> int:
        """How many of a head's dimensions are rotated."""
        return self.rotated or self.head_dim


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: GGUF name, shape (rows first), the heads whose rows are reordered (0 = none), and what is
    added to every value."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0


class _Config:
    """`config.json` with the architecture's defaults, read with the reason for everything it cannot mean."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.raw = read_json(path)
        named = self.raw.get("architectures")
        name = str(named[0] if isinstance(named, list) and named else "unknown")
        if name not in architectures.KNOWN:
            known = ", ".join(sorted({kind.removesuffix("ForCausalLM") for kind in architectures.KNOWN}))
            raise ModelError(f"{printable(name)[:60]} cannot be exported yet", self.where, f"{known} models can")
        self.kind = architectures.KNOWN[name]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        return self.kind.defaults.get(key, default) if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not a positive whole number", self.where)
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not a positive number", self.where)
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{key} is {printable(repr(value))[:40]}, not true or false", self.where)
        return bool(value)

    def refuse(self, key: str, *allowed: Any) -> None:
        if self.raw.get(key) not in allowed:
            what = f"{key} = {printable(repr(self.raw[key]))[:40]}"
            raise ModelError(f"{what} has no counterpart in GGUF {self.kind.gguf}", self.where)


def read(folder: Path) -> Llama:
    """Hyper-parameters from `config.json`; ModelError with the reason for a model that GGUF cannot express."""
    config = _Config(folder / "config.json")
    kind, where = config.kind, config.where
    config.refuse(kind.activation[0], None, kind.activation[1])
    config.refuse("is_causal", None, True)
    for key, allowed in kind.fixed.items():
        config.refuse(key, *allowed)
    heads, hidden, layers = (config.whole(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"hidden size {hidden} is no multiple of {heads} heads", where)
    head_dim, context = config.whole("head_dim", hidden // heads), config.whole("max_position_embeddings")
    rope, rope_type, bases = _rope(config)
    window, slides = _window(config, layers)
    rows = widths.read(config.raw, where) if config.raw.get(widths.TABLE) else ()
    if widths.uneven(rows) and kind.gguf != "llama":
        raise ModelError(f"layers of different widths have no counterpart in GGUF {kind.gguf}", where)
    caps: tuple[Any, Any] = config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")
    model = Llama(
        where=where, layers=layers, hidden=hidden, head_dim=head_dim,
        ffn=rows[0].ffn if rows else config.whole("intermediate_size"), heads=rows[0].heads if rows else heads,
        kv_heads=rows[0].kv_heads if rows else config.whole("num_key_value_heads", heads),
        head_dim_given=config.get("head_dim") is not None, vocabulary=config.whole("vocab_size"), context=context,
        epsilon=config.number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)), rope_base=bases[0],
        rope_type=rope_type, rope=rope, tied=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias"), mlp_bias=config.flag("mlp_bias"), kind=kind,
        rotated=_rotated(config, rope, hidden, heads, head_dim), local_rope_base=bases[1],
        per_layer=rows if widths.uneven(rows) else (),
        original_context=_original_context(config, rope, context), window=window, slides=slides,
        soft_caps=(
            config.number("attn_logit_softcapping", caps[0]) if caps[0] is not None else 0.0,
            config.number("final_logit_softcapping", caps[1]) if caps[1] is not None else 0.0,
        ),
    )  # fmt: skip
    _check(model, config)
    return model


def _check(model: Llama, config: _Config) -> None:
    """ModelError for sizes that do not fit each other, or that the engine's graph takes for granted."""
    kind, where = model.kind, model.where
    if model.heads % model.kv_heads or model.head_dim % 2:
        sizes = f"{model.heads} heads, {model.kv_heads} key-value heads of {model.head_dim}"
        raise ModelError(f"{sizes} do not fit", where)
    if kind.square and model.heads * model.head_dim != model.hidden:
        cause = f"{model.heads} heads of {model.head_dim} are not the hidden size {model.hidden}"
        raise ModelError(f"{cause}, which GGUF {kind.gguf} takes for granted", where)
    if not kind.free_head and not model.tied:
        raise ModelError(f"an output matrix of its own has no place in GGUF {kind.gguf}", where)
    if kind.scale_layers:
        scaled = config.number("query_pre_attn_scalar", config.get("query_pre_attn_scalar"))
        wanted = model.hidden // model.heads if model.layers == kind.scale_layers else model.head_dim
        if scaled != wanted:
            raise ModelError(f"query_pre_attn_scalar = {scaled:g}, but llama.cpp scales attention by {wanted}", where)
    if model.rope_type in ("linear", "yarn"):
        rotary.number(model, "factor")
    rotary.factors(model)


def _rope(config: _Config) -> tuple[Mapping[str, Any], str, tuple[float, float]]:
    """(rotary parameters, their type, (base, base of layers with a window))."""
    rope = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError("rope_parameters is not a table", config.where)
    local: Any = {}
    nested = rope.get("full_attention")
    if isinstance(nested, dict):
        local, rope = rope.get("sliding_attention") or {}, nested
    kind = str(rope.get("rope_type", rope.get("type", "default"))).lower()
    allowed = config.kind.scalings
    local_kind = local.get("rope_type", "default") if isinstance(local, dict) else "unknown"
    for each, known in ((kind, allowed), (str(local_kind), ("default",))):
        if each not in known:
            what = f"rotary scaling {printable(each)[:40]!r} is not supported by GGUF {config.kind.gguf}"
            raise ModelError(what, config.where, ", ".join(known))
    for key in ("short_mscale", "long_mscale"):
        if rope.get(key) is not None:
            raise ModelError(f"rotary parameter {key} has no counterpart in GGUF", config.where)
    if rope.get("truncate", True) is not True:
        raise ModelError("rotary parameter truncate = false has no counterpart in GGUF", config.where)
    base = config.number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    local_base = local.get("rope_theta", config.raw.get("rope_local_base_freq") or 10000.0)
    return rope, kind, (base, config.number("rope_local_base_freq", local_base))


def _rotated(config: _Config, rope: Mapping[str, Any], hidden: int, heads: int, head_dim: int) -> int:
    share = rope.get("partial_rotary_factor", config.raw.get("partial_rotary_factor"))
    if share in (None, 1.0):
        return head_dim
    share = config.number("partial_rotary_factor", share)
    if "original context" not in config.kind.writes or share > 1 or int(share * hidden) // heads % 2:
        raise ModelError("rotates only part of a head, which is not supported", config.where)
    if int(share * hidden) // heads != int(share * head_dim):
        raise ModelError(f"partial_rotary_factor {share:g} does not give a whole number of dimensions", config.where)
    return int(share * head_dim)


def _original_context(config: _Config, rope: Mapping[str, Any], context: int) -> int:
    value = rope.get("original_max_position_embeddings", config.raw.get("original_max_position_embeddings"))
    return context if value is None else int(config.number("original_max_position_embeddings", value))


def _window(config: _Config, layers: int) -> tuple[int, tuple[bool, ...]]:
    """(tokens that a sliding layer sees, per layer whether it slides)."""
    if config.get("sliding_window") is None or config.raw.get("use_sliding_window") is False:
        return 0, (False,) * layers
    window, kinds = config.whole("sliding_window"), config.raw.get("layer_types")
    if isinstance(kinds, list):
        if len(kinds) != layers or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            raise ModelError(f"layer_types does not name one of two kinds for each of {layers} layers", config.where)
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if config.kind.window == "applied":
        period = config.raw.get("sliding_window_pattern", config.raw.get("_sliding_window_pattern"))
        period = config.kind.period if type(period) is not int or period < 1 else period
        return window, tuple((i + 1) % period != 0 for i in range(layers))
    full = config.raw.get("max_window_layers") if "use_sliding_window" in config.raw else 0
    return window, tuple(i >= (full if type(full) is int else 0) for i in range(layers))


def limits(model: Llama) -> list[str]:
    """What llama.cpp will do otherwise than the model, in words; nothing of it shows on short texts."""
    found = []
    if model.kind.window != "applied" and any(model.slides) and model.window < model.context:
        found.append(
            f"llama.cpp lets every layer of {model.kind.gguf} see all tokens: beyond {model.window} tokens the file "
            "answers otherwise than the model, which has a sliding window"
        )
    if model.rope_type in rotary.LONG:
        found.append(
            f"llama.cpp chooses the long or the short rotary factors by its context size, the model by the text's "
            f"length: texts up to {model.original_context} tokens need a context of at most that"
        )
    return found


def slots(model: Llama) -> dict[str, Slot]:
    """Every tensor the model must have, by its transformers name, in file order."""
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == model.kind.gguf)
    names = gguf.get_tensor_name_map(arch, model.layers)
    flags = {
        "": False, architectures.ALWAYS: True, "attention_bias": model.attention_bias, "mlp_bias": model.mlp_bias,
    }  # fmt: skip
    shift = model.kind.norm_shift
    found: dict[str, Slot] = {}

    def add(name: str, shape: tuple[int, ...], order: int = 0, plus: float = 0.0) -> None:
        found[name] = Slot(names.get_name(name, try_suffixes=(".weight", ".bias")), shape, order, plus)

    add("model.embed_tokens.weight", (model.vocabulary, model.hidden))
    for i in range(model.layers):
        width = model.width(i)
        q, kv = width.heads * model.head_dim, width.kv_heads * model.head_dim
        sizes = {
            "hidden": model.hidden, "ffn": width.ffn, "gate_up": 2 * width.ffn, "head": model.head_dim,
            "q": q, "kv": kv, "qkv": q + 2 * kv,
        }  # fmt: skip
        heads = {"": 0, "heads": width.heads, "kv_heads": width.kv_heads}
        for part in model.kind.layer:
            name, rows = f"model.layers.{i}.{part.module}", sizes[part.rows]
            if not part.columns:
                add(f"{name}.weight", (rows,), plus=shift)
                continue
            add(f"{name}.weight", (rows, sizes[part.columns]), heads[part.rotary])
            if flags[part.bias]:
                add(f"{name}.bias", (rows,), heads[part.rotary])
    add("model.norm.weight", (model.hidden,), plus=shift)
    if not model.tied:
        add("lm_head.weight", (model.vocabulary, model.hidden))
    return found


def permute(rows: Array, heads: int) -> Array:
    """Rows from transformers' rotary order to ggml's: (heads * d, ...) -> the same shape, contiguous.

    Only whole rows move, so packed blocks of any type, biases and the B of a LoRA can be given as well.
    """
    import numpy as np

    half = len(rows) // heads // 2
    return np.ascontiguousarray(rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def metadata(model: Llama) -> dict[str, Value]:
    """The keys under the architecture's name."""
    kind, writes = model.kind, model.kind.writes

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
        "attention.layer_norm_rms_epsilon": Value("f32", model.epsilon),
    }
    if "rope base" in writes or model.rope_base != GEMMA2_ROPE_BASE:
        rows["rope.freq_base"] = Value("f32", model.rope_base)
    if "local rope base" in writes:
        rows["rope.freq_base_swa"] = Value("f32", model.local_rope_base)
    if "vocabulary" in writes:
        rows["vocab_size"] = Value("u32", model.vocabulary)
    if "rope dimensions" in writes:
        rows["rope.dimension_count"] = Value("u32", model.rope_dimensions)
    if "head size" in writes and (model.head_dim_given or model.per_layer):
        rows["attention.key_length"] = rows["attention.value_length"] = Value("u32", model.head_dim)
    if "original context" in writes:
        rows["rope.scaling.original_context_length"] = Value("u32", model.original_context)
    if "soft caps" in writes and model.soft_caps[0]:
        rows["attn_logit_softcapping"] = Value("f32", model.soft_caps[0])
    if ("soft caps" in writes or "final soft cap" in writes) and model.soft_caps[1]:
        rows["final_logit_softcapping"] = Value("f32", model.soft_caps[1])
    if kind.window == "named":
        rows["attention.sliding_window"] = Value("u32", model.window)
    if kind.window == "applied" and any(model.slides):
        rows["attention.sliding_window"] = Value("u32", model.window)
        if model.slides != tuple((i + 1) % kind.period != 0 for i in range(model.layers)):
            rows["attention.sliding_window_pattern"] = Value("array[bool]", list(model.slides))
    return {f"{model.gguf}.{key}": value for key, value in (rows | rotary.scaling(model)).items()}

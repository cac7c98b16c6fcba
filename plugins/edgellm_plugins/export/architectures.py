"""What is unlike between the architectures that share Llama's shape, as data.

Sources: ggml's graphs (`src/models/*.cpp` of llama.cpp) for what the engine computes, transformers' modelling files for
what the model computes, and llama.cpp's own converter for which keys a file of each kind carries. One entry per
transformers class; everything else about the exporter reads these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALWAYS = "always"


@dataclass(frozen=True)
class Part:
    """One module of a layer. `rows`, `columns` name sizes of the model (columns empty: a norm gain of `rows`), `rotary`
    the head count whose rows ggml wants as neighbours, `bias` the config flag that gives it one."""

    module: str
    rows: str
    columns: str = ""
    rotary: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    `scalings`: rotary scalings that the engine's graph applies. `norm_shift` is added to norm gains, because the model
    multiplies with 1 + gain and ggml with the gain. `writes`: optional keys that the upstream converter writes for it.
    `window`: what the engine does with a sliding window: nothing and no key (`ignored`), nothing but it wants the key
    (`named`), or it applies it to all layers but every `period`-th (`applied`). `square`: the graph takes heads * head
    size for the hidden size. `free_head`: the engine takes an output matrix of its own. `scale_layers`: the depth at
    which the engine scales attention by hidden / heads instead of the head size. `fixed`: config keys with no
    counterpart in GGUF and the values under which they change nothing. `defaults`: of config keys left out.
    """

    gguf: str
    layer: tuple[Part, ...]
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    activation: tuple[str, str] = ("hidden_act", "silu")
    norm_shift: float = 0.0
    writes: tuple[str, ...] = ("rope base",)
    window: str = "ignored"
    period: int = 1
    square: bool = False
    free_head: bool = True
    scale_layers: int = 0
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _attention(bias: str = "", out_bias: str = "", rotary: bool = False, norms: bool = False) -> tuple[Part, ...]:
    gains = (Part("self_attn.q_norm", "head"), Part("self_attn.k_norm", "head")) if norms else ()
    return (
        Part("self_attn.q_proj", "q", "hidden", "heads" if rotary else "", bias),
        Part("self_attn.k_proj", "kv", "hidden", "kv_heads" if rotary else "", bias),
        Part("self_attn.v_proj", "kv", "hidden", bias=bias),
        Part("self_attn.o_proj", "hidden", "q", bias=out_bias),
        *gains,
    )


def _gated(bias: str = "") -> tuple[Part, ...]:
    return (
        Part("mlp.gate_proj", "ffn", "hidden", bias=bias),
        Part("mlp.up_proj", "ffn", "hidden", bias=bias),
        Part("mlp.down_proj", "hidden", "ffn", bias=bias),
    )


_FIRST, _SECOND = Part("input_layernorm", "hidden"), Part("post_attention_layernorm", "hidden")
_AROUND = (_SECOND, Part("pre_feedforward_layernorm", "hidden"), Part("post_feedforward_layernorm", "hidden"))
_FUSED = (
    Part("self_attn.qkv_proj", "qkv", "hidden"),
    Part("self_attn.o_proj", "hidden", "q"),
    Part("mlp.gate_up_proj", "gate_up", "hidden"),
    Part("mlp.down_proj", "hidden", "ffn"),
)
_LLAMA_KEYS = ("rope base", "vocabulary", "rope dimensions", "head size")
_NO_BIAS: Mapping[str, tuple[Any, ...]] = {"attention_bias": (None, False)}

LLAMA = Architecture(
    "llama",
    (_FIRST, *_attention("attention_bias", "attention_bias", rotary=True), *_gated("mlp_bias"), _SECOND),
    scalings=("default", "linear", "llama3", "yarn"),
    writes=_LLAMA_KEYS,
    fixed={"sliding_window": (None,)},
)
MISTRAL = Architecture(
    "llama",
    (_FIRST, *_attention(rotary=True), *_gated(), _SECOND),
    scalings=("default", "linear", "llama3", "yarn"),
    writes=_LLAMA_KEYS,
    fixed=_NO_BIAS,
)
QWEN2 = Architecture("qwen2", (_FIRST, *_attention(ALWAYS), *_gated(), _SECOND), square=True)
QWEN3 = Architecture(
    "qwen3",
    (_FIRST, *_attention(norms=True), *_gated(), _SECOND),
    writes=("rope base", "head size"),
    fixed=_NO_BIAS,
    defaults={"head_dim": 128},
)
GEMMA2 = Architecture(
    "gemma2",
    (_FIRST, *_attention(), *_gated(), *_AROUND),
    scalings=("default", "linear"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    norm_shift=1.0,
    writes=("head size", "soft caps"),
    window="applied",
    period=2,
    free_head=False,
    scale_layers=46,
    fixed={**_NO_BIAS, "use_bidirectional_attention": (None, False)},
    defaults={
        "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    },
)  # fmt: skip
GEMMA3 = Architecture(
    "gemma3",
    (_FIRST, *_attention(norms=True), *_gated(), *_AROUND),
    scalings=("default", "linear"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    norm_shift=1.0,
    writes=("rope base", "local rope base", "head size", "final soft cap"),
    window="applied",
    period=6,
    scale_layers=62,
    fixed={**_NO_BIAS, "use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
    defaults={
        "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "max_position_embeddings": 131072,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
    },
)  # fmt: skip
PHI3 = Architecture(
    "phi3",
    (_FIRST, *_FUSED, _SECOND),
    scalings=("default", "longrope", "su"),
    writes=("rope base", "rope dimensions", "original context"),
    window="named",
    square=True,
    fixed=_NO_BIAS,
)

KNOWN: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Phi3ForCausalLM": PHI3,
}

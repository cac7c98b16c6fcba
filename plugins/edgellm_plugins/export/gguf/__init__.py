"""gguf: a Llama-type model, a compressed one or a LoRA as a GGUF file for llama.cpp and Ollama.

Format: the GGUF specification, version 3. Blocks of a compressed model are written as they are, never rounded twice;
the file is read back by an independent strict reader before it takes its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Artifact, ModelHandle


ENGINE = (  # mixes that llama.cpp's own quantiser makes; ternary ones are for models trained so
    "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q4_1", "q5_0",
    "q5_1", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m",
    "iq1_s",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    type: str = opt(
        "auto",
        "type of the weight matrices; auto keeps a compressed model's blocks, else f16 (f32 for an adapter)",
        choices=("auto", "f32", "f16", "bf16", "q8_0", "q4_0", *ENGINE),
    )
    types: str = opt("", "by llama.cpp's quantiser: PATTERN=TYPE,... with parts of GGUF tensor names or globs")
    imatrix: str = opt(
        "auto", "importance matrix for llama.cpp's quantiser: a GGUF file, none, or auto for the one beside the model"
    )
    embedding: str = opt(
        "auto",
        "type of token embedding and output head; auto is q8_0 in a quantised file, else as --type",
        choices=("auto", "f32", "f16", "q8_0", "q4_0"),
    )
    adapter: str = opt(
        "merge",
        "merge a LoRA into the weights, or write it alone as a GGUF adapter for a separately exported base",
        choices=("merge", "separate"),
    )
    name: str = opt("", "general.name in the file; the model's name when empty")
    modelfile: bool = opt(True, "write an Ollama Modelfile beside the file")
    temperature: float = opt(0.2, "sampling temperature in the Modelfile", ge=0, le=2)


PLUGIN = Plugin(
    name="gguf",
    summary="GGUF for llama.cpp and Ollama: floats, GPTQ blocks as they are, every type of llama.cpp, LoRA adapters",
    version="0.1.0",
    config=Config,
)


@hookimpl
def edgellm_export(model: ModelHandle, target: Any, config: Config, ctx: Context) -> Artifact:
    from edgellm_plugins.export.gguf import method

    return method.export(model, target, config, ctx)

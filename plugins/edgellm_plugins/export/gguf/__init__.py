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


@dataclass(frozen=True)
class Config:
    type: str = opt(
        "auto",
        "type of the weight matrices; auto keeps a compressed model's blocks, else f16 (f32 for an adapter)",
        choices=("auto", "f32", "f16", "bf16", "q8_0", "q4_0"),
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
    summary="GGUF for llama.cpp and Ollama: F32, F16, BF16, Q8_0, Q4_0, GPTQ blocks as they are, LoRA adapters",
    version="0.1.0",
    config=Config,
)


@hookimpl
def edgellm_export(model: ModelHandle, target: Any, config: Config, ctx: Context) -> Artifact:
    from edgellm_plugins.export.gguf import method

    return method.export(model, target, config, ctx)

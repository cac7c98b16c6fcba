"""GPTQ: one-shot second-order weight quantisation, on the grid of the format that the device will run.

Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323 (ICLR 2023
as OPTQ). The arithmetic is in `method.py`, the walk through the model in `compression/layerwise.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_sdk.config import opt
from edgellm_sdk.kit.overrides import parse
from edgellm_sdk.registry import Plugin

INTEGERS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
BLOCKS = (
    "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    format: str = opt(
        "q4_0",
        "what the device will run: llama.cpp blocks, or intN for a GPTQ safetensors checkpoint",
        choices=(*BLOCKS, *INTEGERS),
    )
    formats: str = opt("", "other blocks for some layers: PATTERN=FORMAT,... with parts of names or globs")
    embedding: str = opt(
        "keep", "blocks for token embedding and output head; keep leaves them to the export", choices=("keep", *BLOCKS)
    )
    calibration_samples: int = opt(16, "windows of text to calibrate on", ge=1, le=4096)
    calibration_length: int = opt(512, "length of a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file to calibrate on; empty: the data of the run")
    sequential: bool = opt(True, "calibrate each layer on what the quantised layers before it put out")
    equal_tokens: bool = opt(False, "scale every token's input to one norm, so that all count alike; off: the paper")
    damping: float = opt(0.01, "added to the Hessian's diagonal, as a fraction of its mean", ge=0, le=1)
    block: int = opt(128, "columns between two updates of the rest of the matrix", ge=1, le=4096)
    search: bool = opt(True, "intN: search each group's clipping range; off: the paper's min-max")
    refit: bool = opt(True, "refit a row's scales jointly once its codes are fixed")
    passes: int = opt(
        4, "passes that set each code anew, given all others, and refit the scales; 0: the paper", ge=0, le=100
    )
    group_size: int = opt(64, "intN: weights that share a scale, 0 for a whole row (blocks: always 32)", ge=0, le=65536)
    symmetric: bool = opt(True, "intN: grid around zero, without zero points of its own (blocks: by format)")
    act_order: bool = opt(False, "intN: quantise the columns with the largest activations first")
    dtype: str = opt("float32", "precision of the calibration forwards", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        parse(self.formats, BLOCKS, "formats")
        if self.format in INTEGERS:
            if self.formats or self.embedding != "keep":
                raise ValueError(f"formats: a checkpoint of {self.format} weights holds no blocks beside them")
            if self.group_size and self.group_size % 8:
                raise ValueError("group-size: must be a multiple of 8, or 0 for whole rows")
        elif self.act_order:
            raise ValueError(
                f"act-order: {self.format} blocks hold 32 neighbouring inputs under one scale, and reordered columns "
                "would need a table of groups that GGUF cannot store; leave it off or choose intN"
            )


PLUGIN = Plugin(
    name="gptq",
    summary="quantise layer by layer, compensating each rounding error in the weights not yet rounded",
    version="0.3.0",
    config=Config,
    paper="GPTQ/OPTQ, arXiv 2210.17323",
    aliases=("optq",),
)

edgellm_compress = compress_hook(__name__)

"""AWQ: move the scale of loud inputs out of a layer's weights and into the layer before, then quantise.

Paper: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978 (MLSys 2024).
Only the folding is done here: the folder that is written computes what the model computed. Run `gptq` on it next.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config:
    format: str = opt(
        "iq4_nl", "blocks that the scales are chosen for", choices=("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
    )
    steps: int = opt(20, "exponents tried: 0, 1/steps, 2/steps, ... below 1", ge=1, le=100)
    calibration_samples: int = opt(16, "windows of text to measure on", ge=1, le=4096)
    calibration_length: int = opt(512, "length of a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file to measure on; empty: the data of the run")
    dtype: str = opt("float32", "precision of the calibration forwards", choices=("float32", "bfloat16"))


PLUGIN = Plugin(
    name="awq",
    summary="fold the scales of loud inputs into the layer before, so that quantisation hurts less; computes the same",
    version="0.1.0",
    config=Config,
    paper="AWQ, arXiv 2306.00978",
)

edgellm_compress = compress_hook(__name__)

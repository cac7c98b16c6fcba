"""imatrix: measure on your data how much each input of each weight matters, for the engine's own quantiser.

The model itself stays as it is (adapters are merged); `imatrix.gguf` is written beside its weights. `edgellm export
--plugin gguf --type q4_k_m` (or any other K- or IQ-type) then weighs its rounding errors with it.
Definition: llama.cpp's `imatrix` tool, the mean square of every input over the tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config:
    calibration_samples: int = opt(32, "windows of text to measure on", ge=1, le=4096)
    calibration_length: int = opt(512, "length of a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file to measure on; empty: the data of the run")
    head: bool = opt(True, "measure the output head too; llama.cpp's tool leaves it out unless asked")


PLUGIN = Plugin(
    name="imatrix",
    summary="which inputs matter on your data, as a GGUF importance matrix for the K- and IQ-types of llama.cpp",
    version="0.1.0",
    config=Config,
    paper="llama.cpp pull request 4930",
)

edgellm_compress = compress_hook(__name__)

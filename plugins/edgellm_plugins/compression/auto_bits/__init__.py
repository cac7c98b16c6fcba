"""auto-bits: a block format for every matrix, so that the GGUF file is as large as asked and drifts least.

What a format costs is measured on this model and these data: the divergence of its answers when one matrix alone is
rounded. The best mix within the budget is found for these figures, and `gptq` quantises to it. Idea of per-matrix
budgets from measured divergence: EvoPress, arXiv 2410.14649 (whose evolution from there on is not built).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin

BLOCKS = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q4_0", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)


def size_in_bytes(text: str) -> int:
    """`75MB` is 75 000 000, `75MiB` is 78 643 200; ValueError, worded for a config, for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"max-size: {text[:30]!r} is not a size such as 75MB or 71.5MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Config:
    max_size: str = opt("", "largest GGUF file, such as 75MB or 71.5MiB; the result is within 1 % below")
    bits: float = opt(4.5, "without max-size: mean bits per weight, embedding included", ge=1, le=16)
    formats: str = opt("", "formats to choose from, comma-separated; empty: all that a matrix's rows divide into")
    probe_samples: int = opt(4, "windows of text on which the cost of a format is measured", ge=1, le=1024)
    probe_length: int = opt(128, "length of such a window", unit="tokens", ge=16, le=32768)
    calibration_samples: int = opt(16, "windows of text that gptq calibrates on", ge=1, le=4096)
    calibration_length: int = opt(512, "length of such a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file for both; empty: the data of the run")
    damping: float = opt(0.01, "gptq's", ge=0, le=1)
    equal_tokens: bool = opt(False, "gptq's: every token of the calibration text counts alike")
    passes: int = opt(4, "passes over the codes behind gptq's sweep", ge=0, le=100)
    dtype: str = opt("float32", "precision of gptq's calibration forwards", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        if self.max_size:
            size_in_bytes(self.max_size)
        self.candidates()

    def candidates(self) -> tuple[str, ...]:
        """The formats to choose from. ValueError for one that is none."""
        asked = tuple(name.strip().lower() for name in self.formats.split(",") if name.strip())
        wrong = [name for name in asked if name not in BLOCKS]
        if wrong:
            raise ValueError(f"formats: {wrong[0][:30]!r} is none of {', '.join(BLOCKS)}")
        return asked or BLOCKS


PLUGIN = Plugin(
    name="auto-bits",
    summary="a file of the size you order: each matrix gets the format that its measured sensitivity earns",
    version="0.1.0",
    config=Config,
    paper="measured per-matrix budgets as in EvoPress, arXiv 2410.14649",
)

edgellm_compress = compress_hook(__name__)

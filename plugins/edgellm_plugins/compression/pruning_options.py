"""Options of all methods that take whole structures out of a model. A method inherits them and adds its own."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_sdk.config import opt


@dataclass(frozen=True)
class Options:
    ratio: float = opt(0.2, "share of the decoder blocks' weights to remove; embedding and head stay", ge=0, le=0.95)
    calibration_samples: int = opt(10, "windows of text to judge by", ge=1, le=4096)
    calibration_length: int = opt(128, "length of a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file to judge by and to recover on; empty: the data of the run")
    recovery_steps: int = opt(0, "steps of LoRA on what is left, merged at the end; 0: none", ge=0, le=1_000_000)
    recovery_rank: int = opt(8, "r of that LoRA", ge=1, le=512)
    recovery_alpha: float = opt(16.0, "its update is scaled by alpha / rank", ge=0)
    recovery_rate: float = opt(5e-4, "its peak learning rate", ge=0)
    recovery_batch: int = opt(4, "examples in a step", unit="examples", ge=1)
    recovery_length: int = opt(128, "longest example", unit="tokens", ge=8)
    recovery_checks: int = opt(4, "times the loss on held-out examples is measured, to keep the best", ge=1, le=1000)

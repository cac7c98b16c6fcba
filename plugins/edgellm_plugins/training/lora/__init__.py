"""LoRA by back-propagation that fits a device (LoRA: arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.training.hooks import training_hooks
from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    rank: int = opt(8, "r, the rank of B A", ge=1, le=512)
    alpha: float = opt(16.0, "the update is scaled by alpha / rank", ge=0)


PLUGIN = Plugin(
    name="lora",
    summary="LoRA by back-propagation, one layer's activations at a time",
    version="0.1.0",
    config=Config,
    paper="arXiv 2106.09685",
    linear=lambda config: "",
)


(
    edgellm_initialise,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = training_hooks(__name__)

"""LoRA-FA: LoRA with a frozen A, whose input need not be stored (arXiv 2308.03303)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.training.hooks import training_hooks
from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    rank: int = opt(16, "r, the rank of B A; trains as many scalars as LoRA of half the rank", ge=1, le=512)
    alpha: float = opt(32.0, "the update is scaled by s = alpha / rank", ge=1e-3)
    init: str = opt(
        "kaiming_uniform",
        "the frozen A: peft's start, or variance 1 / rank",
        choices=("kaiming_uniform", "gaussian"),
    )
    correction: str = opt(
        "none", "what is done to B's gradient: nothing, or (A A^T)^-1 / s^2", choices=("none", "projection")
    )
    gradient: str = opt("backprop", "exact, or estimated from perturbed inferences", choices=("backprop", "zeroth"))
    probes: int = opt(4, "with zeroth: directions a step, two forwards each", ge=1, le=256)
    step: float = opt(0.05, "with zeroth: h, the finite-difference step", ge=1e-6, le=1)
    learning_rate: float = opt(2e-3, "eta, the peak step", ge=0)

    @property
    def parts(self) -> bool:
        return self.gradient == "backprop"


PLUGIN = Plugin(
    name="lora-fa",
    summary="LoRA with a frozen random A: B alone is trained and sent, and averages exactly",
    version="0.1.0",
    config=Config,
    paper="arXiv 2308.03303",
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

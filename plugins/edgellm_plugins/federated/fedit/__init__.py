"""FedIT: federated instruction tuning of LoRA factors (arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.federated.options import Local
from edgellm_plugins.training.hooks import training_hooks
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Local):
    targets: str = opt("q_proj,k_proj,v_proj,o_proj", "module names that get a LoRA, comma-separated, or all-linear")
    rank: int = opt(8, "r, the rank of B A", ge=1, le=512)
    alpha: float = opt(16.0, "the update is scaled by alpha / rank", ge=0)
    learning_rate: float = opt(3e-4, "eta, a round's first step", ge=0)
    train_on_inputs: bool = opt(False, "the loss falls on the prompts too")
    template: str = opt(
        "chat", "how an instruction is put to the model: its own chat template, or Alpaca's", choices=("chat", "alpaca")
    )


PLUGIN = Plugin(
    name="fedit",
    summary="LoRA on every client's instructions, its factors averaged",
    version="0.1.0",
    config=Config,
    paper="arXiv 2305.05644",
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

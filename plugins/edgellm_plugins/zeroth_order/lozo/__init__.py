"""LOZO: low-rank zeroth-order fine-tuning (arXiv 2410.07698, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    direction_rank: int = opt(2, "r, the rank of a direction", ge=1, le=64)
    refresh: int = opt(50, "nu, steps that V is kept", unit="steps", ge=1)
    momentum: float = opt(0.0, "LOZO-M: decay of the factored momentum; 0 is plain LOZO", ge=0, le=0.9999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule != "sgd":
            raise ValueError(f"rule: {self.rule} would replay old directions on a new V; use --momentum")
        if self.share < 1:
            raise ValueError("share: a low-rank direction moves every layer; use 1")


PLUGIN = Plugin(
    name="lozo",
    summary="two forwards along U V^T, V kept for some steps, momentum in factored form",
    version="0.1.0",
    config=Config,
    paper="arXiv 2410.07698",
)


(
    edgellm_initialise,
    edgellm_assign,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = seed_hooks(__name__)

"""MeZO: fine-tuning with two forward passes a step (arXiv 2305.17333, NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    noise: str = opt("gaussian", "directions", choices=("gaussian", "rademacher"))
    difference: str = opt("central", "2 forwards a probe, or 1 and a shared one", choices=("central", "forward"))


PLUGIN = Plugin(
    name="mezo",
    summary="two forward passes a step, memory of inference, checkpoints of a few bytes",
    version="0.1.0",
    config=Config,
    paper="arXiv 2305.17333",
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

"""FedAdamW: FedAdam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Forgetting
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Forgetting):
    weight_decay: float = opt(0.01, "lambda: theta shrinks by eta lambda theta in every round", ge=0)


PLUGIN = Plugin(
    name="fedadamw",
    summary="FedAdam with decoupled weight decay",
    version="0.1.0",
    config=Config,
    paper="arXiv 2003.00295",
    linear=lambda config: "",
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

"""FedAdagrad: Adagrad on the server (arXiv 2003.00295)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Adaptive
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Adaptive):
    beta1: float = opt(0.0, "decay of the mean of changes; 0 is Adagrad itself", ge=0, le=0.999999)


PLUGIN = Plugin(
    name="fedadagrad",
    summary="Adagrad over the rounds on the clients' weighted mean change",
    version="0.1.0",
    config=Config,
    paper="arXiv 2003.00295",
    linear=lambda config: "",
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

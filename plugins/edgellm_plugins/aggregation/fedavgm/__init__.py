"""FedAvgM: momentum on the server."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Weighted):
    server_rate: float = opt(1.0, "eta, the server's step", ge=0)
    beta: float = opt(0.9, "share of the last step's direction that is kept", ge=0, le=0.999999)


PLUGIN = Plugin(
    name="fedavgm",
    summary="momentum over the rounds on the weighted mean of changes",
    version="0.1.0",
    config=Config,
    paper="arXiv 2003.00295",
    linear=lambda config: "",
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

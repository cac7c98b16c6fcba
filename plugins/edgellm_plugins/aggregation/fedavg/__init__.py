"""FedAvg: the mean of client updates, weighted by examples (arXiv 1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config:
    weighting: str = opt("examples", "weight of a client", choices=("examples", "equal"))
    cap: int = opt(0, "largest number of examples a client may claim; 0 means none", unit="examples", ge=0)
    server_rate: float = opt(1.0, "share of the way to the mean that the server goes", ge=0, le=1)


PLUGIN = Plugin(
    name="fedavg",
    summary="weighted mean of client updates",
    version="0.1.0",
    config=Config,
    paper="arXiv 1602.05629",
    linear=lambda config: "",
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

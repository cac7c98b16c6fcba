"""Clipping: no client moves theta further than a bound."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config:
    bound: float = opt(0.0, "longest change of a client; 0 is the median of the round's", ge=0)
    weighting: str = opt("equal", "weight of a client", choices=("examples", "equal"))
    cap: int = opt(0, "largest number of examples a client may claim; 0 means none", unit="examples", ge=0)


PLUGIN = Plugin(
    name="norm-clip",
    summary="mean of client changes, none longer than a bound or the median length",
    version="0.1.0",
    config=Config,
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

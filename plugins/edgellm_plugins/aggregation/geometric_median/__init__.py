"""The geometric median of client changes, by Weiszfeld's iteration."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config:
    iterations: int = opt(200, "at most so many steps of Weiszfeld's", ge=1, le=100_000)


PLUGIN = Plugin(
    name="geometric-median",
    summary="the point with the smallest sum of distances to client changes",
    version="0.1.0",
    config=Config,
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

"""The geometric median of client changes, by Weiszfeld's iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import State, Update


@dataclass(frozen=True)
class Config:
    iterations: int = opt(200, "at most so many steps of Weiszfeld's", ge=1, le=100_000)


PLUGIN = Plugin(
    name="geometric-median",
    summary="the point with the smallest sum of distances to client changes",
    version="0.1.0",
    config=Config,
)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.aggregation.geometric_median.method import aggregate

    return aggregate(state, updates, config, ctx)

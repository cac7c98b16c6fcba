"""Clipping: no client moves theta further than a bound."""

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
    bound: float = opt(0.0, "longest change of a client; 0 is the median of the round's", ge=0)
    weighting: str = opt("equal", "weight of a client", choices=("examples", "equal"))
    cap: int = opt(0, "largest number of examples a client may claim; 0 means none", unit="examples", ge=0)


PLUGIN = Plugin(
    name="norm-clip",
    summary="mean of client changes, none longer than a bound or the median length",
    version="0.1.0",
    config=Config,
)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.aggregation.norm_clip.method import aggregate

    return aggregate(state, updates, config, ctx)

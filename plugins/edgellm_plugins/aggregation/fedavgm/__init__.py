"""FedAvgM: momentum on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import State, Update


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


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.aggregation.fedavgm.method import aggregate

    return aggregate(state, updates, config, ctx)

"""FedAvg: the mean of client updates, weighted by examples (arXiv 1602.05629)."""

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


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.aggregation.fedavg.method import aggregate

    return aggregate(state, updates, config, ctx)

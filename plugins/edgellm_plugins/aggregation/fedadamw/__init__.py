"""FedAdamW: FedAdam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.options import Forgetting
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import State, Update


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


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.aggregation.fedadamw.method import aggregate

    return aggregate(state, updates, config, ctx)

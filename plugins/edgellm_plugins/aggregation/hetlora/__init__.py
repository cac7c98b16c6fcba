"""HetLoRA's aggregation: factors filled up with zeros to one rank, weighed by the norm of B A (arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.lora_options import Ranked
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


@dataclass(frozen=True)
class Config(Ranked):
    weighting: str = opt("norm", "weight of a client", choices=("norm", "examples", "equal"))


PLUGIN = Plugin(
    name="hetlora",
    summary="zero-padded mean of factors of unlike ranks, a baseline for flora and flexlora",
    version="0.1.0",
    config=Config,
    paper="arXiv 2401.06432",
)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.ranking import assign

    return assign(state, clients, data, config, ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__, "edgellm_plugins.aggregation.ranking")

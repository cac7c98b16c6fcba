"""FLoRA: adapters are stacked, which is exact for any ranks, folded into the weights and begun anew (2409.05976)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.lora_options import Ranked
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State

Config = Ranked
PLUGIN = Plugin(
    name="flora",
    summary="exact for unlike ranks: adapters are stacked, folded into the weights and begun anew",
    version="0.1.0",
    config=Config,
    paper="arXiv 2409.05976",
)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.flora.method import assign

    return assign(state, clients, data, config, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> Assignment:
    from edgellm_plugins.aggregation.flora.method import prepare

    return prepare(assignment, ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__, "edgellm_plugins.aggregation.ranking")

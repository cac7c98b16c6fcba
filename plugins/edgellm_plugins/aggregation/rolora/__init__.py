"""RoLoRA: A and B train in alternate rounds, so that each mean is exact (arXiv 2502.01755)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State

Config = Weighted
PLUGIN = Plugin(
    name="rolora",
    summary="B and A train and travel in alternate rounds, which averages exactly",
    version="0.1.0",
    config=Config,
    paper="arXiv 2502.01755",
    linear=lambda config: "",
)


@hookimpl
def edgellm_assign(state: State, clients: Sequence[str], ctx: Context) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.rolora.method import assign

    return assign(state, clients, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> Assignment:
    from edgellm_plugins.aggregation.halves import prepare

    return prepare(assignment, ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

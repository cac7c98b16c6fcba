"""Bulyan: Krum chooses, then the values next to the median are averaged (arXiv 1802.07927)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Byzantine
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


@dataclass(frozen=True)
class Config(Byzantine):
    """f alone."""


PLUGIN = Plugin(
    name="bulyan",
    summary="Krum chooses clients, the values next to their median are averaged",
    version="0.1.0",
    config=Config,
    paper="arXiv 1802.07927",
)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, clients: Sequence[str], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.aggregation import robust

    robust.enough(ctx.configs[PLUGIN.name].byzantine, len(clients), 4, 3, PLUGIN.name)
    robust.one_by_one(state.arrays, PLUGIN.name)
    return (yield)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

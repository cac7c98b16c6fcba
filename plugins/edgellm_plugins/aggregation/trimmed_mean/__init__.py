"""The coordinate-wise trimmed mean (arXiv 1803.01498)."""

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
    name="trimmed-mean",
    summary="mean of client changes without the f largest and smallest at each coordinate",
    version="0.1.0",
    config=Config,
    paper="arXiv 1803.01498",
)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, clients: Sequence[str], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.aggregation import robust

    robust.enough(ctx.configs[PLUGIN.name].byzantine, len(clients), 2, 1, PLUGIN.name)
    robust.one_by_one(state.arrays, PLUGIN.name)
    return (yield)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

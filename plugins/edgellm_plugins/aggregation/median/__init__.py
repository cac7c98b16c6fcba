"""The coordinate-wise median (arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


PLUGIN = Plugin(
    name="median",
    summary="median of client changes, one coordinate at a time",
    version="0.1.0",
    paper="arXiv 1803.01498",
)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, clients: Sequence[str], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.aggregation import robust

    robust.one_by_one(state.arrays, PLUGIN.name)
    return (yield)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

"""The coordinate-wise median (arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State, Update


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


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_sdk.kit.averaging import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], ctx: Context) -> State:
    from edgellm_plugins.aggregation.median.method import aggregate

    return aggregate(state, updates, ctx)

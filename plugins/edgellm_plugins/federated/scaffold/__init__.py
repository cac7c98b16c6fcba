"""SCAFFOLD: control variates against client drift (arXiv 1910.06378). For `--around`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State, Update


PLUGIN = Plugin(
    name="scaffold",
    summary="control variates that take a client's own direction out of its steps; twice the traffic",
    version="0.1.0",
    paper="arXiv 1910.06378",
)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, data: Mapping[str, int], config: Any, ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.federated.scaffold.method import assigned

    return assigned((yield), state, len(data), ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> None:
    from edgellm_plugins.federated.scaffold.method import prepare

    prepare(assignment, ctx)


@hookimpl(wrapper=True)
def edgellm_finetune(assignment: Assignment, config: Any, ctx: Context) -> Generator[None, Update, Update]:
    from edgellm_plugins.federated.drift import insist
    from edgellm_plugins.federated.scaffold.method import insist_on_sgd, reported

    insist_on_sgd(config)
    update = yield
    insist(ctx, PLUGIN.name)
    return reported(update, assignment, ctx)


@hookimpl
def edgellm_screen(updates: Sequence[Update], ctx: Context) -> Mapping[str, str]:
    from edgellm_plugins.federated.scaffold.method import screen

    return screen(updates, ctx)


@hookimpl(wrapper=True)
def edgellm_aggregate(state: State, updates: Sequence[Update], ctx: Context) -> Generator[None, State, State]:
    from edgellm_plugins.federated.scaffold.method import aggregated

    return aggregated((yield), state, updates, ctx)

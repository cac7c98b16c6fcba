"""The hooks of every method on seeded directions, `METHOD` in its method.py. Light until a hook runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.hookspecs import hookimpl

if TYPE_CHECKING:
    from edgellm_plugins.zeroth_order.clients import SpaceMethod
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update

Hooks = tuple[Callable[..., Any], ...]


def seed_hooks(package: str) -> Hooks:
    """(initialise, assign, finetune, screen, aggregate, personalise, measure) of `package`.method.METHOD."""

    def method() -> SpaceMethod:
        found: SpaceMethod = import_module(f"{package}.method").METHOD
        return found

    @hookimpl
    def edgellm_initialise(model: ModelHandle, config: Any, ctx: Context) -> State:
        return method().initialise(model, config, ctx)

    @hookimpl
    def edgellm_assign(state: State, clients: Sequence[str], config: Any) -> Mapping[str, Assignment]:
        return method().assign(state, clients, config)

    @hookimpl
    def edgellm_finetune(
        model: ModelHandle, data: Dataset, assignment: Assignment, config: Any, ctx: Context
    ) -> Update:
        return method().finetune(model, data, assignment, config, ctx)

    @hookimpl
    def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
        return method().screen(updates, state, ctx.configs[method().name])

    @hookimpl
    def edgellm_aggregate(state: State, updates: Sequence[Update], config: Any, ctx: Context) -> State:
        return method().aggregate(state, updates, config, ctx)

    @hookimpl
    def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Any, ctx: Context) -> ModelHandle:
        return method().personalise(model, state, folder, config, ctx)

    @hookimpl
    def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
        return method().measure(subject, data, ctx.configs[method().name], ctx)

    return (
        edgellm_initialise, edgellm_assign, edgellm_finetune, edgellm_screen, edgellm_aggregate, edgellm_personalise,
        edgellm_measure,
    )  # fmt: skip

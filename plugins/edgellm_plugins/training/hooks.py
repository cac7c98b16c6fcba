"""The hooks of every method that trains theta by back-propagation, in its method.py. Light until a hook runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.hookspecs import hookimpl

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update

Hooks = tuple[Callable[..., Any], ...]


def training_hooks(package: str) -> Hooks:
    """(initialise, finetune, screen, aggregate, personalise, measure) of `package`.method; `aggregate` is
    `backprop`'s."""

    def method() -> Any:
        return import_module(f"{package}.method")

    @hookimpl
    def edgellm_initialise(model: ModelHandle, config: Any, ctx: Context) -> State:
        state: State = method().initialise(model, config, ctx)
        return state

    @hookimpl
    def edgellm_finetune(
        model: ModelHandle, data: Dataset, assignment: Assignment, config: Any, ctx: Context
    ) -> Update:
        update: Update = method().finetune(model, data, assignment, config, ctx)
        return update

    @hookimpl
    def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
        reasons: Mapping[str, str] = method().screen(updates, state, ctx)
        return reasons

    @hookimpl
    def edgellm_aggregate(state: State, updates: Sequence[Update], ctx: Context) -> State:
        from edgellm_plugins.training.backprop import aggregate

        return aggregate(state, updates, ctx)

    @hookimpl
    def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Any, ctx: Context) -> ModelHandle:
        tuned: ModelHandle = method().personalise(model, state, folder, config, ctx)
        return tuned

    @hookimpl
    def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
        metrics: Mapping[str, Metric] | None = method().measure(subject, data, ctx)
        return metrics

    return (
        edgellm_initialise, edgellm_finetune, edgellm_screen, edgellm_aggregate, edgellm_personalise, edgellm_measure,
    )  # fmt: skip

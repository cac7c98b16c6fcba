"""The hooks that every rule of aggregation has, `aggregate` in its method.py. Light until a hook runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgellm_sdk.hookspecs import hookimpl

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import State, Update

Hooks = tuple[Callable[..., Any], Callable[..., Any]]


def rule_hooks(package: str, screened_by: str = "edgellm_sdk.kit.averaging") -> Hooks:
    """(screen, aggregate): `screen` of the module `screened_by`, `aggregate` of `package`.method."""

    @hookimpl
    def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
        reasons: Mapping[str, str] = import_module(screened_by).screen(updates, state, ctx)
        return reasons

    @hookimpl
    def edgellm_aggregate(state: State, updates: Sequence[Update], config: Any, ctx: Context) -> State:
        new: State = import_module(f"{package}.method").aggregate(state, updates, config, ctx)
        return new

    return edgellm_screen, edgellm_aggregate

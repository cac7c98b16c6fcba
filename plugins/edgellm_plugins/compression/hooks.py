"""The hook that every compression has, `compress` in its method.py. Light until it runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgellm_sdk.hookspecs import hookimpl

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle


def compress_hook(package: str) -> Callable[..., Any]:
    """`compress` of `package`.method: (model, data, config, ctx) -> model."""

    @hookimpl
    def edgellm_compress(model: ModelHandle, data: Dataset | None, config: Any, ctx: Context) -> ModelHandle:
        made: ModelHandle = import_module(f"{package}.method").compress(model, data, config, ctx)
        return made

    return edgellm_compress

"""FedProx: a client is pulled back to where it started (arXiv 1812.06127). For `--around`."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Update


@dataclass(frozen=True)
class Config:
    mu: float = opt(0.01, "weight of (mu / 2) |theta - theta_0|^2 in a client's loss", ge=0)


PLUGIN = Plugin(
    name="fedprox",
    summary="a proximal term in every client's loss",
    version="0.1.0",
    config=Config,
    paper="arXiv 1812.06127",
)


@hookimpl
def edgellm_prepare(config: Config, ctx: Context) -> None:
    from edgellm_plugins.federated.fedprox.method import prepare

    prepare(config, ctx)


@hookimpl(wrapper=True)
def edgellm_finetune(ctx: Context) -> Generator[None, Update, Update]:
    from edgellm_plugins.federated.drift import insist

    update = yield
    insist(ctx, PLUGIN.name)
    return update

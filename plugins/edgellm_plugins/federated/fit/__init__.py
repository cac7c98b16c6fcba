"""Work that fits each client: batch, layers and steps from the memory, the cores and the link it says it has."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment


@dataclass(frozen=True)
class Config:
    seconds: float = opt(0.0, "longest turn, computing and carrying both ways; 0 is any", unit="s", ge=0)
    floor: int = opt(330, "resident memory of a process before its model", unit="MB", ge=0)
    layers: bool = opt(True, "who cannot bear one example in all trained layers trains fewer, the last ones")


PLUGIN = Plugin(
    name="fit",
    summary="smaller batches, fewer layers and steps for clients with less memory, cores or link (--profiles)",
    version="0.1.0",
    config=Config,
)


@hookimpl(wrapper=True)
def edgellm_assign(
    data: Mapping[str, int], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.federated.fit.method import fitted

    ctx.starts = {}  # of this round alone
    assigned = yield
    return fitted(assigned, data, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment) -> Assignment | None:
    from edgellm_plugins.federated.fit.method import prepare

    return prepare(assignment)

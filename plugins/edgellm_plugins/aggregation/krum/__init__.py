"""Krum and Multi-Krum: the changes with the closest neighbours (arXiv 1703.02757)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Byzantine
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


@dataclass(frozen=True)
class Config(Byzantine):
    select: int = opt(1, "m, how many changes are averaged; 1 is Krum, more is Multi-Krum, 0 is n - f", ge=0)


PLUGIN = Plugin(
    name="krum",
    summary="Krum and Multi-Krum: the client changes with the closest neighbours",
    version="0.1.0",
    config=Config,
    paper="arXiv 1703.02757",
)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, clients: Sequence[str], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.aggregation import robust

    robust.enough(ctx.configs[PLUGIN.name].byzantine, len(clients), 2, 3, PLUGIN.name)
    return (yield)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

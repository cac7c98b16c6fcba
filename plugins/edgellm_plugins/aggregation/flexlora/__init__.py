"""FlexLoRA: the exact mean of products, decomposed; each client gets as many components as its rank (2402.11505)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.lora_options import Ranked
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


@dataclass(frozen=True)
class Config(Ranked):
    rank: int = opt(0, "rank of the result of files carried by hand; 0 is the largest of theirs", ge=0)


PLUGIN = Plugin(
    name="flexlora",
    summary="best approximation of the exact mean in every client's own rank",
    version="0.1.0",
    config=Config,
    paper="arXiv 2402.11505",
    aliases=("exact-svd",),
)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.ranking import assign

    return assign(state, clients, data, config, ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__, "edgellm_plugins.aggregation.ranking")

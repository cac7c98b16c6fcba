"""FedEx-LoRA: factors are averaged, and what that misses is added to the weights (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State


@dataclass(frozen=True)
class Config(Weighted):
    rank: int = opt(0, "largest rank of a round's residual; 0 keeps all of it, (K - 1) r", ge=0)
    tolerance: float = opt(
        1e-7, "leave out singular values of the residual below this share of the mean's norm", ge=0, le=1
    )


PLUGIN = Plugin(
    name="fedex-lora",
    summary="exact: the residual of averaged factors is folded into the weights",
    version="0.1.0",
    config=Config,
    paper="arXiv 2410.09432",
)


@hookimpl
def edgellm_assign(state: State, clients: Sequence[str], ctx: Context) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.fedex_lora.method import assign

    return assign(state, clients, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> Assignment:
    from edgellm_plugins.aggregation.folding import prepare

    return prepare(assignment, ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__, "edgellm_plugins.aggregation.ranking")

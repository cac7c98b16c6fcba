"""Clients of different kinds in one federation: back-propagation at several ranks beside forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.training.hooks import training_hooks
from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, State, Update

WORKS = ("backprop", "scalars")


@dataclass(frozen=True)
class Kind:
    """`backprop` trains the first `rank` columns of every B; `scalars` all of them, along seeded directions."""

    work: str
    rank: int


@dataclass(frozen=True)
class Config(Options):
    rank: int = opt(8, "r, the rank of B A that everybody holds", ge=1, le=512)
    alpha: float = opt(16.0, "the update is scaled by s = alpha / rank", ge=1e-3)
    kinds: str = opt("backprop:8,backprop:4,scalars", "kinds of clients, the most able first: backprop:RANK or scalars")
    learning_rate: float = opt(2e-3, "eta of back-propagation, the peak step", ge=0)
    scalar_rate: float = opt(0.01, "eta along seeded directions, the peak step", ge=0)
    probes: int = opt(4, "seeded directions a step, two forwards each", ge=1, le=256)
    step: float = opt(0.05, "h, the finite-difference step", ge=1e-6, le=1)
    upload_seconds: float = opt(30.0, "a kind whose update takes longer to send is not given", unit="s", ge=0)
    floor: int = opt(330, "resident memory of a process before its model", unit="MB", ge=0)

    def __post_init__(self) -> None:
        self.chosen_kinds()

    @property
    def parts(self) -> bool:
        return False

    def chosen_kinds(self) -> tuple[Kind, ...]:
        """`kinds`, read. ValueError for what is none."""
        found = []
        for word in self.kinds.split(","):
            work, _, rank = word.strip().partition(":")
            if work not in WORKS or (work == "scalars") != (not rank) or (rank and not rank.isdecimal()):
                raise ValueError(f"kinds: {word.strip()[:40]!r} is neither backprop:RANK nor scalars")
            if not 1 <= int(rank or self.rank) <= self.rank:
                raise ValueError(f"kinds: {word.strip()[:40]!r} is not a rank of 1..{self.rank}")
            found.append(Kind(work, int(rank or self.rank)))
        return tuple(found)


PLUGIN = Plugin(
    name="mixed",
    summary="back-propagation at several ranks and seeded scalars in one round, averaged exactly",
    version="0.1.0",
    config=Config,
    paper="arXiv 2308.03303, 2403.12313 (one frozen A for all), 2305.17333 (scalars)",
)


(
    edgellm_initialise,
    edgellm_finetune,
    edgellm_screen,
    _,
    edgellm_personalise,
    edgellm_measure,
) = training_hooks(__name__)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.federated.mixed.method import assign

    return assign(state, clients, data, config, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.federated.mixed.method import aggregate

    return aggregate(state, updates, config, ctx)

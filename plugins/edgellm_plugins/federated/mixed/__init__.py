"""Clients of different kinds in one federation: back-propagation at several ranks beside forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update

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


@hookimpl
def edgellm_initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    from edgellm_plugins.federated.mixed.method import initialise

    return initialise(model, config, ctx)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.federated.mixed.method import assign

    return assign(state, clients, data, config, ctx)


@hookimpl
def edgellm_finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    from edgellm_plugins.federated.mixed.method import finetune

    return finetune(model, data, assignment, config, ctx)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_plugins.federated.mixed.method import screen

    return screen(updates, state, ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.federated.mixed.method import aggregate

    return aggregate(state, updates, config, ctx)


@hookimpl
def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    from edgellm_plugins.federated.mixed.method import personalise

    return personalise(model, state, folder, config, ctx)


@hookimpl
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    from edgellm_plugins.training.backprop import measure

    return measure(subject, data, ctx)

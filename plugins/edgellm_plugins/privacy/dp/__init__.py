"""Client-level differential privacy: clip whole updates, add noise once, charge epsilon first (arXiv 1710.06963)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.report import Report
    from edgellm_sdk.types import Assignment, State, Update


@dataclass(frozen=True)
class Config:
    clip: float = opt(1.0, "C, the largest norm of a client's whole contribution to a round", ge=1e-9, le=1e9)
    noise_multiplier: float = opt(1.0, "z: the noise on the sum of contributions is N(0, (z C)^2)", ge=0.01, le=1e4)
    epsilon: float = opt(8.0, "the budget; a round that would exceed it is not begun", ge=1e-6, le=1e6)
    delta: float = opt(0.0, "delta; 0 takes a tenth of 1 / clients", ge=0, le=0.5)
    clip_on: str = opt(
        "update",
        "what is bounded: the change of what trains, or of B A where A is frozen and known to the server",
        choices=("update", "product"),
    )
    sampling: str = opt(
        "public",
        "of a round's clients: as the run's seed says, or each by a draw that nobody knows",
        choices=("public", "poisson"),
    )


PLUGIN = Plugin(
    name="dp",
    summary="differential privacy for whole clients: clip, noise from the operating system, epsilon charged first",
    version="0.1.0",
    config=Config,
    paper="arXiv 1710.06963",
    requires=("dp_accounting",),
    repeats=False,
    hides=True,
)


@hookimpl
def edgellm_cohort(clients: Sequence[str], count: int, config: Config, ctx: Context) -> Sequence[str] | None:
    from edgellm_plugins.privacy.dp.method import cohort

    return cohort(clients, count, config, ctx)


@hookimpl(wrapper=True)
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.privacy.dp.method import before_the_round

    before_the_round(state, clients, len(data), ctx.configs[PLUGIN.name], ctx)
    return (yield)


@hookimpl
def edgellm_screen(updates: Sequence[Update]) -> Mapping[str, str]:
    from edgellm_plugins.privacy.dp.method import screen

    return screen(updates)


@hookimpl
def edgellm_incoming(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> Sequence[Update]:
    from edgellm_plugins.privacy.dp.method import released

    return released(state, updates, config, ctx)


@hookimpl(wrapper=True)
def edgellm_aggregate(ctx: Context) -> Generator[None, State, State]:
    from edgellm_plugins.privacy.rules import forget

    new = yield
    forget(ctx, "training ", "aggregation error", "error of averaged")  # what is left of the clients' losses is zeros
    return new


@hookimpl
def edgellm_report(report: Report, ctx: Context) -> None:
    from edgellm_plugins.privacy.dp.method import describe

    describe(report, ctx.configs[PLUGIN.name], ctx)

"""Secure aggregation: the server learns the sum of the clients' updates and no single one (arXiv 1611.04482)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.federate.rounds import Engine, Failure
    from edgellm_sdk.report import Report
    from edgellm_sdk.types import Assignment, Dataset, State, Update


@dataclass(frozen=True)
class Config:
    threshold: float = opt(0.6, "share of a round's clients that must finish, or nothing is unmasked", ge=0.51, le=1)
    clip: float = opt(10.0, "C, the largest norm of a client's change; the grid reaches from -C to C", ge=1e-6, le=1e6)
    bits: int = opt(20, "the grid has 2^bits - 1 values; 2^bits x clients stays below 2^32", unit="bits", ge=4, le=30)
    weighting: str = opt("examples", "weight of a client", choices=("examples", "equal"))
    cap: int = opt(0, "largest number of examples that counts; 0 takes that of the round's largest client", ge=0)


PLUGIN = Plugin(
    name="secagg",
    summary="secure aggregation: pairwise masks, so that only the sum of the updates is ever seen",
    version="0.1.0",
    config=Config,
    paper="arXiv 1611.04482",
    requires=("cryptography",),
    hides=True,
)


@hookimpl(wrapper=True)
def edgellm_assign(
    clients: Sequence[str], data: Mapping[str, int], ctx: Context
) -> Generator[None, Mapping[str, Assignment], Mapping[str, Assignment]]:
    from edgellm_plugins.privacy.secagg.method import before_the_round

    before_the_round(clients, data, ctx.configs[PLUGIN.name], ctx)
    return (yield)


@hookimpl
def edgellm_exchange(
    messages: Mapping[str, bytes], engine: Engine, state: State, config: Config, ctx: Context
) -> Iterable[tuple[str, bytes | Failure]]:
    from edgellm_plugins.privacy.secagg.method import exchange

    return exchange(messages, engine, state, config, ctx)


@hookimpl
def edgellm_answer(data: Dataset, assignment: Assignment, ctx: Context) -> Update | None:
    from edgellm_plugins.privacy.secagg.method import answer

    return answer(data, assignment, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> Assignment:
    from edgellm_plugins.privacy.secagg.method import prepare

    return prepare(assignment, ctx)


@hookimpl(wrapper=True)
def edgellm_finetune(assignment: Assignment, ctx: Context) -> Generator[None, Update, Update]:
    from edgellm_plugins.privacy.secagg.method import under_masks

    update = yield
    return under_masks(update, assignment, ctx)


@hookimpl
def edgellm_incoming(updates: Sequence[Update], ctx: Context) -> Sequence[Update]:
    from edgellm_plugins.privacy.secagg.method import merged

    return merged(updates, ctx)


@hookimpl(wrapper=True)
def edgellm_aggregate(ctx: Context) -> Generator[None, State, State]:
    from edgellm_plugins.privacy.rules import forget

    new = yield
    forget(ctx, "aggregation error", "error of averaged")
    return new


@hookimpl
def edgellm_report(report: Report, ctx: Context) -> None:
    from edgellm_plugins.privacy.secagg.method import describe

    describe(report, ctx.configs[PLUGIN.name])

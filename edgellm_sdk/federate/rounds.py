"""The rounds of a federation: sample, assign, work, check, screen, aggregate, checkpoint.

Everything random is a function of (seed, name, index) and the state after each round is on disk, so a run killed at
any moment resumes to the same bytes. An engine only carries messages: it is given the assignments as bytes and gives
back each client's update as bytes, or the reason there is none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from edgellm_sdk import wire
from edgellm_sdk.context import Context, Cost, Rounds
from edgellm_sdk.errors import FederationError, ModelError
from edgellm_sdk.federate.ledger import Ledger, Line
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, Metric, State, Update

CHECKPOINT = "state"


@dataclass(frozen=True)
class Failure:
    """Why a client sent nothing usable. `reached` says whether its assignment got to it."""

    reason: str
    reached: bool = True


Engine: TypeAlias = Callable[[Mapping[str, bytes]], Iterable[tuple[str, "bytes | Failure"]]]
Watch: TypeAlias = Callable[[State], Mapping[str, Metric]]


@dataclass(frozen=True)
class Plan:
    """`clients` maps each enrolled client to its number of examples; `quorum` is a share of the sampled clients."""

    clients: Mapping[str, int]
    per_round: int
    rounds: int
    quorum: float = 0.5
    attempts: int = 3
    watch_every: int = 0

    @cached_property
    def names(self) -> list[str]:
        """The enrolled clients, sorted."""
        return sorted(self.clients)


def sample(plan: Plan, cohort: int, attempt: int, ctx: Context) -> list[str]:
    """This cohort's clients, sorted. A repeated round draws again."""
    return ctx.stream(f"cohort/{cohort}", attempt).sample(plan.names, plan.per_round)


@dataclass
class Traffic:
    """Bytes of all messages that an engine carries in one round, by client; of a client's replies to one message the
    first counts."""

    engine: Engine
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def __call__(self, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        waiting = set(messages)
        for client, message in messages.items():
            self.down[client] = self.down.get(client, 0) + len(message)
        for client, reply in self.engine(messages):
            if client in waiting:
                waiting.remove(client)
                self.up[client] = self.up.get(client, 0) + (0 if isinstance(reply, Failure) else len(reply))
                if isinstance(reply, Failure) and not reply.reached:
                    self.down[client] -= len(messages[client])
            yield client, reply


def run_rounds(
    relay: Relay, start: State, plan: Plan, engine: Engine, ctx: Context, ledger: Ledger, watch: Watch | None = None
) -> State:
    """Rounds `start.round + 1 .. plan.rounds`. FederationError when a round stays below quorum after all attempts.

    The last good state is on disk whenever this returns or raises.
    """
    state = start
    if watch and state.round == 0:
        _observe(watch, state, ctx)
    with ctx.rounds_view(plan.rounds, state.round) as view:
        while state.round < plan.rounds:
            state, cells = _one_round(relay, state, plan, engine, ctx, ledger, view)
            last = state.round == plan.rounds
            if watch and plan.watch_every and (state.round % plan.watch_every == 0 or last):
                _observe(watch, state, ctx)
            ctx.checkpoint(CHECKPOINT, state.arrays, _scalars(state, ctx))
            view.ended(cells, _headline(ctx))
    return state


def resumed(ctx: Context, base: str) -> State | None:
    """The state of the last whole checkpoint, if there is one for this base model; its curves go to `ctx`."""
    found = ctx.resume(CHECKPOINT)
    if found is None:
        return None
    arrays, scalars = found
    state = State(scalars["base"], scalars["round"], arrays, scalars["scalars"], scalars["cohort"])
    if state.base != base:
        raise FederationError("the checkpoint belongs to another base model", str(ctx.folder), "use another --output")
    ctx.curves.update({name: [(x, y) for x, y in points] for name, points in scalars["curves"].items()})
    ctx.started = time.monotonic() - scalars["elapsed"]
    return state


def _scalars(state: State, ctx: Context) -> dict[str, object]:
    return {
        "base": state.base,
        "round": state.round,
        "cohort": state.cohort,
        "scalars": dict(state.scalars),
        "curves": ctx.curves,
        "elapsed": ctx.elapsed,
    }


def _observe(watch: Watch, state: State, ctx: Context) -> None:
    forwards = state.scalars.get("forwards")
    for name, metric in watch(state).items():
        ctx.curve(f"{name} over rounds", state.round, metric.value)
        ctx.curve(f"{name} over seconds", ctx.elapsed, metric.value)
        if isinstance(forwards, int):
            ctx.curve(f"{name} over forwards", forwards, metric.value)


def _headline(ctx: Context) -> str:
    """The newest loss and accuracy, for the progress bar."""
    parts = []
    training = [name for name in ctx.curves if name.startswith("training ") and name.endswith(" over rounds")]
    for name in (*training, "balanced accuracy over rounds"):
        if points := ctx.curves.get(name):
            parts.append(f"{name.split(' over')[0]} {points[-1][1]:.3f}")
    return "  ".join(parts)


def _one_round(
    relay: Relay, state: State, plan: Plan, engine: Engine, ctx: Context, ledger: Ledger, view: Rounds
) -> tuple[State, tuple[Any, ...]]:
    """The next state, and what the view shows of the round."""
    number = state.round + 1
    reasons: dict[str, str] = {}
    for attempt in range(plan.attempts):
        chosen = relay.cohort(plan.names, plan.per_round, state.cohort, attempt, ctx)
        clients = chosen or sample(plan, state.cohort, attempt, ctx)
        assignments = relay.assign(state, clients, plan.clients, ctx)
        ctx.assigned = assignments
        sent = {client: wire.assignment_to_bytes(assignments[client]) for client in clients}
        began = time.monotonic()
        traffic = Traffic(engine)
        replies = _counted(relay.exchange(sent, traffic, state, ctx), len(sent), number, view)
        updates, lines, reasons = _collect(relay, state, assignments, sent, replies, traffic, plan.clients, ctx)
        ledger.add(number, attempt, lines, time.monotonic() - began)
        if len(updates) >= max(1, math.ceil(plan.quorum * len(clients))):
            break
    else:
        some = "; ".join(f"{client}: {reason}" for client, reason in sorted(reasons.items())[:3])
        raise FederationError(
            f"round {number} stayed below quorum {plan.attempts} times", some, "round by round in ledger.jsonl"
        )
    new = relay.aggregate(state, relay.incoming(state, updates, ctx), ctx)
    if new.round != number:
        raise FederationError(f"aggregation returned round {new.round} after round {state.round}")
    problem = _not_finite(new)
    if problem:
        raise FederationError(f"aggregation made {problem} not finite", f"round {number}", "lower the learning rate")
    carried = sum(line.up for line in lines), sum(line.down for line in lines)
    return new, (number, len(updates), len(reasons), *carried, time.monotonic() - began)


def _counted(
    replies: Iterable[tuple[str, bytes | Failure]], asked: int, number: int, view: Rounds
) -> Iterator[tuple[str, bytes | Failure]]:
    view.answered(0, asked, number)
    for count, reply in enumerate(replies, 1):
        view.answered(count, asked, number)
        yield reply


def _not_finite(state: State) -> str | None:
    import numpy as np

    for name, array in sorted(state.arrays.items()):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return name
    return None


def _costs(client: str, ctx: Context) -> dict[str, Any]:
    spent, foretold = (costs.get(client, Cost()) for costs in (ctx.spent, ctx.foretold))
    return {
        "peak": spent.peak, "took": round(spent.seconds, 4),
        "foretold_peak": foretold.peak, "foretold_took": round(foretold.seconds, 4),
    }  # fmt: skip


def _collect(
    relay: Relay,
    state: State,
    assignments: Mapping[str, Assignment],
    sent: Mapping[str, bytes],
    replies: Iterable[tuple[str, bytes | Failure]],
    traffic: Traffic,
    enrolled: Mapping[str, int],
    ctx: Context,
) -> tuple[list[Update], list[Line], dict[str, str]]:
    """(usable updates sorted by client, ledger lines, reasons by client). The first reply of a client counts."""
    updates: dict[str, Update] = {}
    reasons: dict[str, str] = {}
    received: set[str] = set()
    payload: dict[str, int] = {}
    unreached: set[str] = set()
    for client, reply in replies:
        if client not in sent or client in received:
            continue
        received.add(client)
        if isinstance(reply, Failure):
            reasons[client] = reply.reason
            if not reply.reached:
                unreached.add(client)
            continue
        try:
            update = wire.update_from_bytes(reply, client)
        except ModelError as error:
            reasons[client] = error.what
            continue
        payload[client] = wire.payload_bytes(update.arrays)
        problem = wire.check_update(update, state, client)
        if problem is None and update.examples > enrolled[client]:
            problem = f"claims {update.examples} examples, enrolled with {enrolled[client]}"
        if problem:
            reasons[client] = problem
        else:
            updates[client] = update
    for client in sent:
        if client not in received:
            reasons[client] = "did not answer"
    usable = [updates[client] for client in sorted(updates)]
    for client, reason in relay.screen(usable, state, ctx).items():
        reasons.setdefault(client, reason)
    usable = [update for update in usable if update.client not in reasons]
    lines = [
        Line(
            client,
            down=traffic.down.get(client, 0),
            down_payload=0 if client in unreached else wire.payload_bytes(assignments[client].arrays),
            up=traffic.up.get(client, 0),
            up_payload=payload.get(client, 0),
            rejected=reasons.get(client, ""),
            **_costs(client, ctx),
        )
        for client in sorted(sent)
    ]
    return usable, lines, reasons

"""The best mix of formats within a budget: a knapsack in which every matrix takes exactly one of its formats."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm_sdk.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """One format for one matrix: its bytes in the file and the divergence that it is expected to cause, in nats."""

    format: str
    nbytes: int
    cost: float


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of cost over bytes, from the smallest on, each better than the one before.

    Only these can be bought at a price per byte that falls from one to the next.
    """
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(a: Choice, b: Choice) -> float:
    """Divergence saved per byte on the way from `a` up to `b`."""
    return (a.cost - b.cost) / max(b.nbytes - a.nbytes, 1)


def solve(options: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice a matrix, at most `budget` bytes together: steps along all frontiers, the best gain per byte first,
    then whatever else still fits. ConfigError when even the smallest choices do not fit.

    The first part is the optimum of the relaxed problem; what is left over is smaller than the step that did not fit.
    """
    smallest = {name: min(choices, key=lambda c: (c.nbytes, c.cost)) for name, choices in options.items()}
    hulls = {name: frontier(choices) for name, choices in options.items()}
    plan = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.nbytes for choice in plan.values())
    if left < 0:
        least = sum(choice.nbytes for choice in smallest.values())
        raise ConfigError(f"the matrices take at least {least:,} bytes, {budget:,} are left for them")
    steps = [(-_gain(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, place = heapq.heappop(steps)
        hull = hulls[name]
        more = hull[place].nbytes - plan[name].nbytes
        if more > left:
            continue  # this matrix stops here; smaller steps of others may still fit
        left -= more
        plan[name] = hull[place]
        if place + 1 < len(hull):
            heapq.heappush(steps, (-_gain(hull[place], hull[place + 1]), name, place + 1))
    while True:
        fitting = [
            (plan[name].cost - choice.cost, name, choice)
            for name, choices in options.items()
            for choice in choices
            if choice.cost < plan[name].cost and 0 <= choice.nbytes - plan[name].nbytes <= left
        ]
        if not fitting:
            return plan
        _, name, choice = max(fitting, key=lambda row: (row[0], row[1]))
        left -= choice.nbytes - plan[name].nbytes
        plan[name] = choice

"""Client-level DP-FedAvg, arXiv 1710.06963: x_k min(1, C / |x_k|), uniform weights, N(0, (z C)^2 I) on the sum, once.

A client contributes the change of everything that it sends, all arrays together, as one vector. Who sends nothing, or
nothing finite, contributes zeros, so that the sum is divided by a number that no data changes: the clients asked, or
with `sampling=poisson` the number expected. The rule is given one update, the noised mean, which is all that it needs
where it is linear; whatever it does with it is post-processing.

Scalars along a client's own directions (kind `seeds` without shared directions) have no common sum: each client's
vector gets N(0, (z C)^2 I) of its own, and the rule sees one noised update for each client asked. The list of them has
the same sensitivity C; there is more noise in all, by a factor of the square root of their number.

Examples count 1. Of an update's scalars only the counts that options decide are passed on; `loss` and `dropped` are set
to zero, and so are arrays called `loss` (FwdLLM), since they are not covered by the clip.

Noise comes from the operating system: a run cannot be repeated byte for byte, which is the point. A variate is half the
sum of four Box-Muller normals on 53-bit uniforms, and sums are rounded to the arrays' type only after it is added; the
guarantee is that of a real-valued Gaussian.

Where we differ from the paper: epsilon by `accountant`, with cohorts either public or Poisson; no per-layer clip.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgellm_plugins.privacy import accountant, rules
from edgellm_plugins.privacy.budget import Budget
from edgellm_plugins.privacy.clipping import clipped
from edgellm_plugins.privacy.dp import PLUGIN, Config
from edgellm_plugins.privacy.vectors import PUBLIC
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, PrivacyError
from edgellm_sdk.kit import averaging
from edgellm_sdk.report import Report
from edgellm_sdk.types import Array, Arrays, Metric, State, Update

NEUTRAL: Mapping[str, Any] = {"loss": 0.0, "dropped": 0}
CHUNK = 1 << 17
NOTE = "differential privacy: noise and charges are this run's own, so it cannot be repeated byte for byte"


# The mechanism


def normal(count: int) -> Array:
    """Standard normal variates, (count,) float64, every bit from the operating system: 64 bytes for each."""
    made = np.empty(count)
    for start in range(0, count, CHUNK):
        part = made[start : start + CHUNK]
        words = np.frombuffer(os.urandom(64 * len(part)), np.uint64).reshape(8, -1) >> np.uint64(11)
        radius = np.sqrt(-2 * np.log((words[:4] + np.uint64(1)) * 2.0**-53))  # of uniforms in (0, 1]
        part[:] = (radius * np.cos(words[4:] * (2 * math.pi * 2.0**-53))).sum(0) / 2
    return made


def noised(vector: Arrays, deviation: float) -> dict[str, Array]:
    """`vector` + N(0, deviation^2 I), float64."""
    return {name: array + deviation * normal(array.size).reshape(array.shape) for name, array in vector.items()}


# What a client contributes


def contribution(update: Update, state: State, ctx: Context) -> dict[str, Array]:
    """What of an update is clipped. PrivacyError for what a clip does not bound: a plugin's own arrays, integers."""
    vector = {name: array for name, array in update.arrays.items() if name != "loss"}
    for name, array in vector.items():
        if "/" in name or array.dtype.kind != "f":
            what = f"{name[:60]} leaves the client and is no part of theta"
            raise PrivacyError(what, "dp", "leave out the method that sends it")
    if update.kind.startswith("weights"):
        start = averaging.sent(update.client, state, ctx)
        return {name: array.astype(np.float64) - start[name] for name, array in vector.items()}
    return vector


def frozen_factors(names: Sequence[str], state: State, ctx: Context) -> dict[str, Array]:
    """For every B (d_out, r) that trains, the L (r, r) with L L^T = A A^T, so that |dB A|_F = |dB L|_F.

    PrivacyError where that bounds nothing: when A trains as well, no bound on the change of B A bounds the factors that
    noise is added to.
    """
    known: dict[str, Array] = dict(state.arrays)
    for _, live in ctx.kept("objective "):
        known |= getattr(getattr(live, "trainables", None), "frozen", {})
    for assignment in ctx.assigned.values():
        known |= dict(assignment.arrays)
    factors = {}
    for name in names:
        a = name[:-1] + "A"
        if not name.endswith("lora_B") or a in names:
            raise PrivacyError("the change of B A bounds neither factor when both train", "clip-on", "use update")
        if a not in known:
            raise PrivacyError(f"the server does not hold {a[:60]}", "clip-on", "use update")
        wide = known[a].astype(np.float64)
        try:
            factors[name] = np.linalg.cholesky(wide @ wide.T)
        except np.linalg.LinAlgError:
            raise PrivacyError(f"{a[:60]} has no full rank", "clip-on", "use update") from None
    return factors


def neutral(update: Update, client: str, arrays: Arrays, stands_for: int = 1) -> Update:
    """An update of `client` that carries `arrays` and says nothing else about anybody's data; it `stands_for` so many
    clients' forwards."""
    wide = {name: array.astype(update.arrays[name].dtype) for name, array in arrays.items()}
    if "loss" in update.arrays:
        wide["loss"] = np.zeros_like(update.arrays["loss"])
    scalars = {name: update.scalars[name] for name in PUBLIC if name in update.scalars}
    scalars |= {name: value for name, value in NEUTRAL.items() if name in update.scalars}
    scalars |= {"forwards": scalars["forwards"] * stands_for} if "forwards" in scalars else {}
    return Update(update.base, update.round, client, update.kind, wide, 1, update.rng, scalars)


def screen(updates: Sequence[Update]) -> dict[str, str]:
    """Who is not finite contributes nothing. A clip would not see it: min(1, C / NaN) is 1."""
    odd = [u for u in updates if not all(np.isfinite(a).all() for a in u.arrays.values() if a.dtype.kind == "f")]
    return {update.client: "is not finite" for update in odd}


# One round


def cohort(clients: Sequence[str], count: int, config: Config, ctx: Context) -> Sequence[str] | None:
    """With `sampling=poisson` each client with probability count / clients. When chance picks nobody, one is asked
    and its contribution taken as zeros."""
    if config.sampling == "public":
        return None
    draws = secrets.SystemRandom()
    drawn = [client for client in clients if draws.random() < count / len(clients)]
    ctx.drop("dp cohort")
    ctx.keep("dp cohort", lambda: (tuple(drawn), count))
    return drawn or [draws.choice(clients)]


def _delta(config: Config, population: int) -> float:
    """delta, below 1 / N. ConfigError otherwise."""
    if config.delta >= 1 / population:
        raise ConfigError(f"delta {config.delta:g} is not below 1 / {population} clients", "dp", "use 0")
    return config.delta or 0.1 / population


def _budget(clients: Sequence[str], population: int, config: Config, ctx: Context) -> Budget:
    """What was charged so far, under this run's terms; a sum is divided by `per_round`."""
    expected = ctx.keep("dp cohort", lambda: ((), 0))[1] if config.sampling == "poisson" else len(clients)
    terms = {"noise_multiplier": config.noise_multiplier, "clip": config.clip, "clip_on": config.clip_on}
    return Budget(ctx.folder, {**terms, "sampling": config.sampling, "population": population, "per_round": expected})


def _rate(budget: Budget) -> float:
    """q: with what probability a client is in a round, where nobody knows; else 1."""
    terms = budget.terms
    return float(terms["per_round"] / terms["population"]) if terms["sampling"] == "poisson" else 1.0


def _count(budget: Budget, more: Sequence[str] | None = None) -> int:
    """Charges that count for one client, with a round of the clients `more` unless None."""
    if budget.terms["sampling"] == "poisson":
        return budget.charges + (more is not None)
    return budget.times(more or ())


def before_the_round(state: State, clients: Sequence[str], population: int, config: Config, ctx: Context) -> None:
    """PrivacyError, before anyone works, when the round cannot be paid for or the claim cannot be kept."""
    if state.round == 0:
        ctx.note(NOTE)
    if "secagg" in ctx.configs:
        raise PrivacyError("dp clips single updates, which secagg hides", "around", "use one of them")
    rules.comes_first(PLUGIN.name, ctx)
    ctx.drop("dp budget")
    budget = ctx.keep("dp budget", lambda: _budget(clients, population, config, ctx))
    budget.covers(state.round)
    z, delta, q = config.noise_multiplier, _delta(config, population), _rate(budget)
    if not budget.charges:
        share = 1.0 if q < 1 else len(clients) / population
        planned = math.ceil(ctx.rounds * share)
        cost = accountant.epsilon(q, z, planned, delta)
        if cost > config.epsilon:
            most = accountant.affordable(q, z, delta, config.epsilon, planned)
            z = accountant.enough(q, planned, delta, config.epsilon)
            what = f"{ctx.rounds} rounds cost epsilon {cost:.3g} of {config.epsilon:g}"
            fix = f"use --dp-noise-multiplier {z:.3g}" + (f" or --rounds {int(most / share)}" if most else "")
            raise PrivacyError(what, f"delta {delta:.3g}", fix)
    _affordable(budget, clients, state.round + 1, config)


def _affordable(budget: Budget, clients: Sequence[str], number: int, config: Config) -> float:
    """epsilon after one more round of `clients`. PrivacyError when that is beyond the budget."""
    delta = _delta(config, budget.terms["population"])
    cost = accountant.epsilon(_rate(budget), config.noise_multiplier, _count(budget, clients), delta)
    if cost > config.epsilon:
        what = f"the privacy budget is exhausted: round {number} would make epsilon {cost:.4g} of {config.epsilon:g}"
        raise PrivacyError(what, str(budget.path), f"round {number - 1} is the last; its state is in checkpoint")
    return cost


def released(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> list[Update]:
    """What the rule may see of `updates`: charged first, noised then. PrivacyError with nothing released."""
    asked, number = sorted(ctx.assigned), state.round + 1
    budget = ctx.keep("dp budget", lambda: Budget(ctx.folder))
    reason = rules.not_linear(ctx)
    if reason and (updates[0].kind != "seeds" or config.sampling == "poisson"):
        raise PrivacyError(f"noise on a sum does not serve this rule: {reason}"[:200], "dp")
    parts = {update.client: contribution(update, state, ctx) for update in updates}
    shapes = {name: array.shape for name, array in parts[updates[0].client].items()}
    if any({name: array.shape for name, array in part.items()} != shapes for part in parts.values()):
        raise PrivacyError("updates of unlike shapes have no sum to add noise to", "dp")
    factors = frozen_factors(list(shapes), state, ctx) if config.clip_on == "product" else {}
    drawn = ctx.keep("dp cohort", lambda: ((), 0))[0] if config.sampling == "poisson" else asked
    zeros = {name: np.zeros(shape) for name, shape in shapes.items()}
    bounded = []
    for client in asked:
        part = parts.get(client, zeros) if client in drawn else zeros
        bounded.append(clipped({n: a @ factors[n] if n in factors else a for n, a in part.items()}, config.clip))

    ctx.curve("epsilon over rounds", number, _affordable(budget, asked, number, config))
    budget.charge(number, asked)

    deviation = config.noise_multiplier * config.clip
    if reason:
        noisy = (noised(part, deviation) for part in bounded)
        return [neutral(updates[0], client, part) for client, part in zip(asked, noisy, strict=True)]
    total = {name: np.sum([part[name] for part in bounded], axis=0) for name in shapes}
    mean = {name: array / budget.terms["per_round"] for name, array in noised(total, deviation).items()}
    mean = {name: np.linalg.solve(factors[name].T, a.T).T if name in factors else a for name, a in mean.items()}
    whose = updates[0].client
    if updates[0].kind.startswith("weights"):
        start = averaging.sent(whose, state, ctx)
        mean = {name: array + start[name] for name, array in mean.items()}
    return [neutral(updates[0], whose, mean, len(asked))]


def describe(report: Report, config: Config, ctx: Context) -> None:
    """The claim, in the report: epsilon, delta, the unit, and what they were computed from."""
    budget = Budget(ctx.folder)
    if not budget.terms:
        return
    population, z, q, count = budget.terms["population"], config.noise_multiplier, _rate(budget), _count(budget)
    delta = _delta(config, population)
    cost = accountant.epsilon(q, z, count, delta)
    report.metrics["epsilon"] = Metric(cost, f"at delta {delta:.3g}", population)
    report.notes += [] if NOTE in report.notes else [NOTE]
    report.privacy = {
        "unit": "one client: its contribution to every round, or zeros in its place",
        "epsilon": cost,
        "delta": delta,
        "budget": config.epsilon,
        "epsilon, tight": accountant.tight(q, z, count, delta),
        "epsilon when a client's data are exchanged": accountant.epsilon(q, z / 2, count, delta) if q == 1 else None,
        "noise multiplier": z,
        "clip": f"{config.clip:g}, on the {config.clip_on}",
        "clients": population,
        "sampling": f"{config.sampling}, {q:.3g} of the clients a round" if q < 1 else config.sampling,
        "charges": f"{budget.charges}, of which {count} count for the client charged most",
        "accountant": "dp-accounting, Renyi",
        "not covered": "enrolled sizes, held-out figures, ledgers, who answered, other runs on the same data",
    }

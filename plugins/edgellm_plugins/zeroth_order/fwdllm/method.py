"""FwdLLM, arXiv 2308.13894.

One round = one work item set: every sampled client evaluates the loss of its b-th minibatch along random directions v
and sends jvp = (f(theta + h v) - f(theta - h v)) / 2h. The server averages the forward gradients jvp * v of all rounds
since it last moved theta; once the variance of that mean is at most tau it steps and goes to minibatch b + 1, else it
asks the same clients for more directions on the same minibatch.

Symbols: theta trainable tensors, v direction, h step, C clients of a round, N forward gradients collected, tau
variance threshold, eta learning rate, g_prev the last accepted gradient.

Where we differ from the published code (and why):
- The variance covers all trainable tensors, or those named, not one tensor picked by its position in a list.
- The two halves of the variance test alternate over clients and rounds instead of first half / second half: the same
  statistic when theta stands still, and it needs two running sums where the code keeps every gradient.
- Clients count by their examples (`weighting=equal` is the published code): with unlike clients an equal vote of small
  and large ones fits a mix of labels that nobody has.
- tau = 0 calibrates: `calibration` x the variance of the first round (N = C * perturbations). Ours, not the paper's:
  its values belong to encoders with a classification head.
- A direction whose losses are not finite has jvp = 0, is not collected and is counted.
- Directions are numbered, not sent: `wire=seeds` uploads (jvp, loss), 8 bytes a perturbation; the server regenerates v.
  `wire=tensors` uploads jvp * v as the published code does. Both give the same theta, bit for bit.
- h is 0.05, where the code has 0.01 on float16: with a bfloat16 base, jvp at 0.01 was mostly rounding (measured on
  SmolLM2-135M, rank 8 on q and v: mean jvp^2 of 2.1 at h = 0.01, 0.68 at 0.05, 0.69 at 0.2).
- LoRA goes on down_proj of the last layers, where the mean jvp^2 of a direction was 20 times that on q and v.
- `limit` bounds N, so that a run always moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.clients import minibatch
from edgellm_plugins.zeroth_order.estimator import HalfSums, Values
from edgellm_plugins.zeroth_order.fwdllm import Config
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.objective import Objective, measured, objective, written
from edgellm_sdk.types import Array, Arrays, Assignment, Dataset, Metric, ModelHandle, Session, State, Update

THETA, PREVIOUS, FIRST, SECOND, MOMENT1, MOMENT2 = "theta/", "previous/", "sum0/", "sum1/", "moment1/", "moment2/"


def _part(arrays: Arrays, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _named(arrays: Arrays, prefix: str) -> dict[str, Array]:
    return {prefix + name: array for name, array in arrays.items()}


def _objective(model: ModelHandle, config: Config, ctx: Context) -> Objective:
    spec = adapters.Spec(
        config.train,
        config.layers,
        config.rank,
        config.alpha,
        adapters.module_names(config.targets),
        config.reduction,
    )
    return objective(model, spec, ctx, config.precision, config.hidden_memory, config.max_length, config.share)


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0, with nothing collected yet."""
    theta = _objective(model, config, ctx).initial
    if not any(name.endswith(config.variance_of) for name in theta):
        raise ConfigError(f"no trained tensor's name ends in {config.variance_of!r}", "variance-of", "leave it empty")
    scalars = {
        "minibatch": 0, "rounds_on_minibatch": 0, "collected": [0, 0], "weights": [0, 0], "steps": 0, "forwards": 0,
        "dropped": 0, "tau": config.tau, "variance": None, "sampling": False,
    }  # fmt: skip
    return State(model.digest, 0, _named(theta, THETA), scalars)


def _directions(state: State, client: str, config: Config, ctx: Context) -> tuple[int, dict[str, list[int]]]:
    """The pool of directions of one client in the coming round, and which of them each tensor uses."""
    theta = _part(state.arrays, THETA)
    n = config.perturbations
    who = client if config.directions == "own" else ""
    pool = int(ctx.stream(f"directions/{who}", state.round + 1).seeds(1)[0])
    if state.scalars["sampling"]:
        previous = _part(state.arrays, PREVIOUS)
        absolute = config.ranking == "magnitude"
        return pool, estimator.most_aligned(previous, pool, config.candidates * n, n, absolute)
    return pool, {name: list(range(n)) for name in theta}


def _draw(theta: Arrays, pool: int, picks: Mapping[str, Sequence[int]], n: int) -> list[Values]:
    shapes = estimator.shapes_of(theta)
    return [estimator.direction(shapes, pool, {name: picks[name][k] for name in shapes}) for k in range(n)]


def assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> dict[str, Assignment]:
    """theta, the minibatch number, and the directions of each client's own pool."""
    assigned = {}
    for client in clients:
        pool, picks = _directions(state, client, config, ctx)
        arrays = {n: a for n, a in state.arrays.items() if n.startswith(THETA)}
        arrays["pool"] = np.array([pool], np.uint64)
        if state.scalars["sampling"]:
            arrays["picks"] = np.array([picks[name] for name in sorted(picks)], np.uint16)
        scalars = {"minibatch": state.scalars["minibatch"]}
        assigned[client] = Assignment(state.base, state.round + 1, client, arrays, scalars)
    return assigned


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """One client's perturbed inferences on its current minibatch."""
    if not len(data):
        raise DataError("has no examples", assignment.client)
    theta = _part(assignment.arrays, THETA)
    n = config.perturbations
    picks = {name: list(range(n)) for name in theta}
    if "picks" in assignment.arrays:
        picks = {name: row.tolist() for name, row in zip(sorted(theta), assignment.arrays["picks"], strict=True)}
    directions = _draw(theta, int(assignment.arrays["pool"][0]), picks, n)

    number = assignment.scalars["minibatch"]
    name, indices = minibatch(data, assignment.client, number, config.batch_size, ctx)
    loss = partial(_objective(model, config, ctx).evaluate, name, partial(data.select, indices))
    estimate = estimator.probe(loss, theta, directions, config.step, config.difference)

    if estimate.dropped == n:
        raise DataError("no loss was finite", assignment.client, "lower the learning rate or the step")
    arrays: dict[str, Array] = {"loss": estimate.loss}
    if config.wire == "seeds":
        arrays["jvp"] = estimate.jvp
    else:
        gradients = [estimator.scaled(v, float(j)) for v, j in zip(directions, estimate.jvp, strict=True)]
        arrays |= {name: np.stack([g[name] for g in gradients]) for name in theta}
    kind = "seeds" if config.wire == "seeds" else "gradients"
    rng = estimator.noise_id()
    scalars = {"forwards": estimate.forwards, "dropped": estimate.dropped}
    return Update(assignment.base, assignment.round, assignment.client, kind, arrays, len(data), rng, scalars)


def screen(updates: Sequence[Update], state: State) -> dict[str, str]:
    """Reject what cannot be replayed or does not have the shapes of theta."""
    theta = _part(state.arrays, THETA)
    reasons = {}
    for update in updates:
        n = len(update.arrays.get("loss", ()))
        expected = {"loss": (n,), "jvp": (n,)} if update.kind == "seeds" else {"loss": (n,)}
        if update.kind == "gradients":
            expected |= {name: (n, *value.shape) for name, value in theta.items()}
        found = {name: array.shape for name, array in update.arrays.items()}
        forwards, dropped = update.scalars.get("forwards"), update.scalars.get("dropped")
        if update.rng != estimator.noise_id():
            reasons[update.client] = f"seeds of noise {update.rng[:40]!r} cannot be replayed"
        elif n == 0 or found != expected or any(a.dtype != np.float32 for a in update.arrays.values()):
            reasons[update.client] = "does not carry the arrays it was asked for"
        elif type(forwards) is not int or not n < forwards <= 2 * n or type(dropped) is not int or not 0 <= dropped < n:
            reasons[update.client] = "claims an impossible number of forwards"
    return reasons


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """Add the forward gradients to what is collected; step when their mean is precise enough."""
    theta = _part(state.arrays, THETA)
    scalars = dict(state.scalars)
    sums = HalfSums(estimator.shapes_of(theta))
    for half, prefix in enumerate((FIRST, SECOND)):
        for name, array in _part(state.arrays, prefix).items():
            sums.sums[half][name][...] = array
    sums.counts, sums.weights = list(scalars["collected"]), list(scalars["weights"])

    for position, update in enumerate(updates):
        weight = update.examples if config.weighting == "examples" else 1
        for k, gradient in enumerate(_gradients(update, state, theta, config, ctx)):
            if not update.scalars["dropped"] or any(array.any() for array in gradient.values()):
                sums.add(gradient, (position + k + scalars["rounds_on_minibatch"]) % 2, weight)
        for name in ("forwards", "dropped"):
            scalars[name] += update.scalars[name]
    names = [name for name in theta if name.endswith(config.variance_of)]
    variance = sums.variance(names)
    tau = scalars["tau"] or config.calibration * (variance if math.isfinite(variance) else 0.0)

    number = state.round + 1
    loss = float(np.mean([update.arrays["loss"].mean() for update in updates]))
    _draw_curves(ctx, number, loss, variance, sums.count, scalars["forwards"])
    scalars |= {"tau": tau, "variance": variance if math.isfinite(variance) else None}
    if variance > tau and sums.count < config.limit * len(updates):
        scalars |= {"collected": sums.counts, "weights": sums.weights}
        scalars["rounds_on_minibatch"] += 1
        kept = {n: a for n, a in state.arrays.items() if not n.startswith((FIRST, SECOND))}
        kept |= _named(sums.sums[0], FIRST) | _named(sums.sums[1], SECOND)
        return State(state.base, number, kept, scalars, state.cohort)

    g = sums.mean()
    ctx.curve("perturbations accepted over steps", scalars["steps"] + 1, sums.count)
    arrays = _step(theta, g, state, learning_rate(state.round, ctx.rounds, config), config)
    steps = scalars["steps"] + 1
    scalars |= {"collected": [0, 0], "weights": [0, 0], "rounds_on_minibatch": 0, "steps": steps}
    scalars |= {"minibatch": scalars["minibatch"] + 1, "sampling": config.sampling and steps % 2 == 1}
    longest = max(math.ceil(update.examples / config.batch_size) for update in updates)
    cohort = state.cohort + (scalars["minibatch"] % longest == 0)
    return State(state.base, number, arrays, scalars, cohort)


def _gradients(update: Update, state: State, theta: Arrays, config: Config, ctx: Context) -> list[Values]:
    """The forward gradients jvp * v of one update, float32; the same bits from scalars and from tensors."""
    n = len(update.arrays["loss"])
    if update.kind == "gradients":
        return [{name: update.arrays[name][k] for name in theta} for k in range(n)]
    pool, picks = _directions(state, update.client, config, ctx)
    directions = _draw(theta, pool, picks, n)
    return [estimator.scaled(v, float(j)) for v, j in zip(directions, update.arrays["jvp"], strict=True)]


def learning_rate(round: int, rounds: int, config: Config) -> float:
    """eta_r: linear warm-up over ceil(warmup * R) rounds, then linear decay to 0 at R."""
    warm = math.ceil(rounds * config.warmup)
    if round < warm:
        return config.learning_rate * (round + 1) / warm
    return config.learning_rate * max(0.0, (rounds - round) / max(1, rounds - warm))


def _step(theta: Arrays, g: Values, state: State, eta: float, config: Config) -> dict[str, Array]:
    """theta - eta * g, or Adam's step (arXiv 1412.6980, its default constants), float32; g is kept as g_prev."""
    arrays = _named(g, PREVIOUS)
    update = g
    if config.optimizer == "adam":
        t = state.scalars["steps"] + 1
        zeros = {name: np.zeros_like(value) for name, value in g.items()}
        m = {n: 0.9 * old + 0.1 * g[n] for n, old in (_part(state.arrays, MOMENT1) or zeros).items()}
        s = {n: 0.999 * old + 0.001 * g[n] ** 2 for n, old in (_part(state.arrays, MOMENT2) or zeros).items()}
        update = {n: m[n] / (1 - 0.9**t) / (np.sqrt(s[n] / (1 - 0.999**t)) + 1e-8) for n in g}
        arrays |= _named({n: a.astype(np.float32) for n, a in m.items()}, MOMENT1)
        arrays |= _named({n: a.astype(np.float32) for n, a in s.items()}, MOMENT2)
    moved = {name: (value - np.float32(eta) * update[name]).astype(np.float32) for name, value in theta.items()}
    return arrays | _named(moved, THETA)


def _draw_curves(ctx: Context, number: int, loss: float, variance: float, count: int, forwards: int) -> None:
    ctx.trained(number, forwards, loss)
    ctx.curve("perturbations collected over rounds", number, count)
    if math.isfinite(variance):
        ctx.curve("variance over rounds", number, variance)


def measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """Loss and, for labelled data, balanced accuracy of theta in the middle of a run."""
    return measured(_part(subject.arrays, THETA), data, ctx) if isinstance(subject, State) else None


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta as an adapter folder on its base."""
    return written(_objective(model, config, ctx), folder, _part(state.arrays, THETA), model)

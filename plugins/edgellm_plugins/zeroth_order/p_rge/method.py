"""P-RGE, arXiv 2409.15520 (its third version calls the method MobiZO).

One step: q directions z_k, and the 2q candidates theta + eps z_k, theta - eps z_k stacked on the batch axis of one
forward. Only LoRA-FA's B trains, so X A^T is the same for every candidate and a candidate costs one small matrix.

    g_k = (l_k^+ - l_k^-) / (2 eps),    theta <- theta - eta * mean_k(g_k z_k)

Symbols: theta the B matrices, q `queries`, E `batch`, B_e = E / q examples of one query, eps `step`, eta
`learning_rate`. A step always runs 2 E rows, so choices of q compare at equal cost.

`loops` says which of the paper's loops share a call: `both` 2q candidates (group-major: all + then all -), `outer` the
q of one sign (two calls), `none` one (2q calls: MeZO's way). All three give the same losses up to rounding.

Federated: a client makes `steps` steps from the theta it was sent and uploads g and the loss of every query, 8 bytes;
the server replays the steps, to the bit, and moves theta by the mean of the clients' moves, weighted by their examples.
As theta_client is known exactly, that is FedAvg of the local models.

Where we differ from the published code (and why):
- B and its update are float32 whatever the base is; there the adapter is updated in the base's float16.
- Directions are numbered and regenerated (`edgellm_sdk.random`); no noise is added to and removed from the state.
- B_e examples are taken in turn from one fixed shuffle, so what the frozen layers make of them is kept.
- `split` takes E different examples, B_e for each query. Queries then have no batch in common and each makes calls of
  its own; the published option tiles the whole batch all the same when both loops are on.
- Only the last layers' down_proj train by default, as in the rest of this family (`fwdllm` says why); the published
  scripts train every linear layer: `layers=0`, `targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.clients import minibatch
from edgellm_plugins.zeroth_order.estimator import Values
from edgellm_plugins.zeroth_order.p_rge import Config
from edgellm_sdk import random
from edgellm_sdk.context import Context
from edgellm_sdk.errors import DataError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.objective import Objective, measured, objective, written
from edgellm_sdk.types import Array, Arrays, Assignment, Dataset, Float32, Metric, ModelHandle, Session, State, Update

THETA = "theta/"


def _theta(arrays: Arrays) -> dict[str, Array]:
    return {name.removeprefix(THETA): array for name, array in arrays.items() if name.startswith(THETA)}


def _objective(model: ModelHandle, config: Config, ctx: Context) -> Objective:
    targets = adapters.module_names(config.targets)
    spec = adapters.Spec("lora-fa", config.layers, config.rank, config.alpha, targets)
    share = {"both": 2 * config.queries, "outer": config.queries, "none": 1}[config.loops]
    return objective(model, spec, ctx, config.precision, config.hidden_memory, config.max_length, share)


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0 = 0 and the numbers that updates are screened by."""
    theta = _objective(model, config, ctx).initial
    scalars = {"queries": config.queries, "steps": config.steps, "batch": config.batch, "forwards": 0}
    return State(model.digest, 0, {THETA + name: value for name, value in theta.items()}, scalars)


def _pool(client: str, round: int, ctx: Context) -> int:
    return int(ctx.stream(f"directions/{client}", round).seeds(1)[0])


def assign(state: State, clients: Sequence[str], ctx: Context) -> dict[str, Assignment]:
    """theta and the client's own pool of directions."""
    number = state.round + 1
    return {
        client: Assignment(
            state.base, number, client, {**state.arrays, "pool": np.array([_pool(client, number, ctx)], np.uint64)}
        )
        for client in clients
    }


def directions(theta: Arrays, pool: int, step: int, queries: int) -> list[Values]:
    """z_1 .. z_q of local step `step` (from 0): candidates step * q .. step * q + q - 1 of the pool."""
    shapes = estimator.shapes_of(theta)
    return [estimator.direction(shapes, pool, step * queries + k) for k in range(queries)]


def moved(theta: Arrays, z: Sequence[Values], jvp: Float32, learning_rate: float) -> dict[str, Array]:
    """theta - eta * mean_k(g_k z_k), float32. Products and sums are rounded one by one, so a replay has equal bits."""
    out = {name: np.array(value, dtype=np.float32) for name, value in theta.items()}
    for v, g in zip(z, jvp, strict=True):
        coefficient = np.float32(learning_rate / len(z)) * np.float32(g)
        for name, value in out.items():
            value -= coefficient * v[name]
    return out


def replay(theta: Arrays, pool: int, jvp: Float32, learning_rate: float) -> dict[str, Array]:
    """The client's theta after its local steps, from `jvp` (steps, q) float32."""
    local = dict(theta)
    for step, row in enumerate(jvp):
        local = moved(local, directions(local, pool, step, len(row)), row, learning_rate)
    return local


def losses(
    live: Objective,
    data: Dataset,
    client: str,
    start: int,
    theta: Arrays,
    z: Sequence[Values],
    config: Config,
    ctx: Context,
) -> tuple[Array, Array, int]:
    """(l^+ (q,), l^- (q,), rows run) on minibatch `start`, or with `split` on minibatches start .. start + q - 1."""
    size = config.batch // config.queries

    def evaluate(number: int, chosen: Sequence[Values]) -> tuple[Array, int]:
        name, indices = minibatch(data, client, number, size, ctx)
        signs = [config.step] * len(chosen) + [-config.step] * len(chosen)
        found = live.evaluate(name, lambda: data.select(indices), theta, [*chosen, *chosen], signs)
        return found.reshape(2, -1), len(signs) * len(indices)

    if config.split:
        parts = [evaluate(start + k, [v]) for k, v in enumerate(z)]
    else:
        parts = [evaluate(start, z)]
    plus, minus = np.concatenate([pair for pair, _ in parts], axis=1)
    return plus, minus, sum(rows for _, rows in parts)


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """`steps` local steps; the update is what the server needs to replay them."""
    if not len(data):
        raise DataError("has no examples", assignment.client)
    live = _objective(model, config, ctx)
    theta, pool = _theta(assignment.arrays), int(assignment.arrays["pool"][0])
    q, batches = config.queries, config.queries if config.split else 1
    jvp, near = np.empty((config.steps, q), np.float32), np.empty((config.steps, q), np.float32)
    forwards = 0
    for step in range(config.steps):
        z = directions(theta, pool, step, q)
        number = ((assignment.round - 1) * config.steps + step) * batches
        plus, minus, rows = losses(live, data, assignment.client, number, theta, z, config, ctx)
        jvp[step], near[step] = (plus - minus) / (2 * config.step), (plus + minus) / 2
        forwards += rows
        theta = moved(theta, z, jvp[step], config.learning_rate)
    arrays = {"jvp": jvp, "loss": near}
    scalars = {"forwards": forwards}
    return Update(
        assignment.base, assignment.round, assignment.client, "seeds", arrays, len(data), random.RNG_ID, scalars
    )


def screen(updates: Sequence[Update], state: State) -> dict[str, str]:
    """Reject what cannot be replayed or does not have the shape that was asked for."""
    steps, q, batch = (state.scalars[name] for name in ("steps", "queries", "batch"))
    expected = dict.fromkeys(("jvp", "loss"), ((steps, q), "float32"))
    reasons = {}
    for update in updates:
        forwards = update.scalars.get("forwards")
        found = {name: (array.shape, str(array.dtype)) for name, array in update.arrays.items()}
        if update.kind != "seeds" or found != expected:
            reasons[update.client] = "does not carry the arrays it was asked for"
        elif update.rng != random.RNG_ID:
            reasons[update.client] = f"seeds of generator {update.rng[:40]!r} cannot be replayed"
        elif type(forwards) is not int or not 2 * q * steps <= forwards <= 2 * batch * steps:
            reasons[update.client] = "claims an impossible number of forwards"
    return reasons


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """theta + sum_c (n_c / n) (theta_c - theta) with theta_c replayed from client c's scalars."""
    theta, number = _theta(state.arrays), state.round + 1
    total = {name: np.zeros(value.shape) for name, value in theta.items()}
    examples = sum(update.examples for update in updates)
    for update in updates:
        local = replay(theta, _pool(update.client, number, ctx), update.arrays["jvp"], config.learning_rate)
        for name, move in total.items():
            move += update.examples / examples * (local[name].astype(np.float64) - theta[name])
    arrays = {THETA + name: (value + total[name]).astype(np.float32) for name, value in theta.items()}

    forwards = state.scalars["forwards"] + sum(update.scalars["forwards"] for update in updates)
    loss = float(np.mean([update.arrays["loss"].mean() for update in updates]))
    ctx.trained(number, forwards, loss)
    return State(state.base, number, arrays, {**state.scalars, "forwards": forwards})


def measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """Loss and, for labelled data, balanced accuracy of theta in the middle of a run."""
    return measured(_theta(subject.arrays), data, ctx) if isinstance(subject, State) else None


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta as an adapter folder on its base."""
    return written(_objective(model, config, ctx), folder, _theta(state.arrays), model)

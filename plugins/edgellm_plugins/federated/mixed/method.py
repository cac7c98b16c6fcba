"""Unlike clients, aggregated exactly. theta are all B (d_out, R) of a LoRA-FA (arXiv 2308.03303) whose frozen A
everybody draws from the run's seed, so that the change of the weights, s dB A, is linear in dB and

    mean_i(dW_i) = s mean_i(dB_i) A        whatever made dB_i  (arXiv 2403.12313 has this for one kind of client).

backprop:r  trains the first r columns of every B, which is LoRA-FA of rank r on the first r rows of A, and sends them:
            4 r d_out bytes a module. What the other columns hold takes part in the forward pass and stays.
scalars     moves along seeded directions by central differences (arXiv 2305.17333) and sends the derivatives, steps x
            probes float32. The server walks the same way in the same order and gets the same dB, bit for bit.

A client that says what it has (`--profiles`) is given the first of `kinds` whose foretold memory it has and whose
update its uplink carries in `upload_seconds`; others get the kinds in turn. dB_i is 0 in columns a client does not
train: they count in the mean, as clients without a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_plugins.federated.mixed import PLUGIN, Config, Kind
from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Leaves, Slope
from edgellm_plugins.training.lora_fa.method import EPS
from edgellm_plugins.zeroth_order import estimator
from edgellm_sdk.context import Context, Cost
from edgellm_sdk.errors import DataError
from edgellm_sdk.kit import adapters, averaging, footprint
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.objective import Objective, objective
from edgellm_sdk.types import Array, Arrays, Assignment, Dataset, ModelHandle, Profile, State, Update
from edgellm_sdk.wire import check_update


def _spec(config: Config) -> adapters.Spec:
    return adapters.Spec("lora-fa", config.layers, config.rank, config.alpha, adapters.module_names(config.targets))


def _objective(model: ModelHandle, config: Config, ctx: Context) -> Objective:
    return objective(model, _spec(config), ctx, config.precision, config.hidden_memory, config.max_length)


# The server: who does what


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """theta_0: every B zero."""
    return backprop.initialise(model, _objective(model, config, ctx))


def assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> dict[str, Assignment]:
    """Every client gets all of theta and its kind, in the scalars `work` and `rank`."""
    kinds, places = config.chosen_kinds(), {client: place for place, client in enumerate(sorted(data))}
    found = {}
    for client in clients:
        costs = [foretold(kind, client, state.arrays, config, ctx) for kind in kinds]
        place = places[client] % len(kinds)
        if client in ctx.profiles:
            place = next((k for k, kind in enumerate(kinds) if _bears(client, kind, costs[k], state, config, ctx)), -1)
        ctx.foretold[client] = costs[place]
        told = {"work": kinds[place].work, "rank": kinds[place].rank}
        found[client] = Assignment(state.base, state.round + 1, client, state.sent, told)
    return found


def sent_bytes(kind: Kind, theta: Arrays, config: Config) -> int:
    """What a client of this kind sends in a round, payload alone."""
    if kind.work == "scalars":
        return 4 * config.steps * config.probes
    return sum(4 * len(array) * kind.rank for array in theta.values())


def foretold(kind: Kind, client: str, theta: Arrays, config: Config, ctx: Context) -> Cost:
    """Memory and time of a turn; nothing without the model's shape."""
    if ctx.model is None or not ctx.model.path.is_dir():
        return Cost()
    model, scalars = ctx.model, sum(array.size for array in theta.values())
    shape = ctx.keep(f"shape {model.digest}", lambda: footprint.shape_of(model, config.precision))
    rate = ctx.keep(f"rate of a core {model.digest}", lambda: footprint.core_rate(shape))
    turn = footprint.Turn(
        config.layers or shape.layers, scalars, config.steps, config.batch_size, config.max_length, config.chunk,
        config.probes if kind.work == "scalars" else 0,
    )  # fmt: skip
    profile = ctx.profiles.get(client, Profile())
    carried = sum(array.nbytes for array in theta.values()), sent_bytes(kind, theta, config)
    cores = profile.cores or footprint.cores_here()
    peak = footprint.memory(shape, turn, config.floor * 1_000_000)
    return Cost(peak, footprint.seconds(shape, turn, rate * cores, profile, *carried))


def _bears(client: str, kind: Kind, cost: Cost, state: State, config: Config, ctx: Context) -> bool:
    profile = ctx.profiles[client]
    if profile.memory and cost.peak > profile.memory:
        return False
    return not profile.up or 8 * sent_bytes(kind, state.arrays, config) <= profile.up * config.upload_seconds


# A client's turn


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """Kind `delta` with dB (d_out, r) float32, or kind `scalars` with `jvp` (steps, probes) float32."""
    kind = Kind(str(assignment.scalars["work"]), int(assignment.scalars["rank"]))
    if kind.work == "scalars":
        return _by_scalars(model, data, assignment, config, ctx)
    frozen = backprop.frozen_base(model, _spec(config), ctx, config.precision, config.hidden_memory, config.max_length)
    mine = {name: array[:, : kind.rank] for name, array in assignment.arrays.items()}
    others = {
        name: torch.from_numpy(np.array(array[:, kind.rank :], np.float32))[None].to(frozen.device)
        for name, array in assignment.arrays.items()
    }
    slope = _slope_of_columns(frozen, others, config.chunk)
    return backprop.work(slope, backprop.FORWARDS, data, replace(assignment, arrays=mine), config, ctx, EPS)


def _slope_of_columns(frozen: Frozen, others: Mapping[str, Tensor], chunk: int) -> Slope:
    """Back-propagation to the first columns of every B, `others` (1, d_out, R - r) being the rest."""

    def slope(step: int, name: str, make: Callable[[], Dataset], leaves: Leaves) -> float:
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.zero_()
        frozen.trainables.set({key: torch.cat([leaf, others[key]], 2) for key, leaf in leaves.items()})
        return backprop.backward(frozen, frozen.batch(name, make), chunk)

    return slope


def _by_scalars(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    client, live = assignment.client, _objective(model, config, ctx)
    if not len(data):
        raise DataError("has no examples", client)
    theta, jvps, losses = dict(assignment.arrays), [], []
    for step in steps_of(assignment.round, config):
        place, rows = backprop.minibatch(len(data), client, step, config.batch_size, ctx)
        make = partial(data.select, rows)
        directions = _directions(theta, client, step, config, ctx)
        loss: Any = partial(live.evaluate, f"{client}/{place}", make)
        found = estimator.probe(loss, theta, directions, config.step)
        jvps.append(found.jvp)
        losses.append(float(found.loss.astype(np.float64).mean()))
        theta = _moved(theta, directions, found.jvp, step, config, ctx)
    told = {
        "loss": math.fsum(losses) / len(losses), "steps": len(losses), "forwards": 2 * config.probes * len(losses),
    }  # fmt: skip
    arrays = {"jvp": np.stack(jvps)}
    return Update(assignment.base, assignment.round, client, "scalars", arrays, len(data), estimator.noise_id(), told)


def steps_of(round: int, config: Config) -> range:
    return range((round - 1) * config.steps, round * config.steps)


def _directions(theta: Arrays, client: str, step: int, config: Config, ctx: Context) -> list[estimator.Values]:
    pool = int(ctx.stream(f"directions/{client}", step).seeds(1)[0])
    return [estimator.direction(estimator.shapes_of(theta), pool, k) for k in range(config.probes)]


def _moved(
    theta: Arrays, directions: Sequence[estimator.Values], jvp: Array, step: int, config: Config, ctx: Context
) -> dict[str, Array]:
    """theta - eta mean_k(jvp_k v_k), float32."""
    peak = replace(config, learning_rate=config.scalar_rate)
    eta = np.float32(backprop.learning_rate(step, ctx.rounds * config.steps, peak))
    gradient = estimator.mean_gradient(directions, jvp)
    return {name: value - eta * gradient[name] for name, value in theta.items()}


def walked(theta: Arrays, jvps: Array, client: str, round: int, config: Config, ctx: Context) -> dict[str, Array]:
    """Where `client` got to in `round` from `theta`: the same bits."""
    found = dict(theta)
    for step, jvp in zip(steps_of(round, config), jvps, strict=True):
        found = _moved(found, _directions(found, client, step, config, ctx), jvp, step, config, ctx)
    return found


# The server: what came back


def screen(updates: Sequence[Update], state: State, ctx: Context) -> dict[str, str]:
    """Reject what is not the work that a client was given."""
    config: Config = ctx.configs[PLUGIN.name]
    reasons = {}
    for update in updates:
        told = ctx.assigned[update.client].scalars
        kind = Kind(str(told["work"]), int(told["rank"]))
        by_scalars = kind.work == "scalars"
        known: dict[str, Array] = {"jvp": np.zeros((config.steps, config.probes), np.float32)}
        if not by_scalars:
            known = {name: array[:, : kind.rank] for name, array in state.arrays.items()}
        cost = 2 * config.probes if by_scalars else backprop.FORWARDS
        counts = update.scalars.get("steps"), update.scalars.get("forwards")
        loss = update.scalars.get("loss")
        if update.kind != ("scalars" if by_scalars else "delta"):
            reasons[update.client] = f"kind {update.kind[:40]!r} is not the work it was given"
        elif update.rng != (estimator.noise_id() if by_scalars else ""):
            reasons[update.client] = f"directions of noise {update.rng[:40]!r} cannot be drawn again"
        elif counts != (config.steps, config.steps * cost) or any(type(count) is not int for count in counts):
            reasons[update.client] = "claims other steps than it was asked for"
        elif type(loss) is not float or not math.isfinite(loss):
            reasons[update.client] = "claims an impossible loss"
        elif problem := check_update(update, state, update.client, known):
            reasons[update.client] = problem
    return reasons


def change(update: Update, state: State, config: Config, ctx: Context) -> dict[str, Array]:
    """dB of one client: name -> (d_out, R) float64, zero in columns that it does not train."""
    if update.kind == "scalars":
        theta = walked(state.arrays, update.arrays["jvp"], update.client, update.round, config, ctx)
        return {name: theta[name].astype(np.float64) - array for name, array in state.arrays.items()}
    found = {}
    for name, array in state.arrays.items():
        found[name] = np.zeros(array.shape)
        found[name][:, : update.arrays[name].shape[1]] = update.arrays[name]
    return found


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """B + sum_i (n_i / n) dB_i, summed in float64 over clients in sorted order."""
    rows = sorted(updates, key=lambda update: update.client)
    changes = [change(update, state, config, ctx) for update in rows]
    mean = averaging.mean(changes, averaging.shares(rows))
    arrays = {name: (array + mean[name]).astype(np.float32) for name, array in state.arrays.items()}
    return averaging.advanced(state, rows, arrays, ctx)


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """theta as a PEFT LoRA, A included, on its base."""
    return backprop.personalise(model, state, folder, _objective(model, config, ctx))


measure = backprop.measure

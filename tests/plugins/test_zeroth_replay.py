"""What is perturbed is what is moved, what is moved is what is replayed, and nothing else changes."""

from __future__ import annotations

import random as python_random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order.samplers import LowRank
from edgellm_plugins.zeroth_order.space import Follower, Full
from edgellm_plugins.zeroth_order.trajectory import Log, move
from seed_method_cases import BOTH, METHODS, TRAINS, context, dataset, one_round, options, samplers

from edgellm_sdk import models
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import ModelHandle


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


class LateU(LowRank):
    """The published code's order on a refresh: perturbing draws V before U from the step's one stream, moving does
    not, so that both get another U."""

    late = True

    def at(self, step: int) -> None:
        super().at(step)
        self.late = step % self.refresh == 0

    def shift(self, name: str, weight: torch.Tensor, seed: int, c: float, out: torch.Tensor) -> torch.Tensor:
        if weight.dim() != 2 or not self.late:
            return super().shift(name, weight, seed, c, out)
        rows, columns = weight.shape
        drawn = noise.take("gaussian", seed, f"{name}/U", (columns + rows) * self.rank)[columns * self.rank :]
        left = torch.from_numpy(drawn.reshape(rows, self.rank))
        return torch.add(weight, (left * c) @ self.basis(name), out=out)


def apart(sampler: Any, theta: dict[str, torch.Tensor], seed: int) -> tuple[float, float]:
    """(largest difference between theta + z as perturbed and as moved, largest |z|)."""
    worst, size = 0.0, 0.0
    for name, weight in theta.items():
        perturbed = sampler.shift(name, weight, seed, 1.0, torch.empty_like(weight))
        moved = weight.clone()
        sampler.move(name, moved, Move((seed,), (1.0,)))
        worst = max(worst, float((perturbed - moved).abs().max()))
        size = max(size, float((moved - weight).abs().max()))
    return worst, size


def test_what_is_perturbed_is_what_is_moved(handle: ModelHandle) -> None:
    """zo_extensions.md check 1, also on the steps that change V, where the published order is found out."""
    whole = Whole(handle, "float32", max_length=64)
    theta = {name: parameter.detach() for name, parameter in whole.parameters.items()}
    for sampler in [*samplers(whole), LowRank(2, whole.shapes, 3, 2)]:
        for t in range(6):
            sampler.at(t)
            worst, size = apart(sampler, theta, 40 + t)
            assert worst <= 1e-6 and size > 0.5, (sampler.id, t)
    wrong = LateU(2, whole.shapes, 3, 2)
    for t in range(6):
        wrong.at(t)
        worst, _ = apart(wrong, theta, 40 + t)
        assert worst > 0.5 if t % 2 == 0 else worst <= 1e-6


@pytest.mark.parametrize("train", BOTH)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_log_of_half_the_layers_rebuilds_theta(
    handle: ModelHandle, tmp_path: Path, train: str, precision: str
) -> None:
    """zo_extensions.md check 1 for LeZO: which layers a step moved is read off its seed again."""
    config = options("mezo", train=train, precision=precision, layers=0, share=0.5, learning_rate=0.05)
    ctx, method = context(tmp_path, config, "mezo"), METHODS["mezo"][1]
    state = method.initialise(handle, config, ctx)
    start = method.follower(handle, config, ctx).space.digest()
    for _ in range(2):
        state, _ = one_round("mezo", handle, state, {"a": dataset()}, config, ctx)
    here = method.follower(handle, config, ctx).space.digest()

    def replayed(log: Log, share: float) -> str:
        other = options("mezo", train=train, precision=precision, layers=0, share=share, learning_rate=0.05)
        follower = Follower(method.space(handle, other, context(tmp_path, other, "mezo")))
        follower.goto([move(log, t, other) for t in range(len(log))], come_back=False)
        return follower.space.digest()

    log = Log.of(state.arrays)
    assert replayed(log, 0.5) == here != start
    assert replayed(log, 1.0) != here, "a step left some layer out"
    log.seeds[0] ^= 1
    assert replayed(log, 0.5) != here


def test_names_decide_a_replay_and_their_order_does_not(handle: ModelHandle, tmp_path: Path) -> None:
    """mezo.md check 6: two tensors of one shape exchanged are the two that come out wrong."""
    config = options("mezo", train="full", learning_rate=0.01)
    ctx, method = context(tmp_path, config, "mezo"), METHODS["mezo"][1]
    state = method.initialise(handle, config, ctx)
    state, _ = one_round("mezo", handle, state, {"a": dataset()}, config, ctx)
    space, log = method.follower(handle, config, ctx).space, Log.of(state.arrays)
    assert isinstance(space, Full)
    theta = {name: np.array(start) for name, start in handle.tensors()}

    def wrong(order: list[str], called: dict[str, str]) -> set[str]:
        """The tensors that a replay in this order and under these names does not rebuild."""
        found = {}
        for name in order:
            found[name] = theta[name].copy()
            for t in range(len(log)):
                noise.move("gaussian", found[name], called.get(name, name), move(log, t, config))
        return {n for n, value in found.items() if not np.array_equal(value, space.whole.parameters[n].numpy())}

    one, two = (f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1))
    assert wrong(list(theta), {}) == wrong(list(theta)[::-1], {}) == set()
    assert wrong(list(theta), {one: two, two: one}) == {one, two}


@pytest.mark.parametrize("name, train", [(name, train) for name in METHODS for train in TRAINS.get(name, BOTH)])
def test_a_round_leaves_the_generators_alone(handle: ModelHandle, tmp_path: Path, name: str, train: str) -> None:
    """mezo.md check 10: estimates, steps and their aggregation draw nothing from torch, numpy or Python."""
    config = options(name, train=train)
    ctx, method = context(tmp_path, config, name), METHODS[name][1]
    state = method.initialise(handle, config, ctx)
    given = method.assign(state, ["a"], config)["a"]

    def generators() -> list[Any]:
        kind, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), kind, np.asarray(keys).tolist(), rest, python_random.getstate()]

    before = generators()
    update = method.finetune(handle, dataset(), given, config, ctx)
    after = method.aggregate(state, [update], config, ctx)
    assert generators() == before
    assert after.round == 1 and np.abs(update.arrays["scalar"]).max() > 0

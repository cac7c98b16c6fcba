"""A device trains every weight in the memory of inference: no second model, no gradient, and no graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.fedkseed import Config as KSeedConfig
from edgellm_plugins.zeroth_order.fedkseed import method as fedkseed
from edgellm_plugins.zeroth_order.fedkseed_pro import method as fedkseed_pro
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.space import Full
from edgellm_plugins.zeroth_order.trajectory import sgd
from seed_method_cases import dataset, encoded, live_bytes, no_data

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import ModelHandle, State

LAYERS = 12
"""So many that the largest tensor, and what one layer computes, are small beside the model."""


@pytest.fixture(scope="module")
def deep(make_tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return models.resolve(str(make_tiny_llama(tmp_path_factory.mktemp("deep") / "m", layers=LAYERS)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mezo_step_holds_no_more_than_a_forward_pass(deep: ModelHandle, dtype: str) -> None:
    """mezo.md check 3. What is shifted lies in a scratch that is there from the start."""
    whole = Whole(deep, dtype, max_length=64)
    space, batch = Full(whole, Dense("gaussian", whole.shapes)), encoded(whole)
    space._batches["b"] = batch
    model = sum(p.numel() * p.element_size() for p in whole.parameters.values())
    assert space.sampler.noise._scratch.numel() == 4 * (1 << 18)

    def step() -> None:
        seeds = [3]
        space.step(sgd(seeds, differences.central(1e-3)(space, "b", no_data, seeds).scalars.tolist(), 1e-6))

    assert live_bytes(step) <= live_bytes(lambda: whole.loss(batch)) + model // 20


@pytest.mark.parametrize("method", [fedkseed, fedkseed_pro])
def test_a_fedkseed_client_holds_one_model(
    deep: ModelHandle, tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fedkseed.md check 6, catching up included, which reads theta_0 from disk tensor by tensor."""

    def no_gradient(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", no_gradient)
    monkeypatch.setattr(torch.autograd, "grad", no_gradient)
    config = KSeedConfig(train="full", seeds=16, steps=2, batch_size=4, precision="float32")
    ctx, data = Context(tmp_path, seed=7, rounds=4), dataset(6)
    states: list[State] = [method.METHOD.initialise(deep, config, ctx)]
    follower = method.METHOD.follower(deep, config, ctx)
    whole = follower.space.whole
    model = sum(p.numel() * p.element_size() for p in whole.parameters.values())

    def one_round() -> None:
        given = method.METHOD.assign(states[-1], ["a"], config)["a"]
        update = method.METHOD.finetune(deep, data, given, config, ctx)
        states.append(method.METHOD.aggregate(states[-1], [update], config, ctx))

    plain = live_bytes(lambda: whole.loss(encoded(whole)))
    assert live_bytes(one_round) <= plain + model // 10
    assert len(states) == 3 and follower._saved is None
    assert not any(p.requires_grad or p.grad is not None for p in whole.parameters.values())

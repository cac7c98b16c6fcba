"""The ExecuTorch training program as eager torch computes it, wherever ExecuTorch itself is not installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_hardware.executorch import method
from edgellm_hardware.executorch.llama import layout_of
from edgellm_hardware.executorch.program import Shape, Step
from edgellm_hardware.executorch.trainer import batch_inputs

from edgellm_sdk import models, random
from edgellm_sdk.context import Context
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.types import ModelHandle

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


class Bowl(torch.nn.Module):
    """In place of a model: the loss of a candidate is its squared distance from ones."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layout = SimpleNamespace(size=size)

    def forward(self, tokens: Any, places: Any, targets: Any, candidates: torch.Tensor) -> torch.Tensor:
        return ((candidates - 1) ** 2).sum(1, keepdim=True)


@pytest.mark.parametrize(
    "dtype, centres, noise", [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-6, 1e-5)], ids=["float64", "float32"]
)
def test_the_recurrence_is_mezo(dtype: torch.dtype, centres: float, noise: float) -> None:
    """p_rge.md check 3: 50 calls, each fed the g of the last, against a float64 replay of theta - eta mean(g z).

    After call T the middle of the two halves of the state is theta_{T-1} and their difference over 2 eps is z_T. In
    float32 the middle of two numbers of order 1 is known to some 1e-6 and their difference over 0.02 to 1e-5.
    """
    size, q, eta, eps = 40, 2, 0.01, 1e-2
    program: Any = Step(Bowl(size), Shape(q, 1, 1, 1), "host").to(dtype)  # type: ignore[arg-type]
    one, rate, step = (torch.tensor([value], dtype=dtype) for value in (1, eta, eps))
    g, theta, generator = torch.zeros(q, dtype=dtype), np.zeros(size), np.random.default_rng(0)
    z, used, first = np.zeros((q, size)), np.zeros(q), 0.0
    for _ in range(50):
        theta = theta - eta * (used[:, None] * z).mean(0)
        z = generator.normal(size=(q, size)).astype(np.float32).astype(np.float64)
        losses = program(None, None, None, one, g, rate, step, torch.tensor(z, dtype=dtype))
        state = program.state.double().numpy()
        middle, difference = (state[:q] + state[q:]) / 2, (state[:q] - state[q:]) / (2 * eps)
        assert np.abs(middle - theta).max() <= centres
        assert np.abs(difference - z).max() <= noise
        g = (losses[:q] - losses[q:]) / (2 * eps)
        used = g.double().numpy()
        first = first or float(losses.mean())
    assert 0.5 < np.abs(theta).max() < 5 and float(losses.mean()) < 0.5 * first


def test_one_forward_is_2q_separate_ones(handle: ModelHandle) -> None:
    """To 1e-5: each candidate alone through transformers, its LoRA folded into the weights, row by row, unpadded."""
    shape = Shape(2, 3, 32, 12)
    spec = adapters.Spec("lora-fa", 0, 4, 8.0, TARGETS)
    live, trainables, llama = method.prepared(handle, spec, shape.tokens, Context(Path(), seed=3))
    generator = np.random.default_rng(1)
    tokens = [tuple(generator.integers(3, 384, 20 + k).tolist()) for k in range(shape.batch)]
    rows = [Encoded(row, len(row) - 2, k) for k, row in enumerate(tokens)]
    copies = []
    for k in range(2 * shape.queries):
        drawn = {n: random.normal(random.key(9, n, k), v.size).reshape(v.shape) for n, v in trainables.initial.items()}
        copies.append({name: np.float32(0.1) * value for name, value in drawn.items()})
    inputs, weights = batch_inputs(rows, shape)[:3], batch_inputs(rows, shape)[3].numpy()
    with torch.no_grad():
        nll = llama(*inputs, torch.from_numpy(np.stack([llama.layout.pack(copy) for copy in copies]))).numpy()
    found = (nll * weights).sum(1) / weights.sum()

    plain = handle.load(dtype="float32").model
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for loss, copy in zip(found, copies, strict=True):
        total: list[float] = []
        with torch.no_grad():
            for name, value in copy.items():
                path = name.removesuffix(".lora_B")
                product = torch.from_numpy(value) @ torch.from_numpy(trainables.frozen[f"{path}.lora_A"])
                plain.get_submodule(path).weight.copy_(start[f"{path}.weight"] + spec.scale * product)
            for row in rows:
                scores = plain(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
                total += [-float(scores[p - 1, row.tokens[p]]) for p in range(row.start, len(row.tokens))]
        assert loss == pytest.approx(np.mean(total), abs=1e-5)
    assert np.abs(np.diff(np.sort(found))).min() > 1e-4, "the candidates are told apart"
    assert live is not None  # what `llama` reads its frozen weights from


def test_layout_round_trip() -> None:
    shapes = {"b": (3, 2), "a": (5, 2)}
    values = {n: random.normal(random.key(1, n), s[0] * s[1]).reshape(s) for n, s in shapes.items()}
    layout = layout_of(values)
    row = layout.pack(values)
    again = layout.unpack(row)
    assert layout.size == row.size == 16 and all(np.array_equal(values[name], again[name]) for name in values)
    assert np.array_equal(row[:10], values["a"].T.ravel())

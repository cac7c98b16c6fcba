"""What the tests of the seed methods share: settings, a round, spaces whose loss can be anything, directions."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from edgellm_plugins.zeroth_order import fzoo, lozo, mezo, p_rge, sparse_mezo
from edgellm_plugins.zeroth_order.fzoo import method as fzoo_method
from edgellm_plugins.zeroth_order.lozo import method as lozo_method
from edgellm_plugins.zeroth_order.mezo import method as mezo_method
from edgellm_plugins.zeroth_order.options import Options
from edgellm_plugins.zeroth_order.p_rge import method as p_rge_method
from edgellm_plugins.zeroth_order.samplers import Dense, LowRank
from edgellm_plugins.zeroth_order.space import Small
from edgellm_plugins.zeroth_order.sparse_mezo import method as sparse_method
from edgellm_plugins.zeroth_order.trajectory import SeedMethod

from edgellm_sdk.context import Context
from edgellm_sdk.kit import noise, prompts
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Dataset, Example, ModelHandle, State, Update

METHODS: dict[str, tuple[Any, SeedMethod]] = {
    "mezo": (mezo.Config, mezo_method.METHOD),
    "fzoo": (fzoo.Config, fzoo_method.METHOD),
    "lozo": (lozo.Config, lozo_method.METHOD),
    "p-rge": (p_rge.Config, p_rge_method.METHOD),
    "sparse-mezo": (sparse_mezo.Config, sparse_method.METHOD),
}
BOTH = ("full", "lora-fa")
TRAINS = {"p-rge": ("lora-fa",), "sparse-mezo": ("full", "layers")}


def dataset(n: int = 16) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


def options(name: str, **changes: Any) -> Options:
    settings = {"layers": 1, "rank": 4, "steps": 3, "batch_size": 4, "precision": "float32", "step": 0.01}
    made: Options = METHODS[name][0](**settings | changes)
    return made


def context(folder: Path, config: Options, name: str, rounds: int = 4) -> Context:
    return Context(folder, seed=7, rounds=rounds, configs={name: config})


def one_round(
    name: str, handle: ModelHandle, state: State, shards: dict[str, Dataset], config: Options, ctx: Context
) -> tuple[State, list[Update]]:
    method = METHODS[name][1]
    given = method.assign(state, sorted(shards), config)
    updates = [method.finetune(handle, shards[c], given[c], config, ctx) for c in sorted(shards)]
    assert method.screen(updates, state, config) == {}
    return method.aggregate(state, updates, config, ctx), updates


# --- a space that is one vector, so that losses can be anything


class Vector:
    """theta is one vector and the loss any function of it."""

    def __init__(self, loss: Callable[[np.ndarray], float], start: np.ndarray, sampler: Any) -> None:
        self.loss, self.theta, self.start, self.sampler = loss, start.copy(), start, sampler

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[tuple[int, float]]) -> np.ndarray:
        z = {seed: self.sampler.draw("x", self.theta, seed).astype(np.float64) for seed, _ in points}
        return np.array([self.loss(self.theta + c * z[seed]) for seed, c in points])

    def step(self, made: Move) -> None:
        self.sampler.move("x", torch.from_numpy(self.theta), made)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def vector(loss: Callable[[np.ndarray], float], d: int, kind: str = "gaussian") -> Vector:
    return Vector(loss, np.zeros(d, np.float32), Dense(kind, {"x": (d,)}))


def no_data() -> Dataset:
    raise AssertionError("not needed")


# --- whole models


def encoded(whole: Whole) -> list[prompts.Encoded]:
    return prompts.encode(whole.tokenizer, dataset(6).examples, 64)


def samplers(whole: Whole) -> list[Any]:
    shapes = whole.shapes
    return [
        Dense("gaussian", shapes),
        Dense("rademacher", shapes, share=0.5),
        Dense("gaussian", shapes, limits={name: 0.02 for name, shape in shapes.items() if len(shape) > 1}),
        LowRank(2, shapes, 3, 10),
    ]


def snapshot(space: Any) -> dict[str, np.ndarray]:
    if isinstance(space, Small):
        return {name: value.copy() for name, value in space.theta.items()}
    return {name: parameter.numpy().copy() for name, parameter in space.whole.parameters.items()}


def live_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch holds at once for what it allocates in `run`, after one run for nothing."""
    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


# --- many directions at once


@contextmanager
def drawn_ahead(kind: str, seeds: Sequence[int], name: str, elements: int) -> Iterator[None]:
    """Inside, `noise.take` hands out what it would draw for these seeds from one table, twenty times as fast."""
    where, signs = noise.places(seeds, name, elements)
    assert where.shape[1] == 1, "a tensor of one block"
    table = dict(zip(seeds, noise.bank(kind)[where + np.arange(elements)] * signs, strict=True))
    take = noise.take
    for seed in (seeds[0], seeds[-1]):
        np.testing.assert_array_equal(table[seed], take(kind, seed, name, elements))

    def looked_up(asked: str, seed: int, tensor: str, count: int) -> np.ndarray:
        known = (asked, tensor, count) == (kind, name, elements) and seed in table
        return table[seed].copy() if known else take(asked, seed, tensor, count)

    with mock.patch.object(noise, "take", looked_up):
        yield


# --- a model in float64


def _float64_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = (
        self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    )
    return scaled


class Llama64:
    """The mean cross-entropy of a Llama, float64 throughout, and its exact directional derivatives.

    transformers computes the norms in float32 whatever the weights are, and that rounding hides how fast the error of
    a difference falls; here they are float64 too.
    """

    def __init__(self, handle: ModelHandle, data: Dataset) -> None:
        loaded = handle.load(dtype="float32")
        self.model = loaded.model.double().requires_grad_(True)
        self.model.model.embed_tokens.padding_idx = None  # autograd would leave that row out
        norms = [module for module in self.model.modules() if type(module).__name__ == "LlamaRMSNorm"]
        assert norms
        for norm in norms:
            norm.forward = types.MethodType(_float64_norm, norm)
        self._rows = prompts.encode(loaded.tokenizer, data.examples, 64)
        self.theta = {name: p.detach().float().numpy().copy() for name, p in self.model.named_parameters()}

    def _loss(self) -> torch.Tensor:
        losses = []
        for row in self._rows:
            scores = self.model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            losses += [-scores[at - 1, row.tokens[at]] for at in range(row.start, len(row.tokens))]
        return torch.stack(losses).mean()

    def slope(self, z: Mapping[str, np.ndarray]) -> float:
        """<grad f(theta_0), z> by autograd."""
        self.model.zero_grad()
        torch.autograd.backward(self._loss())
        return sum(float((p.grad * torch.from_numpy(z[n])).sum()) for n, p in self.model.named_parameters())

    @torch.no_grad()
    def at(
        self, theta: Mapping[str, np.ndarray], directions: Sequence[Mapping[str, np.ndarray]], steps: Sequence[float]
    ) -> np.ndarray:
        """An `estimator.Loss`: the loss at theta + steps[k] * directions[k]; the model is left at theta_0."""
        found = []
        for z, c in zip(directions, steps, strict=True):
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.from_numpy(theta[name].astype(np.float64) + c * z[name].astype(np.float64)))
            found.append(float(self._loss()))
        for name, parameter in self.model.named_parameters():
            parameter.copy_(torch.from_numpy(self.theta[name]))
        return np.array(found)

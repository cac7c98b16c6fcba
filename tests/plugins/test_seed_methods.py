"""MeZO and its kin: estimates, replay, restore, and a federation whose whole state is a list of seeds and scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import differences, fzoo, lozo, mezo, sparse_mezo
from edgellm_plugins.zeroth_order.fzoo import method as fzoo_method
from edgellm_plugins.zeroth_order.lozo import method as lozo_method
from edgellm_plugins.zeroth_order.mezo import method as mezo_method
from edgellm_plugins.zeroth_order.options import Options
from edgellm_plugins.zeroth_order.samplers import Dense, LowRank
from edgellm_plugins.zeroth_order.space import Follower, Full, Small
from edgellm_plugins.zeroth_order.sparse_mezo import method as sparse_method
from edgellm_plugins.zeroth_order.trajectory import Log, SeedMethod, move

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import noise, prompts
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Dataset, Example, ModelHandle, State, Update

METHODS: dict[str, tuple[Any, SeedMethod]] = {
    "mezo": (mezo.Config, mezo_method.METHOD),
    "fzoo": (fzoo.Config, fzoo_method.METHOD),
    "lozo": (lozo.Config, lozo_method.METHOD),
    "sparse-mezo": (sparse_mezo.Config, sparse_method.METHOD),
}


def dataset(n: int = 16) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


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


def test_moments_of_the_estimate_on_a_linear_loss() -> None:
    """mezo.md check 1: E|g|^2 = (d + n + 1) / n |v|^2 and |mean - v| / |v| = sqrt((d + 1) / (n draws))."""
    d, draws = 1000, 2000
    v = np.random.default_rng(0).normal(size=d)
    v /= np.linalg.norm(v)
    space = vector(lambda x: float(v @ x), d)
    for n in (1, 10):
        total, squares = np.zeros(d), []
        for k in range(draws // n):
            seeds = list(range(k * n, k * n + n))
            scalars = differences.central(1e-2)(space, "b", no_data, seeds).scalars  # type: ignore[arg-type]
            g = sum(
                s * noise.take("gaussian", seed, "x", d).astype(float) for s, seed in zip(scalars, seeds, strict=True)
            )
            total += g
            squares.append(float(g @ g))
        assert np.mean(squares) == pytest.approx((d + n + 1) / n, rel=0.05)
        assert np.linalg.norm(total / len(squares) - v) == pytest.approx(((d + 1) / draws) ** 0.5, rel=0.1)


def test_fzoo_does_not_see_the_scale_of_the_loss_and_its_step_has_the_stated_length() -> None:
    """zo_extensions.md check 3."""
    d, n, eta = 4000, 8, 0.01
    v = np.random.default_rng(0).normal(size=d)
    estimate = differences.normalised(1e-3)
    lengths = []
    for k in range(200):
        seeds = list(range(k * n, k * n + n))
        one = estimate(vector(lambda x: float(v @ x), d, "rademacher"), "b", no_data, seeds)  # type: ignore[arg-type]
        space = vector(lambda x: 100 * float(v @ x), d, "rademacher")
        many = estimate(space, "b", no_data, seeds)  # type: ignore[arg-type]
        np.testing.assert_allclose(one.scalars, many.scalars, rtol=1e-5)
        space.step(Move(tuple(seeds), tuple(-eta * many.scalars)))
        lengths.append(float(np.linalg.norm(space.theta)))
        assert one.forwards == n + 1
    assert np.mean(lengths) == pytest.approx(eta * (d / n) ** 0.5, rel=0.05)


def test_bad_losses_are_dropped_and_equal_ones_move_nothing() -> None:
    broken = iter([1.0, np.nan, 2.0, 1.0, np.inf, 1.0])
    found = differences.central(0.5)(vector(lambda x: next(broken), 4), "b", no_data, [1, 2, 3])  # type: ignore[arg-type]
    assert found.scalars.tolist() == [0.0, 1.0, 0.0] and found.dropped == 2 and found.forwards == 6
    still = differences.normalised(0.5)(vector(lambda x: 3.0, 4), "b", no_data, [1, 2, 3])  # type: ignore[arg-type]
    assert not still.scalars.any() and still.dropped == 0
    log = Log()
    log.append([1, 2, 3], still.scalars.tolist(), 0.1)
    assert len(log) == 1 and move(log, 0, options("fzoo")).seeds == ()


def test_n_directions_are_the_mean_of_single_ones() -> None:
    """mezo.md check 7."""
    v = np.random.default_rng(0).normal(size=50)
    space = vector(lambda x: float(np.sin(x + v).sum()), 50)
    together = differences.central(0.01)(space, "b", no_data, [5, 6, 7, 8]).scalars  # type: ignore[arg-type]
    apart = [differences.central(0.01)(space, "b", no_data, [s]).scalars[0] / 4 for s in (5, 6, 7, 8)]  # type: ignore[arg-type]
    np.testing.assert_allclose(together, apart, rtol=1e-6)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_replayed_moments_are_the_moments(rule: str) -> None:
    """With a window as long as the run, the replay equals the optimiser with stored moments (arXiv 1412.6980)."""
    d, eta, log = 64, 0.01, Log()
    config = options("mezo", rule=rule, window=100)
    space = vector(lambda x: 0.0, d)
    m, v, reference = np.zeros(d), np.zeros(d), np.zeros(d)
    for t, scalar in enumerate(np.random.default_rng(0).normal(size=12)):
        log.append([100 + t], [float(np.float32(scalar))], eta)
        space.step(move(log, t, config))
        g = np.float32(scalar) * noise.take("gaussian", 100 + t, "x", d).astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        reference -= eta * (m if rule == "momentum" else adam)
    np.testing.assert_allclose(space.theta, reference, atol=1e-5)


# --- low rank


def test_low_rank_directions_moves_and_momentum() -> None:
    shapes = {"w": (40, 30), "g": (7,)}
    plain, heavy = (LowRank(2, shapes, 11, 3, momentum=b) for b in (0.0, 0.5))
    theta = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    z = plain.draw("w", theta, 5)
    assert np.linalg.matrix_rank(z) == 2
    again = plain.draw("w", theta, 6)
    assert np.linalg.matrix_rank(np.concatenate([z, again])) == 2, "V is shared until the refresh"
    tensor = torch.from_numpy(theta.copy())
    plain.move("w", tensor, Move((5, 6), (0.1, -0.2), decay=0.5))
    np.testing.assert_allclose(tensor.numpy(), 0.5 * theta + 0.1 * z - 0.2 * again, atol=1e-5)
    plain.at(3)
    assert np.linalg.matrix_rank(np.concatenate([z, plain.draw("w", theta, 5)])) == 4
    moved, n = torch.zeros(40, 30), np.zeros((40, 2))
    bases = []
    for t, seed in enumerate((1, 2, 3, 4)):
        heavy.at(t)
        basis = heavy.basis("w").numpy().astype(np.float64)
        if t == 3:
            n = n @ (bases[-1] @ basis.T) / 30
        bases.append(basis)
        u = noise.take("gaussian", seed, "w/U", 80).reshape(40, 2)
        n = 0.5 * n + 0.5 * 0.1 * u
        before = moved.clone()
        heavy.move("w", moved, Move((seed,), (0.1,)))
        np.testing.assert_allclose((moved - before).numpy(), n @ basis, atol=1e-5)


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_shifted_run_is_a_run_of_the_shifted_model(make_tiny_llama: Any, tmp_path: Path, tied: bool) -> None:
    """Against transformers with every weight replaced, for each kind of direction; and the loss at theta itself."""
    handle = models.resolve(str(make_tiny_llama(tmp_path / "m", tied=tied)))
    whole = Whole(handle, "float32", max_length=64)
    batch = encoded(whole)

    def reference(moved: Callable[[str, torch.Tensor], torch.Tensor]) -> float:
        loaded = handle.load(dtype="float32").model
        for name, parameter in loaded.named_parameters():
            parameter.data = moved(name, parameter.data)
        losses = []
        for row in batch:
            logits = loaded(torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
            losses += [-float(logits[at - 1, row.tokens[at]]) for at in range(row.start, len(row.tokens))]
        return float(np.mean(losses))

    assert whole.loss(batch) == pytest.approx(reference(lambda name, w: w), rel=1e-5)
    for sampler in samplers(whole):
        space = Full(whole, sampler)
        space._batches["b"] = batch
        found = space.losses("b", no_data, [(9, 0.05)])[0]
        wanted = reference(lambda n, w, s=sampler: w + 0.05 * torch.from_numpy(s.draw(n, w.numpy(), 9)))
        assert found == pytest.approx(wanted, rel=1e-4), sampler.id
        assert abs(found - whole.loss(batch)) > 1e-4


def test_the_directional_derivative_is_autograds(handle: ModelHandle) -> None:
    """mezo.md check 2 on every weight of a model."""
    whole = Whole(handle, "float32", max_length=64)
    batch = encoded(whole)
    space = Full(whole, Dense("gaussian", whole.shapes))
    space._batches["b"] = batch
    found = differences.central(1e-4)(space, "b", no_data, [4]).scalars[0]
    loaded = handle.load(dtype="float32").model.requires_grad_(True)
    loaded.model.embed_tokens.padding_idx = None  # autograd would leave that row out
    losses = []
    for row in batch:
        logits = loaded(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        losses += [-logits[at - 1, row.tokens[at]] for at in range(row.start, len(row.tokens))]
    torch.stack(losses).mean().backward()
    exact = sum(
        float((p.grad * torch.from_numpy(space.sampler.draw(n, p.detach().numpy(), 4))).sum())
        for n, p in loaded.named_parameters()
    )
    assert found == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_evaluations_leave_no_trace(handle: ModelHandle, dtype: str) -> None:
    """mezo.md checks 4 and 10: bit-equal weights and an untouched generator after any number of evaluations."""
    whole = Whole(handle, dtype, max_length=64)
    before = {name: parameter.clone() for name, parameter in whole.parameters.items()}
    generator = torch.get_rng_state()
    for sampler in samplers(whole):
        space = Full(whole, sampler)
        for seed in range(5):
            assert np.isfinite(space.losses("b", lambda: dataset(4), [(seed, 0.01), (seed, -0.01), (0, 0.0)])).all()
        space.measure(dataset(4))
    assert all(torch.equal(before[name], parameter) for name, parameter in whole.parameters.items())
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("train", ["full", "lora-fa"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_log_rebuilds_theta_bit_for_bit(
    handle: ModelHandle, tmp_path: Path, name: str, train: str, precision: str
) -> None:
    """mezo.md checks 5 and 6, also over refreshes of V and with momentum; a changed log ends elsewhere."""
    special = {"lozo": {"refresh": 2, "momentum": 0.5}}.get(name, {})
    config = options(name, train=train, precision=precision, learning_rate=0.05, **special)
    ctx = context(tmp_path, config, name)
    method = METHODS[name][1]
    state = method.initialise(handle, config, ctx)
    start = method.follower(handle, config, ctx).space.digest()
    for _ in range(2):
        state, updates = one_round(name, handle, state, {"a": dataset()}, config, ctx)
    here = method.follower(handle, config, ctx).space.digest()
    assert here != start
    assert updates[0].arrays["scalar"].nbytes == 4 * 3 * config.probes

    def replayed(log: Log) -> str:
        follower = Follower(method.space(handle, config, context(tmp_path, config, name)))
        follower.goto([move(log, t, config) for t in range(len(log))], come_back=False)
        return follower.space.digest()

    log = Log.of(state.arrays)
    assert replayed(log) == here
    log.seeds[0] ^= 1
    assert replayed(log) != here


def test_numpy_alone_rebuilds_a_whole_model(handle: ModelHandle, tmp_path: Path) -> None:
    config = options("mezo", train="full", learning_rate=0.01)
    ctx = context(tmp_path, config, "mezo")
    state = mezo_method.METHOD.initialise(handle, config, ctx)
    state, _ = one_round("mezo", handle, state, {"a": dataset()}, config, ctx)
    space = mezo_method.METHOD.follower(handle, config, ctx).space
    assert isinstance(space, Full)
    log = Log.of(state.arrays)
    for name, start in handle.tensors():
        weight = np.array(start)
        for t in range(len(log)):
            noise.move("gaussian", weight, name, move(log, t, config))
        assert np.array_equal(weight, space.whole.parameters[name].numpy()), name


@pytest.mark.parametrize("train", ["full", "lora-fa"])
def test_a_round_is_the_mean_of_its_clients_models(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    """The one group of a round against weighting the clients' own final weights, and a late client's catch-up."""
    config = options("mezo", train=train, learning_rate=1e-3)
    shards = {"a": dataset(12), "b": dataset(4)}
    ctx = context(tmp_path, config, "mezo")
    method = mezo_method.METHOD
    state = method.initialise(handle, config, ctx)
    given = method.assign(state, sorted(shards), config)
    ends, updates = [], []
    for client in sorted(shards):
        updates.append(method.finetune(handle, shards[client], given[client], config, ctx))
        ends.append(snapshot(method.follower(handle, config, ctx).space))
    state = method.aggregate(state, updates, config, ctx)
    follower = method.follower(handle, config, ctx)
    follower.goto([move(Log.of(state.arrays), 0, config)], come_back=False)
    for name, value in snapshot(follower.space).items():
        np.testing.assert_allclose(value, 0.75 * ends[0][name] + 0.25 * ends[1][name], atol=1e-6)
    for _ in range(2):
        state, _ = one_round("mezo", handle, state, shards, config, ctx)
    log = Log.of(state.arrays)
    moves = [move(log, t, config) for t in range(len(log))]
    follower.goto(moves, come_back=False)
    late = Follower(method.space(handle, config, context(tmp_path, config, "mezo")))
    late.goto(moves, come_back=False)
    assert late.space.digest() == follower.space.digest()


def snapshot(space: Any) -> dict[str, np.ndarray]:
    if isinstance(space, Small):
        return {name: value.copy() for name, value in space.theta.items()}
    return {name: parameter.numpy().copy() for name, parameter in space.whole.parameters.items()}


def test_refusals(handle: ModelHandle, tmp_path: Path) -> None:
    config = options("mezo")
    ctx = context(tmp_path, config, "mezo")
    method = mezo_method.METHOD
    state = method.initialise(handle, config, ctx)
    given = method.assign(state, ["a"], config)["a"]
    other = dataclasses.replace(given, scalars={**given.scalars, "noise": "bank20-rademacher/1"})
    with pytest.raises(ModelError, match="made with noise"):
        method.finetune(handle, dataset(), other, config, ctx)
    with pytest.raises(ModelError, match="another base model"):
        method.finetune(handle, dataset(), dataclasses.replace(given, base="0" * 64), config, ctx)
    with pytest.raises(ConfigError, match="one direction a step"):
        method.initialise(handle, options("mezo", rule="adam", probes=2), ctx)
    with pytest.raises(ConfigError, match="only for plain steps"):
        method.assign(state, ["a", "b"], options("mezo", rule="momentum"))
    update = method.finetune(handle, dataset(), given, config, ctx)
    bad = {
        "rng": {"rng": "mt19937"},
        "shape": {"arrays": {**update.arrays, "scalar": np.zeros((4, 1), np.float32)}},
        "dtype": {"arrays": {"scalar": update.arrays["scalar"].astype(np.float64)}},
        "loss": {"scalars": {**update.scalars, "loss": float("nan")}},
        "forwards": {"scalars": {**update.scalars, "forwards": -1}},
        "alone": {"scalars": {**update.scalars, "alone": "yes"}},
    }
    for name, change in bad.items():
        assert method.screen([dataclasses.replace(update, **change)], state, config), name  # type: ignore[arg-type]


def test_a_whole_model_learns_and_comes_out_as_a_model(handle: ModelHandle, tmp_path: Path) -> None:
    """mezo.md check 9 in small: the loss on the training data falls, and what is written is what was trained."""
    config = options("mezo", train="full", steps=60, probes=4, learning_rate=2e-3, batch_size=16)
    ctx = context(tmp_path, config, "mezo", rounds=1)
    method = mezo_method.METHOD
    state = method.initialise(handle, config, ctx)
    space = method.follower(handle, config, ctx).space
    before = space.measure(dataset())["validation loss"].value
    state, _ = one_round("mezo", handle, state, {"a": dataset()}, config, ctx)
    after = space.measure(dataset())["validation loss"].value
    assert after < before - 0.1
    tuned = method.personalise(handle, state, tmp_path / "model", config, ctx)
    fresh = Whole(tuned, "float32", max_length=128)
    assert fresh.measure(dataset())["validation loss"].value == pytest.approx(after, rel=1e-5)
    assert all(torch.equal(fresh.parameters[n], p) for n, p in space.whole.parameters.items())  # type: ignore[attr-defined]

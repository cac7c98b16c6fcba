"""MeZO and its kin: estimates, replay, restore, and a federation whose whole state is a list of seeds and scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import differences, grzo
from edgellm_plugins.zeroth_order.grzo import method as grzo_method
from edgellm_plugins.zeroth_order.mezo import method as mezo_method
from edgellm_plugins.zeroth_order.samplers import Dense, LowRank
from edgellm_plugins.zeroth_order.space import Follower, Full
from edgellm_plugins.zeroth_order.trajectory import Log, move, rate_at
from seed_method_cases import (
    BOTH,
    METHODS,
    TRAINS,
    context,
    dataset,
    encoded,
    no_data,
    one_round,
    options,
    samplers,
    snapshot,
    vector,
)

from edgellm_sdk import models
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Dataset, Example, ModelHandle


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


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
    lost = iter([1.0, np.nan, 2.0, np.inf])
    one = differences.normalised(0.5)(vector(lambda x: next(lost), 4), "b", no_data, [1, 2, 3])  # type: ignore[arg-type]
    assert not one.scalars.any() and one.dropped == 2 and one.loss == 1.5


@pytest.mark.parametrize("train", BOTH)
@pytest.mark.parametrize("name", [*METHODS, "grzo"])
def test_a_step_along_nothing_still_decays(name: str, train: str, handle: ModelHandle, tmp_path: Path) -> None:
    """A lost step's move has no directions; every tensor shrinks, and in bfloat16 in the mean."""
    if name == "p-rge" and train == "full":
        pytest.skip("p-rge trains small sets")
    if name == "sparse-mezo" and train == "lora-fa":
        train = "layers"
    config, method = (grzo.Config, grzo_method.METHOD) if name == "grzo" else METHODS[name]
    made = config(
        train=train, layers=1, rank=4, weight_decay=0.1, precision="bfloat16", share=0.5 if name != "lozo" else 1.0
    )
    space = method.space(handle, made, Context(tmp_path, seed=7, rounds=4))
    theta = (
        space.whole.parameters if isinstance(space, Full) else {n: torch.from_numpy(v) for n, v in space.theta.items()}
    )
    before = {n: w.detach().float().clone() for n, w in theta.items()}
    follower = Follower(space)
    for t in range(20):
        follower.step(t, Move((), (), decay=0.05))
    for n, w in theta.items():
        wanted = before[n] * 0.95**20
        assert float((w.detach().float() - wanted).norm()) <= 0.02 * float(before[n].norm()), n


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


@pytest.mark.parametrize("name, train", [(name, train) for name in METHODS for train in TRAINS.get(name, BOTH)])
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


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_learnt_is_in_the_labels(handle: ModelHandle, tmp_path: Path, seed: int) -> None:
    """mezo.md check 9 in small: with its labels shuffled the same run learns nothing that holds for other messages."""
    order = np.random.default_rng(seed).permutation(32)

    def accuracy(labels: list[int]) -> float:
        texts = [("win a prize now", "see you at dinner")[i % 2] + f" {i}" for i in range(64)]
        rows = [
            Example(({"role": "user", "content": text},), ("spam", "ham")[label], ("spam", "ham")[label])
            for text, label in zip(texts, [*labels, *(i % 2 for i in range(32))], strict=True)
        ]
        data = Dataset(tuple(rows), f"{labels}", "toy", ("ham", "spam"))
        config = options("mezo", steps=300, probes=4, learning_rate=0.2, batch_size=16, rank=16)
        ctx = Context(tmp_path, seed=seed, rounds=1)
        start = mezo_method.METHOD.initialise(handle, config, ctx)
        one_round("mezo", handle, start, {"a": data.select(range(32))}, config, ctx)
        space = mezo_method.METHOD.follower(handle, config, ctx).space
        return space.measure(data.select(range(32, 64)))["balanced accuracy"].value

    true = [i % 2 for i in range(32)]
    assert accuracy(true) >= accuracy([true[i] for i in order]) + 0.2


# --- settings that would train something else than they say


@pytest.mark.parametrize("train", ["lora", "lora-fa"])
def test_sparse_mezo_refuses_tensors_that_start_at_zero(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    """Their smallest weights are all of them, at 0, and nothing would move after the first step."""
    config = options("sparse-mezo", train=train)
    with pytest.raises(ConfigError, match=r"lora_B starts at 0"):
        METHODS["sparse-mezo"][1].initialise(handle, config, context(tmp_path, config, "sparse-mezo"))


@pytest.mark.parametrize("train", ["full", "layers"])
def test_sparse_mezo_goes_on_moving(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    config = options("sparse-mezo", train=train, steps=6, step=1e-3, learning_rate=1e-3)
    ctx = context(tmp_path, config, "sparse-mezo")
    state = METHODS["sparse-mezo"][1].initialise(handle, config, ctx)
    _, (update,) = one_round("sparse-mezo", handle, state, {"a": dataset()}, config, ctx)
    assert (np.abs(update.arrays["scalar"]) > 0).all()


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("mezo", {"rule": "momentum"}, "rule momentum"),
        ("mezo", {"weight_decay": 0.1}, "weight decay"),
        ("lozo", {"momentum": 0.5}, "momentum"),
        ("sparse-mezo", {"train": "full"}, "steps above 1"),
    ],
)
def test_several_clients_are_refused_where_their_steps_do_not_add_up(
    handle: ModelHandle, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    config = options(name, **changes)
    method = METHODS[name][1]
    state = method.initialise(handle, config, context(tmp_path, config, name))
    assert set(method.assign(state, ["a"], config)) == {"a"}
    with pytest.raises(ConfigError, match=f"only for plain steps.*{reason}"):
        method.assign(state, ["a", "b"], config)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("lozo", {"rule": "adam"}, "use --momentum"),
        ("lozo", {"share": 0.5}, "moves every layer"),
        ("mezo", {"step": 1e-12}, "difference of losses is rounding"),
        ("mezo", {"learning_rate": 1e300}, "learning"),
    ],
)
def test_settings_out_of_bounds(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        build(METHODS[name][0], changes, name)
    assert found.value.exit_code == 3


def test_the_warm_up_begins_with_a_step(handle: ModelHandle, tmp_path: Path) -> None:
    """Half of 4 rounds of 3 steps warms up: 1/6, 2/6 .. 6/6 of eta alone, 1/2 and 1 in rounds of several."""
    config = options("mezo", warmup=0.5, learning_rate=0.6)
    ctx = context(tmp_path, config, "mezo")
    alone = [rate_at(r, i, config, ctx) for r in (1, 2, 3) for i in range(3)]
    assert alone == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6], rel=1e-6)
    assert [rate_at(r, None, config, ctx) for r in (1, 2, 3, 4)] == pytest.approx([0.3, 0.6, 0.6, 0.6], rel=1e-6)


def test_a_log_in_bytes(handle: ModelHandle, tmp_path: Path) -> None:
    """mezo.md check 5: 12 bytes a step at one direction; what is read back is what was written, alike or not."""
    log = Log()
    for t in range(1000):
        log.append([t], [0.5], 0.25)
    arrays = log.arrays()
    assert sum(array.nbytes for array in arrays.values()) <= 12 * 1000 + 12
    assert Log.of(arrays) == log
    log.append([7, 8], [0.0, 1.0], 0.25)
    log.append([], [], 0.5)
    log.append([9], [2.0], 0.5)
    arrays = log.arrays()
    assert arrays["groups"].tolist() == [1000, 1, 1, 1] and arrays["size"].tolist() == [1, 2, 0, 1]
    assert Log.of(arrays) == log and Log.of(Log().arrays()) == Log()
    assert log.group(1000) == ([7, 8], [0.0, 1.0]) and log.group(1001) == ([], [])

"""FwdLLM: the checks that tell a faithful implementation from a toy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.estimator import HalfSums
from edgellm_plugins.zeroth_order.fwdllm import Config, method
from seed_method_cases import Llama64

from edgellm_sdk import models, random, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Arrays, Dataset, Example, ModelHandle, State, Update


def dataset(n: int = 24) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def context(tmp_path: Path, rounds: int = 20) -> Context:
    return Context(tmp_path, seed=7, rounds=rounds)


def work(
    handle: ModelHandle, state: State, shards: Mapping[str, Dataset], config: Config, ctx: Context
) -> list[Update]:
    sizes = {client: len(data) for client, data in shards.items()}
    assigned = method.assign(state, sorted(shards), sizes, config, ctx)
    return [method.finetune(handle, shards[client], assigned[client], config, ctx) for client in sorted(shards)]


def test_jvp_agrees_with_autograd_and_its_error_is_second_order(handle: ModelHandle) -> None:
    """Sheet check 1, in float32 and float64, on the real path through kept hidden states."""
    frozen = Frozen(handle, adapters.Spec("lora", 1, 4), Stream(0, "a"), "float32")
    kept = frozen.prepare(prompts.encode(frozen.tokenizer, dataset().examples[:6], 64))
    stream = Stream(1, "theta")
    theta = {
        name: stream.normal(value.size).reshape(value.shape) * np.float32(0.05)
        for name, value in frozen.trainables.initial.items()
    }
    v = estimator.direction(estimator.shapes_of(theta), 3, 0)

    def value(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        frozen.trainables.set(tensors)
        hidden = kept.hidden.clone()
        for layer, keywords in zip(
            list(adapters.decoder_layers(frozen.model))[frozen.trainables.lowest :], kept.calls, strict=True
        ):
            hidden = layer(hidden, **{k: x.clone() if torch.is_tensor(x) else x for k, x in keywords.items()})
        logits = frozen.model.lm_head(frozen.model.model.norm(hidden[kept.rows.clone(), kept.columns.clone()]))
        return torch.nn.functional.cross_entropy(logits.float(), kept.targets.clone())

    kept.calls = [
        {k: tuple(t.clone() for t in x) if isinstance(x, tuple) else x for k, x in call.items()} for call in kept.calls
    ]
    live = {name: torch.from_numpy(t)[None].requires_grad_() for name, t in theta.items()}
    value(live).backward()
    exact = sum(float((live[name].grad[0] * torch.from_numpy(v[name])).sum()) for name in theta)  # type: ignore[index]

    frozen._kept["batch"] = kept
    estimate = estimator.probe(partial(frozen.evaluate, "batch", dataset), theta, [v], 0.01)
    assert float(estimate.jvp[0]) == pytest.approx(exact, rel=0.01)


def test_central_difference_error_falls_a_hundredfold_in_float64() -> None:
    """Sheet check 1: O(h^2), and a one-sided difference falls only tenfold."""

    def smooth(x: np.ndarray) -> float:
        return float(np.sin(x).sum() + 0.3 * (x**3).sum())

    x, v = np.linspace(-1, 1, 20), random.normal(5, 20).astype(np.float64)
    exact = float(((np.cos(x) + 0.9 * x**2) * v).sum())
    central = [abs((smooth(x + h * v) - smooth(x - h * v)) / (2 * h) - exact) for h in (1e-2, 1e-3)]
    forward = [abs((smooth(x + h * v) - smooth(x)) / h - exact) for h in (1e-2, 1e-3)]
    assert 80 < central[0] / central[1] < 120
    assert 8 < forward[0] / forward[1] < 12


def linear_loss(g: np.ndarray) -> estimator.Loss:
    def loss(theta: Arrays, directions: Sequence[Arrays], steps: Sequence[float]) -> np.ndarray:
        return np.array([(theta["x"] + h * v["x"]) @ g for v, h in zip(directions, steps, strict=True)])

    return loss


def test_forward_gradients_are_unbiased_with_the_known_spread() -> None:
    """Sheet check 2: 4000 forward gradients at d = 500 leave a relative error of sqrt((d + 1) / 4000)."""
    d, n = 500, 4000
    g = random.normal(11, d).astype(np.float64)
    theta = {"x": np.zeros(d, np.float32)}
    directions = [estimator.direction({"x": (d,)}, 99, k) for k in range(n)]
    estimate = estimator.probe(linear_loss(g), theta, directions, 0.01)
    sums = HalfSums({"x": (d,)})
    for k, (v, jvp) in enumerate(zip(directions, estimate.jvp, strict=True)):
        sums.add(estimator.scaled(v, float(jvp)), k % 2)
    error = np.linalg.norm(sums.mean()["x"] - g) / np.linalg.norm(g)
    assert error == pytest.approx(math.sqrt((d + 1) / n), rel=0.15)


def test_sampling_keeps_the_aligned_tenth_and_is_biased_towards_it() -> None:
    """Sheet checks 2 and 5: mean cosine of the best tenth is 1.75 / sqrt(D), far above the unbiased zero."""
    size, rounds = 2000, 12
    target = {"x": random.normal(4, size)}
    kept, plain = [], []
    for pool in range(rounds):
        picks = estimator.most_aligned(target, pool, 100, 10)["x"]
        for index, bucket in [(i, kept) for i in picks] + [(i, plain) for i in range(10)]:
            v = estimator.part("x", size, pool, index).astype(np.float64)
            bucket.append(float(v @ target["x"]) / (np.linalg.norm(v) * np.linalg.norm(target["x"])))
    assert np.mean(kept) == pytest.approx(1.75 / math.sqrt(size), rel=0.10)
    assert abs(np.mean(plain)) < 0.5 / math.sqrt(size)


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_variance_is_twice_that_of_the_mean(count: int) -> None:
    """Sheet check 3: iid forward gradients of variance s^2 give E[Var] = 2 s^2 / N."""
    s, size = 2.0, 50
    found = []
    for trial in range(200):
        sums = HalfSums({"x": (size,)})
        draws = random.normal(random.key(trial, "trial", count), size * count).reshape(count, size) * np.float32(s)
        for k, row in enumerate(draws):
            sums.add({"x": row}, k % 2)
        found.append(sums.variance())
    assert np.mean(found) == pytest.approx(2 * s * s / count, rel=0.10)


def test_variance_with_an_empty_half_is_infinite() -> None:
    sums = HalfSums({"x": (3,)})
    sums.add({"x": np.ones(3, np.float32)}, 0)
    assert sums.variance() == math.inf


def test_rejecting_rounds_leave_theta_and_ask_the_same_clients(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 4: reject while Var > tau, with theta bit-equal and the minibatch unchanged; accept once."""
    ctx = context(tmp_path)
    shards = {f"c{k}": dataset(16) for k in range(2)}
    loose = Config(layers=1, tau=1e9, sampling=False, precision="float32")
    start = method.initialise(handle, loose, ctx)
    first = method.aggregate(start, work(handle, start, shards, loose, ctx), loose, ctx)
    assert first.scalars["steps"] == 1 and first.scalars["minibatch"] == 1

    strict = Config(layers=1, tau=first.scalars["variance"] / 6, limit=256, sampling=False, precision="float32")
    state, counts = method.initialise(handle, strict, ctx), []
    while state.scalars["steps"] == 0 and state.round < 64:
        before = {n: a.copy() for n, a in state.arrays.items() if n.startswith(method.THETA)}
        cohort, minibatch = state.cohort, state.scalars["minibatch"]
        state = method.aggregate(state, work(handle, state, shards, strict, ctx), strict, ctx)
        if state.scalars["steps"] == 0:
            assert all(np.array_equal(before[name], state.arrays[name]) for name in before)
            assert (state.cohort, state.scalars["minibatch"]) == (cohort, minibatch)
            counts.append(sum(state.scalars["collected"]))
    assert state.scalars["steps"] == 1 and len(counts) >= 2
    assert any(not np.array_equal(before[name], state.arrays[name]) for name in before)
    assert state.scalars["collected"] == [0, 0]


def test_the_limit_guarantees_progress(handle: ModelHandle, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    shards = {"a": dataset(8), "b": dataset(8)}
    config = Config(layers=1, tau=1e-12, limit=3, perturbations=1, precision="float32")
    state = method.initialise(handle, config, ctx)
    for _ in range(3):
        state = method.aggregate(state, work(handle, state, shards, config, ctx), config, ctx)
    assert state.scalars["steps"] == 1


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks; equal values share the middle of theirs, so that a constant has no correlation (NaN)."""
    ranks = [np.searchsorted(np.sort(v), v, "left") + np.searchsorted(np.sort(v), v, "right") for v in (x, y)]
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_more_perturbations_are_wanted_as_gradient_noise_grows() -> None:
    """Sheet check 4, pacing: a two-factor toy whose gradient spread grows while its loss falls."""
    target, tau, size = 4.0, 0.5, 40
    a, b = np.full(size, 0.05), np.full(size, 0.05)
    losses, wanted = [], []
    for step in range(12):
        sums, count = HalfSums({"x": (2 * size,)}), 0
        while count < 4 or sums.variance() > tau:
            noise = 1 + 0.5 * random.normal(random.key(step, "data", count), 1)[0]
            residual = float(a @ b) / math.sqrt(size) - target * noise
            grad = np.concatenate([residual * b, residual * a]) / math.sqrt(size)
            v = random.normal(random.key(step, "v", count), 2 * size).astype(np.float64)
            sums.add({"x": (grad @ v * v).astype(np.float32)}, count % 2)
            count += 1
        g = sums.mean()["x"]
        losses.append((float(a @ b) / math.sqrt(size) - target) ** 2)
        wanted.append(count)
        a, b = a - 0.25 * g[:size], b - 0.25 * g[size:]
    assert losses[-1] < losses[0]
    assert spearman(losses, wanted) < 0, "N rises as the loss falls"


@pytest.mark.parametrize("train", adapters.KINDS)
def test_both_wires_give_the_same_theta_and_the_stated_bytes(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    """Sheet check 6: scalars and tensors end in the same bits; at most 16 bytes up per perturbation, or 4 d."""
    shards = {"a": dataset(12), "b": dataset(10)}
    ends, payloads = [], []
    for sent in ("seeds", "tensors"):
        ctx = context(tmp_path)
        config = Config(train=train, layers=1, wire=sent, perturbations=2, tau=1e9, precision="float32")
        state = method.initialise(handle, config, ctx)
        for _ in range(4):
            updates = work(handle, state, shards, config, ctx)
            updates = [wire.update_from_bytes(wire.update_to_bytes(update), "client") for update in updates]
            assert method.screen(updates, state) == {}
            state = method.aggregate(state, updates, config, ctx)
        ends.append(state)
        payloads.append(wire.payload_bytes(updates[0].arrays))
    d = sum(a.size for n, a in ends[0].arrays.items() if n.startswith(method.THETA))
    assert all(np.array_equal(ends[0].arrays[n], ends[1].arrays[n]) for n in ends[0].arrays)
    assert payloads == [2 * 8, 2 * (4 * d + 4)]


def test_probes_that_share_a_call_give_the_same_losses(handle: ModelHandle) -> None:
    for train in adapters.KINDS:
        frozen = Frozen(handle, adapters.Spec(train, 1), Stream(0, "a"), "float32")
        theta = frozen.trainables.initial
        directions = [estimator.direction(estimator.shapes_of(theta), 1, k) for k in range(3)]

        found = []
        for frozen.share in (1, 6):
            found.append(estimator.probe(partial(frozen.evaluate, "x", lambda: dataset(5)), theta, directions, 0.05))
        one, many = found
        np.testing.assert_allclose(one.loss, many.loss, rtol=1e-5)


def test_kept_hidden_states_change_nothing(handle: ModelHandle) -> None:
    """The suffix after kept states equals the whole model, and a zero budget keeps nothing."""
    data = dataset(6)
    frozen = Frozen(handle, adapters.Spec("lora", 1), Stream(0, "a"), "float32", budget=0)
    loss = float(frozen.losses("x", lambda: data)[0])
    assert not frozen._kept
    loaded = handle.load(dtype="float32")
    total, count = 0.0, 0
    for row in prompts.encode(loaded.tokenizer, data.examples, 128):
        logits = loaded.model(torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
        for position in range(row.start, len(row.tokens)):
            total -= float(logits[position - 1, row.tokens[position]])
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_no_autograd_anywhere(handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sheet check 8: nothing calls backward, nothing requires a gradient."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    ctx = context(tmp_path)
    config = Config(layers=1, precision="float32")
    state = method.initialise(handle, config, ctx)
    work(handle, state, {"a": dataset(8)}, config, ctx)
    frozen = next(value for _, value in ctx.kept("objective "))
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_bad_updates_are_rejected_with_a_reason(handle: ModelHandle, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    config = Config(layers=1, precision="float32")
    state = method.initialise(handle, config, ctx)
    good = work(handle, state, {"a": dataset(8)}, config, ctx)[0]
    bad = {
        "rng": Update(**{**good.__dict__, "rng": "mt19937"}),
        "shape": Update(
            **{**good.__dict__, "arrays": {"jvp": np.zeros(2, np.float32), "loss": np.zeros(1, np.float32)}}
        ),
        "dtype": Update(**{**good.__dict__, "arrays": {k: a.astype(np.float64) for k, a in good.arrays.items()}}),
        "empty": Update(**{**good.__dict__, "arrays": {k: a[:0] for k, a in good.arrays.items()}}),
        "forwards": Update(**{**good.__dict__, "scalars": {"forwards": 10**9}}),
    }
    assert method.screen([good], state) == {}
    for name, update in bad.items():
        assert method.screen([update], state), name


def test_learning_rate_warms_up_and_decays() -> None:
    config = Config(learning_rate=1.0, warmup=0.1)
    rates = [method.learning_rate(r, 100, config) for r in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[100] == 0.0
    assert rates[55] == pytest.approx(0.5)


def test_a_direction_that_is_not_finite_is_dropped_and_counted() -> None:
    """jvp 0 and the mean of the other losses in its place; the others are untouched."""
    theta = {"x": np.ones(4, np.float32)}
    directions = [estimator.direction({"x": (4,)}, 3, k) for k in range(3)]

    def loss(theta: Any, along: Any, steps: Any) -> np.ndarray:
        values = np.array([float((theta["x"] + s * v["x"]).sum()) for v, s in zip(along, steps, strict=True)])
        values[[i for i, v in enumerate(along) if v is directions[1]]] = [np.inf, np.nan][: len(values)]
        return values

    found = estimator.probe(loss, theta, directions, 0.1)
    assert found.dropped == 1 and found.forwards == 6 and found.jvp[1] == 0
    np.testing.assert_allclose(found.jvp[[0, 2]], [directions[k]["x"].sum() for k in (0, 2)], rtol=1e-5)
    assert found.loss[1] == pytest.approx(float(found.loss[[0, 2]].mean()))


def test_a_variance_of_nothing_is_refused(handle: ModelHandle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="variance-of"):
        method.initialise(handle, Config(layers=1, variance_of="no such"), Context(tmp_path))


def test_the_error_of_jvp_is_second_order_on_a_llama_in_float64(handle: ModelHandle) -> None:
    """Sheet check 1 on every weight of a Llama: a tenth of h leaves a hundredth of a central difference's error, and a
    tenth of a forward one's, which is not good enough for the bound of the first."""
    llama = Llama64(handle, dataset(6))
    for index in range(4, 9):
        v = estimator.direction(estimator.shapes_of(llama.theta), 3, index)
        exact = llama.slope(v)
        ratios = {}
        for kind in ("central", "forward"):
            found = [float(estimator.probe(llama.at, llama.theta, [v], h, kind).jvp[0]) for h in (1e-4, 1e-5)]
            ratios[kind] = abs(found[0] - exact) / abs(found[1] - exact)
        assert 80 < ratios["central"] < 120
        assert 7 < ratios["forward"] < 14
        assert not 80 < ratios["forward"] < 120


def paced(seed: int, folder: Path) -> tuple[list[float], list[float]]:
    """(loss, perturbations wanted) of each step that `aggregate` took on a toy without a model: two factors a, b fit a
    noisy target, and gradients spread more the larger a and b have become."""
    size, target, n = 40, 4.0, 8
    config = Config(wire="tensors", tau=0.25, limit=256, sampling=False, learning_rate=0.25, warmup=0.0)
    ctx = Context(folder, seed=7, rounds=10**6)  # so many that eta does not decay
    scalars: dict[str, Any] = {
        "minibatch": 0, "rounds_on_minibatch": 0, "collected": [0, 0], "weights": [0, 0], "steps": 0, "forwards": 0,
        "dropped": 0, "tau": config.tau, "variance": None, "sampling": False,
    }  # fmt: skip
    state = State("base", 0, {method.THETA + "x": np.full(2 * size, 0.1, np.float32)}, scalars)
    losses: list[float] = []
    while state.scalars["steps"] < 20:
        x = state.arrays[method.THETA + "x"].astype(np.float64)
        a, b = x[:size], x[size:]
        fit = float(a @ b) / math.sqrt(size)
        if state.scalars["rounds_on_minibatch"] == 0:
            losses.append((fit - target) ** 2)
        gradients = []
        for k in range(n):
            seen = target * (1 + 0.5 * random.normal(random.key(seed, "data", state.round * n + k), 1)[0])
            slope = (fit - seen) * np.concatenate([b, a]) / math.sqrt(size)
            v = random.normal(random.key(seed, "v", state.round * n + k), 2 * size).astype(np.float64)
            gradients.append((slope @ v * v).astype(np.float32))
        arrays = {"loss": np.full(n, losses[-1], np.float32), "x": np.stack(gradients)}
        told = {"forwards": 2 * n, "dropped": 0}
        update = Update("base", state.round + 1, "a", "gradients", arrays, 8, estimator.noise_id(), told)
        assert method.screen([update], state) == {}
        state = method.aggregate(state, [update], config, ctx)
    places, wanted = zip(*ctx.curves["perturbations accepted over steps"], strict=True)
    assert places == tuple(range(1, 21)) and 2 * sum(wanted) == state.scalars["forwards"]
    assert max(wanted) < config.limit, "the variance decided, not the limit"
    return losses, list(wanted)


def test_a_run_asks_for_more_perturbations_as_its_loss_falls(tmp_path: Path) -> None:
    """Sheet check 4, pacing, by `aggregate` itself: Spearman < 0 in each of 6 runs, and their mean below -0.38, which
    chance alone passes in 5 % of single runs of 20 steps."""
    found = []
    for seed in range(6):
        losses, wanted = paced(seed, tmp_path)
        assert losses[-1] < 0.5 * losses[0]
        found.append(spearman(losses, wanted))
        assert found[-1] < 0
    assert np.mean(found) < -0.38

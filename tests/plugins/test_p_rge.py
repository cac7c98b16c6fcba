"""P-RGE: the checks that tell a faithful implementation from a toy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.p_rge import Config, method

from edgellm_sdk import config as options
from edgellm_sdk import models, random, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.types import Arrays, Dataset, Example, ModelHandle, State, Update

ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # rectangular ones among them: 64 -> 32 and 64 -> 128


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes: Any) -> Config:
    return Config(**{"layers": 0, "targets": ALL, "rank": 4, "alpha": 8.0, "precision": "float32", **changes})


def work(
    handle: ModelHandle, state: State, shards: Mapping[str, Dataset], config: Config, ctx: Context
) -> list[Update]:
    assigned = method.assign(state, sorted(shards), ctx)
    return [method.finetune(handle, shards[client], assigned[client], config, ctx) for client in sorted(shards)]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(candidates in the call, tokens through the model) of every call from now on."""
    calls: list[tuple[int, int]] = []
    original = Frozen.logits

    def spy(self: Frozen, kept: Any, probes: int = 1) -> torch.Tensor:
        calls.append((probes, probes * math.prod(kept.hidden.shape[:2])))
        return original(self, kept, probes)

    monkeypatch.setattr(Frozen, "logits", spy)
    return calls


def trained(
    handle: ModelHandle, config: Config, folder: Path, data: Dataset, rounds: int = 1
) -> tuple[Arrays, list[Update]]:
    """theta after `rounds` rounds of one client, and its updates."""
    ctx = Context(folder, seed=7)
    state, sent = method.initialise(handle, config, ctx), []
    for _ in range(rounds):
        updates = work(handle, state, {"a": data}, config, ctx)
        assert method.screen(updates, state) == {}
        state = method.aggregate(state, updates, config, ctx)
        sent += updates
    return method._theta(state.arrays), sent


def merged_loss(model: Any, start: Mapping[str, torch.Tensor], a: Arrays, b: Arrays, scale: float, rows: Any) -> float:
    """Mean cross-entropy with every LoRA folded into its weight, one example at a time: the plain way."""
    with torch.no_grad():
        for name, value in b.items():
            module = name.removesuffix(".lora_B")
            product = torch.from_numpy(value).double() @ torch.from_numpy(a[f"{module}.lora_A"]).double()
            model.get_submodule(module).weight.copy_(start[module] + scale * product)
        total, count = 0.0, 0
        for row in rows:
            logits = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            for position in range(row.start, len(row.tokens)):
                total -= float(logits[position - 1, row.tokens[position]])
                count += 1
    return total / count


@pytest.mark.parametrize("loops", ["both", "outer"])
def test_a_shared_call_equals_sequential_calls_for_50_steps(handle: ModelHandle, tmp_path: Path, loops: str) -> None:
    """Sheet checks 1 and 8: losses to 1e-5 at each step, theta after 50 steps to 1e-5, rectangular layers included."""
    data, rate = dataset(), 1e-3
    shared, one = (
        trained(handle, config(loops=way, steps=50, queries=3, batch=6, learning_rate=rate), tmp_path, data)
        for way in (loops, "none")
    )
    assert np.abs(shared[1][0].arrays["loss"] - one[1][0].arrays["loss"]).max() <= 1e-5
    assert max(np.abs(shared[0][name] - one[0][name]).max() for name in one[0]) <= 1e-5
    assert max(np.abs(value).max() for value in one[0].values()) > 1e-3, "theta has moved"


def test_the_2q_losses_of_one_call_are_those_of_each_adapter_alone(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 1 away from theta = 0, where + and - and the queries differ; group-major pairing would show here."""
    found = []
    stream = random.Stream(3, "theta")
    for loops in ("both", "outer", "none"):
        settings, ctx = config(loops=loops, queries=4, step=0.2), Context(tmp_path, seed=7)
        live = method._objective(handle, settings, ctx)
        theta = {n: random.normal(random.key(3, n), v.size).reshape(v.shape) for n, v in live.initial.items()}
        z = method.directions(theta, int(stream.key), 0, 4)
        found.append(method.losses(live, dataset(), "a", 0, theta, z, settings, ctx)[:2])
    for plus, minus in found[:2]:
        assert np.abs(plus - found[2][0]).max() <= 1e-5 and np.abs(minus - found[2][1]).max() <= 1e-5
    spread = np.concatenate(found[2])
    assert np.diff(np.sort(spread)).min() > 5e-5, "the eight candidates differ by more than the tolerance"


def test_one_query_is_mezo_on_lora_fa(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 2: q = 1 against MeZO written plainly on merged weights, same seeds, to 1e-6 per step."""
    settings = config(queries=1, batch=4, steps=1, learning_rate=1e-3)
    data, ctx = dataset(), Context(tmp_path, seed=7)
    state = method.initialise(handle, settings, ctx)
    live: Any = method._objective(handle, settings, ctx)
    loaded = handle.load(dtype="float32")
    loaded.model.double()
    start = {
        n.rpartition(".")[0]: loaded.model.get_submodule(n.rpartition(".")[0]).weight.clone()
        for n in live.trainables.initial
    }
    order = ctx.stream("order/a").permutation(len(data)).tolist()
    scale = settings.alpha / settings.rank
    for round in range(5):
        theta = method._theta(state.arrays)
        rows = prompts.encode(loaded.tokenizer, data.select(order[4 * round : 4 * round + 4]).examples, 128)
        pool = int(ctx.stream("directions/a", round + 1).seeds(1)[0])
        z = {n: random.normal(random.key(pool, n, 0), v.size).reshape(v.shape) for n, v in theta.items()}
        high, low = (
            merged_loss(
                loaded.model, start, live.trainables.frozen, {n: v + sign * 0.01 * z[n] for n, v in theta.items()},
                scale, rows,
            )
            for sign in (1, -1)
        )  # fmt: skip
        wanted = {n: v - 1e-3 * (high - low) / 0.02 * z[n] for n, v in theta.items()}
        state = method.aggregate(state, work(handle, state, {"a": data}, settings, ctx), settings, ctx)
        got = method._theta(state.arrays)
        assert max(np.abs(got[name] - wanted[name]).max() for name in wanted) <= 1e-6
        assert max(np.abs(got[name] - theta[name]).max() for name in wanted) > 1e-4


def test_variance_falls_as_one_over_q(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 5: over 500 seeds, the variance of mean_k(g_k z_k) times q is constant within 15 %."""
    found = {}
    for q in (1, 2, 4, 8):
        settings = config(layers=1, targets="down_proj", queries=q, batch=8 * q, learning_rate=1.0)  # B_e fixed here
        ctx = Context(tmp_path, seed=7)
        live = method._objective(handle, settings, ctx)
        theta = live.initial
        estimates = []
        for pool in range(500):
            z = method.directions(theta, 1000 * q + pool, 0, q)
            plus, minus, _ = method.losses(live, dataset(), "a", 0, theta, z, settings, ctx)
            jvp = ((plus - minus) / (2 * settings.step)).astype(np.float32)
            step = method.moved(theta, z, jvp, 1.0)
            estimates.append(np.concatenate([(theta[n] - step[n]).ravel() for n in sorted(theta)]))
        found[q] = float(np.var(estimates, axis=0).sum())
    for q in (2, 4, 8):
        assert found[q] * q == pytest.approx(found[1], rel=0.15), found


def test_the_estimate_agrees_with_the_gradient(handle: ModelHandle, tmp_path: Path) -> None:
    """Averaged over 4000 queries, the estimate's error is the known sqrt((d + 1) / n) of its norm."""
    settings = config(layers=1, targets="down_proj", rank=1, alpha=2.0, queries=32, batch=256)
    ctx = Context(tmp_path, seed=7)
    live: Any = method._objective(handle, settings, ctx)
    theta, d, n = live.initial, live.trainables.size, 4000
    total = {name: np.zeros(v.shape) for name, v in theta.items()}
    for pool in range(n // 32):
        z = method.directions(theta, pool, 0, 32)
        plus, minus, _ = method.losses(live, dataset(8), "a", 0, theta, z, settings, ctx)
        for v, g in zip(z, (plus - minus) / (2 * settings.step), strict=True):
            for name in total:
                total[name] += g * v[name] / n
    exact = {}
    for name, value in theta.items():  # d is 64: every partial derivative, by central differences in each coordinate
        exact[name] = np.zeros(value.shape)
        for place in np.ndindex(value.shape):
            unit = {k: np.zeros(v.shape, np.float32) for k, v in theta.items()}
            unit[name][place] = 1
            plus, minus, _ = method.losses(live, dataset(8), "a", 0, theta, [unit], settings, ctx)
            exact[name][place] = float((plus - minus)[0]) / (2 * settings.step)
    norm = math.sqrt(sum(float((v**2).sum()) for v in exact.values()))
    error = math.sqrt(sum(float(((total[k] - exact[k]) ** 2).sum()) for k in exact)) / norm
    assert error == pytest.approx(math.sqrt((d + 1) / n), rel=0.35)


@pytest.mark.parametrize("split", [False, True])
def test_a_step_costs_the_same_tokens_for_every_q(
    handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    """Sheet check 6: q * B_e = 16 gives 2E rows a step; the calls are those that `loops` promises."""
    same = Dataset((dataset(1).examples[0],) * 32, "same", "toy", ("ham", "spam"))  # one length, so tokens are rows
    calls = spied(monkeypatch)
    tokens = {}
    for q in (1, 2, 4, 8, 16):
        for loops, candidates in (("both", 2 * q), ("outer", q), ("none", 1)):
            calls.clear()
            settings = config(queries=q, batch=16, steps=1, loops=loops, split=split)
            _, sent = trained(handle, settings, tmp_path, same)
            assert sent[0].scalars["forwards"] == 32
            tokens[q, loops] = sum(n for _, n in calls)
            expected = candidates if not split else min(candidates, 2)
            assert all(probes == expected for probes, _ in calls) and len(calls) == 2 * q // expected
    assert len(set(tokens.values())) == 1


def test_split_gives_each_query_its_own_examples(handle: ModelHandle, tmp_path: Path) -> None:
    data = dataset(8)
    ctx, settings = Context(tmp_path, seed=7), config(queries=4, batch=8, split=True)
    live = method._objective(handle, settings, ctx)
    seen: list[list[str]] = []

    class Watch:
        def evaluate(self, name: str, make: Any, *rest: Any) -> Any:
            seen.append([str(e.prompt) for e in make().examples])
            return live.evaluate(name, make, *rest)

    z = method.directions(live.initial, 5, 0, 4)
    watch: Any = Watch()
    plus, minus, rows = method.losses(watch, data, "a", 0, live.initial, z, settings, ctx)
    assert [len(batch) for batch in seen] == [2, 2, 2, 2] and rows == 16
    assert sorted(sum(seen, [])) == sorted(str(e.prompt) for e in data.examples)
    for k, v in enumerate(z):
        alone = method.losses(live, data, "a", k, live.initial, [v], settings, ctx)
        assert plus[k] == pytest.approx(alone[0][0], abs=1e-6) and minus[k] == pytest.approx(alone[1][0], abs=1e-6)


def test_the_base_is_untouched_and_no_gradient_exists(
    handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sheet check 7: every tensor of the frozen model has the same bits after training."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    ctx, settings = Context(tmp_path, seed=7), config(steps=5)
    state = method.initialise(handle, settings, ctx)
    live: Any = method._objective(handle, settings, ctx)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    work(handle, state, {"a": dataset()}, settings, ctx)
    after = live.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in live.model.parameters())
    assert "edgellm_plugins" in method.__name__ and len(before) > 10


def test_a_and_the_input_projection_are_shared(handle: ModelHandle, tmp_path: Path) -> None:
    """LoRA-FA: however many candidates are installed, A is one matrix and X A^T allocates only its result."""
    ctx, settings = Context(tmp_path, seed=7), config(queries=8, batch=16, steps=1)
    state = method.initialise(handle, settings, ctx)
    work(handle, state, {"a": dataset()}, settings, ctx)
    live: Any = method._objective(handle, settings, ctx)
    places = live.trainables._places
    assert all(probed.slots["lora_A"].shape[0] == 1 for probed, _ in places.values())
    assert all(probed.slots["lora_B"].shape[0] == 16 for probed, _ in places.values())
    a, x = places["model.layers.0.mlp.down_proj.lora_A"][0].slots["lora_A"], torch.randn(16, 40, 128)
    with torch.profiler.profile(profile_memory=True) as profile:
        x @ a.mT
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) <= 16 * 40 * 4 * 4


def test_the_server_replays_the_client_to_the_bit(handle: ModelHandle, tmp_path: Path) -> None:
    """8 bytes up per perturbation pair, and theta after the round is the client's own theta."""
    settings, ctx = config(steps=6, queries=4, learning_rate=0.01), Context(tmp_path, seed=7)
    state = method.initialise(handle, settings, ctx)
    assigned = method.assign(state, ["a"], ctx)["a"]
    seen: list[Arrays] = []
    live: Any = method._objective(handle, settings, ctx)
    evaluate = live.evaluate
    live.evaluate = lambda name, make, theta, *rest: (seen.append(theta), evaluate(name, make, theta, *rest))[1]
    update = method.finetune(handle, dataset(), assigned, settings, ctx)
    again = wire.update_from_bytes(wire.update_to_bytes(update), "a")
    assert wire.payload_bytes(again.arrays) == 8 * 6 * 4
    pool = int(assigned.arrays["pool"][0])
    before = method.replay(method._theta(state.arrays), pool, again.arrays["jvp"][:-1], 0.01)
    assert all(np.array_equal(before[name], seen[-1][name]) for name in before), "theta at the client's last step"
    final = method.moved(before, method.directions(before, pool, 5, 4), update.arrays["jvp"][-1], 0.01)
    new = method._theta(method.aggregate(state, [again], settings, ctx).arrays)
    assert all(np.array_equal(final[name], new[name]) for name in final)


def test_aggregation_is_the_weighted_mean_of_the_local_models(handle: ModelHandle, tmp_path: Path) -> None:
    """FedAvg of what each client would have reached alone, weighted 24 : 8 : 5; from a theta that is not zero."""
    settings = config(steps=4, learning_rate=0.02)
    shards, ctx = {"a": dataset(24), "b": dataset(8), "c": dataset(5)}, Context(tmp_path, seed=7)
    state = method.initialise(handle, settings, ctx)
    for _ in range(2):
        updates = work(handle, state, shards, settings, ctx)
        alone = {u.client: method._theta(method.aggregate(state, [u], settings, ctx).arrays) for u in updates}
        state = method.aggregate(state, updates, settings, ctx)
        new = method._theta(state.arrays)
        for name in new:
            mean = sum(alone[c][name].astype(np.float64) * len(shards[c]) for c in shards) / 37
            np.testing.assert_allclose(new[name], mean, rtol=0, atol=1e-7)
    assert state.scalars["forwards"] == 2 * 4 * 2 * 4 * (4 + 4) + sum(2 * 4 * n for n in c_rows(5, 4, 8))


def c_rows(examples: int, size: int, steps: int) -> list[int]:
    """Lengths of the minibatches that a client with a short last one meets."""
    sizes = [min(size, examples - k) for k in range(0, examples, size)]
    return [sizes[k % len(sizes)] for k in range(steps)]


def test_linear_in_the_directions(handle: ModelHandle) -> None:
    """Local steps add up: replay equals theta - eta / q * sum over steps and queries of g z, in any order."""
    shapes = {"x": (5, 3), "y": (7,)}
    theta = {n: random.normal(random.key(1, n), math.prod(s)).reshape(s) for n, s in shapes.items()}
    jvp = random.normal(9, 12).reshape(4, 3)
    got = method.replay(theta, 77, jvp, 0.1)
    for name, shape in shapes.items():
        total = theta[name].astype(np.float64)
        for index in reversed(range(12)):
            v = random.normal(random.key(77, name, index), math.prod(shape)).reshape(shape)
            total = total - 0.1 / 3 * float(jvp.ravel()[index]) * v
        np.testing.assert_allclose(got[name], total, atol=1e-6)


def test_bad_updates_are_rejected_with_a_reason(handle: ModelHandle, tmp_path: Path) -> None:
    ctx, settings = Context(tmp_path, seed=7), config(steps=2)
    state = method.initialise(handle, settings, ctx)
    good = work(handle, state, {"a": dataset()}, settings, ctx)[0]
    short = {name: array[:1] for name, array in good.arrays.items()}
    bad = [
        replace(good, rng="mt19937"),
        replace(good, kind="gradients"),
        replace(good, arrays=short),
        replace(good, arrays={k: a.astype(np.float64) for k, a in good.arrays.items()}),
        replace(good, arrays={"jvp": good.arrays["jvp"]}),
        replace(good, scalars={"forwards": 10**9}),
        replace(good, scalars={"forwards": True}),
    ]
    assert method.screen([good], state) == {}
    assert all(method.screen([update], state) for update in bad)


def test_the_equal_cost_rule_is_kept() -> None:
    with pytest.raises(ConfigError, match="16 examples cannot be shared equally by 3 queries"):
        options.build(Config, {"queries": 3}, "p-rge")
    assert options.build(Config, {"queries": 16}, "p-rge").batch == 16


def test_more_queries_learn_from_fewer_tokens(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 9 on a tiny model: E = 16, both from the same learning rates, 3 seeds.

    The tokens q = 4 needs for the loss that q = 1 ends with, each at its best rate, are no more than q = 1 took.
    """
    data = dataset(64)
    rates, steps = (1.0, 3.0, 10.0), 160
    for seed in (1, 2, 3):
        curves: dict[int, list[np.ndarray]] = {1: [], 4: []}
        for q in curves:
            for rate in rates:
                ctx = Context(tmp_path, seed=seed)
                settings = config(layers=1, targets="down_proj", queries=q, steps=20, learning_rate=rate)
                state = method.initialise(handle, settings, ctx)
                for _ in range(steps // 20):
                    state = method.aggregate(state, work(handle, state, {"a": data}, settings, ctx), settings, ctx)
                curves[q].append(np.array([y for _, y in ctx.curves["training loss over forwards"]]))
        best = {q: min(found, key=lambda curve: curve[-1]) for q, found in curves.items()}
        reached = int(np.argmax(best[4] <= best[1][-1])) if (best[4] <= best[1][-1]).any() else steps
        assert best[1][-1] < best[1][0] - 0.1, "q = 1 has learnt something to compare with"
        assert reached <= len(best[1]) - 1


def test_the_way_through(handle: ModelHandle, tmp_path: Path) -> None:
    """Rounds, measure, personalise: the adapter on disk reads back as theta."""
    from edgellm_sdk.kit import adapters

    ctx, settings = Context(tmp_path, seed=7), config(steps=5, learning_rate=0.01)
    state = method.initialise(handle, settings, ctx)
    state = method.aggregate(state, work(handle, state, {"a": dataset()}, settings, ctx), settings, ctx)
    metrics = method.measure(state, dataset(8), ctx)
    assert metrics is not None and {"validation loss", "balanced accuracy"} <= metrics.keys()
    tuned = method.personalise(handle, state, tmp_path / "tuned", settings, ctx)
    saved = adapters.arrays(tuned.adapters[0])
    assert all(np.array_equal(saved[name], value) for name, value in method._theta(state.arrays).items())
    assert estimator.shapes_of(method._theta(state.arrays)).keys() <= saved.keys()

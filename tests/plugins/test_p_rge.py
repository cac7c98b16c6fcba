"""P-RGE: the checks that tell a faithful implementation from a toy. What every seed method shows is not repeated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.clients import minibatch
from edgellm_plugins.zeroth_order.mezo import Config as Mezo
from edgellm_plugins.zeroth_order.mezo import method as mezo_method
from edgellm_plugins.zeroth_order.p_rge import Config, method
from edgellm_plugins.zeroth_order.space import Small
from edgellm_plugins.zeroth_order.trajectory import Log, seeds_of
from seed_method_cases import live_bytes

from edgellm_sdk import config as options
from edgellm_sdk import models, random
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import adapters, noise, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.types import Array, Arrays, Dataset, Example, ModelHandle, State

ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # rectangular ones among them: 64 -> 32 and 64 -> 128
METHOD = method.METHOD


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
    return Config(
        **{"layers": 0, "targets": ALL, "rank": 4, "alpha": 8.0, "precision": "float32", "step": 0.01, **changes}
    )


def small(handle: ModelHandle, config: Config, ctx: Context) -> Small:
    """The live set of tensors, at theta_0 unless a run has moved it."""
    found = METHOD.follower(handle, config, ctx).space
    assert isinstance(found, Small)
    return found


def round_of(
    handle: ModelHandle, state: State, shards: Mapping[str, Dataset], config: Config, ctx: Context
) -> tuple[State, list[Array]]:
    """The next state, and the scalars that each client sent."""
    given = METHOD.assign(state, sorted(shards), config)
    updates = [METHOD.finetune(handle, shards[c], given[c], config, ctx) for c in sorted(shards)]
    assert METHOD.screen(updates, state, config) == {}
    return METHOD.aggregate(state, updates, config, ctx), [update.arrays["scalar"] for update in updates]


def trained(
    handle: ModelHandle, config: Config, folder: Path, data: Dataset, rounds: int = 1
) -> tuple[dict[str, Array], list[Array], State]:
    """theta after `rounds` rounds of one client, what it sent, and the state."""
    ctx, sent = Context(folder, seed=7, rounds=rounds), []
    state = METHOD.initialise(handle, config, ctx)
    for _ in range(rounds):
        state, scalars = round_of(handle, state, {"a": data}, config, ctx)
        sent += scalars
    live = METHOD.follower(handle, config, ctx)
    live.goto(METHOD.moves(state.arrays, state.scalars, config), come_back=False)
    return {n: v.copy() for n, v in small(handle, config, ctx).theta.items()}, sent, state


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(candidates in the call, tokens through the model) of every call from now on."""
    calls: list[tuple[int, int]] = []
    original = Frozen.logits

    def spy(self: Frozen, kept: Any, probes: int = 1) -> torch.Tensor:
        calls.append((probes, probes * math.prod(kept.hidden.shape[:2])))
        return original(self, kept, probes)

    monkeypatch.setattr(Frozen, "logits", spy)
    return calls


class Watched:
    """A space that notes the points it is asked for, and answers with another space's losses."""

    def __init__(self, inner: Small) -> None:
        self.inner, self.seen, self.found = inner, [], []  # type: ignore[var-annotated]

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[tuple[int, float]]) -> Array:
        self.seen.append((name, [str(e.prompt) for e in make().examples], list(points)))
        self.found.append(self.inner.losses(name, make, points))
        return self.found[-1]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


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
    """Sheet checks 1 and 8: g, theta after 50 steps to 1e-5, rectangular layers included."""
    data = dataset()
    shared, one = (
        trained(handle, config(loops=way, steps=50, probes=3, batch_size=6, learning_rate=1e-3), tmp_path, data)
        for way in (loops, "none")
    )
    eps = 0.01
    assert np.abs(shared[1][0] - one[1][0]).max() * 3 * 2 * eps <= 2e-5, "each of the two losses to 1e-5"
    assert max(np.abs(shared[0][name] - one[0][name]).max() for name in one[0]) <= 1e-5
    assert max(np.abs(value).max() for value in one[0].values()) > 1e-3, "theta has moved"


def test_the_2q_losses_of_one_call_are_those_of_each_adapter_alone(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 1 away from theta = 0, where + and - and the queries differ; group-major pairing would show here."""
    found, points = [], []
    for loops in ("both", "outer", "none"):
        settings, ctx = config(loops=loops, probes=4, step=0.2), Context(tmp_path, seed=7)
        space = small(handle, settings, ctx)
        for name, value in space.theta.items():
            value[:] = random.normal(random.key(3, name), value.size).reshape(value.shape)
        watched: Any = Watched(space)
        method.estimate(settings)(watched, "a", dataset, [11, 12, 13, 14])
        found.append(watched.found[0])
        points.append(watched.seen[0][2])
    assert points[0] == points[1] == points[2] == [(s, c) for c in (0.2, -0.2) for s in (11, 12, 13, 14)]
    assert max(np.abs(values - found[2]).max() for values in found[:2]) <= 1e-5
    assert np.diff(np.sort(found[2])).min() > 5e-5, "the eight candidates differ by more than the tolerance"


def test_one_query_is_mezo_on_lora_fa(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 2: q = 1 against MeZO written plainly on merged weights, same seeds, to 1e-6 per step."""
    settings = config(probes=1, batch_size=4, steps=1, learning_rate=1e-3)
    data, ctx = dataset(), Context(tmp_path, seed=7, rounds=5)
    state = METHOD.initialise(handle, settings, ctx)
    live: Any = small(handle, settings, ctx).objective
    loaded = handle.load(dtype="float32")
    loaded.model.double()
    start = {
        n.rpartition(".")[0]: loaded.model.get_submodule(n.rpartition(".")[0]).weight.clone()
        for n in live.trainables.initial
    }
    theta = {n: v.copy() for n, v in live.initial.items()}
    scale = settings.alpha / settings.rank
    for round in range(1, 6):
        _, indices = minibatch(data, "a", round - 1, 4, ctx)
        rows = prompts.encode(loaded.tokenizer, data.select(indices).examples, 128)
        (seed,) = seeds_of("a", round, 0, 1, ctx)
        z = {n: noise.take("gaussian", seed, n, v.size).reshape(v.shape) for n, v in theta.items()}
        high, low = (
            merged_loss(
                loaded.model, start, live.trainables.frozen, {n: v + sign * 0.01 * z[n] for n, v in theta.items()},
                scale, rows,
            )
            for sign in (1, -1)
        )  # fmt: skip
        wanted = {n: v - 1e-3 * (high - low) / 0.02 * z[n] for n, v in theta.items()}
        state, _ = round_of(handle, state, {"a": data}, settings, ctx)
        METHOD.follower(handle, settings, ctx).goto(METHOD.moves(state.arrays, {}, settings), come_back=False)
        got = small(handle, settings, ctx).theta
        assert max(np.abs(got[name] - wanted[name]).max() for name in wanted) <= 1e-6
        assert max(np.abs(got[name] - theta[name]).max() for name in wanted) > 1e-4
        theta = {n: v.copy() for n, v in got.items()}


def test_without_loops_or_split_it_is_n_spsa(handle: ModelHandle, tmp_path: Path) -> None:
    """The same log as MeZO's n-SPSA on minibatches of E / q, to the rounding of a shared call."""
    data, shared = dataset(), {"layers": 1, "rank": 4, "precision": "float32", "step": 0.01, "learning_rate": 1e-3}
    _, (ours,), _ = trained(handle, Config(**shared, probes=4, batch_size=16, steps=6), tmp_path, data)
    mezo = Mezo(**shared, probes=4, batch_size=4, steps=6)
    ctx = Context(tmp_path, seed=7)
    state = mezo_method.METHOD.initialise(handle, mezo, ctx)
    update = mezo_method.METHOD.finetune(handle, data, mezo_method.METHOD.assign(state, ["a"], mezo)["a"], mezo, ctx)
    np.testing.assert_allclose(ours, update.arrays["scalar"], atol=1e-3 * float(np.abs(ours).max()))


def test_variance_falls_as_one_over_q(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 5: over 500 seeds, the variance of mean_k(g_k z_k) times q is constant within 15 %."""
    found = {}
    for q in (1, 2, 4, 8):
        settings = config(layers=1, targets="down_proj", probes=q, batch_size=8 * q)  # B_e fixed here
        space = small(handle, settings, Context(tmp_path, seed=7))
        estimates = []
        for draw in range(500):
            seeds = [10_000 * q + draw * q + k for k in range(q)]
            probe = method.estimate(settings)(space, "a", lambda: dataset(8), seeds)
            z = [np.concatenate([space.sampler.draw(n, v, s).ravel() for n, v in space.theta.items()]) for s in seeds]
            estimates.append(probe.scalars @ np.array(z))
        found[q] = float(np.var(estimates, axis=0).sum())
    for q in (2, 4, 8):
        assert found[q] * q == pytest.approx(found[1], rel=0.15), found


def test_the_estimate_agrees_with_the_gradient(handle: ModelHandle, tmp_path: Path) -> None:
    """Averaged over 4000 queries, the estimate's error is the known sqrt((d + 1) / n) of its norm."""
    settings = config(layers=1, targets="down_proj", rank=1, alpha=2.0, probes=32, batch_size=256)
    space = small(handle, settings, Context(tmp_path, seed=7))
    ((name, theta),) = space.theta.items()
    n, total = 4000, np.zeros(theta.size)
    for k in range(n // 32):
        seeds = list(range(32 * k, 32 * k + 32))
        probe = method.estimate(settings)(space, "a", lambda: dataset(8), seeds)
        z = np.array([space.sampler.draw(name, theta, seed).ravel() for seed in seeds])
        total += probe.scalars.astype(np.float64) @ z * 32 / n
    exact = np.zeros(theta.size)
    for place in range(theta.size):  # every partial derivative, by central differences in each coordinate
        unit = np.zeros(theta.size, np.float32)
        unit[place] = 1
        directions = [{name: unit.reshape(theta.shape)}] * 2
        plus, minus = space.objective.evaluate("a", lambda: dataset(8), space.theta, directions, [0.01, -0.01])
        exact[place] = (plus - minus) / 0.02
    error = np.linalg.norm(total - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(math.sqrt((theta.size + 1) / n), rel=0.35)


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
            settings = config(probes=q, batch_size=16, steps=1, loops=loops, split=split)
            *_, state = trained(handle, settings, tmp_path, same)
            assert state.scalars["forwards"] == 2
            tokens[q, loops] = sum(n for _, n in calls)
            expected = candidates if not split else min(candidates, 2)
            assert all(probes == expected for probes, _ in calls) and len(calls) == 2 * q // expected
    assert len(set(tokens.values())) == 1


@pytest.mark.parametrize("examples, expected", [(8, [2, 2, 2, 2]), (3, [1, 1, 1, 1]), (6, [2, 2, 1, 1])])
def test_split_gives_each_query_its_own_examples(
    handle: ModelHandle, tmp_path: Path, examples: int, expected: list[int]
) -> None:
    data = dataset(examples)
    settings = config(probes=4, batch_size=8, split=True)
    space = small(handle, settings, Context(tmp_path, seed=7))
    watched: Any = Watched(space)
    probe = method.estimate(settings)(watched, "b", lambda: data, [1, 2, 3, 4])
    assert [len(batch) for _, batch, _ in watched.seen] == expected
    assert {text for _, batch, _ in watched.seen for text in batch} == {str(e.prompt) for e in data.examples}
    for k, seed in enumerate((1, 2, 3, 4)):
        batch = data.select([i for i, e in enumerate(data.examples) if str(e.prompt) in watched.seen[k][1]])
        plus, minus = space.losses(f"alone {k}", lambda batch=batch: batch, [(seed, 0.01), (seed, -0.01)])
        assert 4 * probe.scalars[k] == pytest.approx((plus - minus) / 0.02, rel=1e-3, abs=1e-4)


def test_the_base_is_untouched_and_no_gradient_exists(
    handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sheet check 7: every tensor of the frozen model has the same bits after training."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    ctx, settings = Context(tmp_path, seed=7), config(steps=5)
    state = METHOD.initialise(handle, settings, ctx)
    live: Any = small(handle, settings, ctx).objective
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    round_of(handle, state, {"a": dataset()}, settings, ctx)
    after = live.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in live.model.parameters()) and len(before) > 10


def test_a_candidate_costs_its_b_and_one_activation(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 7: against inference on the same rows, 2q candidates allocate at most 2q B's and one activation."""
    settings = config(probes=8, batch_size=16)
    space = small(handle, settings, Context(tmp_path, seed=7))
    live: Any = space.objective
    data, trained_bytes = dataset(2), sum(v.nbytes for v in space.theta.values())
    kept = live.batch("rows", lambda: data)
    wide = live.batch("tiled", lambda: data.select([0, 1] * 16))
    live.trainables.set_one(space.theta)

    plain = live_bytes(lambda: live.logits(wide))
    z = [{n: space.sampler.draw(n, v, seed) for n, v in space.theta.items()} for seed in range(8)]
    theta = space.theta

    def candidates() -> object:
        return live.evaluate("rows", lambda: data, theta, [*z, *z], [0.01] * 8 + [-0.01] * 8)

    activation = 16 * 2 * kept.hidden.shape[1] * 128 * 4  # the FFN's width, the widest there is
    tiled_input = 16 * kept.nbytes
    assert live_bytes(candidates) <= plain + 16 * trained_bytes + activation + tiled_input


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_serves_as_well(tiny_llama: Path, handle: ModelHandle, tmp_path: Path, bits: int) -> None:
    """Sheet check 7: over a block-quantised model the loss falls and the base's bytes stay."""
    from edgellm_sdk import compress, store

    text = tmp_path / "text.txt"
    text.write_text("win a prize now call this number see you at dinner mum is home " * 50)
    asked = {"format": f"q{bits}_0", "calibration_text": str(text), "calibration_length": 32}
    compress("gptq", str(tiny_llama), output=tmp_path / "small", options=asked)
    base = models.resolve(str(tmp_path / "small"))
    assert base.dtype == f"q{bits}_0"
    files = {path: store.digest_file(path) for path in base.path.rglob("*.safetensors")}
    settings = Config(layers=1, rank=4, precision="float32", probes=4, batch_size=16, steps=30, learning_rate=3.0)
    ctx, data = Context(tmp_path / "run", seed=7, rounds=4), dataset(32)
    state = METHOD.initialise(base, settings, ctx)
    before = METHOD.measure(state, data, settings, ctx)
    for _ in range(4):
        state, _ = round_of(base, state, {"a": data}, settings, ctx)
    after = METHOD.measure(state, data, settings, ctx)
    assert before is not None and after is not None
    assert after["validation loss"].value < before["validation loss"].value - 0.2
    assert {path: store.digest_file(path) for path in base.path.rglob("*.safetensors")} == files


def test_a_and_the_input_projection_are_shared(handle: ModelHandle, tmp_path: Path) -> None:
    """LoRA-FA: however many candidates are installed, A is one matrix and X A^T allocates only its result."""
    ctx, settings = Context(tmp_path, seed=7), config(probes=8, batch_size=16, steps=1)
    state = METHOD.initialise(handle, settings, ctx)
    round_of(handle, state, {"a": dataset()}, settings, ctx)
    live: Any = small(handle, settings, ctx).objective
    places = live.trainables._places
    assert all(probed.slots["lora_A"].shape[0] == 1 for probed, _ in places.values())
    assert all(probed.slots["lora_B"].shape[0] == 16 for probed, _ in places.values())
    a, x = places["model.layers.0.mlp.down_proj.lora_A"][0].slots["lora_A"], torch.randn(16, 40, 128)
    with torch.profiler.profile(profile_memory=True) as profile:
        x @ a.mT
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) <= 16 * 40 * 4 * 4


def test_several_clients_are_the_weighted_mean_of_their_models(handle: ModelHandle, tmp_path: Path) -> None:
    """FedAvg of what each client would have reached alone, weighted 24 : 8 : 5; 4 bytes up for each query."""
    settings = config(steps=4, learning_rate=0.02)
    shards = {"a": dataset(24), "b": dataset(8), "c": dataset(5)}
    ctx = Context(tmp_path, seed=7, rounds=1)
    state = METHOD.initialise(handle, settings, ctx)
    new, sent = round_of(handle, state, shards, settings, ctx)
    assert all(scalars.shape == (4, 4) and scalars.dtype == np.float32 for scalars in sent)
    mean: dict[str, Any] = {}
    for client, data in shards.items():
        alone = Context(tmp_path / client, seed=7, rounds=1)
        alone_state = METHOD.initialise(handle, settings, alone)
        theta = theta_of(handle, round_of(handle, alone_state, {client: data}, settings, alone)[0], settings, alone)
        for name, value in theta.items():
            mean[name] = mean.get(name, 0) + value.astype(np.float64) * len(data) / 37
    for name, value in theta_of(handle, new, settings, ctx).items():
        np.testing.assert_allclose(value, mean[name], rtol=0, atol=1e-6)
        assert np.abs(value).max() > 1e-4


def theta_of(handle: ModelHandle, state: State, config: Config, ctx: Context) -> Arrays:
    METHOD.follower(handle, config, ctx).goto(METHOD.moves(state.arrays, {}, config), come_back=False)
    return {n: v.copy() for n, v in small(handle, config, ctx).theta.items()}


def test_the_equal_cost_rule_is_kept() -> None:
    with pytest.raises(ConfigError, match="16 examples cannot be shared equally by 3 queries"):
        options.build(Config, {"probes": 3}, "p-rge")
    assert options.build(Config, {"probes": 16}, "p-rge").batch_size == 16
    with pytest.raises(ConfigError, match="train"):
        options.build(Config, {"train": "full"}, "p-rge")


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
                ctx = Context(tmp_path, seed=seed, rounds=steps // 20)
                settings = config(layers=1, targets="down_proj", probes=q, steps=20, learning_rate=rate)
                state = METHOD.initialise(handle, settings, ctx)
                for _ in range(steps // 20):
                    state, _ = round_of(handle, state, {"a": data}, settings, ctx)
                curves[q].append(np.array([y for _, y in ctx.curves["training loss over forwards"]]))
        best = {q: min(found, key=lambda curve: curve[-1]) for q, found in curves.items()}
        reached = int(np.argmax(best[4] <= best[1][-1])) if (best[4] <= best[1][-1]).any() else steps
        assert best[1][-1] < best[1][0] - 0.1, "q = 1 has learnt something to compare with"
        assert reached <= len(best[1]) - 1


def test_the_way_through(handle: ModelHandle, tmp_path: Path) -> None:
    """Rounds, measure, personalise: the adapter on disk reads back as theta, and the log has q entries a step."""
    ctx, settings = Context(tmp_path, seed=7), config(steps=5, learning_rate=0.01)
    state = METHOD.initialise(handle, settings, ctx)
    state, _ = round_of(handle, state, {"a": dataset()}, settings, ctx)
    metrics = METHOD.measure(state, dataset(8), settings, ctx)
    assert metrics is not None and {"validation loss", "balanced accuracy"} <= metrics.keys()
    tuned = METHOD.personalise(handle, state, tmp_path / "tuned", settings, ctx)
    saved = adapters.arrays(tuned.adapters[0])
    theta = theta_of(handle, state, settings, ctx)
    assert all(np.array_equal(saved[name], value) for name, value in theta.items())
    assert estimator.shapes_of(theta).keys() <= saved.keys()
    assert [len(Log.of(state.arrays).group(t)[0]) for t in range(5)] == [4] * 5

"""GRZO: a direction for each example, evaluated in one batch, summed and replayed to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.grzo import Config, method
from edgellm_plugins.zeroth_order.per_example import PerExample, example_seeds
from edgellm_plugins.zeroth_order.space import Follower, Full, Small
from edgellm_plugins.zeroth_order.trajectory import Log, move

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import adapters, noise, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.objective import evaluate_each
from edgellm_sdk.kit.scoring import AnswerKey, Goal
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, ModelHandle, State

ANSWERS = ("spam", "ham", "not spam at all, mum", "a call")  # of different lengths


def dataset(n: int = 16, answers: tuple[str, ...] = ("spam", "ham")) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(
            ({"role": "user", "content": f"{words[i % 4]} {i}"},), answers[i % len(answers)], answers[i % len(answers)]
        )
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}-{len(answers)}", "toy", tuple(sorted(set(answers))))


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def options(**changes: Any) -> Config:
    settings: dict[str, Any] = {"layers": 1, "rank": 4, "steps": 3, "batch_size": 4, "precision": "float32"}
    return Config(**settings | {"step": 0.01} | changes)


def context(folder: Path, config: Config, rounds: int = 4) -> Context:
    return Context(folder, seed=7, rounds=rounds, configs={"grzo": config})


def one_round(handle: ModelHandle, state: State, shards: dict[str, Dataset], config: Config, ctx: Context) -> State:
    given = method.METHOD.assign(state, sorted(shards), config)
    updates = [method.METHOD.finetune(handle, shards[c], given[c], config, ctx) for c in sorted(shards)]
    assert method.METHOD.screen(updates, state, config) == {}
    return method.METHOD.aggregate(state, updates, config, ctx)


def no_data() -> Dataset:
    raise AssertionError("not needed")


# --- the directions


def test_each_direction_is_gaussian_and_those_of_a_batch_are_uncorrelated() -> None:
    sampler = PerExample({"w": (64, 48), "g": (64,)})
    theta = {"w": np.zeros((64, 48), np.float32), "g": np.zeros(64, np.float32)}
    drawn = []
    for base in range(40):
        z = [sampler.draw("w", theta["w"], seed) for seed in example_seeds((base + 1) << 20, 8)]
        assert all(np.array_equal(np.abs(z[0]), np.abs(other)) for other in z)
        assert len({other.tobytes() for other in z}) == 8
        drawn.append(np.stack(z).reshape(8, -1).astype(np.float64))
        u, v = (sampler.draw("g", theta["g"], seed) for seed in example_seeds(base << 20, 2))
        assert np.array_equal(np.abs(u), np.abs(v)) and not np.array_equal(u, v)
    for i in range(8):
        one = np.sort(np.concatenate([z[i] for z in drawn]))
        normal = np.sort(np.random.default_rng(i).normal(size=one.size))
        assert abs(one.mean()) < 0.02 and one.std() == pytest.approx(1, abs=0.01)
        assert np.abs(one - normal)[100:-100].max() < 0.15  # quantile by quantile
    products = np.mean([z @ z.T / z.shape[1] for z in drawn], axis=0)
    assert np.abs(products - np.eye(8)).max() < 0.02


def test_the_estimate_without_normalisation_is_the_gradient() -> None:
    """A 30 x 40 matrix, B = 16, linear losses: the variance is near that of independent directions, (d + 1) / B."""
    rows, columns, size, draws = 30, 40, 16, 400
    rng, d = np.random.default_rng(0), 30 * 40
    slopes = rng.normal(size=(size, d)) / 10 + rng.normal(size=d)
    v = slopes.mean(0)
    sampler = PerExample({"w": (rows, columns)})
    theta, total, errors = np.zeros((rows, columns), np.float32), np.zeros(d), []
    for k in range(draws):
        z = np.stack([sampler.draw("w", theta, seed).ravel() for seed in example_seeds(k << 20, size)]).astype(float)
        g = (z * (z * slopes).sum(1)[:, None]).mean(0)  # d_i / (2 eps) of a linear loss is exact
        total += g
        errors.append(float(((g - v) ** 2).sum() / (v**2).sum()))
    assert np.mean(errors) == pytest.approx((d + 1) / size, rel=0.1)
    assert np.linalg.norm(total / draws - v) / np.linalg.norm(v) == pytest.approx(
        (np.mean(errors) / draws) ** 0.5, rel=0.1
    )


def test_a_move_is_the_sum_of_its_directions_in_the_same_bits_everywhere() -> None:
    """Against numpy, one direction after the other in another order, for several bases; and with two threads."""
    shapes = {"w": (700, 500), "g": (300,), "wide": (3, 300_000)}
    seeds = [*example_seeds(5 << 20, 6), *example_seeds(9 << 20, 3)]
    a = np.random.default_rng(0).normal(size=9).astype(np.float32) * 10.0 ** np.arange(-4, 5) / 7
    sampler, results = PerExample(shapes), []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            theta = {n: torch.from_numpy(np.random.default_rng(1).normal(size=s)).float() for n, s in shapes.items()}
            start = {n: t.numpy().copy() for n, t in theta.items()}
            for name, weight in theta.items():
                sampler.move(name, weight, Move(tuple(seeds), tuple(a.tolist()), decay=0.25))
        finally:
            torch.set_num_threads(before)
        results.append(theta)
    for name, shape in shapes.items():
        assert torch.equal(results[0][name], results[1][name])
        parts = []
        for chosen in (range(6), range(6, 9)):
            u = noise.take("gaussian", seeds[chosen[0]], name, int(np.prod(shape))).reshape(shape)
            flips = np.zeros(shape)
            for k in reversed(chosen):  # float64 sums of float32 numbers of like size are exact in any order
                flips += float(np.float32(a[k])) * np.sign(sampler.draw(name, start[name], seeds[k]) * u)
            parts.append(u * flips.astype(np.float32))
        wanted = start[name] * np.float32(0.75) + (parts[0] + parts[1])
        assert np.array_equal(results[0][name].numpy(), wanted), name


# --- evaluations


def biased(handle: ModelHandle, folder: Path) -> ModelHandle:
    """The tiny model with random biases in its attention, where the original has none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(handle.path, folder)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(handle.path, attention_bias=True))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + name.endswith("norm.weight"))
    model.save_pretrained(folder)
    return models.resolve(str(folder))


@pytest.mark.parametrize("kind", ["untied", "tied", "biases"])
def test_the_layer_trick_is_a_model_for_each_example(
    handle: ModelHandle, tiny_llama_tied: Path, tmp_path: Path, kind: str
) -> None:
    """zo_extensions.md check 4: against transformers with W + c z_i written out, for loss, choice and text."""
    chosen = {
        "untied": lambda: handle,
        "tied": lambda: models.resolve(str(tiny_llama_tied)),
        "biases": lambda: biased(handle, tmp_path / "m"),
    }[kind]()
    data, c, seeds = dataset(5, ANSWERS), 0.05, example_seeds(77 << 20, 8)
    whole = Whole(chosen, "float32", max_length=64)
    space = Full(whole, method.sampler(whole.parameters, options(), context(tmp_path, options()), "cpu"))
    before = {name: parameter.clone() for name, parameter in whole.parameters.items()}
    found = space.each("b", lambda: data, seeds, (c, -c))
    batch = prompts.encode(whole.tokenizer, data.examples, 64)
    whole.goal = Goal("f1", 6)
    texts = whole.written(batch, space.sampler.flips(seeds[:5], c))  # type: ignore[attr-defined]
    for i, row in enumerate(batch):
        for k, step in enumerate((c, -c)):
            loaded = chosen.load(dtype="float32").model
            for name, parameter in loaded.named_parameters():
                parameter.data += step * torch.from_numpy(space.sampler.draw(name, parameter.numpy(), seeds[i]))
            logp = loaded(torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
            wanted = np.mean([-float(logp[at - 1, row.tokens[at]]) for at in range(row.start, len(row.tokens))])
            assert found[k, i] == pytest.approx(wanted, abs=1e-5)
            if step > 0:
                tokens = list(row.tokens[: row.start])
                for _ in range(6):
                    tokens.append(int(loaded(torch.tensor([tokens])).logits[0, -1].argmax()))
                text = whole.tokenizer.decode(tokens[row.start :], skip_special_tokens=True)
                assert texts[i] == text or 2 in tokens[row.start :]
    assert np.abs(found[0] - found[1]).min() > 1e-3
    assert all(torch.equal(before[name], parameter) for name, parameter in whole.parameters.items())


@pytest.mark.parametrize(
    ("train", "layers", "targets"),
    [
        ("lora-fa", 1, ("down_proj",)),  # only scored positions run
        ("lora-fa", 1, ("o_proj", "down_proj")),
        ("lora", 2, ("q_proj", "v_proj")),
        ("norm", 0, ()),
        ("layers", 1, ()),
        ("adapter", 1, ()),
    ],
)
def test_small_sets_give_each_example_its_own_candidate(
    handle: ModelHandle, train: str, layers: int, targets: tuple[str, ...]
) -> None:
    """Answers of different lengths, so examples have different numbers of scored positions."""
    spec = adapters.Spec(train, layers, 4, 8.0, targets)
    for goal in (Goal(), Goal("accuracy"), Goal("rouge", 6)):
        live = Frozen(handle, spec, Stream(0, "a"), "float32", goal=goal)
        data, rng = dataset(5, ANSWERS if goal.name != "accuracy" else ("spam", "ham")), np.random.default_rng(0)
        vs = [{n: rng.normal(size=a.shape).astype(np.float32) for n, a in live.initial.items()} for _ in range(7)]
        found = live.evaluate_each("b", lambda data=data: data, live.initial, vs, [0.3, -0.3, 0.1])  # type: ignore[misc]
        assert found.shape == (3, 5)
        for i in range(5):
            one = data.select([i])
            alone = live.evaluate(f"b{i}", lambda one=one: one, live.initial, [vs[i]] * 3, [0.3, -0.3, 0.1])  # type: ignore[misc]
            np.testing.assert_allclose(found[:, i], alone, atol=1e-5)
        if goal.name == "loss":

            class Plain:
                """A backend that only knows batches."""

                evaluate = staticmethod(live.evaluate)

            slowly: Any = Plain()
            again = evaluate_each(slowly, "c", lambda data=data: data, live.initial, vs, [0.3, -0.3, 0.1])  # type: ignore[misc]
            np.testing.assert_allclose(found, again, atol=1e-5)
            assert np.ptp(found) > 0.1


@pytest.mark.parametrize("train", ["full", "lora-fa"])
def test_a_direction_for_each_example_at_two_forwards(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    """zo_extensions.md check 4, and a minibatch with fewer examples than directions."""
    config = options(train=train, batch_size=8)
    space = method.METHOD.space(handle, config, context(tmp_path, config))
    calls = []
    counted: Any = space.whole if isinstance(space, Full) else space.objective  # type: ignore[attr-defined]
    name = "_hidden" if train == "full" else "_logits"
    inner = getattr(counted, name)
    setattr(counted, name, lambda *given, **named: (calls.append(given), inner(*given, **named))[1])
    seeds = method.METHOD.directions([123 << 20], config)
    probe = method.estimate(config)(space, "b", lambda: dataset(8), seeds)
    assert probe.forwards == 2 and np.count_nonzero(probe.scalars) == 8
    if train == "full":
        assert len(calls) == 2
    else:
        assert sum(given[1] for given in calls) == 2  # copies of the batch
    assert np.std(probe.scalars.astype(float) * 8, ddof=1) == pytest.approx(1, rel=1e-4)
    short = method.estimate(config)(space, "c", lambda: dataset(5), seeds)
    assert np.count_nonzero(short.scalars[:5]) == 5 and not short.scalars[5:].any()
    single = method.estimate(config)(space, "d", lambda: dataset(1), seeds)
    assert not single.scalars.any() and single.dropped == 0
    two = method.METHOD.directions([123 << 20, 456 << 20], config)
    assert len(set(two)) == 16
    both = method.estimate(config)(space, "b", lambda: dataset(8), two)
    np.testing.assert_allclose(both.scalars[:8], probe.scalars / 2, rtol=1e-6)
    assert both.forwards == 4


class Given:
    """A space whose losses are given."""

    def __init__(self, plus: list[float], minus: list[float]) -> None:
        self.pair, self.sampler = np.array([plus, minus]), None

    def each(self, *rest: Any) -> np.ndarray:
        return self.pair

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return no_data


def test_equal_differences_move_nothing_and_bad_ones_are_dropped() -> None:
    estimate = partial(differences.per_example(0.1), name="b", make=no_data, seeds=example_seeds(1 << 20, 4))
    worked = estimate(Given([1.0, 2.0, 4.0, 1.0], [1.0, 1.0, 1.0, 1.0]))  # type: ignore[arg-type]
    d = np.array([0.0, 1.0, 3.0, 0.0])
    np.testing.assert_allclose(worked.scalars, d / (np.sqrt(2.0) + 1e-8) / 4, rtol=1e-6)
    assert worked.loss == 1.5
    still = estimate(Given([2.0] * 4, [1.0] * 4))  # type: ignore[arg-type]
    assert not still.scalars.any() and still.dropped == 0
    broken = estimate(Given([1.0, np.nan, 4.0, 2.0], [1.0, 1.0, 1.0, np.inf]))  # type: ignore[arg-type]
    np.testing.assert_allclose(broken.scalars, [0, 0, 3 / (3 / np.sqrt(2)) / 2, 0], rtol=1e-6)
    assert broken.dropped == 2


def test_a_module_of_another_kind_is_refused(handle: ModelHandle) -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

    whole = Whole(handle, "float32", max_length=64)
    sampler = PerExample(whole.shapes)
    batch = prompts.encode(whole.tokenizer, dataset(3).examples, 64)
    whole.model.model.layers[0].mlp.gate = Strange()
    with pytest.raises(ModelError, match="Strange cannot be perturbed row by row"):
        whole.evaluate_each(batch, AnswerKey(), sampler.flips(example_seeds(0, 3), 0.1))
    del whole.model.model.layers[0].mlp.gate
    mlp = whole.model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x.flatten(0, 1)).view(x.shape)  # as experts see tokens, without their examples
    with pytest.raises(ModelError, match="rows reach a layer where 3 are in the batch"):
        whole.evaluate_each(batch, AnswerKey(), sampler.flips(example_seeds(0, 3), 0.1))
    del mlp.forward
    assert np.isfinite(whole.evaluate_each(batch, AnswerKey(), None)).all()


# --- runs


@pytest.mark.parametrize("train", ["full", "lora-fa"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"rule": "momentum", "window": 4}, {"share": 0.5, "probes": 2}])
def test_the_log_rebuilds_theta_bit_for_bit(
    handle: ModelHandle, tmp_path: Path, train: str, precision: str, changes: dict[str, Any]
) -> None:
    """zo_extensions.md check 1, by one thread and by two."""
    config = options(train=train, precision=precision, learning_rate=0.01, **changes)
    ctx = context(tmp_path, config)
    state = method.METHOD.initialise(handle, config, ctx)
    start = method.METHOD.follower(handle, config, ctx).space.digest()
    for _ in range(2):
        state = one_round(handle, state, {"a": dataset(10)}, config, ctx)  # the third minibatch is short
    here = method.METHOD.follower(handle, config, ctx).space.digest()
    assert here != start

    def replayed(log: Log, threads: int) -> str:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            follower = Follower(method.METHOD.space(handle, config, context(tmp_path, config)))
            follower.goto([move(log, t, config) for t in range(len(log))], come_back=False)
            return follower.space.digest()
        finally:
            torch.set_num_threads(before)

    log = Log.of(state.arrays)
    assert replayed(log, 1) == replayed(log, 2) == here
    log.seeds[0] ^= 1
    assert replayed(log, 1) != here


def test_a_backend_that_only_infers_is_asked_for_one_example_at_a_time(handle: ModelHandle, tmp_path: Path) -> None:
    """llama.cpp on the same weights, against torch's one call."""
    pytest.importorskip("llama_cpp")
    from edgellm_hardware import llama_cpp
    from edgellm_plugins.export import gguf

    path, config = tmp_path / "tiny.gguf", options()
    gguf.edgellm_export(handle, path, gguf.Config(type="f32", modelfile=False), Context(tmp_path, threads=1))
    file = dataclasses.replace(models.resolve(str(path)), path=path, format="gguf")
    found = []
    for device, model in (("llama_cpp", file), ("cpu", handle)):
        settings = {"grzo": config, "llama_cpp": llama_cpp.Config(threads=1)}
        space = method.METHOD.space(
            model, config, Context(tmp_path, seed=7, device=device, threads=1, configs=settings)
        )
        seeds = method.METHOD.directions([1 << 40], config)
        found.append(method.estimate(config)(space, "b", lambda: dataset(4), seeds))
    np.testing.assert_allclose(found[0].scalars, found[1].scalars, atol=2e-3)
    assert np.count_nonzero(found[0].scalars) == 4 and found[0].forwards == 2


def test_several_clients_are_one_group_of_the_log(handle: ModelHandle, tmp_path: Path) -> None:
    config = options(learning_rate=0.05)
    ctx = context(tmp_path, config)
    state = method.METHOD.initialise(handle, config, ctx)
    state = one_round(handle, state, {"a": dataset(12), "b": dataset(4)}, config, ctx)
    log = Log.of(state.arrays)
    assert len(log) == 1 and len(log.seeds) == 2 * 3 * 4


@pytest.mark.parametrize("train", ["full", "lora-fa"])
def test_a_model_learns(handle: ModelHandle, tmp_path: Path, train: str) -> None:
    rates = {"full": 1e-3, "lora-fa": 0.05}
    config = options(train=train, steps=60, batch_size=16, learning_rate=rates[train], targets="down_proj,o_proj")
    ctx = context(tmp_path, config, rounds=1)
    state = method.METHOD.initialise(handle, config, ctx)
    space = method.METHOD.follower(handle, config, ctx).space
    assert isinstance(space, Full if train == "full" else Small)
    before = space.measure(dataset())["validation loss"].value
    one_round(handle, state, {"a": dataset()}, config, ctx)
    assert space.measure(dataset())["validation loss"].value < before - 0.1

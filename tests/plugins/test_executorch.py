"""ExecuTorch: a training program that is what P-RGE says, step for step, in the runtime a phone would use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

if importlib.util.find_spec("executorch") is None:
    pytest.skip("executorch is not installed", allow_module_level=True)

from edgellm_hardware.executorch import Config, edgellm_probe, method
from edgellm_hardware.executorch.evaluator import Evaluator
from edgellm_hardware.executorch.llama import Llama, layout_of
from edgellm_hardware.executorch.program import Shape, Step, lower
from edgellm_hardware.executorch.trainer import Program, Trainer, batch_inputs, train

from edgellm_sdk import models, random
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import adapters, loading, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.types import Dataset, Example, ModelHandle

Q, B, T, N, EPS = 2, 3, 32, 12, 0.02
SMALL = {"queries": Q, "batch": B, "tokens": T, "labels": N, "rank": 4, "alpha": 8.0}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


@pytest.fixture(scope="module")
def made(handle: ModelHandle, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Exported programs by noise and backend, each lowered once."""
    folder = tmp_path_factory.mktemp("pte")

    def make(noise: str, backend: str = "xnnpack") -> Path:
        path = folder / f"{noise}-{backend}.pte"
        if not path.exists():
            config = Config(**{**SMALL, "noise": noise, "backend": backend})  # type: ignore[arg-type]
            method.export(handle, path, config, Context(folder, seed=3))
        return path

    return make


def module(handle: ModelHandle) -> tuple[Any, adapters.Trainables, Llama]:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spec = adapters.Spec("lora-fa", 0, 4, 8.0, targets)
    return method.prepared(handle, spec, T, Context(Path(), seed=3))


def batch(seed: int, count: int = B, length: int = 20, answer: int = 2) -> list[Encoded]:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, 384, length + k).tolist() for k in range(count)]
    return [Encoded(tuple(row), len(row) - answer, k) for k, row in enumerate(rows)]


def dataset(n: int = 12) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [Example(f"{words[i % 4]} {i} ->", (" spam", " ham")[i % 2], ("spam", "ham")[i % 2]) for i in range(n)]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"), (" ham", " spam"))


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_20_exported_steps_equal_20_eager_ones(handle: ModelHandle, made: Made, backend: str) -> None:
    """The same noise in: losses to 1e-5, state to 1e-6 after every step, each side feeding its own g back.

    eta is the largest of the published grid: what two roundings of g differ by reaches the state times eta.
    """
    trainer = Trainer(made("host", backend), 1e-3, EPS, seed=5)
    eager, g = Step(module(handle)[2], trainer.shape, "host"), np.zeros(Q, np.float32)
    for step in range(20):
        rows = batch(step)
        z = torch.from_numpy(trainer.noise(step))
        with torch.no_grad():
            scalars = (torch.from_numpy(g), torch.tensor([1e-3]), torch.tensor([EPS]))
            expected = eager(*batch_inputs(rows, trainer.shape), *scalars, z).numpy()
        losses = trainer.step(rows)
        g = (expected[:Q] - expected[Q:]) / np.float32(2 * EPS)
        assert np.abs(losses - expected).max() <= 1e-5
        assert float((trainer.state - eager.state).abs().max()) <= 1e-6
    assert float((trainer.state[0] + trainer.state[Q]).abs().max()) / 2 > 1e-3, "B has moved"


@pytest.mark.parametrize("noise", ["graph", "host"])
def test_the_recurrence_in_the_graph_is_mezo(made: Made, noise: str) -> None:
    """Against a NumPy replay in float64 over 50 steps, fed with the noise and g that the program saw: below 1e-6.

    For `graph`, the noise is read off the state; its spread and independence show that it is noise.
    """
    eta, trainer = 0.01, Trainer(made(noise), 0.01, EPS, seed=5)
    theta, worst, drawn = np.zeros(trainer.layout.size), 0.0, []
    g = np.zeros(Q)
    z = np.zeros((Q, trainer.layout.size))
    for step in range(50):
        theta = theta - eta * (g[:, None] * z).mean(0)
        trainer.step(batch(step % 4))
        state = trainer.state.numpy().astype(np.float64)
        centres = (state[:Q] + state[Q:]) / 2
        assert np.abs(centres - centres[0]).max() < 1e-6, "all copies share one mean"
        worst = max(worst, float(np.abs(centres[0] - theta).max()))
        seen = (state[:Q] - state[Q:]) / (2 * EPS)
        z = trainer.noise(step).astype(np.float64) if noise == "host" else seen
        assert np.abs(seen - z).max() < 1e-4
        g = trainer.g.astype(np.float64)
        drawn.append(seen)
    assert worst < 1e-6
    final = trainer.layout.pack(trainer.adapter())
    assert np.abs(final - (theta - eta * (g[:, None] * z).mean(0))).max() < 1e-6
    assert np.abs(theta).max() > 1e-2
    values = np.concatenate([row for pair in drawn for row in pair])
    assert abs(values.mean()) < 0.01 and values.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(drawn[0][0], drawn[0][1])[0, 1]) < 0.1


def test_two_graph_programs_draw_different_noise_and_two_host_programs_the_same(made: Made) -> None:
    states = []
    for noise in ("graph", "graph", "host", "host"):
        trainer = Trainer(made(noise), 0.01, EPS, seed=5)
        trainer.step(batch(0))
        states.append(trainer.state.clone())
    assert not torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])


@pytest.mark.parametrize("engine", ["eager", "portable", "xnnpack"])
def test_one_forward_equals_2q_separate_ones(handle: ModelHandle, engine: str) -> None:
    """To 1e-5: each candidate alone through transformers, its LoRA folded into the weights, row by row, unpadded."""
    live, trainables, llama = module(handle)
    shape, rows = Shape(Q, B, T, N), batch(1)
    theta = {n: random.normal(random.key(9, n), 2 * Q * v.size) for n, v in trainables.initial.items()}
    copies = [
        {n: 0.1 * theta[n].reshape(2 * Q, *v.shape)[k] for n, v in trainables.initial.items()} for k in range(2 * Q)
    ]
    tokens, places, targets, weights = batch_inputs(rows, shape)
    stack = torch.from_numpy(np.stack([llama.layout.pack(copy) for copy in copies]))
    if engine == "eager":
        with torch.no_grad():
            nll = llama(tokens, places, targets, stack).numpy()
    else:
        nll = Program(lower(llama, shape, "candidates", engine))((tokens, places, targets, stack))
    found = (nll * weights.numpy()).sum(1) / weights.numpy().sum()
    plain = handle.load(dtype="float32").model
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for k, copy in enumerate(copies):
        total: list[float] = []
        with torch.no_grad():
            for name, value in copy.items():
                path = name.removesuffix(".lora_B")
                product = torch.from_numpy(value) @ torch.from_numpy(trainables.frozen[f"{path}.lora_A"])
                plain.get_submodule(path).weight.copy_(start[f"{path}.weight"] + trainables.spec.scale * product)
            for row in rows:
                scores = plain(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
                total += [-float(scores[p - 1, row.tokens[p]]) for p in range(row.start, len(row.tokens))]
        assert found[k] == pytest.approx(np.mean(total), abs=1e-5)
    assert np.abs(np.diff(np.sort(found))).min() > 1e-4, "the candidates are told apart"
    assert live is not None


@pytest.mark.parametrize("layers", [0, 1])
def test_a_tied_model_is_computed_the_same(tiny_llama_tied: Path, tmp_path: Path, layers: int) -> None:
    """The exporter's own comparison with transformers, on another model, and with one layer trained: 1e-5."""
    config = Config(**{**SMALL, "noise": "host", "layers": layers})  # type: ignore[arg-type]
    artifact = method.export(models.resolve(str(tiny_llama_tied)), tmp_path / "t.pte", config, Context(tmp_path))
    assert artifact.verified["loss difference"] <= 1e-5
    assert [path.suffix for path in artifact.files] == [".pte", ".safetensors"]


def test_the_loss_falls_and_memory_does_not_grow(made: Made) -> None:
    """300 steps on two minibatches: loss down by half a nat, resident memory flat, nothing requires a gradient."""
    rows = [batch(0), batch(1)]
    trainer, losses = train(made("host"), rows, 100, 0.02, EPS, seed=1)
    before = psutil.Process().memory_info().rss
    losses += [float(trainer.step(rows[k % 2]).mean()) for k in range(200)]
    grown = psutil.Process().memory_info().rss - before
    assert np.mean(losses[-20:]) < np.mean(losses[:4]) - 0.5
    assert grown < 4 << 20, f"{grown} bytes more after 200 steps"
    assert not trainer.state.requires_grad


def test_evaluation_changes_nothing_and_sees_the_finished_adapter(handle: ModelHandle, made: Made) -> None:
    for noise in ("graph", "host"):
        trainer, _ = train(made(noise), [batch(0)], 10, 0.02, EPS)
        state, g = trainer.state.clone(), trainer.g.copy()
        found = trainer.evaluate(batch(7))
        assert torch.equal(state, trainer.state) and np.array_equal(g, trainer.g)
        live, trainables, _ = module(handle)
        trainables.set_one(trainer.adapter())
        total: list[float] = []
        with torch.no_grad():
            for row in batch(7):
                scores = live(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
                total += [-float(scores[p - 1, row.tokens[p]]) for p in range(row.start, len(row.tokens))]
        assert found == pytest.approx(np.mean(total), abs=1e-5)


def test_the_finished_adapter_loads_in_peft_and_gives_the_same_logits(
    handle: ModelHandle, made: Made, tmp_path: Path
) -> None:
    from peft import PeftModel

    trainer, _ = train(made("graph"), [batch(0), batch(1)], 30, 0.02, EPS)
    trainer.finalise(tmp_path / "adapter")
    tuned = models.resolve(str(tmp_path / "adapter"))
    assert tuned.adapters and tuned.digest != handle.digest
    live, trainables, _ = module(handle)
    trainables.set_one(trainer.adapter())
    tokens = torch.tensor([batch(3)[0].tokens])
    with torch.no_grad():
        expected = live(tokens).logits
        plain = handle.load(dtype="float32").model
        before = plain(tokens).logits.clone()
        in_peft = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(tokens).logits
        here = tuned.load(dtype="float32").model(tokens).logits
    assert float((in_peft - expected).abs().max()) <= 1e-5 and float((here - expected).abs().max()) <= 1e-5
    assert float((before - expected).abs().max()) > 0.05


def test_reloading_resets_the_state(made: Made) -> None:
    path = made("host")
    first = Trainer(path, 0.01, EPS)
    first.step(batch(0))
    assert float(first.state.abs().max()) > 0
    assert float(Trainer(path, 0.01, EPS).state.abs().max()) == 0


def test_host_noise_is_a_function_of_seed_step_and_query(made: Made) -> None:
    """Direction k of step t is the portable normal (seed, name, t q + k), each B transposed as the state has it."""
    trainer = Trainer(made("host"), 0.01, EPS, seed=77)
    drawn = []
    for step in (0, 3):
        z = trainer.noise(step)
        for k in range(Q):
            for name, value in trainer.layout.unpack(z[k]).items():
                expected = random.normal(random.key(77, name, step * Q + k), value.size)
                assert np.array_equal(value.ravel(), expected)
        drawn += [*z]
    drawn += [*Trainer(made("host"), 0.01, EPS, seed=78).noise(0)]
    correlation = np.corrcoef(np.stack(drawn))
    assert np.abs(correlation - np.eye(len(drawn))).max() < 0.1
    assert np.stack(drawn).std() == pytest.approx(1, abs=0.02)


def test_the_objective_agrees_with_torch_and_trains(handle: ModelHandle, tmp_path: Path) -> None:
    """`--device executorch`: same losses and measures as the torch objective; whole steps of `p-rge` on it."""
    spec = adapters.Spec("lora-fa", 0, 4, 8.0, ("q_proj", "down_proj"))
    ctx = Context(tmp_path, seed=7, device="executorch")
    small = Config(queries=2, batch=3, labels=5)
    ours = Evaluator(handle, spec, 48, small, ctx)
    torch_one = Frozen(handle, spec, ctx.stream("adapter"), "float32", max_length=48)
    theta = {n: 0.05 * random.normal(random.key(1, n), v.size).reshape(v.shape) for n, v in ours.initial.items()}
    vs = [{n: random.normal(random.key(k, n), v.size).reshape(v.shape) for n, v in theta.items()} for k in range(6)]
    steps = [0.1, -0.1, 0.0, 0.2, -0.2, 0.3]
    found, wanted = (o.evaluate("x", lambda: dataset(7), theta, vs, steps) for o in (ours, torch_one))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for name, metric in torch_one.measure(theta, dataset(7)).items():
        assert ours.measure(theta, dataset(7))[name].value == pytest.approx(metric.value, abs=1e-5)

    from edgellm_plugins.zeroth_order.p_rge import Config as PRGE
    from edgellm_plugins.zeroth_order.p_rge.method import METHOD as p_rge

    settings = PRGE(layers=0, rank=4, steps=3, probes=2, batch_size=4, step=0.01, precision="float32", max_length=48)
    ends = []
    for device in ("executorch", "cpu"):
        run = replace(ctx, device=device, _kept={})
        state = p_rge.initialise(handle, settings, run)
        given = p_rge.assign(state, ["a"], settings)["a"]
        state = p_rge.aggregate(state, [p_rge.finetune(handle, dataset(), given, settings, run)], settings, run)
        follower = p_rge.follower(handle, settings, run)
        follower.goto(p_rge.moves(state.arrays, state.scalars, settings), come_back=False)
        ends.append(follower.space.theta)
    assert all(np.abs(ends[0][name] - ends[1][name]).max() < 1e-4 for name in ends[1])
    assert max(np.abs(value).max() for value in ends[0].values()) > 1e-3


def test_what_does_not_fit_is_refused_in_one_line(handle: ModelHandle, made: Made, tmp_path: Path) -> None:
    trainer = Trainer(made("host"), 0.01, EPS)
    for rows, words in (
        (batch(0, count=B + 1), "examples do not fit"),
        (batch(0, length=T + 1), "tokens does not fit"),
        (batch(0, answer=N), "scored tokens do not fit"),
        ([], "examples do not fit"),
    ):
        with pytest.raises(DataError, match=words):
            trainer.step(rows)
    with pytest.raises(ConfigError, match="nothing to write"):
        trainer.finalise(tmp_path / "empty")
    with pytest.raises(ModelError, match="companion"):
        Trainer(tmp_path / "missing.pte", 0.01)
    with pytest.raises(ModelError, match="cannot load"):
        (tmp_path / "broken.pte").write_bytes(b"not a program")
        (tmp_path / "broken.safetensors").write_bytes(made("host").with_suffix(".safetensors").read_bytes())
        Trainer(tmp_path / "broken.pte", 0.01)
    with pytest.raises(ConfigError, match="lora-fa"):
        Evaluator(handle, adapters.Spec("lora"), 32, Config(), Context(tmp_path))
    with pytest.raises(ConfigError, match="rank: is the method's to choose"):
        Evaluator(handle, adapters.Spec("lora-fa"), 32, Config(rank=8), Context(tmp_path))


def test_layout_round_trip() -> None:
    shapes = {"b": (3, 2), "a": (5, 2)}
    values = {n: random.normal(random.key(1, n), s[0] * s[1]).reshape(s) for n, s in shapes.items()}
    layout = layout_of(values)
    again = layout.unpack(layout.pack(values))
    assert layout.size == 16 and all(np.array_equal(values[name], again[name]) for name in values)


def test_the_probe_says_what_is_there() -> None:
    info = edgellm_probe()
    assert info.available and str(info.details["version"])[0].isdigit()


def test_prompts_of_a_real_tokenizer_fit(handle: ModelHandle, made: Made) -> None:
    rows = prompts.encode(loading.load_tokenizer(handle), dataset(B).examples, T)
    assert np.isfinite(Trainer(made("graph"), 0.01, EPS).step(rows)).all()

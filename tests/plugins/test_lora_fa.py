"""LoRA-FA: the checks that tell a faithful implementation from a toy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora import Config as LoraConfig
from edgellm_plugins.training.lora import method as lora
from edgellm_plugins.training.lora_fa import Config, method
from edgellm_plugins.zeroth_order import estimator

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Assignment, Dataset, Example, ModelHandle, State, Update

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dataset(n: int = 12) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def context(tmp_path: Path, config: Config, rounds: int = 10, seed: int = 7) -> Context:
    return Context(tmp_path, seed=seed, rounds=rounds, configs={"lora-fa": config})


def live(ctx: Context) -> Frozen:
    return next(value for _, value in ctx.kept("objective "))  # type: ignore[no-any-return]


def assigned(state: State, client: str = "a") -> Assignment:
    return Assignment(state.base, state.round + 1, client, state.arrays, state.scalars)


def run(handle: ModelHandle, shards: Mapping[str, Dataset], config: Config, ctx: Context, count: int) -> list[State]:
    states = [method.initialise(handle, config, ctx)]
    for _ in range(count):
        state = states[-1]
        updates = [method.finetune(handle, shards[c], assigned(state, c), config, ctx) for c in sorted(shards)]
        assert method.screen(updates, state, ctx) == {}
        states.append(backprop.aggregate(state, updates, ctx))
    return states


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_only_b_moves(handle: ModelHandle, tmp_path: Path, init: str) -> None:
    """Sheet check 1: A is bit-identical after training and in the saved file, only B is trained, sent and stepped."""
    config = Config(rank=4, init=init, steps=3, batch_size=4, precision="float32")
    ctx = context(tmp_path, config)
    start = method.initialise(handle, config, ctx)
    before = {name: a.copy() for name, a in live(ctx).trainables.frozen.items()}
    after = run(handle, {"a": dataset(8)}, config, ctx, 2)[-1]
    frozen = live(ctx).trainables.frozen
    assert all(np.array_equal(before[name], frozen[name]) for name in before) and len(before) == 14
    assert set(start.arrays) == set(after.arrays) == {name.removesuffix("A") + "B" for name in before}
    assert not any(array.any() for array in start.arrays.values())
    assert all(array.any() for array in after.arrays.values())
    rule = backprop.StepRule(backprop.leaves_of(after.arrays), config.optimizer)
    assert {name: m.shape[1:] for name, (m, _) in rule.moments.items()} == {n: a.shape for n, a in after.arrays.items()}
    tuned = method.personalise(handle, after, tmp_path / "model", config, ctx)
    saved = adapters.arrays(tuned.adapters[0])
    assert all(np.array_equal(saved[name], before[name]) for name in before)


def test_trainable_count_of_smollm2() -> None:
    """Sheet check 1: SmolLM2-135M's shapes, rank 16, every linear layer: 2 488 320."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=8, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    sizes = {name: module.out_features for name, module in model.named_modules() if name.endswith(LINEARS)}
    assert 16 * sum(sizes.values()) == 2_488_320
    one = LlamaForCausalLM(LlamaConfig(**{**shape.to_dict(), "num_hidden_layers": 1}))
    spec = adapters.Spec("lora-fa", 0, 16, 32.0, adapters.module_names(Config().targets))
    assert 30 * adapters.install(one, spec, Stream(0, "a")).size == 2_488_320


def test_gaussian_a_has_variance_one_over_rank(handle: ModelHandle, tmp_path: Path) -> None:
    config = Config(rank=16, init="gaussian", precision="float32")
    ctx = context(tmp_path, config)
    method.initialise(handle, config, ctx)
    values = np.concatenate([a.ravel() for a in live(ctx).trainables.frozen.values()])
    assert float(values.var()) == pytest.approx(1 / 16, rel=0.03)
    assert abs(float(values.mean())) < 0.005
    slot = next(m for m in live(ctx).model.modules() if "lora_A" in getattr(m, "slots", {}))
    live(ctx).trainables.set_one(live(ctx).initial)
    assert any(torch.equal(slot.slots["lora_A"][0], torch.from_numpy(a)) for a in live(ctx).trainables.frozen.values())


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (8, 32.0)])
def test_the_corrected_gradient_is_the_projection(rank: int, alpha: float) -> None:
    """Sheet check 2, float64: s g~_B A = G A^T (A A^T)^-1 A within 1e-10; without the correction far from it."""
    torch.manual_seed(0)
    wide, tall, s = 24, 18, alpha / rank
    a = torch.randn(rank, wide, dtype=torch.float64)
    x, y = torch.randn(40, wide, dtype=torch.float64), torch.randn(40, tall, dtype=torch.float64)
    weight = torch.randn(tall, wide, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(tall, rank, dtype=torch.float64, requires_grad=True)
    ((F.linear(x, weight) - y) ** 2).mean().backward()
    ((F.linear(x, weight.detach()) + s * F.linear(F.linear(x, a), b) - y) ** 2).mean().backward()
    assert weight.grad is not None and b.grad is not None
    _, _, rows = torch.linalg.svd(a, full_matrices=False)
    projected = weight.grad @ rows.mT @ rows
    induced = s * (b.grad @ method.inverse_gram(a, s)) @ a
    assert float((induced - projected).norm() / weight.grad.norm()) <= 1e-10
    assert float((s * b.grad @ a - projected).norm() / weight.grad.norm()) > 0.1


def test_correction_reaches_every_b(handle: ModelHandle, tmp_path: Path) -> None:
    """One SGD step with the correction: s dB A is -eta times the projected gradient, by plain autograd on W."""
    config = Config(
        rank=4, alpha=8.0, correction="projection", optimizer="sgd", learning_rate=0.5, warmup=0, clip=0, steps=1,
        batch_size=6, precision="float32",
    )  # fmt: skip
    ctx, data = context(tmp_path, config), dataset(6)
    start, after = run(handle, {"a": data}, config, ctx, 1)
    loaded = handle.load()
    frozen = live(ctx)
    weights = {n: p.requires_grad_() for n, p in loaded.model.named_parameters() if n.endswith("proj.weight")}
    total, count = torch.zeros(()), 0
    for row in prompts.encode(loaded.tokenizer, data.examples, 128):
        logits = loaded.model(torch.tensor([row.tokens])).logits[0, row.start - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(row.tokens[row.start :]), reduction="sum")
        count += len(logits)
    (total / count).backward()
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        a = torch.from_numpy(frozen.trainables.frozen[f"{module}.lora_A"]).double()
        b = torch.from_numpy(after.arrays[f"{module}.lora_B"] - start.arrays[f"{module}.lora_B"]).double()
        _, _, rows = torch.linalg.svd(a, full_matrices=False)
        expected = -0.5 * weight.grad.double() @ rows.mT @ rows  # type: ignore[union-attr]
        assert float((2.0 * b @ a - expected).norm() / expected.norm()) < 1e-4, name


def test_b_has_loras_gradient(handle: ModelHandle) -> None:
    """Sheet check 3: with one A and one B, g_B of LoRA-FA and of LoRA agree to 1e-6."""
    frozen = Frozen(handle, adapters.Spec("lora-fa", 0, 4, 8.0, LINEARS), Stream(0, "a"), "float32")
    both = Frozen(handle, adapters.Spec("lora", 0, 4, 8.0, LINEARS), Stream(0, "a"), "float32")
    stream, data = Stream(1, "theta"), dataset(6)
    b = {name: stream.normal(v.size).reshape(v.shape) * np.float32(0.05) for name, v in frozen.initial.items()}
    one, two = backprop.leaves_of(b), backprop.leaves_of({**b, **frozen.trainables.frozen})
    backprop.exact_slope(frozen, 16)(0, "x", lambda: data, one)
    backprop.exact_slope(both, 16)(0, "x", lambda: data, two)
    for name in b:
        assert one[name].grad is not None and float(one[name].grad.abs().max()) > 0  # type: ignore[union-attr]
        torch.testing.assert_close(one[name].grad, two[name].grad, rtol=1e-6, atol=1e-6)


# Saved activations (sheet checks 4 and 5), in a plain forward without recomputation


@contextmanager
def saved(exempt: set[int]) -> Iterator[dict[int, int]]:
    """Storages that autograd saves, by address, with their bytes; all are held until the end, so addresses differ."""
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in exempt:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def activation_bytes(kind: str, rank: int, targets: tuple[str, ...], dtype: torch.dtype, live_a: bool = False) -> int:
    """The sheet's random 4-layer Llama, batch 2 x 128, vocabulary 1024: bytes saved for one backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(dtype).eval().requires_grad_(False)
    trainables = adapters.install(model, adapters.Spec(kind, 0, rank, 2.0 * rank, targets), Stream(0, "a"))
    trainables.set(backprop.leaves_of(trainables.initial))
    slots = [slots for module in model.modules() if (slots := getattr(module, "slots", None))]
    if live_a:  # frozen through the optimiser only: A would not be stepped, yet asks for its gradient
        for each in slots:
            each["lora_A"] = each["lora_A"].clone().requires_grad_()
    exempt = {p.untyped_storage().data_ptr() for p in model.parameters()}
    exempt |= {tensor.untyped_storage().data_ptr() for each in slots for tensor in each.values()}
    tokens = torch.arange(256).view(2, 128) % 1024
    with saved(exempt) as sizes:
        logits = model(input_ids=tokens, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("targets", "dtype", "low", "high"),
    [
        (LINEARS, torch.float32, 0.0, 0.78),
        (LINEARS, torch.bfloat16, 0.0, 0.52),
        (("q_proj", "v_proj"), torch.float32, 0.9, 1.0),
    ],
    ids=["all linear, float32", "all linear, bfloat16", "q and v, float32"],
)
def test_saved_bytes_against_lora(targets: tuple[str, ...], dtype: torch.dtype, low: float, high: float) -> None:
    """Sheet check 4. With q and v alone little is saved."""
    ratio = activation_bytes("lora-fa", 16, targets, dtype) / activation_bytes("lora", 16, targets, dtype)
    assert low <= ratio <= high


def test_the_saving_does_not_depend_on_rank() -> None:
    """Sheet check 4: from 4 to 64 the ratio moves by 3 % at most."""
    found = [
        activation_bytes("lora-fa", r, LINEARS, torch.float32) / activation_bytes("lora", r, LINEARS, torch.float32)
        for r in (4, 16, 64)
    ]
    assert max(found) / min(found) <= 1.03


def test_freezing_a_in_the_optimiser_alone_saves_nothing() -> None:
    """Sheet check 5: A that still requires a gradient keeps LoRA's bytes."""
    late = activation_bytes("lora-fa", 16, LINEARS, torch.float32, live_a=True)
    assert late / activation_bytes("lora", 16, LINEARS, torch.float32) > 0.99


# Merging, averaging, zeroth order, quality


def test_merged_and_unmerged_agree(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 7: logits within 1e-4 in float32, after training that moved them."""
    config = Config(rank=4, steps=6, batch_size=4, learning_rate=1e-2, precision="float32")
    ctx = context(tmp_path, config, rounds=2)
    state = run(handle, {"a": dataset(8)}, config, ctx, 2)[-1]
    tuned = method.personalise(handle, state, tmp_path / "model", config, ctx)
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        apart, merged = (tuned.load(merge=merge).model(input_ids=tokens).logits for merge in (False, True))
        base = handle.load().model(input_ids=tokens).logits
    assert float((apart - merged).abs().max()) <= 1e-4
    assert float((apart - base).abs().max()) > 1e-2


def test_averaging_b_averages_the_update_only_with_one_a(handle: ModelHandle, tmp_path: Path) -> None:
    """Sheet check 9: mean(B_i) A = mean(B_i A) to 1e-6 when A comes from one seed; with two seeds it does not."""

    def trained(client: str, seed: int) -> tuple[Update, Mapping[str, np.ndarray], State]:
        config = Config(rank=4, steps=4, batch_size=4, learning_rate=1e-2, warmup=0, precision="float32")
        ctx = context(tmp_path, config, rounds=1, seed=seed)
        start = method.initialise(handle, config, ctx)
        update = method.finetune(handle, dataset(8), assigned(start, client), config, ctx)
        return update, live(ctx).trainables.frozen, start

    def gap(seeds: tuple[int, int]) -> float:
        (one, a_one, start), (two, a_two, _) = trained("a", seeds[0]), trained("b", seeds[1])
        ctx = context(tmp_path, Config())
        mean = backprop.aggregate(start, [one, two], ctx).arrays
        worst = 0.0
        for name in a_one:
            b = name.removesuffix("A") + "B"
            exact = (one.arrays[b] @ a_one[name] + two.arrays[b] @ a_two[name]).astype(np.float64) / 2
            worst = max(worst, float(np.abs(mean[b] @ a_one[name] - exact).max() / np.abs(exact).max()))
        return worst

    assert gap((7, 7)) <= 1e-6
    assert gap((7, 8)) > 0.1


def test_zeroth_order_replays_from_numbers(handle: ModelHandle, tmp_path: Path) -> None:
    """SGD on perturbed inferences: theta - sum eta mean(jvp v), rebuilt from direction numbers and scalars alone."""
    config = Config(
        rank=4, layers=1, gradient="zeroth", probes=3, optimizer="sgd", learning_rate=0.1, warmup=0, clip=0, steps=3,
        batch_size=4, precision="float32",
    )  # fmt: skip
    ctx = context(tmp_path, config, rounds=1)
    start = method.initialise(handle, config, ctx)
    told: list[np.ndarray] = []
    probe = estimator.probe

    def listening(*arguments: Any) -> estimator.Estimate:
        estimate = probe(*arguments)
        told.append(estimate.jvp)
        return estimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimator, "probe", listening)
        update = method.finetune(handle, dataset(8), assigned(start), config, ctx)
    assert update.scalars["forwards"] == 3 * 2 * 3 and method.screen([update], start, ctx) == {}
    shapes = estimator.shapes_of(start.arrays)
    for name, shape in shapes.items():
        theta = torch.zeros(shape)
        for step, jvp in enumerate(told):
            pool = int(ctx.stream("directions/a", step).seeds(1)[0])
            v = [torch.from_numpy(estimator.direction({name: shape}, pool, k)[name]) for k in range(3)]
            g = sum(float(j) * each for j, each in zip(jvp, v, strict=True)) / 3
            theta -= backprop.learning_rate(step, 3, config) * g
        torch.testing.assert_close(torch.from_numpy(update.arrays[name]), theta, rtol=1e-5, atol=1e-7)


def test_zeroth_order_points_where_back_propagation_does(handle: ModelHandle, tmp_path: Path) -> None:
    """The mean of many forward gradients has a cosine with g_B of about sqrt(n / (n + d + 1))."""
    config = Config(rank=1, layers=1, targets="k_proj", gradient="zeroth", probes=256, step=0.01, precision="float32")
    ctx, data = context(tmp_path, config), dataset(4)
    found: Any = method._objective(handle, config, ctx)
    stream = Stream(2, "b")
    b = {name: stream.normal(v.size).reshape(v.shape) * np.float32(0.1) for name, v in found.initial.items()}
    (d,) = (value.size for value in b.values())
    exact, rough = backprop.leaves_of(b), backprop.leaves_of(b)
    backprop.exact_slope(found, 16)(0, "x", lambda: data, exact)
    method.zeroth_slope(found, config, "a", ctx)(0, "x", lambda: data, rough)
    (one,), (two,) = ([leaf.grad.flatten() for leaf in leaves.values()] for leaves in (exact, rough))  # type: ignore[union-attr]
    cosine = float(F.cosine_similarity(one, two, dim=0))
    assert cosine == pytest.approx((256 / (256 + d + 1)) ** 0.5, abs=0.08)


def test_quality_is_loras(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Sheet check 8 on a tiny model: final loss within 5 % of LoRA's or below it, each at its best rate of three;
    LoRA-FA has twice the rank, so both train about as many scalars. The corrected gradient too.

    The best of the three is the largest for every arm: this compares progress in 60 steps, not where training ends. At
    1e-2 all arms end at the same loss, and would pass whatever the method."""
    handle = models.resolve(str(make_tiny_llama(tmp_path / "model", layers=2)))
    data = dataset(16)
    shared: dict[str, Any] = {"steps": 60, "batch_size": 8, "precision": "float32"}

    def best(name: str, module: Any, make: Callable[[float], Any]) -> float:
        losses = []
        for rate in (1e-4, 3e-4, 1e-3):
            config = make(rate)
            ctx = Context(tmp_path, seed=7, rounds=1, configs={name: config})
            start = module.initialise(handle, config, ctx)
            update = module.finetune(handle, data, assigned(start), config, ctx)
            after = backprop.measure(backprop.aggregate(start, [update], ctx), data, ctx)
            assert after is not None
            losses.append(after["validation loss"].value)
        return min(losses)

    reference = best("lora", lora, lambda rate: LoraConfig(rank=8, alpha=16.0, learning_rate=rate, **shared))
    for correction in ("none", "projection"):
        found = best(
            "lora-fa",
            method,
            lambda rate, correction=correction: Config(  # type: ignore[misc]
                rank=16, alpha=32.0, learning_rate=rate, correction=correction, **shared
            ),
        )
        print(f"LoRA {reference:.4f}, LoRA-FA {correction} {found:.4f}")
        assert found <= 1.05 * reference, correction


def test_an_engine_that_draws_its_own_a_is_not_given_another(handle: ModelHandle, tmp_path: Path) -> None:
    ctx = Context(tmp_path, device="llama_cpp")
    with pytest.raises(ConfigError, match="cannot back-propagate"):
        method.initialise(handle, Config(), ctx)
    ctx.keep(f"objective {handle.digest}", object)  # stands for an engine's objective: nothing of it is used
    with pytest.raises(ConfigError, match="draws its own A"):
        method.initialise(handle, Config(gradient="zeroth", init="gaussian"), ctx)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_cosine_to_the_gradient_grows_with_the_probes(handle: ModelHandle, tmp_path: Path, seed: int) -> None:
    """Mean of 20 steps: sqrt(n / (n + d + 1)) within 0.06 for n = 1 .. 256 directions in d = 32 dimensions."""
    config = Config(rank=1, layers=1, targets="k_proj", gradient="zeroth", step=0.01, precision="float32")
    ctx, data = context(tmp_path, config, seed=seed), dataset(4)
    found: Any = method._objective(handle, config, ctx)
    found.share = 32  # candidates a call: for speed alone
    stream = Stream(2, "b")
    b = {name: stream.normal(v.size).reshape(v.shape) * np.float32(0.1) for name, v in found.initial.items()}
    ((name, value),) = b.items()
    exact, rough = backprop.leaves_of(b), backprop.leaves_of(b)
    backprop.exact_slope(found, 16)(0, "x", lambda: data, exact)
    assert exact[name].grad is not None
    means: list[float] = []
    for n in (1, 4, 16, 64, 256):
        slope = method.zeroth_slope(found, replace(config, probes=n), "a", ctx)
        cosines = []
        for step in range(20):
            slope(step, "x", lambda: data, rough)
            one, two = (leaves[name].grad.flatten() for leaves in (exact, rough))  # type: ignore[union-attr]
            cosines.append(float(F.cosine_similarity(one, two, dim=0)))
        means.append(float(np.mean(cosines)))
        assert means[-1] == pytest.approx((n / (n + value.size + 1)) ** 0.5, abs=0.06)
    assert means == sorted(means) and len(set(means)) == 5

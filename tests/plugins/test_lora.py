"""LoRA by back-propagation: exact gradients, bounded memory, and what a federation makes of them."""

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
from edgellm_plugins.training.lora import Config, method
from torch.utils._python_dispatch import TorchDispatchMode

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, FederationError
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, ModelHandle, State, Update

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dataset(n: int = 12) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


def texts(n: int = 6) -> Dataset:
    rows = [Example("", f"are you coming home for dinner tonight {i}" * (1 + i % 3)) for i in range(n)]
    return Dataset(tuple(rows), f"texts-{n}", "texts")


@pytest.fixture(scope="module")
def handle(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return models.resolve(str(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)))


def context(tmp_path: Path, config: Config, rounds: int = 10) -> Context:
    return Context(tmp_path, seed=7, rounds=rounds, configs={"lora": config})


def frozen_of(handle: ModelHandle, spec: adapters.Spec, dtype: str = "float32") -> Frozen:
    return Frozen(handle, spec, Stream(0, "a"), dtype)


def scattered(frozen: Frozen, seed: int = 1, size: float = 0.05) -> dict[str, np.ndarray]:
    """theta away from its start, where A's gradient is zero."""
    stream = Stream(seed, "theta")
    return {
        name: value + stream.normal(value.size).reshape(value.shape) * np.float32(size)
        for name, value in frozen.initial.items()
    }


def ours(frozen: Frozen, data: Dataset, theta: Mapping[str, np.ndarray], chunk: int) -> tuple[float, dict[str, Any]]:
    leaves = backprop.leaves_of(theta)
    loss = backprop.exact_slope(frozen, chunk)(0, "batch", lambda: data, leaves)
    return loss, {name: leaf.grad[0] for name, leaf in leaves.items()}  # type: ignore[index]


def padded(tokenizer: Any, data: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = prompts.encode(tokenizer, data.examples, 128)
    tokens = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for k, row in enumerate(rows):
        tokens[k, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[k, : len(row.tokens)] = 1
        labels[k, row.start : len(row.tokens)] = tokens[k, row.start : len(row.tokens)]
    return tokens, mask, labels


def through_peft(
    handle: ModelHandle, spec: adapters.Spec, data: Dataset, theta: Mapping[str, np.ndarray]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by plain autograd through the whole model with peft's LoRA layers."""
    from peft import LoraConfig, get_peft_model

    loaded = handle.load(dtype="float32")
    total = len(adapters.decoder_layers(loaded.model))
    which = list(range(total - (spec.layers or total), total))
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), layers_to_transform=which
    )
    model = get_peft_model(loaded.model, config).eval()
    live = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data.copy_(torch.from_numpy(theta[short]))
            live[short] = parameter
    assert live.keys() == theta.keys()
    tokens, mask, labels = padded(loaded.tokenizer, data)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in live.items()}  # type: ignore[misc]


@pytest.mark.parametrize("data", [dataset(6), texts()], ids=["completions", "texts"])
@pytest.mark.parametrize(
    ("layers", "targets"),
    [(0, LINEARS), (2, ("q_proj", "v_proj")), (1, LINEARS), (1, ("down_proj",))],
    ids=["all", "last two", "last", "last FFN"],
)
def test_gradients_are_those_of_plain_autograd(
    handle: ModelHandle, layers: int, targets: tuple[str, ...], data: Dataset
) -> None:
    """Un-checkpointed, unchunked, padded and masked, through peft's layers: within 1e-5 of every tensor's norm."""
    spec = adapters.Spec("lora", layers, 4, 8.0, targets)
    frozen = frozen_of(handle, spec)
    theta = scattered(frozen)
    loss, found = ours(frozen, data, theta, chunk=5)
    expected_loss, expected = through_peft(handle, spec, data, theta)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_chunked_cross_entropy_is_cross_entropy(chunk: int) -> None:
    """Value and gradient in float64 arithmetic of the reference, within 1e-6, whether or not the chunks divide N."""
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 16), torch.nn.Linear(16, 50, bias=True)
    targets = torch.randint(0, 50, (20,))
    wide = hidden.double().requires_grad_()
    weight, bias = head.weight.double(), head.bias.double()
    expected = F.cross_entropy(F.linear(wide, weight, bias) * 1.0, targets)
    expected.backward()
    loss, gradient = backprop.chunked_cross_entropy(hidden, targets, head, chunk)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float((gradient - wide.grad).abs().max()) < 1e-6  # type: ignore[operator]


class Widest(TorchDispatchMode):
    """The most rows of any tensor with `width` columns that an operation makes (`weight` and its views excepted)."""

    def __init__(self, width: int, weight: torch.Tensor) -> None:
        super().__init__()
        self.width, self.rows = width, 0
        self.exempt = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            wide = torch.is_tensor(tensor) and tensor.dim() and tensor.shape[-1] == self.width
            if wide and tensor.untyped_storage().data_ptr() != self.exempt:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


def test_logits_never_exist_for_more_than_a_chunk(handle: ModelHandle) -> None:
    """No operation, forward or backward, makes more than `chunk` rows of the vocabulary; a plain loss does."""
    frozen, data = frozen_of(handle, adapters.Spec("lora", 0, 4)), texts()
    theta, width, weight = scattered(frozen), frozen.model.config.vocab_size, frozen.model.lm_head.weight
    scored = len(frozen.batch("batch", lambda: data).targets)
    with Widest(width, weight) as seen:
        ours(frozen, data, theta, chunk=16)
    assert 0 < seen.rows <= 16 < scored
    frozen.trainables.set(backprop.leaves_of(theta))
    tokens, _, labels = padded(frozen.tokenizer, data)
    with Widest(width, weight) as seen:
        logits = frozen.model(input_ids=tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    assert seen.rows >= scored


@contextmanager
def live_bytes(exempt: set[int]) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps for backward, each storage once: `now` and `peak`."""
    count, holders = {"now": 0, "peak": 0}, {}

    class Box:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key, self.size = storage.data_ptr(), storage.nbytes()
            if self.key not in exempt:
                holders[self.key] = holders.get(self.key, 0) + 1
                count["now"] += self.size if holders[self.key] == 1 else 0
                count["peak"] = max(count["peak"], count["now"])

        def __del__(self) -> None:
            if self.key in holders:
                holders[self.key] -= 1
                count["now"] -= self.size if not holders[self.key] else 0

    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        yield count


def test_activations_of_one_layer_at_a_time(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """What autograd keeps does not grow with depth; through the whole model it does."""
    peaks, plain = [], []
    for layers in (3, 6):  # of two, the lower has no gradient to pass on and keeps less
        made = models.resolve(str(make_tiny_llama(tmp_path / f"{layers}", layers=layers)))
        frozen, data = frozen_of(made, adapters.Spec("lora", 0, 4, targets=LINEARS)), texts()
        theta = scattered(frozen)
        weights = {p.untyped_storage().data_ptr() for p in frozen.model.parameters()}
        with live_bytes(weights) as count:
            ours(frozen, data, theta, chunk=16)
        peaks.append(count["peak"])
        frozen.trainables.set(backprop.leaves_of(theta))
        tokens, _, _ = padded(frozen.tokenizer, data)
        with live_bytes(weights) as count:
            out = frozen.model.model(input_ids=tokens).last_hidden_state
        plain.append(count["peak"])
        del out
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
    assert plain[1] > 1.8 * plain[0] and plain[0] > 2 * peaks[0]


def test_layers_below_run_once_and_without_autograd(handle: ModelHandle) -> None:
    """With the last layer trained, a kept batch runs the two below never again; none of them makes a graph."""
    frozen, data = frozen_of(handle, adapters.Spec("lora", 1, 4)), dataset(4)
    calls: list[tuple[int, bool]] = []
    for index, layer in enumerate(adapters.decoder_layers(frozen.model)):
        layer.register_forward_hook(lambda m, i, out, index=index: calls.append((index, out.requires_grad)))
    theta = scattered(frozen)
    for _ in range(3):
        ours(frozen, data, theta, chunk=16)
    assert [call for call in calls if call[0] < 2] == [(0, False), (1, False)]


def test_kept_hidden_states_change_no_bit(handle: ModelHandle, tmp_path: Path) -> None:
    ends = []
    for memory in (0, 64):
        config = Config(layers=2, hidden_memory=memory, steps=5, batch_size=4, precision="float32")
        ends.append(rounds_of(handle, {"a": dataset(8)}, config, context(tmp_path, config), 2)[-1])
    assert all(np.array_equal(ends[0].arrays[name], ends[1].arrays[name]) for name in ends[0].arrays)


def test_the_base_stays_as_it_is_in_bfloat16(handle: ModelHandle) -> None:
    """A 16-bit base: no bit of it moves, adapters and gradients are float32, close to those on a float32 base."""
    spec, data = adapters.Spec("lora", 0, 4, targets=LINEARS), dataset(6)
    half, full = frozen_of(handle, spec, "bfloat16"), frozen_of(handle, spec)
    theta = scattered(full)
    before = {name: p.clone() for name, p in half.model.named_parameters()}
    (_, found), (_, exact) = ours(half, data, theta, 16), ours(full, data, theta, 16)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in half.model.named_parameters())
    assert {g.dtype for g in found.values()} == {torch.float32}
    one, two = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (found, exact))
    assert float(F.cosine_similarity(one, two, dim=0)) > 0.99


@pytest.mark.parametrize(("kind", "decay"), [("adamw", 0.0), ("adamw", 0.1), ("sgd", 0.0)])
def test_step_rules_are_torchs(kind: str, decay: float) -> None:
    stream = Stream(3, "steps")
    start = {"x": stream.normal(30).reshape(5, 6), "y": stream.normal(4)}
    ours_, theirs = backprop.leaves_of(start), backprop.leaves_of(start)
    rule = backprop.StepRule(ours_, kind, decay)
    made: type[Any] = torch.optim.AdamW if kind == "adamw" else torch.optim.SGD
    reference = made(theirs.values(), lr=0.01, weight_decay=decay)
    for _ in range(10):
        for name in start:
            gradient = torch.from_numpy(stream.normal(start[name].size).reshape(ours_[name].shape))
            ours_[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        rule.step(0.01)
        reference.step()
    for name in start:
        torch.testing.assert_close(ours_[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_clipping_keeps_the_direction() -> None:
    leaves = backprop.leaves_of({"x": np.zeros(2, np.float32), "y": np.zeros(1, np.float32)})
    leaves["x"].grad, leaves["y"].grad = torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0]])
    assert backprop.clip(leaves, 10) == pytest.approx(5) and float(leaves["y"].grad) == 4
    assert backprop.clip(leaves, 0) == pytest.approx(5) and float(leaves["y"].grad) == 4
    backprop.clip(leaves, 1)
    torch.testing.assert_close(leaves["x"].grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(leaves["y"].grad, torch.tensor([[0.8]]))


def test_learning_rate_warms_up_and_decays() -> None:
    config = Config(learning_rate=1.0, warmup=0.1)
    rates = [backprop.learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)


def test_minibatches_cover_the_data_once_a_pass_in_changing_order(tmp_path: Path) -> None:
    ctx = context(tmp_path, Config())
    passes = []
    for first in (0, 4):
        seen = [backprop.minibatch(10, "a", first + k, 3, ctx) for k in range(4)]
        assert sorted(i for _, rows in seen for i in rows) == list(range(10))
        passes.append(seen)
    assert dict(passes[0]) == dict(passes[1])
    later = [[backprop.minibatch(10, "a", 4 * e + k, 3, ctx)[0] for k in range(4)] for e in range(6)]
    assert len({tuple(order) for order in later}) > 1
    assert backprop.minibatch(10, "b", 0, 3, ctx) != backprop.minibatch(10, "a", 0, 3, ctx)


# The federation


def rounds_of(
    handle: ModelHandle, shards: Mapping[str, Dataset], config: Config, ctx: Context, count: int
) -> list[State]:
    from edgellm_sdk.types import Assignment

    states = [method.initialise(handle, config, ctx)]
    for _ in range(count):
        state = states[-1]
        sent = {c: Assignment(state.base, state.round + 1, c, state.arrays, state.scalars) for c in sorted(shards)}
        updates = [method.finetune(handle, shards[c], sent[c], config, ctx) for c in sorted(shards)]
        assert method.screen(updates, state, ctx) == {}
        states.append(backprop.aggregate(state, updates, ctx))
    return states


def test_a_step_of_one_client_is_gradient_descent(handle: ModelHandle, tmp_path: Path) -> None:
    """steps=1, SGD, no clipping, no warm-up: theta moves by -eta times the gradient that plain autograd gives."""
    config = Config(
        rank=4, optimizer="sgd", learning_rate=0.1, warmup=0, clip=0, steps=1, batch_size=6, precision="float32"
    )
    data = dataset(6)
    start, after = rounds_of(handle, {"a": data}, config, context(tmp_path, config), 1)
    spec = adapters.Spec("lora", 0, 4, 16.0, LINEARS)
    _, expected = through_peft(handle, spec, data, start.arrays)
    for name, gradient in expected.items():
        moved = torch.from_numpy(after.arrays[name] - start.arrays[name])
        assert float((moved + 0.1 * gradient).norm()) <= 2e-5 * float(0.1 * gradient.norm()) + 1e-6, name


def test_aggregation_weighs_by_examples_and_counts(tmp_path: Path) -> None:
    ctx = context(tmp_path, Config(steps=2))
    state = State("base", 0, {"w": np.array([1.0, 2.0], np.float32)}, {"forwards": 0, "steps": 0})
    told = {"steps": 2, "forwards": 6}

    def update(client: str, change: list[float], examples: int, loss: float) -> Update:
        arrays = {"w": np.array(change, np.float32)}
        return Update("base", 1, client, "delta", arrays, examples, "", {**told, "loss": loss})

    updates = [update("a", [1, 0], 1, 4.0), update("b", [0, 4], 3, 2.0)]
    assert method.screen(updates, state, ctx) == {}
    new = backprop.aggregate(state, updates, ctx)
    np.testing.assert_array_equal(new.arrays["w"], np.array([1.25, 5.0], np.float32))
    assert new.scalars == {"forwards": 12, "steps": 2} and new.round == 1
    for x, at in (("rounds", 1), ("forwards", 12)):
        assert ctx.curves[f"training loss over {x}"] == [(at, 2.5)]
    assert len(ctx.curves["training loss over seconds"]) == 1
    again = backprop.aggregate(state, updates[::-1], context(tmp_path, Config()))
    assert np.array_equal(again.arrays["w"], new.arrays["w"])

    good = updates[0]
    bad = {
        "kind": replace(good, kind="weights"),
        "shape": replace(good, arrays={"w": np.zeros(3, np.float32)}),
        "dtype": replace(good, arrays={"w": np.zeros(2)}),
        "names": replace(good, arrays={"v": np.zeros(2, np.float32)}),
        "nan": replace(good, arrays={"w": np.full(2, np.nan, np.float32)}),
        "steps": replace(good, scalars={**good.scalars, "steps": 3}),
        "true": replace(good, scalars={**good.scalars, "steps": True}),
        "forwards": replace(good, scalars={**good.scalars, "forwards": 10**9}),
        "loss": replace(good, scalars={**good.scalars, "loss": "nan"}),
        "silent": replace(good, scalars={}),
    }
    for name, wrong in bad.items():
        assert method.screen([wrong], state, ctx), name


def test_the_loss_falls_and_the_folder_behaves_like_the_state(handle: ModelHandle, tmp_path: Path) -> None:
    """Four rounds of two clients: lower training and held-out loss; merged, unmerged and live losses agree."""
    config = Config(rank=4, learning_rate=5e-3, steps=8, batch_size=4, precision="float32")
    ctx = context(tmp_path, config, rounds=4)
    shards = {"a": dataset(12), "b": dataset(8)}
    states = rounds_of(handle, shards, config, ctx, 4)
    losses = [loss for _, loss in ctx.curves["training loss over rounds"]]
    assert losses[-1] < 0.5 * losses[0]
    assert states[-1].scalars == {"forwards": 4 * 2 * 8 * 3, "steps": 32, "scale": 4.0}
    assert [x for x, _ in ctx.curves["training loss over forwards"]] == [48, 96, 144, 192]
    held_out = dataset(16)
    before, after = (backprop.measure(state, held_out, ctx) for state in (states[0], states[-1]))
    assert before is not None and after is not None
    assert after["validation loss"].value < 0.5 * before["validation loss"].value

    tuned = method.personalise(handle, states[-1], tmp_path / "model", config, ctx)
    tokens, mask, labels = padded(handle.load().tokenizer, held_out)
    with torch.no_grad():
        apart, merged = (tuned.load(merge=merge).model(input_ids=tokens, attention_mask=mask) for merge in (0, 1))
    assert float((apart.logits - merged.logits)[mask.bool()].abs().max()) <= 1e-4
    loss = F.cross_entropy(merged.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert float(loss) == pytest.approx(after["validation loss"].value, rel=1e-4)


def test_mistakes_are_one_line(handle: ModelHandle, tmp_path: Path) -> None:
    from edgellm_sdk.types import Assignment

    config = Config(layers=1, precision="float32")
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    sent = Assignment(state.base, 1, "a", state.arrays)
    with pytest.raises(DataError, match="no examples"):
        method.finetune(handle, Dataset((), "empty"), sent, config, ctx)
    wild = replace(sent, arrays={name: np.full_like(a, 1e30) for name, a in state.arrays.items()})
    with pytest.raises(FederationError, match="not finite"):
        method.finetune(handle, dataset(4), wild, config, ctx)
    with pytest.raises(ConfigError, match="cannot back-propagate"):
        method.initialise(handle, config, Context(tmp_path, device="llama_cpp"))

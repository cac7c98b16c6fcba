"""FedPETuning: five kinds of theta, of which nothing else travels, through the same rounds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgellm_plugins.aggregation.fedavg import Config as FedAvg
from edgellm_plugins.aggregation.fedavg import method as fedavg
from edgellm_plugins.federated import local
from edgellm_plugins.federated.fedpetuning import Config, method
from edgellm_plugins.training import backprop
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import edgellm_sdk as edgellm
from edgellm_sdk import models, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import adapters, answers, prompts
from edgellm_sdk.kit.conformance import checks
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Assignment, Dataset, Example, ModelHandle, State

ROBERTA = 124_647_170
HEAD = 592_130
SMALL: dict[str, Any] = {"batch_size": 4, "precision": "float32", "rank": 4, "width": 6, "prefix_length": 5}
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 5e-3},
    "adapter": {"learning_rate": 5e-3},
    "adapter and norms": {"learning_rate": 5e-3, "norms": True},
    "prefix": {"learning_rate": 1e-2, "prefix_hidden": 24},
    "plain prefix": {"learning_rate": 5e-2, "prefix_hidden": 0},
    "bitfit": {"learning_rate": 1e-2},
    "bitfit and norms": {"learning_rate": 1e-2, "norms": True},
    "full": {"learning_rate": 1e-3},
}


def config_of(name: str, **options: Any) -> Config:
    tune = next(kind for kind in ("lora", "adapter", "prefix", "bitfit", "full") if kind in name)
    return Config(tune=tune, **(SMALL | TUNES[name] | options))


def dataset(n: int = 12) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def plain(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return models.resolve(str(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.fixture(scope="module")
def handle(plain: ModelHandle, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    """The tiny model with a bias on every linear layer."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    shutil.copytree(plain.path, folder)
    config = plain.load().model.config
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config)
    model.load_state_dict({**model.state_dict(), **plain.load().model.state_dict()})
    model.save_pretrained(folder)
    return models.resolve(str(folder))


def context(tmp_path: Path, config: Config, rounds: int = 1) -> Context:
    return Context(tmp_path, seed=7, rounds=rounds, configs={"fedpetuning": config})


def rounds_of(
    handle: ModelHandle, shards: Mapping[str, Dataset], config: Config, ctx: Context, count: int
) -> list[State]:
    states = [method.initialise(handle, config, ctx)]
    for _ in range(count):
        state = states[-1]
        sent = {c: Assignment(state.base, state.round + 1, c, state.arrays, state.scalars) for c in sorted(shards)}
        updates = [method.finetune(handle, shards[c], sent[c], config, ctx) for c in sorted(shards)]
        assert local.screen(updates, state, config, ctx) == {}
        states.append(backprop.aggregate(state, updates, ctx))
    return states


# Counts, bytes, memory


def roberta(config: Config) -> dict[str, Any]:
    """theta_0 on the shapes of RoBERTa-base with a head of two labels."""
    shapes = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(shapes)
    assert sum(parameter.numel() for parameter in model.parameters()) == ROBERTA
    found = adapters.install(model, replace(method.spec_of(config), targets=("query", "value")), Stream(0, "a"))
    return method.theta_of(found.initial, config, Stream(0, "prefix"))


@pytest.mark.parametrize(
    ("config", "count", "ratio"),
    [
        (Config(tune="lora", rank=8), 887_042, 140.5),
        (Config(tune="lora", rank=16), 1_181_954, 105.5),
        (Config(tune="adapter", width=16), 1_200_770, 103.8),
        (Config(tune="adapter", width=64), 2_971_394, 41.9),
        (Config(tune="prefix", prefix_length=64), 10_343_170, 12.1),
        (Config(tune="prefix", prefix_length=64, prefix_hidden=0), 1_179_648 + HEAD, 70.4),
        (Config(tune="bitfit"), 694_274, 179.5),
    ],
)
def test_counts_and_bytes_of_roberta_base(config: Config, count: int, ratio: float) -> None:
    """The paper's numbers, and its ratios to all of the model; the payload is 4 bytes a value."""
    theta = roberta(config)
    assert sum(array.size for array in theta.values()) == count
    assert wire.payload_bytes(theta) == 4 * count
    assert ROBERTA / count == pytest.approx(ratio, abs=0.06)
    assert {array.dtype for array in theta.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", TUNES)
def test_only_theta_is_sent(name: str, handle: ModelHandle, tmp_path: Path) -> None:
    """The measured payload of a client's message is 4 |theta|, and no frozen name is in it."""
    config = config_of(name)
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    update = method.finetune(handle, dataset(4), Assignment(state.base, 1, "a", state.arrays), config, ctx)
    raw = wire.update_to_bytes(update)
    size = sum(array.size for array in state.arrays.values())
    assert wire.payload_bytes(wire.update_from_bytes(raw, "a").arrays) == 4 * size
    assert 4 * size < len(raw) < 4 * size + 40_000
    frozen = set(dict(handle.load().model.named_parameters())) - set(state.arrays)
    assert not frozen & set(update.arrays)
    owned = {name for name in update.arrays if name in dict(handle.load().model.named_parameters())}
    own = config.tune in ("bitfit", "full") or config.norms
    assert bool(owned) == own and update.arrays.keys() == state.arrays.keys()


@pytest.mark.parametrize("name", TUNES)
def test_the_optimiser_holds_two_floats_for_each_of_theta(name: str, handle: ModelHandle, tmp_path: Path) -> None:
    config = config_of(name)
    state = method.initialise(handle, config, context(tmp_path, config))
    rule = backprop.StepRule(backprop.leaves_of(state.arrays), config.optimizer)
    held = sum(moment.numel() for pair in rule.moments.values() for moment in pair)
    assert held == 2 * sum(array.size for array in state.arrays.values())


def test_decay_spares_biases_and_norms() -> None:
    start = {
        name: np.ones(2, np.float32)
        for name in ("x.weight", "x.bias", "x.down_bias", "input_layernorm.weight", "output.LayerNorm.weight", "lora_A")
    }
    leaves = backprop.leaves_of(start)
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    backprop.StepRule(leaves, "sgd", decay=0.5).step(0.1)
    shrunk = {name for name, leaf in leaves.items() if float(leaf.detach()[0, 0]) != 1}
    assert shrunk == {"x.weight", "lora_A"}


# A prefix made by an MLP


def test_the_slope_through_the_mlp_is_that_of_plain_autograd(handle: ModelHandle, tmp_path: Path) -> None:
    """Against torch's own modules and a model whose cache was filled beforehand."""
    config, data = config_of("prefix"), dataset(5)
    state = method.initialise(handle, config, context(tmp_path, config))
    frozen = Frozen(handle, method.spec_of(config), Stream(0, "a"), "float32")
    leaves = backprop.leaves_of(state.arrays)
    loss = method.through(backprop.exact_slope(frozen, 7), frozen.initial)(0, "b", lambda: data, leaves)

    table, inner, outer = nn.Embedding(5, 24), nn.Linear(24, 24), nn.Linear(24, 2 * 2 * 32)
    places = {
        "prefix.embedding": table.weight, "prefix.inner": inner.weight, "prefix.inner_bias": inner.bias,
        "prefix.outer": outer.weight, "prefix.outer_bias": outer.bias,
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in places.items()} == {n: a.shape for n, a in state.arrays.items()}
    for name, parameter in places.items():
        parameter.data.copy_(torch.from_numpy(state.arrays[name]))
    made = outer(torch.tanh(inner(table.weight)))
    loaded = handle.load(dtype="float32")
    encoded = prompts.encode(loaded.tokenizer, data.examples, 128)
    tokens = answers.padded([row.tokens for row in encoded])
    cache = DynamicCache(config=loaded.model.config)
    for layer in range(2):
        parts = made[:, 64 * layer : 64 * (layer + 1)].split(32, 1)  # key before value, as names are sorted
        cache.update(*(p.view(1, 5, 2, 16).transpose(1, 2).expand(len(tokens), -1, -1, -1) for p in parts), layer)
    logits = loaded.model(
        input_ids=tokens, past_key_values=cache, position_ids=torch.arange(tokens.shape[1])[None]
    ).logits
    picked = [logits[k, at - 1] for k, row in enumerate(encoded) for at in row.scored]
    wanted = torch.tensor([row.tokens[at] for row in encoded for at in row.scored])
    expected = F.cross_entropy(torch.stack(picked), wanted)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in places.items():
        assert parameter.grad is not None and float(parameter.grad.norm()) > 0
        found = leaves[name].grad
        assert found is not None
        assert float((found[0] - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, name


def test_what_is_saved_is_the_plain_prefix(handle: ModelHandle, tmp_path: Path) -> None:
    config = config_of("prefix")
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    tuned = method.personalise(handle, state, tmp_path / "model", config, ctx)
    saved = adapters.arrays(tuned.adapters[0])
    assert sorted(saved) == [f"model.layers.{k}.self_attn.prefix_{part}" for k in range(2) for part in ("key", "value")]
    assert {array.shape for array in saved.values()} == {(5, 32)}
    e, w, b = (state.arrays[f"prefix.{name}"] for name in ("embedding", "inner", "inner_bias"))
    expected = np.tanh(e @ w.T + b) @ state.arrays["prefix.outer"].T + state.arrays["prefix.outer_bias"]
    np.testing.assert_allclose(saved["model.layers.1.self_attn.prefix_key"], expected[:, 64:96], atol=1e-5)


# Rounds


@pytest.mark.parametrize("name", TUNES)
def test_equal_clients_weigh_alike_and_clones_are_one(name: str, handle: ModelHandle, tmp_path: Path) -> None:
    config = config_of(name)
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    told = {c: Assignment(state.base, 1, c, state.arrays, state.scalars) for c in "abc"}
    updates = [method.finetune(handle, dataset(8), told[c], config, ctx) for c in "abc"]
    plain, weighted = (fedavg.aggregate(state, updates, FedAvg(way), ctx) for way in ("equal", "examples"))
    assert all(np.array_equal(plain.arrays[key], weighted.arrays[key]) for key in state.arrays)
    longer = [*updates[:2], replace(updates[2], examples=16)]
    unlike = fedavg.aggregate(state, longer, FedAvg(), ctx)
    assert any(not np.array_equal(plain.arrays[key], unlike.arrays[key]) for key in state.arrays)
    clones = [replace(updates[0], client=f"clone-{k}") for k in range(4)]
    one = backprop.aggregate(state, clones, ctx)
    assert all(float(np.abs(one.arrays[key] - updates[0].arrays[key]).max()) <= 1e-7 for key in state.arrays)


@pytest.mark.parametrize("name", TUNES)
def test_the_loss_falls_and_the_folder_behaves_like_the_state(name: str, handle: ModelHandle, tmp_path: Path) -> None:
    """Three rounds of two clients, every kind: held-out loss falls; what is saved has the loss that was measured, on
    top of the base and merged, or says that it cannot be merged."""
    config = config_of(name, epochs=3, keep="last")
    ctx = context(tmp_path, config, rounds=3)
    states = rounds_of(handle, {"a": dataset(12), "b": dataset(8)}, config, ctx, 3)
    held_out = dataset(16)
    before, after = (method.measure(state, held_out, ctx) for state in (states[0], states[-1]))
    assert before is not None and after is not None
    assert after["validation loss"].value < 0.9 * before["validation loss"].value
    tuned = method.personalise(handle, states[-1], tmp_path / "model", config, ctx)
    ways = (False,) if config.tune in ("adapter", "prefix") else (False, True)
    for merge in ways:
        live = tuned.load(merge=merge)
        losses = []
        for row in prompts.encode(live.tokenizer, held_out.examples, 128):
            with torch.no_grad():
                scores = F.log_softmax(live.model(input_ids=torch.tensor([row.tokens])).logits[0], -1)
            losses += [-float(scores[at - 1, row.tokens[at]]) for at in row.scored]
        assert sum(losses) / len(losses) == pytest.approx(after["validation loss"].value, rel=1e-4)
    if len(ways) == 1:
        with pytest.raises(ModelError, match="cannot be merged into the weights"):
            tuned.load(merge=True)


def test_the_best_watched_state_becomes_the_model(handle: ModelHandle, tmp_path: Path) -> None:
    """Later, worse states are not kept; with `last` they are; resuming finds the best again."""
    config = config_of("lora", epochs=4)
    ctx = context(tmp_path, config, rounds=4)
    states = rounds_of(handle, {"a": dataset(12)}, config, ctx, 2)
    worse = replace(states[2], round=3, arrays={n: a * np.float32(8) for n, a in states[2].arrays.items()})
    losses = []
    for state in (states[0], states[2], worse):
        found = method.measure(state, dataset(16), ctx)
        assert found is not None
        losses.append(found["validation loss"].value)
        assert found["best validation loss"].value == min(losses)
    assert losses[1] < losses[0] and losses[1] < losses[2]
    again = context(tmp_path, config, rounds=4)
    for keep, expected in (("best", states[2]), ("last", worse)):
        tuned = method.personalise(handle, worse, tmp_path / keep, replace(config, keep=keep), again)
        saved = adapters.arrays(tuned.adapters[0])
        assert all(np.array_equal(saved[name], array) for name, array in expected.arrays.items())
    assert again.notes == [f"the model is that of round 2, whose validation loss {losses[1]:.4f} is lowest"]


@pytest.mark.parametrize("name", ["adapter", "prefix", "full"])
def test_conformance_of_the_other_kinds(name: str) -> None:
    tune = {"tune": name, "prefix_hidden": 16, "learning_rate": 1e-3}
    for check in checks("fedpetuning", tune):
        if check.__name__ in ("finetune_repeats", "rounds_resume", "finetune_keeps_its_inputs"):
            check()


# What a user can get wrong


def test_bitfit_of_a_model_without_biases_is_one_line(plain: ModelHandle, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    given = (str(plain.path), str(tmp_path / "d.jsonl"))
    with pytest.raises(ConfigError, match="no biases to train"):
        edgellm.finetune("fedpetuning", *given, tmp_path / "one", rounds=1, options={"tune": "bitfit"})
    made = edgellm.finetune(
        "fedpetuning", *given, tmp_path / "two", rounds=1, options={"tune": "bitfit", "norms": True}
    )
    assert made.report.metrics["uploaded"].value == 4 * 4 * 64  # two norms in each of two layers


@pytest.mark.parametrize("tune", ["adapter", "prefix"])
def test_what_gguf_cannot_express_is_refused(tune: str, plain: ModelHandle, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    options = {"tune": tune, "prefix_hidden": 8}
    edgellm.finetune(
        "fedpetuning", str(plain.path), str(tmp_path / "d.jsonl"), tmp_path / "run", rounds=1, options=options
    )
    with pytest.raises(ModelError, match="GGUF lacks"):
        edgellm.export("gguf", model=str(tmp_path / "run"), output=tmp_path / "x.gguf")


def test_clients_of_another_kind_are_refused(handle: ModelHandle, tmp_path: Path) -> None:
    config = config_of("lora")
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    update = method.finetune(handle, dataset(4), Assignment(state.base, 1, "a", state.arrays), config, ctx)
    told = {**update.scalars, local.ADAPTER: method.local.digest(method.spec_of(config_of("adapter")), "0")}
    assert local.screen([replace(update, scalars=told)], state, config, ctx) == {"a": "trained another adapter"}

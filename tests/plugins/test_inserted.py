"""Prefixes, Houlsby's adapters, BitFit and full layers: what trains, exact gradients, folders that behave alike."""

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
from edgellm_plugins.training import backprop
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import adapters, answers, prompts, scoring
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, ModelHandle

HEAD = 592_130
LENGTH = 5
SPECS = {
    "houlsby": Spec("houlsby", 0, size=6),
    "houlsby and norms": Spec("houlsby", 0, size=6, norms=True),
    "prefix": Spec("prefix", 0, size=LENGTH),
    "bitfit": Spec("bitfit", 0),
    "bitfit and norms": Spec("bitfit", 0, norms=True),
    "full": Spec("full", 0),
}


def dataset(n: int = 6) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2]) for i in range(n)]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy")


@pytest.fixture(scope="module")
def plain(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return models.resolve(str(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3)))


@pytest.fixture(scope="module")
def biased(plain: ModelHandle, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    """The tiny model with a bias on every linear layer."""
    folder = tmp_path_factory.mktemp("models") / "biased"
    shutil.copytree(plain.path, folder)
    config = plain.load().model.config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    model.load_state_dict(plain.load().model.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return models.resolve(str(folder))


def scattered(frozen: Frozen, size: float = 0.05) -> dict[str, np.ndarray]:
    stream = Stream(1, "theta")
    return {
        name: value + stream.normal(value.size).reshape(value.shape) * np.float32(size)
        for name, value in frozen.initial.items()
    }


def padded(tokenizer: Any, data: Dataset) -> tuple[Tensor, Tensor, Tensor]:
    rows = prompts.encode(tokenizer, data.examples, 128)
    tokens = answers.padded([row.tokens for row in rows])
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for k, row in enumerate(rows):
        mask[k, : len(row.tokens)] = 1
        labels[k, row.start : len(row.tokens)] = tokens[k, row.start : len(row.tokens)]
    return tokens, mask, labels


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def reference(handle: ModelHandle, spec: Spec, theta: Mapping[str, np.ndarray], data: Dataset) -> dict[str, Any]:
    """Logits, loss and gradients by plain autograd through an untouched model: hooks for bottlenecks, a cache filled
    beforehand for a prefix, the model's own parameters for the rest."""
    loaded = handle.load(dtype="float32")
    model = loaded.model
    own = dict(model.named_parameters())
    live: dict[str, Tensor] = {}
    for name, array in theta.items():
        if name in own:
            own[name].data.copy_(torch.from_numpy(array))
            live[name] = own[name].requires_grad_()
        else:
            live[name] = torch.from_numpy(array.copy()).requires_grad_()
    tokens, mask, labels = padded(loaded.tokenizer, data)
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if spec.kind == "houlsby":
        for index, layer in enumerate(model.model.layers):
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                at = f"model.layers.{index}.{path}."

                def bend(module: Any, inputs: Any, h: Tensor, at: str = at) -> Tensor:
                    low = F.relu(h @ live[at + "down"].T + live[at + "down_bias"])
                    return h + low @ live[at + "up"].T + live[at + "up_bias"]

                layer.get_submodule(path).register_forward_hook(bend)
    if spec.kind == "prefix":
        cache, rows = DynamicCache(config=model.config), len(tokens)
        for index in range(len(model.model.layers)):
            at = f"model.layers.{index}.self_attn.prefix_"
            parts = [live[at + part].view(1, LENGTH, 2, 16).transpose(1, 2) for part in ("key", "value")]
            cache.update(*(part.expand(rows, -1, -1, -1) for part in parts), index)
        given |= {
            "past_key_values": cache, "position_ids": torch.arange(tokens.shape[1])[None],
            "attention_mask": torch.cat([torch.ones((rows, LENGTH), dtype=torch.long), mask], 1),
        }  # fmt: skip
    logits = model(**given).logits
    loss = loss_of(logits, labels)
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in live.items()}
    return {"logits": logits.detach(), "loss": float(loss.detach()), "gradients": gradients, "mask": mask.bool()}


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_plain_autograd(name: str, biased: ModelHandle) -> None:
    spec, data = SPECS[name], dataset()
    frozen = Frozen(biased, spec, Stream(0, "a"), "float32")
    theta = scattered(frozen)
    expected = reference(biased, spec, theta, data)
    leaves = backprop.leaves_of(theta)
    loss = backprop.exact_slope(frozen, 5)(0, "batch", lambda: data, leaves)
    assert loss == pytest.approx(expected["loss"], rel=1e-6)
    assert expected["gradients"].keys() == leaves.keys() and len(leaves) > 3
    norm = float(torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm())
    for key, gradient in expected["gradients"].items():
        found = leaves[key].grad
        assert found is not None and float((found[0] - gradient).norm()) < 1e-5 * max(float(gradient.norm()), norm / 10)
    seen = [key for key, gradient in expected["gradients"].items() if float(gradient.norm()) > 0]
    assert len(seen) >= len(leaves) - 3  # a bias of keys has no gradient: softmax does not see it


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_the_last_layers_alone_have_the_same_gradients(name: str, layers: int, biased: ModelHandle) -> None:
    """Layer by layer with what lies below kept, and through all layers at once."""
    spec, data = replace(SPECS[name], layers=layers), dataset()
    frozen = Frozen(biased, spec, Stream(0, "a"), "float32")
    assert all(int(key.split(".")[2]) >= 3 - layers for key in frozen.initial)
    theta = scattered(frozen)
    one, two = backprop.leaves_of(theta), backprop.leaves_of(theta)
    loss = backprop.exact_slope(frozen, 5)(0, "batch", lambda: data, one)
    frozen.trainables.set(two)
    tokens, mask, labels = padded(frozen.tokenizer, data)
    whole = loss_of(frozen.model(input_ids=tokens, attention_mask=mask).logits, labels)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6)
    for key in theta:
        torch.testing.assert_close(one[key].grad, two[key].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SPECS)
def test_on_a_base_of_16_bits(name: str, biased: ModelHandle) -> None:
    """Gradients are float32 and point where those on a float32 base do; no bit of the base moves."""
    half, full = (Frozen(biased, SPECS[name], Stream(0, "a"), dtype) for dtype in ("bfloat16", "float32"))
    theta, data, found = scattered(full), dataset(), []
    before = {key: parameter.clone() for key, parameter in half.model.named_parameters()}
    for frozen in (half, full):
        leaves = backprop.leaves_of(theta)
        backprop.exact_slope(frozen, 16)(0, "batch", lambda: data, leaves)
        assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
        found.append(torch.cat([leaf.grad.flatten() for leaf in leaves.values()]))  # type: ignore[union-attr]
    assert all(torch.equal(parameter, before[key]) for key, parameter in half.model.named_parameters())
    assert float(F.cosine_similarity(*found, dim=0)) > 0.99


@pytest.mark.parametrize("name", SPECS)
def test_probes_are_as_if_each_were_alone(name: str, biased: ModelHandle) -> None:
    frozen = Frozen(biased, SPECS[name], Stream(0, "a"), "float32")
    theta, data = scattered(frozen), dataset()
    stream = Stream(2, "v")
    directions = [{k: stream.normal(v.size).reshape(v.shape) for k, v in theta.items()} for _ in range(3)]
    together = frozen.evaluate("b", lambda: data, theta, directions, [0.1, -0.1, 0.0])
    alone = [
        frozen.evaluate("b", lambda: data, theta, [v], [s])[0]
        for v, s in zip(directions, [0.1, -0.1, 0.0], strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert abs(together[0] - together[2]) > 1e-4


def test_bottlenecks_and_lora_start_as_the_base_and_a_prefix_does_not(plain: ModelHandle) -> None:
    """Logits within 1e-6 of the base's; a prefix of any values takes its share of attention."""
    loaded = plain.load(dtype="float32")
    tokens, mask, _ = padded(loaded.tokenizer, dataset())
    base = loaded.model(input_ids=tokens, attention_mask=mask).logits
    apart = {}
    for kind in ("lora", "houlsby", "prefix"):
        frozen = Frozen(plain, Spec(kind, 0, size=LENGTH), Stream(0, "a"), "float32")
        logits = frozen.model(input_ids=tokens, attention_mask=mask).logits
        apart[kind] = float((logits - base)[mask.bool()].abs().max())
    assert apart["lora"] <= 1e-6 and apart["houlsby"] <= 1e-6
    assert apart["prefix"] > 1e-2


@pytest.mark.parametrize("name", SPECS)
def test_a_folder_behaves_as_what_was_trained(name: str, biased: ModelHandle, tmp_path: Path) -> None:
    """Written and read back, on top of the base or merged where that can be: the logits of the reference."""
    spec, data = SPECS[name], dataset()
    frozen = Frozen(biased, spec, Stream(0, "a"), "float32")
    theta = scattered(frozen)
    expected = reference(biased, spec, theta, data)
    frozen.write(tmp_path / "a", theta, {"path": str(biased.path), "digest": biased.digest, "name": "x"})
    tuned = models.resolve(str(tmp_path / "a"))
    tokens, mask, _ = padded(frozen.tokenizer, data)
    with torch.no_grad():
        apart = tuned.load().model(input_ids=tokens, attention_mask=mask).logits
    assert float((apart - expected["logits"])[expected["mask"]].abs().max()) <= 1e-4
    if spec.kind in adapters.UNMERGEABLE:
        with pytest.raises(ModelError, match="cannot be merged"):
            tuned.load(merge=True)
        with pytest.raises(ModelError, match="cannot be merged"):
            dict(tuned.tensors())
    else:
        with torch.no_grad():
            merged = tuned.load(merge=True).model(input_ids=tokens, attention_mask=mask).logits
        assert float((merged - expected["logits"])[expected["mask"]].abs().max()) <= 1e-4
        streamed = dict(tuned.tensors())
        assert all(np.array_equal(streamed[key], value) for key, value in theta.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_goes_with_a_cache_and_with_padding(attention: str, plain: ModelHandle, tmp_path: Path) -> None:
    """Token by token and in two pieces from a cache, with and without padding on the left: the logits of one call."""
    frozen = Frozen(plain, Spec("prefix", 0, size=LENGTH), Stream(0, "a"), "float32")
    frozen.write(tmp_path / "a", scattered(frozen, 0.5), {"path": str(plain.path), "digest": plain.digest, "name": "x"})
    model = models.resolve(str(tmp_path / "a")).load().model
    model.set_attn_implementation(attention)
    tokens = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        for cuts in ([7, 12], list(range(1, 13))):
            cache, begin, parts = DynamicCache(config=model.config), 0, []
            for end in cuts:
                parts.append(model(input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=True).logits)
                begin = end
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        left = torch.cat([torch.zeros((2, 3), dtype=torch.long), tokens], 1)
        mask = torch.cat([torch.zeros((2, 3), dtype=torch.long), torch.ones_like(tokens)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        shifted = model(input_ids=left, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(shifted, whole, rtol=1e-4, atol=1e-4)


def test_answers_are_generated_with_a_prefix(plain: ModelHandle) -> None:
    """`Frozen.generate`, which keeps keys and values of the text only, writes what one call a token writes."""
    spec, goal = Spec("prefix", 2, size=LENGTH), scoring.Goal("f1", 6)
    frozen = Frozen(plain, spec, Stream(0, "a"), "float32", goal=goal)
    frozen.trainables.set_one(scattered(frozen, 0.5))
    data = dataset(4)
    written = frozen.generate(frozen.begun("b", lambda: data))
    rows = answers.prompts_of(prompts.encode(frozen.tokenizer, data.examples, 128))
    for row, found in zip(rows, written, strict=True):
        expected: list[int] = []
        while len(expected) < 6:
            logits = frozen.model(input_ids=torch.tensor([[*row, *expected]])).logits
            token = int(logits[0, -1].argmax())
            if token in frozen.stops:
                break
            expected.append(token)
        assert found == expected


def test_slots_follow_the_model_to_a_device(plain: ModelHandle) -> None:
    frozen = Frozen(plain, Spec("houlsby", 1, size=4), Stream(0, "a"), "float32")
    layer = adapters.decoder_layers(frozen.model)[2].to("meta")
    assert all(slot.is_meta for slot in layer.get_submodule("mlp.down_proj").slots.values())


# Counts


def installed(spec: Spec) -> adapters.Trainables:
    """RoBERTa-base with a head of two labels, its shapes without its values."""
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    return adapters.install(model, spec, Stream(0, "a"))


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (Spec("lora", 0, 8, targets=("query", "value")), 887_042),
        (Spec("lora", 0, 16, targets=("query", "value")), 1_181_954),
        (Spec("houlsby", 0, size=16), 1_200_770),
        (Spec("houlsby", 0, size=64), 2_971_394),
        (Spec("prefix", 0, size=64), 1_179_648 + HEAD),
        (Spec("bitfit", 0), 694_274),
    ],
    ids=lambda value: f"{value.kind}-{value.rank}-{value.size}" if isinstance(value, Spec) else str(value),
)
def test_counts_of_roberta_base_are_the_papers(spec: Spec, count: int) -> None:
    """arXiv 2212.10025: the head of 592,130 values included."""
    found = installed(spec)
    assert found.size == count
    head = {name: array for name, array in found.initial.items() if name.startswith("classifier.")}
    assert sum(array.size for array in head.values()) == HEAD


def test_an_encoder_computes_with_what_is_put_in() -> None:
    """A small encoder classifier: every tensor that trains gets a gradient, and the start is neutral where it is in a
    decoder."""
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, type_vocab_size=1, num_labels=3,
    )  # fmt: skip
    tokens = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    for spec in (Spec("lora", 0, 4, targets=("query", "value")), *SPECS.values()):
        torch.manual_seed(0)
        model = RobertaForSequenceClassification(config).eval().requires_grad_(False)
        before = model(input_ids=tokens).logits
        trainables = adapters.install(model, spec, Stream(0, "a"))
        leaves = backprop.leaves_of(trainables.initial)
        trainables.set(leaves)
        logits = model(input_ids=tokens).logits
        assert (float((logits - before).detach().abs().max()) <= 1e-6) == (spec.kind != "prefix")
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        assert all(leaf.grad is not None for leaf in leaves.values()), spec.kind


# Refusals


def test_bitfit_without_biases_is_refused(plain: ModelHandle) -> None:
    with pytest.raises(ConfigError, match="no biases to train"):
        Frozen(plain, Spec("bitfit", 0), Stream(0, "a"), "float32")
    gains = Frozen(plain, Spec("bitfit", 0, norms=True), Stream(0, "a"), "float32")
    assert len(gains.initial) == 6 and all(name.endswith("layernorm.weight") for name in gains.initial)


@pytest.mark.parametrize("kind", ["houlsby", "prefix"])
def test_gguf_refuses_what_it_cannot_express(kind: str, plain: ModelHandle, tmp_path: Path) -> None:
    from edgellm_plugins.export.gguf import Config
    from edgellm_plugins.export.gguf import method as gguf

    frozen = Frozen(plain, Spec(kind, 1, size=4), Stream(0, "a"), "float32")
    note = {"path": str(plain.path), "digest": plain.digest, "name": "x"}
    frozen.write(tmp_path / "a", dict(frozen.initial), note)
    tuned = models.resolve(str(tmp_path / "a"))
    with pytest.raises(ModelError, match="GGUF lacks"):
        gguf.export(tuned, tmp_path / "a.gguf", Config(), Context(tmp_path))
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_of_another_model_is_refused(plain: ModelHandle, tmp_path: Path) -> None:
    frozen = Frozen(plain, Spec("houlsby", 1, size=4), Stream(0, "a"), "float32")
    note = {"path": str(plain.path), "digest": plain.digest, "name": "x"}
    frozen.write(tmp_path / "a", dict(frozen.initial), note)
    arrays, _ = store.load_arrays(tmp_path / "a" / adapters.WEIGHTS)
    moved = {name.replace("layers.2", "layers.9"): array for name, array in arrays.items()}
    store.save_arrays(tmp_path / "a" / adapters.WEIGHTS, moved, {})
    with pytest.raises(ModelError, match=r"the model has no model\.layers\.9"):
        models.resolve(str(tmp_path / "a")).load()

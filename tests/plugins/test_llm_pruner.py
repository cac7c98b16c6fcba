"""LLM-Pruner: groups, importance, budgets, the folder it writes, recovery, and the way on to a file on a device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.llm_pruner import Config, method
from edgellm_plugins.compression.llm_pruner.method import Gradient, Layer, choose, gradients, group_scores, structures
from edgellm_plugins.compression.pruned import FFN, Kept, attention, cut, shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgellm_sdk import checkpoint, store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.gguf_file import read as read_gguf
from edgellm_sdk.models import resolve
from edgellm_sdk.steps import delivery, recipe
from edgellm_sdk.types import Dataset, Example, ModelHandle

TEXT = "a small model learns on a small device from private messages, and classifies every one of them. "
TAYLOR = ("vector", "element-first", "element-second", "element-mix")


def llama(heads: int = 6, kv: int = 2, bias: bool = False, layers: int = 2, seed: int = 0) -> Any:
    """A random Llama in float64: hidden 72, heads of 8, FFN 40, vocabulary 50."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=72, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=8, attention_bias=bias, mlp_bias=bias, initializer_range=0.2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
    return model


IDS = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(5))


def members_of(heads: set[int], channels: set[int], repeat: int, head: int) -> list[tuple[str, int, list[int]]]:
    """The sheet's table written down by hand: (module, axis, indices) of the groups that go."""
    q = [i for g in heads for i in range(g * repeat * head, (g + 1) * repeat * head)]
    kv = [i for g in heads for i in range(g * head, (g + 1) * head)]
    c = sorted(channels)
    return [
        ("self_attn.q_proj", 0, q), ("self_attn.k_proj", 0, kv), ("self_attn.v_proj", 0, kv),
        ("self_attn.o_proj", 1, q), ("mlp.gate_proj", 0, c), ("mlp.up_proj", 0, c), ("mlp.down_proj", 1, c),
    ]  # fmt: skip


def rest(layer: int, heads: set[int], channels: set[int], kv: int, ffn: int) -> Kept:
    return Kept(layer, tuple(i for i in range(kv) if i not in heads), tuple(i for i in range(ffn) if i not in channels))


# Groups


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "kv"), [(6, 2), (9, 3), (4, 4)])
@pytest.mark.parametrize(
    ("gone", "channels"), [({1}, set()), (set(), {0, 7, 39}), ({0}, {3, 4, 5})], ids=["attention", "ffn", "both"]
)
def test_masking_a_group_is_deleting_it(gone: set[int], channels: set[int], heads: int, kv: int, bias: bool) -> None:
    """Zeroed members, biases of rows among them, against rows and columns that are not there: the same logits."""
    masked, deleted = llama(heads, kv, bias), llama(heads, kv, bias)
    for number, layer in enumerate(masked.model.layers):
        for module, axis, places in members_of(gone, channels, heads // kv, 8):
            linear = layer.get_submodule(module)
            (linear.weight if axis == 0 else linear.weight.t())[places] = 0
            if axis == 0 and linear.bias is not None:
                linear.bias[places] = 0
        cut(deleted.model.layers[number], rest(number, gone, channels, kv, 40))
    assert shape(deleted.model.layers[0]) == (kv - len(gone), heads // kv, 8, 40 - len(channels))
    with torch.no_grad():
        difference = (masked(IDS).logits - deleted(IDS).logits).abs().max()
        assert difference < 1e-12 and (deleted(IDS).logits - llama(heads, kv, bias)(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TAYLOR)
def test_a_group_that_feeds_nothing_is_free_and_scores_nothing(kind: str) -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 5] = 0
        layer.self_attn.o_proj.weight[:, 24:48] = 0  # key-value head 1 with its three query heads of 8
    layers = [Layer(layer, rest(i, set(), set(), 2, 40), 2, 40) for i, layer in enumerate(model.model.layers)]
    method.score(layers, model, IDS, Config(importance=kind), Context(Path()), 0)
    before = model(IDS).logits
    for number, layer in enumerate(layers):
        assert float(layer.scores["heads"][1]) == 0 and float(layer.scores["channels"][5]) == 0
        assert float(layer.scores["heads"][0]) > 0 and int((layer.scores["channels"] == 0).sum()) == 1
        cut(layer.module, rest(number, {1}, {5}, 2, 40))
    assert (model(IDS).logits - before).abs().max() < 1e-12


def test_query_heads_belong_to_the_key_value_head_they_use() -> None:
    """9 query heads on 3: importance on heads 0, 1, 2 alone is key-value head 0's. Adding up heads 0, 3, 6 for it, as
    the code does, would give every group a third."""
    members = attention(3, 8)
    parts = [(m, torch.zeros(m.width * 3, dtype=torch.float64)) for m in members]
    for place in (0, 3):  # rows of q_proj, columns of o_proj
        parts[place][1][: 3 * 8] = 1
    assert group_scores(parts, "sum").tolist() == [48, 0, 0]
    assert group_scores(parts, "max").tolist() == [24, 0, 0]
    assert group_scores(parts, "last").tolist() == [24, 0, 0]
    assert group_scores(parts, "prod").tolist() == [0, 0, 0]


def test_aggregation_by_hand() -> None:
    parts = [(m, torch.tensor(v, dtype=torch.float64)) for m, v in zip(FFN, ([1, 2], [3, 5], [7, 1]), strict=True)]
    found = {name: group_scores(parts, name).tolist() for name in ("sum", "max", "prod", "last")}
    assert found == {"sum": [11, 8], "max": [7, 5], "prod": [21, 10], "last": [7, 1]}


# Importance


def test_the_expansion_is_exact_for_a_quadratic_loss() -> None:
    """One linear layer, squared loss, true Hessian diagonal: |w g - w^2 H / 2| is the loss that one weight costs."""
    draw = torch.Generator().manual_seed(0)
    x, w, y = (torch.randn(n, generator=draw, dtype=torch.float64) for n in ((20, 6), (1, 6), (20, 1)))

    def loss(weight: Tensor) -> Tensor:
        return (x @ weight.t() - y).square().mean()

    g = torch.func.grad(loss)(w)
    hessian = (2 * x.square().mean(0))[None]
    scores = structures("element-mix", w.detach(), Gradient(g, hessian), 1)
    for column in range(6):
        without = w.detach().clone()
        without[0, column] = 0
        assert abs(abs(float(loss(without) - loss(w))) - float(scores[column])) < 1e-10
    first = structures("element-first", w.detach(), Gradient(g), 1)
    second = structures("element-second", w.detach(), Gradient(g, hessian), 1)
    assert torch.allclose(first, (w * g).abs()[0].detach()) and torch.allclose(
        second, (w.square() * hessian)[0].detach()
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 1), st.integers(1, 6), st.integers(1, 6))
def test_a_vector_never_scores_more_than_its_elements(seed: int, axis: int, rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(rows, columns, generator=draw, dtype=torch.float64) for _ in range(2))
    vector, element = (structures(kind, w, Gradient(g), axis) for kind in ("vector", "element-first"))
    product = w * g
    one_sign = ((product >= 0).all(1 - axis)) | ((product <= 0).all(1 - axis))
    cancelled = torch.minimum(product.clamp(min=0).sum(1 - axis), (-product).clamp(min=0).sum(1 - axis))
    assert torch.allclose(element - vector, 2 * cancelled)  # 0 where all have one sign, else above
    assert ((cancelled > 0) == ~one_sign).all()
    assert torch.allclose(structures("l2", w, None, axis), w.square().sum(1 - axis).sqrt())


def test_gradients_are_the_mean_and_the_mean_of_squares() -> None:
    """Against torch.func window by window: F is the mean of squared gradients, not the square of the mean."""
    model = llama()
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    weights = [model.get_parameter(name) for name in names]
    found = gradients(model, weights, IDS, second=True)
    assert all(w.grad is None and not w.requires_grad and not w._post_accumulate_grad_hooks for w in weights)

    def loss(values: dict[str, Tensor], window: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, (window[None],)).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, window[1:])

    each = [torch.func.grad(loss)({n: w.detach() for n, w in zip(names, weights, strict=True)}, row) for row in IDS]
    for name, gradient in zip(names, found, strict=True):
        stacked = torch.stack([grads[name] for grads in each])
        assert gradient.squares is not None
        # transformers takes its loss from logits in float32
        assert torch.allclose(gradient.mean, stacked.mean(0), rtol=1e-5, atol=1e-7)
        assert torch.allclose(gradient.squares, stacked.square().mean(0), rtol=1e-5, atol=1e-8)
        assert not torch.allclose(gradient.squares, stacked.mean(0).square(), rtol=0.1)
    assert gradients(model, weights, IDS, second=False)[0].squares is None


# Budgets


def smollm2_block() -> Any:
    """One of SmolLM2's 30, without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).model.layers[0]


def test_sizes_of_groups_are_those_of_smollm2() -> None:
    """Hidden 576, 9 heads on 3 of 64, FFN 1536: 294 912 weights a key-value head, 1 728 a channel."""
    layer = Layer(smollm2_block(), rest(0, set(), set(), 3, 1536), 3, 1536)
    assert (layer.parameters("heads"), layer.parameters("channels")) == (294_912, 1_728)
    assert 3 * 294_912 + 1536 * 1_728 == 3_538_944


@pytest.mark.parametrize(("heads", "channels", "lost"), [(1, 0, 294_912), (0, 384, 384 * 1_728)])
def test_a_cut_takes_what_its_groups_hold(heads: int, channels: int, lost: int) -> None:
    block = smollm2_block()
    before = sum(p.numel() for p in block.parameters())
    cut(block, rest(0, set(range(heads)), set(range(channels)), 3, 1536))
    assert before - sum(p.numel() for p in block.parameters()) == lost


def fake(scores: list[list[float]]) -> list[Layer]:
    layers = []
    for number, row in enumerate(scores):
        layer = Layer(torch.nn.Identity(), Kept(number, tuple(range(len(row))), ()), len(row), 0)
        layer.scores["heads"] = torch.tensor(row, dtype=torch.float64)
        layers.append(layer)
    return layers


def test_three_heads_a_layer_do_not_round_to_nothing() -> None:
    """A quarter of 3 heads is less than one in each of 4 layers, and 3 of the 12: the cheapest layers lose one."""
    layers = fake([[9, 8, 7], [1, 9, 9], [9, 2, 9], [5, 6, 5]])
    assert method.lose(layers, "heads", 3, 1, "local") == [set(), {0}, {1}, {0}]
    layers = fake([[1, 1, 7], [2, 9, 9], [9, 9, 9], [5, 6, 5]])
    assert method.lose(layers, "heads", 3, 1, "local") == [{0}, {0}, set(), {0}]  # at most one more than the share
    assert method.lose(layers, "heads", 3, 1, "global") == [{0, 1}, {0}, set(), set()]
    assert method.lose(layers, "heads", 99, 1, "global") == [{0, 1}, {0, 1}, {0, 1}, {0, 2}]  # one always stays


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_chosen_is_the_amount_and_the_cheapest(data: Any) -> None:
    size = data.draw(st.integers(1, 4), "size")
    counts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5), "counts")
    costs = [data.draw(st.lists(st.floats(0, 9), min_size=n, max_size=n)) for n in counts]
    runs = [method.runs_of(torch.tensor(row, dtype=torch.float64), size) for row in costs]
    possible = sum(len(places) for row in runs for _, places in row[:-1])
    amount = data.draw(st.integers(0, possible), "amount")
    gone = choose(runs, amount, None)
    assert abs(sum(map(len, gone)) - amount) <= max(size / 2, min(size, amount) if size > 1 else 0)
    for row, places, ordered in zip(costs, gone, runs, strict=True):
        assert (len(row) - len(places)) % size == 0 or not places and len(row) % size  # widths are multiples
        assert len(places) < len(row) and sorted(p for _, run in ordered for p in run) == list(range(len(row)))
        left = [row[p] for p in range(len(row)) if p not in places]
        assert not places or max(row[p] for p in places) <= min(left)
        assert all(a <= b for (a, _), (b, _) in zip(ordered, ordered[1:], strict=False))


# The folder


@pytest.fixture
def model(make_tiny_llama: Any, tmp_path: Path) -> ModelHandle:
    return resolve(str(make_tiny_llama(tmp_path / "model", layers=4)))


def compressed(handle: ModelHandle, folder: Path, text: Path | str, **options: Any) -> ModelHandle:
    given = {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text), **options}
    return method.compress(handle, None, build(Config, given, "llm-pruner"), Context(folder, seed=1))


@pytest.mark.parametrize("importance", [*TAYLOR, "l2", "random"])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_counts_widths_and_weights_of_what_is_written(
    importance: str, ranking: str, model: ModelHandle, text: Path, tmp_path: Path
) -> None:
    """Removed weights are the groups' sizes and the ratio's, to half a run; what stays is the source's, bit for bit."""
    handle = compressed(model, tmp_path / "run", text, ratio=0.3, importance=importance, ranking=ranking, multiple=16)
    told = json.loads((tmp_path / "run" / "pruned.json").read_text())
    heads = sum(2 - len(row["heads"]) for row in told["kept"])
    channels = sum(128 - len(row["channels"]) for row in told["kept"])
    removed = heads * 16 * 64 * (2 + 2 * 2) + channels * 3 * 64
    assert heads and channels and model.parameters - handle.parameters == removed
    body = 4 * (2 * 16 * 64 * 6 + 128 * 3 * 64)
    assert abs(removed - 0.3 * body) <= 16 * 3 * 64 / 2
    assert all(len(row["channels"]) % 16 == 0 for row in told["kept"])
    if ranking == "local":
        assert max(told["channels"]) - min(told["channels"]) <= 16
    old, new = (checkpoint.inspect(h.path) for h in (model, handle))
    assert set(old.tensors) == set(new.tensors)
    for number, row in enumerate(told["kept"]):
        for module, axis, places in members_of(set(row["heads"]), set(row["channels"]), 2, 16):
            name = f"model.layers.{number}.{module}.weight"
            assert np.array_equal(new.array(name), old.array(name).take(places, axis)), name
    for name in ("model.embed_tokens.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        assert np.array_equal(new.array(name), old.array(name))
    assert handle.load().tokenizer is not None and not handle.adapters


def test_what_is_loaded_is_what_was_cut(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    """The folder against the live model cut by hand at the places that the record names."""
    handle = compressed(model, tmp_path / "run", text, ratio=0.4, iterations=3)
    live = model.load().model
    for layer, row in zip(
        live.model.layers, json.loads((tmp_path / "run" / "pruned.json").read_text())["kept"], strict=True
    ):
        cut(layer, Kept(0, tuple(row["heads"]), tuple(row["channels"])))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(live(ids).logits, handle.load().model(ids).logits)


def test_a_pruned_model_can_be_pruned_again(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    once = compressed(model, tmp_path / "one", text, ratio=0.25)
    twice = compressed(once, tmp_path / "two", text, ratio=0.2, importance="element-mix")
    assert twice.parameters < once.parameters < model.parameters
    assert torch.isfinite(twice.load().model(torch.arange(9)[None]).logits).all()


def test_stored_precision_and_adapters(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    """bfloat16 stays bfloat16; an adapter is merged before anything is judged or cut."""
    half = tmp_path / "half"
    shutil.copytree(model.path, half)
    from safetensors.torch import load_file, save_file

    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    assert compressed(resolve(str(half)), tmp_path / "a", text).dtype == "bfloat16"
    adapter, prefix = tmp_path / "adapter", "base_model.model.model.layers.1.mlp.down_proj"
    rng = np.random.default_rng(0)
    factors = {
        f"{prefix}.lora_A.weight": rng.standard_normal((4, 128)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.standard_normal((64, 4)).astype(np.float32),
    }
    store.save_arrays(adapter / "adapter_model.safetensors", factors, {})
    store.write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    handle = compressed(replace(model, adapters=(adapter,)), tmp_path / "b", text)
    kept = json.loads((tmp_path / "b" / "pruned.json").read_text())["kept"][1]["channels"]
    merged = checkpoint.inspect(model.path).array("model.layers.1.mlp.down_proj.weight")
    merged = merged + 2 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
    assert handle.adapters == ()
    assert np.allclose(
        checkpoint.inspect(handle.path).array("model.layers.1.mlp.down_proj.weight"), merged[:, kept], atol=1e-5
    )


def test_the_random_baseline_follows_the_seed(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        config = Config(importance="random", calibration_text=str(text), calibration_length=32, calibration_samples=2)
        return method.compress(model, None, config, Context(tmp_path / name, seed=seed)).digest

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0.95}, ConfigError, "weights at most"),
        ({"spare_first": 4}, ConfigError, "leave none"),
        ({"ratio": 0.6, "attention": False, "multiple": 128}, ConfigError, "--multiple"),
        ({"calibration_length": 30000}, DataError, "one window needs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str, model: ModelHandle, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        compressed(model, tmp_path / "run", text, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "model").exists()


def test_models_it_cannot_prune_are_refused(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GGUF file cannot be compressed again"):
        compressed(replace(model, format="gguf"), tmp_path / "a", text)
    from edgellm_sdk.kit.conformance_runs import tiny_blocks

    with pytest.raises(ModelError, match="already quantised"):
        compressed(tiny_blocks(), tmp_path / "b", text)
    with pytest.raises(DataError, match="nothing to calibrate on"):
        compressed(model, tmp_path / "c", "")
    fused = torch.nn.Module()
    fused.self_attn = torch.nn.Module()
    with pytest.raises(ModelError, match="other parts than a Llama's"):
        shape(fused)
    loaded = model.load().model
    loaded.model.layers[3].mlp.down_proj.weight.fill_(float("nan"))
    layers = [Layer(loaded.model.layers[3], rest(3, set(), set(), 2, 128), 2, 128)]
    with pytest.raises(ModelError, match="not finite"):
        method.score(layers, loaded, torch.arange(32).view(2, 16), Config(), Context(tmp_path), 0)


# Recovery and the way on


def messages() -> Dataset:
    rows = tuple(Example("", f"{TEXT}{n} pounds") for n in range(40))
    return Dataset(rows, "f", "my.jsonl")


def test_recovery_lowers_the_loss_and_merges_without_changing_it(model: ModelHandle, tmp_path: Path) -> None:
    options = {"ratio": 0.4, "calibration_samples": 4, "calibration_length": 32, "recovery_length": 48}
    plain = method.compress(model, messages(), build(Config, options, "llm-pruner"), Context(tmp_path / "a", seed=1))
    ctx = Context(tmp_path / "b", seed=1)
    asked = build(Config, options | {"recovery_steps": 30, "recovery_rate": 5e-3}, "llm-pruner")
    back = method.compress(model, messages(), asked, ctx)
    windows = layerwise.calibration(model.load().tokenizer, messages(), "", 8, 32, Context(tmp_path, seed=9))

    def loss(handle: ModelHandle) -> float:
        with torch.no_grad():
            return float(handle.load().model(input_ids=windows, labels=windows).loss)

    assert loss(back) < 0.8 * loss(plain)
    assert back.parameters == plain.parameters and back.path == tmp_path / "b" / "model" and not back.adapters
    assert not (tmp_path / "b" / "recovery").exists()
    curve = ctx.curves["held-out loss over recovery steps"]
    assert [x for x, _ in curve] == [0, 8, 15, 23, 30] and f"{min(y for _, y in curve):.4f}" in ctx.notes[-1]
    frozen = json.loads((tmp_path / "b" / "pruned.json").read_text())["kept"]
    assert frozen == json.loads((tmp_path / "a" / "pruned.json").read_text())["kept"]


def test_recovery_keeps_the_best_state_and_merges_it_exactly(
    model: ModelHandle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that ruins the model: the start is the best state and the model stays what pruning left, in every bit."""
    plain = compressed(model, tmp_path / "a", text)
    back = compressed(
        model, tmp_path / "b", text, recovery_steps=4, recovery_length=32, recovery_rate=30.0, recovery_checks=2
    )
    old, new = (checkpoint.inspect(h.path) for h in (plain, back))
    assert all(np.array_equal(old.array(name), new.array(name)) for name in old.tensors)
    from edgellm_plugins.compression import recovery

    logits: list[Tensor] = []
    ids = torch.arange(40)[None]
    original = recovery.objective.written

    def spy(*arguments: Any) -> ModelHandle:
        adapted = original(*arguments)
        logits.append(adapted.load().model(ids).logits)
        return adapted

    monkeypatch.setattr(recovery.objective, "written", spy)
    merged = compressed(model, tmp_path / "c", text, recovery_steps=8, recovery_length=32, recovery_rate=5e-3)
    assert len(logits) == 1
    after = merged.load().model(ids).logits
    assert (after - logits[0]).abs().max() < 1e-4
    perplexities = [F.cross_entropy(found[0, :-1], ids[0, 1:]).exp() for found in (after, logits[0])]
    assert abs(perplexities[0] / perplexities[1] - 1) < 1e-3
    assert (merged.load().model(ids).logits - plain.load().model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("plugin", ["llm-pruner", "depth-prune"])
def test_a_recovered_model_is_the_same_in_every_byte(plugin: str) -> None:
    from edgellm_sdk.kit.conformance import checks

    options = {"recovery_steps": 3, "recovery_length": 32, "recovery_checks": 2}
    named = {check.__name__: check for check in checks(plugin, options)}
    named["compress_repeats"]()


def test_recovery_needs_examples_and_a_finite_loss(model: ModelHandle, tmp_path: Path) -> None:
    options = {"calibration_samples": 1, "calibration_length": 16, "recovery_steps": 2}
    with pytest.raises(DataError, match="fewer than two examples"):
        method.compress(model, messages().select([0]), build(Config, options, "llm-pruner"), Context(tmp_path / "a"))
    options |= {"recovery_rate": 1e30, "recovery_length": 32}
    with pytest.raises(ModelError, match="not finite"):
        method.compress(model, messages(), build(Config, options, "llm-pruner"), Context(tmp_path / "b"))


def test_pruned_recovered_quantised_exported_and_run(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    """The whole chain in one recipe, the gate at its end; the file holds one array entry a layer."""
    pytest.importorskip("llama_cpp")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"{TEXT}{n}"}) + "\n" for n in range(24)))
    (tmp_path / "chain.toml").write_text(f"""
[[step]]
name = "pruned"
verb = "compress"
plugin = "llm-pruner"
model = "{model.path}"
data = "{tmp_path / "data.jsonl"}"
[step.options]
ratio = 0.3
calibration_samples = 4
calibration_length = 32

[[step]]
name = "recovered"
verb = "finetune"
plugin = "lora"
data = "{tmp_path / "data.jsonl"}"
rounds = 2
watch = 0

[[step]]
name = "small"
verb = "compress"
plugin = "gptq"
data = "{tmp_path / "data.jsonl"}"
[step.options]
calibration_samples = 4
calibration_length = 32

[[step]]
name = "file"
verb = "export"
plugin = "gguf"
""")
    outcomes = recipe.run(tmp_path / "chain.toml", tmp_path / "out")
    file = read_gguf(tmp_path / "out" / "file.gguf")
    widths = json.loads((tmp_path / "out" / "pruned" / "pruned.json").read_text())
    assert file.metadata["general.architecture"] == "deci"
    assert list(file.metadata["deci.feed_forward_length"]) == widths["channels"]
    assert list(file.metadata["deci.attention.head_count_kv"]) == widths["key-value heads"]
    assert {file.tensors[f"blk.{i}.ffn_down.weight"].type for i in range(4)} == {"Q4_0"}
    assert outcomes[-1].report.verified["passed"]


def test_half_precision_logits_are_those_of_torch(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    handle = compressed(model, tmp_path / "run", text, ratio=0.35)
    done = delivery.export("gguf", str(handle.path), tmp_path / "m.gguf", options={"type": "f16"})
    assert done.report.verified["passed"]
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = list(range(3, 35))
    engine.eval(ids)
    with torch.no_grad():
        want = handle.load().model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine.scores[:32] - want).max() < 1e-2

"""Depth pruning: block influence, the greedy way, the model that is left, and llama.cpp's own removal of blocks."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.compression.depth_prune import Config, method

from edgellm_sdk import checkpoint
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.gguf_file import read as read_gguf
from edgellm_sdk.models import resolve
from edgellm_sdk.steps import delivery
from edgellm_sdk.types import Dataset, Example, ModelHandle

TEXT = "a small model learns on a small device from private messages, and classifies every one of them. "
IDS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(make_tiny_llama: Any, tmp_path: Path) -> ModelHandle:
    return resolve(str(make_tiny_llama(tmp_path / "model", layers=5)))


def compressed(handle: ModelHandle, folder: Path, **options: Any) -> ModelHandle:
    data = Dataset(tuple(Example("", f"{TEXT}{n} pounds") for n in range(40)), "f", "my.jsonl")
    given = {"calibration_samples": 4, "calibration_length": 32, **options}
    return method.compress(handle, data, build(Config, given, "depth-prune"), Context(folder, seed=1))


def silent(model: Any, number: int) -> None:
    """Make a block hand on what it is given."""
    layer = model.model.layers[number]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def test_influence_is_one_minus_the_mean_cosine(model: ModelHandle) -> None:
    """Against transformers' own hidden states, token by token in numpy (its last one is behind the final norm)."""
    loaded = model.load().model
    found = method.influence(loaded, IDS)
    assert not any(layer._forward_hooks for layer in loaded.model.layers)
    with torch.no_grad():
        states = [h.double().numpy() for h in loaded(IDS, output_hidden_states=True).hidden_states]
    for number in range(4):
        a, b = states[number].reshape(-1, 64), states[number + 1].reshape(-1, 64)
        cosines = [float(x @ y / np.sqrt((x @ x) * (y @ y))) for x, y in zip(a, b, strict=True)]
        assert abs(found[number] - (1 - sum(cosines) / len(cosines))) < 1e-9
    assert len(found) == 5 and all(0 < value < 2 for value in found)


def test_a_block_that_does_nothing_has_no_influence_and_goes_for_nothing(model: ModelHandle, tmp_path: Path) -> None:
    loaded = model.load().model
    silent(loaded, 2)
    assert abs(method.influence(loaded, IDS)[2]) < 1e-12
    with torch.no_grad():
        before = loaded(IDS).logits
        with method.without(loaded.model.layers, [2]):
            assert torch.equal(loaded(IDS).logits, before)
        with method.without(loaded.model.layers, [1]):
            assert (loaded(IDS).logits - before).abs().max() > 1e-3
        assert torch.equal(loaded(IDS).logits, before)
    from safetensors.torch import load_file, save_file

    tensors = load_file(model.path / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, model.path / "model.safetensors", metadata={"format": "pt"})
    handle = compressed(resolve(str(model.path)), tmp_path / "run", layers=1)
    assert json.loads((tmp_path / "run" / "pruned.json").read_text())["removed"] == [2]
    assert torch.equal(handle.load().model(IDS).logits, before)


def test_greedy_removes_what_costs_least_and_judges_anew(model: ModelHandle, tmp_path: Path) -> None:
    """By brute force: models rebuilt from a list without the blocks, every pair in the order that greedy takes."""
    loaded = model.load().model
    gone, losses = method.greedy(loaded, IDS, 2, Context(Path()))

    def loss_without(numbers: list[int]) -> float:
        other = model.load().model
        other.model.layers = torch.nn.ModuleList(l for i, l in enumerate(other.model.layers) if i not in numbers)
        with torch.no_grad():
            return float(other(input_ids=IDS, labels=IDS, use_cache=False).loss)

    first = [loss_without([i]) for i in range(5)]
    assert gone[0] == int(np.argmin(first)) and abs(losses[0] - min(first)) < 1e-5
    second = {i: loss_without([gone[0], i]) for i in range(5) if i != gone[0]}
    assert gone[1] == min(second, key=lambda i: second[i]) and abs(losses[1] - second[gone[1]]) < 1e-5
    assert not any("forward" in layer.__dict__ for layer in loaded.model.layers)
    compressed(model, tmp_path / "run", layers=2, score="loss")
    told = json.loads((tmp_path / "run" / "pruned.json").read_text())
    assert len(told["removed"]) == len(told["loss after each"]) == 2


@pytest.mark.parametrize(("options", "count"), [({"layers": 2}, 2), ({"ratio": 0.4}, 2), ({"ratio": 0.0}, 0)])
def test_what_is_left_is_the_source_numbered_anew(
    options: dict[str, Any], count: int, model: ModelHandle, tmp_path: Path
) -> None:
    handle = compressed(model, tmp_path / "run", **options)
    told = json.loads((tmp_path / "run" / "pruned.json").read_text())
    assert len(told["removed"]) == count
    lowest = np.argsort(told["influence"], kind="stable")[:count].tolist()
    assert told["removed"] == lowest
    stay = [i for i in range(5) if i not in lowest]
    config = json.loads((handle.path / "config.json").read_text())
    assert config["num_hidden_layers"] == 5 - count and "edgellm_widths" not in config
    old, new = checkpoint.inspect(model.path), checkpoint.inspect(handle.path)
    for place, number in enumerate(stay):
        parts = [name.split(".", 3)[3] for name in old.tensors if name.startswith(f"model.layers.{number}.")]
        assert len(parts) == 9
        for part in parts:
            want, got = old.array(f"model.layers.{number}.{part}"), new.array(f"model.layers.{place}.{part}")
            assert np.array_equal(want, got)
    live = model.load().model
    with torch.no_grad(), method.without(live.model.layers, lowest):
        assert torch.equal(live(IDS).logits, handle.load().model(IDS).logits)


def test_layers_of_several_kinds_keep_theirs(tmp_path: Path, model: ModelHandle) -> None:
    """A model whose blocks attend differently: what is left attends as it did."""
    import shutil

    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    settings = Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=kinds, sliding_window=8, use_sliding_window=True, max_position_embeddings=64,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path / "qwen2"
    Qwen2ForCausalLM(settings).save_pretrained(folder)
    for name in checkpoint.SIDE_FILES:
        if name not in ("config.json", "generation_config.json") and (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    handle = compressed(resolve(str(folder)), tmp_path / "run", layers=1)
    removed = json.loads((tmp_path / "run" / "pruned.json").read_text())["removed"]
    config = json.loads((handle.path / "config.json").read_text())
    assert config["layer_types"] == [kind for i, kind in enumerate(kinds) if i not in removed]
    live = resolve(str(folder)).load().model
    with torch.no_grad(), method.without(live.model.layers, removed):
        assert torch.equal(live(IDS).logits, handle.load().model(IDS).logits)


def test_blocks_of_a_width_pruned_model_keep_their_widths(model: ModelHandle, tmp_path: Path) -> None:
    from edgellm_plugins.compression.llm_pruner import Config as Width
    from edgellm_plugins.compression.llm_pruner import method as width

    data = Dataset(tuple(Example("", f"{TEXT}{n}") for n in range(20)), "f")
    given = {"calibration_samples": 4, "calibration_length": 32, "ratio": 0.3, "ranking": "global"}
    narrow = width.compress(model, data, build(Width, given, "llm-pruner"), Context(tmp_path / "narrow", seed=1))
    before = json.loads((tmp_path / "narrow" / "pruned.json").read_text())
    handle = compressed(narrow, tmp_path / "run", layers=2)
    told = json.loads((tmp_path / "run" / "pruned.json").read_text())
    stay = [i for i in range(5) if i not in told["removed"]]
    assert len(set(before["channels"])) > 1
    assert told["channels"] == [before["channels"][i] for i in stay]
    assert told["heads"] == [before["heads"][i] for i in stay]
    live = narrow.load().model
    with torch.no_grad(), method.without(live.model.layers, told["removed"]):
        assert torch.equal(live(IDS).logits, handle.load().model(IDS).logits)


def test_llama_cpp_removes_the_same_blocks(model: ModelHandle, tmp_path: Path) -> None:
    """`prune_layers` of llama.cpp's quantiser on the whole file, and our file of the pruned folder: the same logits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    handle = compressed(model, tmp_path / "run", layers=2)
    removed = sorted(json.loads((tmp_path / "run" / "pruned.json").read_text())["removed"])
    delivery.export("gguf", str(model.path), tmp_path / "whole.gguf", options={"type": "f32"}, gate=False)
    done = delivery.export("gguf", str(handle.path), tmp_path / "ours.gguf", options={"type": "f32"})
    assert done.report.verified["passed"]
    assert read_gguf(tmp_path / "ours.gguf").metadata["general.architecture"] == "llama"
    parameters = llama_cpp.llama_model_quantize_default_params()
    numbers = (ctypes.c_int32 * (len(removed) + 1))(*removed, -1)
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, 1
    parameters.prune_layers = ctypes.cast(numbers, type(parameters.prune_layers))
    paths = [str(tmp_path / name).encode() for name in ("whole.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) == 0
    ours, theirs = (read_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        assert np.array_equal(ours.tensor_bytes(name), theirs.tensor_bytes(name)), name
    scores = []
    for name in ("ours", "theirs"):
        engine = llama_cpp.Llama(str(tmp_path / f"{name}.gguf"), n_ctx=64, logits_all=True, verbose=False)
        engine.eval(list(range(3, 35)))
        scores.append(engine.scores[:32].copy())
    assert np.array_equal(*scores)


def test_recovery_works_here_as_well(model: ModelHandle, tmp_path: Path) -> None:
    plain = compressed(model, tmp_path / "a", layers=2)
    back = compressed(model, tmp_path / "b", layers=2, recovery_steps=20, recovery_rate=5e-3, recovery_length=48)
    tokens = back.load().tokenizer(TEXT + "7 pounds", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [float(h.load().model(input_ids=tokens, labels=tokens).loss) for h in (plain, back)]
    assert losses[1] < 0.9 * losses[0] and back.parameters == plain.parameters


def test_what_cannot_be_done_is_said(model: ModelHandle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 of 5 blocks would go"):
        compressed(model, tmp_path / "a", layers=5)
    with pytest.raises(ConfigError, match="leave at least one"):
        compressed(model, tmp_path / "a", layers=9)
    with pytest.raises(ConfigError, match="score"):
        compressed(model, tmp_path / "a", score="luck")
    with pytest.raises(DataError, match="one window needs"):
        compressed(model, tmp_path / "a", calibration_length=30000)
    from edgellm_sdk.kit.conformance_runs import tiny_blocks

    with pytest.raises(ModelError, match="already quantised"):
        compressed(tiny_blocks(), tmp_path / "a")
    assert not (tmp_path / "a" / "model").exists()

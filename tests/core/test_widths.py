"""Layers of different widths: what config.json may say, that a folder loads so, and that the file runs so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgellm_sdk import ledger, widths
from edgellm_sdk.errors import ModelError
from edgellm_sdk.gguf_file import read as read_gguf
from edgellm_sdk.models import resolve
from edgellm_sdk.steps.delivery import export
from edgellm_sdk.types import ModelHandle
from edgellm_sdk.widths import Widths

CONFIG = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 128}  # fmt: skip
UNEVEN = (Widths(4, 2, 128), Widths(2, 1, 96), Widths(4, 2, 64))


def narrowed(source: Path, target: Path, rows: tuple[Widths, ...]) -> ModelHandle:
    """The first heads and channels of every layer of `source`, cut here by slices and not by the pruners."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(widths.written(config, rows)))
    tensors = load_file(source / "model.safetensors")
    for number, row in enumerate(rows):
        sizes = {"q_proj": row.heads * 16, "k_proj": row.kv_heads * 16, "v_proj": row.kv_heads * 16,
                 "gate_proj": row.ffn, "up_proj": row.ffn}  # fmt: skip
        for name in [name for name in tensors if name.startswith(f"model.layers.{number}.")]:
            part = name.split(".")[-2]
            if part in sizes:
                tensors[name] = tensors[name][: sizes[part]].contiguous()
            elif part in ("o_proj", "down_proj"):
                size = row.heads * 16 if part == "o_proj" else row.ffn
                tensors[name] = tensors[name][:, :size].contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(target))


@pytest.fixture
def uneven(make_tiny_llama: Any, tmp_path: Path) -> ModelHandle:
    return narrowed(make_tiny_llama(tmp_path / "whole", layers=3), tmp_path / "uneven", UNEVEN)


@given(
    st.lists(
        st.builds(lambda kv, r, n: Widths(kv * r, kv, n), st.integers(1, 9), st.integers(1, 4), st.integers(1, 999)),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_what_is_written_is_read(rows: list[Widths]) -> None:
    config = widths.written(CONFIG, rows)
    assert widths.read(json.loads(json.dumps(config)), "m") == tuple(rows)
    assert config["head_dim"] == 16  # named, because hidden / heads no longer gives it
    assert config["hidden_size"] % config["num_attention_heads"] == 0  # transformers refuses anything else
    assert widths.written(config, rows) == config
    assert (widths.TABLE in config) or not widths.uneven(rows)


def test_a_plain_config_has_equal_layers() -> None:
    assert widths.read(CONFIG, "m") == (Widths(4, 2, 128),) * 3
    assert not widths.uneven(widths.read(CONFIG, "m"))
    without = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert widths.read(without, "m")[0] == Widths(4, 4, 128)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "not a table"),
        ({"3": {}}, "'3'"),
        ({"-1": {}}, "'-1'"),
        ({"٣": {}}, "entry"),
        ({"1": {}, "01": {}}, "'01'"),
        ({"1": 7}, "'1'"),
        ({"1": {"sliding_window": 7}}, "sets 'sliding_window' for layer 1"),
        ({"1": {"intermediate_size": 0}}, "layer 1 has intermediate_size = 0"),
        ({"1": {"intermediate_size": True}}, "True"),
        ({"1": {"intermediate_size": 1 << 40}}, "layer 1"),
        ({"1": {"num_attention_heads": 3}}, "3 heads on 2 key-value heads"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        widths.read({**CONFIG, widths.TABLE: table or [0]}, "m")


def test_a_number_of_layers_that_cannot_be_meant_is_refused() -> None:
    for layers in (0, 1 << 30, True, None, "3"):
        with pytest.raises(ModelError, match="num_hidden_layers"):
            widths.read({**CONFIG, "num_hidden_layers": layers}, "m")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("deci.feed_forward_length", ("array[u32]", [128, 96]), "lacks the int"),
        ("deci.feed_forward_length", ("array[f32]", [128.0, float("nan"), 64.0]), "lacks the int"),
        ("deci.attention.head_count", ("array[u32]", [4, 0, 4]), "layer 1 has num_attention_heads = 0"),
        ("deci.attention.head_count_kv", ("array[u32]", [2, 0, 2]), "num_key_value_heads = 0"),
        ("deci.block_count", ("u32", 4_000_000_000), "4000000000 layers"),
    ],
)
def test_a_file_whose_arrays_cannot_be_meant_is_refused(
    key: str, value: tuple[str, Any], message: str, uneven: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_plugins.export import llama_family
    from edgellm_plugins.export.gguf_container import Value

    metadata = llama_family.metadata
    monkeypatch.setattr(llama_family, "metadata", lambda model: metadata(model) | {key: Value(*value)})
    export("gguf", str(uneven.path), tmp_path / "m.gguf", options={"type": "f32"}, gate=False)
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "m.gguf"))


def test_the_folder_loads_at_its_widths(uneven: ModelHandle) -> None:
    from transformers import LlamaForCausalLM

    model = uneven.load().model
    assert type(model) is LlamaForCausalLM
    for layer, row in zip(model.model.layers, UNEVEN, strict=True):
        assert layer.self_attn.k_proj.out_features == row.kv_heads * 16
        assert layer.self_attn.o_proj.in_features == row.heads * 16
        assert layer.mlp.down_proj.in_features == row.ffn
    state = model.state_dict()
    for name, tensor in load_file(uneven.path / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name
    ids = torch.arange(12)[None]
    step = model.generate(ids, max_new_tokens=3, do_sample=False)
    whole = model(step[:, :-1]).logits[:, -3:].argmax(-1)
    assert torch.equal(step[:, -3:], whole)  # the cache holds a different number of heads in each layer


def test_widths_that_the_tensors_do_not_have_are_an_error(uneven: ModelHandle) -> None:
    config = json.loads((uneven.path / "config.json").read_text())
    config[widths.TABLE]["1"]["intermediate_size"] = 64
    (uneven.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        resolve(str(uneven.path)).load()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_gate_passes_on_the_uneven_file(kind: str, uneven: ModelHandle, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    done = export("gguf", str(uneven.path), tmp_path / "m.gguf", options={"type": kind})
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "deci"
    assert tuple(file.metadata["deci.feed_forward_length"]) == (128, 96, 64)
    assert tuple(file.metadata["deci.attention.head_count"]) == (4, 2, 4)
    assert tuple(file.metadata["deci.attention.head_count_kv"]) == (2, 1, 2)
    assert file.metadata["deci.rope.dimension_count"] == file.metadata["deci.attention.key_length"] == 16
    checks = {check["name"]: check for check in done.report.verified["checks"]}
    assert all(check["passed"] for check in checks.values()) and "30 tensors" in checks["weights"]["detail"]
    assert checks["kl mean"]["value"] < {"f32": 1e-6, "f16": 1e-4, "q8_0": 0.03}[kind]


def test_equal_widths_give_the_same_logits_as_llama_and_as_deci(
    make_tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from edgellm_plugins.export import llama_family

    model = make_tiny_llama(tmp_path / "whole", layers=3)
    export("gguf", str(model), tmp_path / "llama.gguf", options={"type": "f32"}, gate=False)
    read = llama_family.read

    def as_deci(folder: Path) -> llama_family.Llama:
        family = read(folder)
        return dataclasses.replace(family, per_layer=(family.width(0),) * family.layers)

    monkeypatch.setattr(llama_family, "read", as_deci)
    export("gguf", str(model), tmp_path / "deci.gguf", options={"type": "f32"}, gate=False)
    scores = []
    for name in ("llama", "deci"):
        assert read_gguf(tmp_path / f"{name}.gguf").metadata["general.architecture"] == name
        engine = llama_cpp.Llama(str(tmp_path / f"{name}.gguf"), n_ctx=64, logits_all=True, verbose=False)
        engine.eval(list(range(3, 35)))
        scores.append(engine.scores[:32].copy())
    assert (scores[0] == scores[1]).all()


def test_the_gate_sees_a_wrong_width_and_a_wrong_matrix(uneven: ModelHandle, tmp_path: Path) -> None:
    export("gguf", str(uneven.path), tmp_path / "m.gguf", options={"type": "f32"}, gate=False)
    file, expected = read_gguf(tmp_path / "m.gguf"), ledger.expected_facts(uneven)
    assert ledger.differences(expected, ledger.found_facts(file)) == []
    other = {**expected, "attention.head_count": [4, 4, 4]}
    assert "attention.head_count is" in ledger.differences(other, ledger.found_facts(file))[0]
    report = ledger.compare_weights(uneven, file)
    assert report is not None and report.ratio == 0 and not report.problems
    tensors = load_file(uneven.path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"  # two heads where layer 0 has four: another rotary order
    tensors[name] = torch.from_numpy(ledger.interleave(tensors[name].numpy(), 2).copy())
    save_file(tensors, uneven.path / "model.safetensors", metadata={"format": "pt"})
    report = ledger.compare_weights(resolve(str(uneven.path)), file)
    assert report is not None and report.ratio > 1 and "blk.1.attn_q" in report.worst


def test_a_program_that_knows_one_number_of_heads_refuses_the_model(uneven: ModelHandle) -> None:
    from edgellm_hardware.executorch.llama import Llama

    from edgellm_sdk.kit import adapters
    from edgellm_sdk.random import Stream

    model = uneven.load().model
    trainables = adapters.install(model, adapters.Spec("lora-fa", 1, 4, 8.0, ("q_proj",)), Stream(0, "t"))
    with pytest.raises(ModelError, match="different numbers of heads"):
        Llama(model, trainables, 16)


def test_the_file_becomes_the_folder_again(uneven: ModelHandle, tmp_path: Path) -> None:
    from edgellm_sdk import checkpoint

    export("gguf", str(uneven.path), tmp_path / "m.gguf", options={"type": "f32"}, gate=False)
    back = resolve(str(tmp_path / "m.gguf"))
    config = json.loads((back.path / "config.json").read_text())
    assert widths.read(config, "m") == UNEVEN and config["model_type"] == "llama" and config["head_dim"] == 16
    old, new = checkpoint.inspect(uneven.path), checkpoint.inspect(back.path)
    assert set(old.tensors) == set(new.tensors)
    for name in old.tensors:
        assert (old.array(name) == new.array(name)).all(), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(uneven.load().model(ids).logits, back.load().model(ids).logits)

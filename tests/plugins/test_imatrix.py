"""The importance matrix: sums by hand, the file, and llama.cpp's quantiser with it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.compression.imatrix import Config as Measure
from edgellm_plugins.compression.imatrix import method
from edgellm_plugins.export import imatrix
from edgellm_plugins.export.gguf import ENGINE, Config
from edgellm_plugins.export.gguf.method import export
from edgellm_plugins.export.imatrix import Entry, Imatrix

from edgellm_sdk import checkpoint, gguf_file, ledger
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle


@pytest.fixture(scope="module")
def measured(wide_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    folder = tmp_path_factory.mktemp("measured")
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text)}
    return method.compress(resolve(str(wide_llama)), None, build(Measure, options, "imatrix"), Context(folder, seed=1))


def test_sums_are_those_worked_out_from_the_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    model = resolve(str(tiny_llama)).load().model
    windows = torch.randint(384, (6, 16), generator=torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())
        )
    with torch.no_grad():
        model(input_ids=windows)
    wanted = {name: x.square().sum(0) for name, x in seen.items()}
    for memory in (None, 1):  # one batch or many
        sums = method.sums_of_squares(model, windows, Context(tmp_path, memory=memory))
        assert len(sums) == 15
        for name in names:
            assert sums[name][1] == 96
            assert torch.allclose(sums[name][0].double(), wanted[name], rtol=1e-5)
    assert torch.equal(sums["model.layers.0.self_attn.q_proj"][0], sums["model.layers.0.self_attn.v_proj"][0])
    assert "lm_head" not in method.sums_of_squares(model, windows, Context(tmp_path), head=False)


def test_the_file_is_that_of_llama_cpps_tool(measured: ModelHandle) -> None:
    import gguf

    path = measured.path / imatrix.NAME
    reader = gguf.GGUFReader(path)
    fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix", "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": 4, "imatrix.chunk_size": 32,
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 30  # 14 linears and the head, which is the embedding here
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape.tolist() == [512, 1]
    assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [[128.0]]
    found = imatrix.read(path)
    assert found.entries["token_embd.weight"].count == 128 and found.chunks == 4
    again = replace(found, path=path.with_name("again.gguf"))
    imatrix.write(again)
    assert again.path.read_bytes() == path.read_bytes()
    again.path.unlink()


def test_the_model_beside_it_is_the_one_given(measured: ModelHandle, wide_llama: Path) -> None:
    ours, theirs = measured.load().model.state_dict(), resolve(str(wide_llama)).load().model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_mean_squares_are_above_zero() -> None:
    sums = np.array([0, 8, 4], np.float32)
    assert Entry(sums, 4).mean_squares() == pytest.approx([1e-6, 2, 1])
    assert Entry(sums, 0).mean_squares().tolist() == [1, 1, 1] == Entry(0 * sums, 4).mean_squares().tolist()


def written(model: ModelHandle, target: Path, **given: Any) -> gguf_file.GGUFFile:
    config = build(Config, {"modelfile": False, **given}, "gguf")
    artifact = export(model, target, config, Context(target.parent, threads=1))
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []
    assert artifact.verified["quantiser"] == "llama.cpp"
    return gguf_file.read(target)


@pytest.mark.llama
@pytest.mark.parametrize("kind", [*ENGINE, "q4_0", "q8_0"])
def test_every_type_of_the_engine(kind: str, measured: ModelHandle, tmp_path: Path) -> None:
    """Made with the matrix, said so, near the model, and accepted by the gate's look at the weights."""
    pytest.importorskip("llama_cpp")
    found = written(measured, tmp_path / "m.gguf", type=kind)
    assert found.metadata["quantize.imatrix.entries_count"] == 15
    assert found.metadata["quantize.imatrix.file"] == "imatrix.gguf"
    assert str(measured.path.parent) not in str(dict(found.metadata))
    types = {tensor.type for tensor in found.tensors.values() if len(tensor.shape) == 2}
    family = kind.upper().removesuffix("_S").removesuffix("_M").removesuffix("_L").removesuffix("_XS")
    assert any(name.startswith(family[:3]) for name in types), types
    report = ledger.compare_weights(measured, found)
    assert report is not None and not report.problems and report.ratio <= 1, report


@pytest.mark.llama
def test_the_engine_rounds_as_if_it_had_been_called_here(measured: ModelHandle, tmp_path: Path) -> None:
    """Through file, child and struct arrive the numbers that the quantising function itself is given here."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    entries = imatrix.read(measured.path / imatrix.NAME).entries
    weight = checkpoint.inspect(measured.path).array("model.layers.1.mlp.down_proj.weight")
    pointer = ctypes.POINTER(ctypes.c_float)
    for kind in ("q4_0", "q4_k_s", "iq4_nl"):
        found = written(measured, tmp_path / f"{kind}.gguf", type=kind)
        info = found.tensors["blk.1.ffn_down.weight"]
        x = np.ascontiguousarray(weight, np.float32)
        importance = entries[info.name].mean_squares()
        out = np.zeros((len(x), info.row_bytes), np.uint8)
        ggml.ggml_quantize_chunk(
            info.type_id, x.ctypes.data_as(pointer), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0),
            ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), importance.ctypes.data_as(pointer),
        )  # fmt: skip
        assert np.array_equal(found.tensor_bytes(info.name), out), kind


@pytest.mark.llama
def test_with_the_matrix_the_weighted_error_falls(measured: ModelHandle, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    entries = imatrix.read(measured.path / imatrix.NAME).entries
    weight = checkpoint.inspect(measured.path).array("model.layers.0.mlp.gate_proj.weight")
    importance = entries["blk.0.ffn_gate.weight"].mean_squares()
    for kind in ("q4_0", "q2_k_s", "q4_k_s"):
        errors = []
        for matrix in ("auto", "none"):
            if (kind, matrix) == ("q4_0", "none"):
                config = Config(type="q4_0", imatrix="none", modelfile=False)  # our own rounding, which is the engine's
                export(measured, tmp_path / "q4_0-none.gguf", config, Context(tmp_path))
                found = gguf_file.read(tmp_path / "q4_0-none.gguf")
            elif (kind, matrix) == ("q2_k_s", "none"):
                found = written(measured, tmp_path / "q2-none.gguf", type="q2_k", imatrix="none")
            else:
                found = written(measured, tmp_path / f"{kind}-{matrix}.gguf", type=kind, imatrix=matrix)
            info = found.tensors["blk.0.ffn_gate.weight"]
            values = ledger.decode(found.tensor_bytes(info.name), info.type_id)
            errors.append(float(((values - weight) ** 2 * importance).sum()))
        assert errors[0] < errors[1], kind


@pytest.mark.llama
def test_single_tensors_get_the_type_asked_for(measured: ModelHandle, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    types = "ffn_down=q6_k,blk.0.*=iq3_s,attn_v=q8_0"
    found = written(measured, tmp_path / "m.gguf", type="q4_k_s", types=types, embedding="f16")
    got = {name: tensor.type for name, tensor in found.tensors.items() if len(tensor.shape) == 2}
    assert got["blk.0.ffn_down.weight"] == got["blk.1.ffn_down.weight"] == "Q6_K"
    assert got["blk.0.attn_v.weight"] == "IQ3_S" and got["blk.1.attn_v.weight"] == "Q8_0"
    assert got["blk.1.attn_output.weight"] == "Q4_K" and got["token_embd.weight"] == "F16"
    bits = {"Q6_K": 6.5625, "IQ3_S": 3.4375, "Q8_0": 8.5, "Q4_K": 4.5, "F16": 16.0, "F32": 32.0}
    sizes = {t.name: math.prod(t.shape) * bits[t.type] / 8 for t in found.tensors.values()}
    begin = min(t.offset for t in found.tensors.values())
    assert (tmp_path / "m.gguf").stat().st_size == begin + sum(size + -size % 32 for size in sizes.values())


@pytest.mark.llama
def test_same_types_are_copied(measured: ModelHandle, tmp_path: Path) -> None:
    """llama_model_quantize leaves blocks of the type asked for alone: ours survive it."""
    pytest.importorskip("llama_cpp")
    from edgellm_hardware.llama_cpp.quantiser import quantise

    config = Config(type="q4_0", imatrix="none", embedding="q8_0", modelfile=False)
    export(measured, tmp_path / "ours.gguf", config, Context(tmp_path))
    quantise(tmp_path / "ours.gguf", tmp_path / "after.gguf", "q4_0", None, (("token_embd", 8),), 1)
    before, after = (gguf_file.read(tmp_path / name) for name in ("ours.gguf", "after.gguf"))
    for name, info in before.tensors.items():
        assert after.tensors[name].type == info.type
        assert np.array_equal(after.tensor_bytes(name), before.tensor_bytes(name))


def test_what_cannot_be_done_is_refused(measured: ModelHandle, wide_llama: Path, tmp_path: Path) -> None:
    plain = resolve(str(wide_llama))

    def refused(error: type[Exception], words: str, model: ModelHandle = plain, **given: Any) -> None:
        with pytest.raises(error, match=words):
            written(model, tmp_path / "m.gguf", **given)
        assert not (tmp_path / "m.gguf").exists()

    refused(ConfigError, "needs an importance matrix", type="iq2_xs")
    refused(ConfigError, "not of auto", types="ffn_down=q8_0")
    refused(ConfigError, "is not PATTERN=FORMAT", type="q4_k_m", types="ffn_down")
    refused(ConfigError, "matches no tensor", type="q4_k_m", types="ffn_dwon=q8_0")
    refused(ConfigError, "adapter is f32 or f16", type="q4_k_m", adapter="separate")
    refused(
        ModelError, "is not a GGUF|cannot be|no such|is not", type="q4_k_m", imatrix=str(wide_llama / "config.json")
    )
    other = Imatrix(tmp_path / "other.gguf", {"blk.0.attn_q.weight": Entry(np.ones(8, np.float32), 4)}, ("x",), 1, 4)
    imatrix.write(other)
    refused(ModelError, "8 inputs there, 256 here", type="q4_k_m", imatrix=str(other.path))
    imatrix.write(replace(other, entries={"elsewhere": Entry(np.ones(8, np.float32), 4)}))
    refused(ModelError, "of another model", type="q4_k_m", imatrix=str(other.path))
    imatrix.write(replace(other, entries={"blk.0.attn_q.weight": Entry(np.full(256, -1, np.float32), 4)}))
    refused(ModelError, "negative or not finite", type="q4_k_m", imatrix=str(other.path))
    export(plain, tmp_path / "f.gguf", Config(type="f16", modelfile=False), Context(tmp_path))
    refused(ModelError, "is not an importance matrix", type="q4_k_m", imatrix=str(tmp_path / "f.gguf"))


@pytest.mark.llama
def test_rows_that_do_not_divide_are_refused_when_asked_for_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(ConfigError, match="rows of 64 do not divide into q4_k blocks of 256"):
        written(resolve(str(tiny_llama)), tmp_path / "m.gguf", type="q4_k_m", types="attn_q=q4_k")
    found = written(resolve(str(tiny_llama)), tmp_path / "m.gguf", type="q4_k_m")
    assert found.tensors["blk.0.attn_q.weight"].type == "Q5_0"  # the engine's own fallback

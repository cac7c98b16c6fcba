"""Our files against those of llama.cpp's own converter: same tensors, same bytes, same metadata.

Opt in: EDGELLM_UPSTREAM_CONVERTER names an unpacked llama.cpp source folder (the source archive of llama-cpp-python
holds one under `vendor/llama.cpp`), or cookbook/benchmarks/exporter.py has left one in the cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.export.gguf import Config, edgellm_export

from edgellm_sdk import gguf_file
from edgellm_sdk.context import Context
from edgellm_sdk.models import cache_folder
from edgellm_sdk.types import ModelHandle

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
import decoders  # noqa: E402

CACHED = sorted(cache_folder().glob("benchmarks/llama_cpp_python-*/vendor/llama.cpp"))
SOURCE = Path(os.environ.get("EDGELLM_UPSTREAM_CONVERTER") or (CACHED[-1] if CACHED else ""))
pytestmark = pytest.mark.skipif(
    not (SOURCE / "convert_hf_to_gguf.py").is_file(),
    reason="no llama.cpp source folder: set EDGELLM_UPSTREAM_CONVERTER or run cookbook/benchmarks/exporter.py",
)

# Made from folder names and model cards; no engine reads them.
DESCRIPTIVE = ("general.name", "general.basename", "general.size_label", "general.finetune", "general.version",
               "general.sampling", "general.license", "general.tags", "general.languages")  # fmt: skip
# Keys that only we write, with the value that llama.cpp assumes when they are absent.
OURS = {
    "tokenizer.ggml.add_bos_token": False,
    # llama.cpp computes with it what the model computes; without it, with the usual attention factor
    "qwen2.rope.scaling.attn_factor": None,
}

DRIVER = """
import importlib.util, runpy, sys, types, transformers
if importlib.util.find_spec("sentencepiece") is None:  # imported before they see that there is no such tokenizer
    sys.modules["sentencepiece"] = types.ModuleType("sentencepiece")
    sys.modules["sentencepiece"].SentencePieceProcessor = None
source, known = sys.argv[1], sys.argv[2]
sys.path[:0] = [source, source + "/gguf-py"]
if known:  # the tokenizers of tiny models are in nobody's table of hashes
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: known
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def theirs(folder: Path, target: Path, kind: str, known: str) -> gguf_file.GGUFFile:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(SOURCE), known, str(folder), "--outfile", str(target), "--outtype", kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return gguf_file.read(target)


def differences(folder: Path, tmp_path: Path, kind: str, known: str) -> tuple[list[str], int]:
    """What differs between the two files, and how many tensors and keys were compared."""
    expected = theirs(folder, tmp_path / "theirs.gguf", kind, known)
    handle = ModelHandle(folder, "0" * 64, "hf", "LlamaForCausalLM", "float32", 1)
    target = tmp_path / "ours.gguf"
    edgellm_export(handle, target, Config(type=kind, modelfile=False), Context(tmp_path / "run"))
    got = gguf_file.read(target)
    wrong = [f"tensor {name}" for name in expected.tensors.keys() ^ got.tensors.keys()]
    for name in expected.tensors.keys() & got.tensors.keys():
        a, b = expected.tensors[name], got.tensors[name]
        if (a.shape, a.type) != (b.shape, b.type):
            wrong.append(f"{name} is {b.type}{b.shape}, not {a.type}{a.shape}")
        elif not np.array_equal(expected.tensor_bytes(name), got.tensor_bytes(name)):
            wrong.append(f"the bytes of {name}")
    ignored = {key for key in expected.metadata if key.startswith(DESCRIPTIVE)}
    ignored |= {key for key in got.metadata if key.startswith(DESCRIPTIVE)}
    keys = (expected.metadata.keys() | got.metadata.keys()) - ignored
    for key in sorted(keys):
        if key not in expected.metadata and key in OURS and OURS[key] in (None, got.metadata[key]):
            continue
        if not same(expected, got, key):
            wrong.append(f"{key}: {str(got.metadata.get(key))[:60]} for {str(expected.metadata.get(key))[:60]}")
    return wrong, len(expected.tensors) + len(keys)


def same(expected: gguf_file.GGUFFile, got: gguf_file.GGUFFile, key: str) -> bool:
    if expected.kinds.get(key) != got.kinds.get(key):
        return False
    a: Any = expected.metadata[key]
    b: Any = got.metadata[key]
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_tiny_models(tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path, kind: str, tied: bool) -> None:
    wrong, compared = differences(tiny_llama_tied if tied else tiny_llama, tmp_path, kind, "smollm")
    assert wrong == []
    assert compared > 40


def test_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """Their adapter keeps alpha apart, ours folds the scale into B: the products are equal."""
    import json

    from safetensors.numpy import save_file

    folder, rng, tensors = tmp_path / "lora", np.random.default_rng(4), {}
    folder.mkdir()
    for layer in range(2):
        for module, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(4, 64)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(rows, 4)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("convert_hf_to_gguf", "convert_lora_to_gguf"), str(SOURCE), "smollm",
         str(folder), "--base", str(tiny_llama), "--outfile", str(tmp_path / "theirs.gguf"), "--outtype", "f32"],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = gguf_file.read(tmp_path / "theirs.gguf")
    handle = ModelHandle(tiny_llama, "0" * 64, "hf", "LlamaForCausalLM", "float32", 1, (folder,))
    edgellm_export(handle, tmp_path / "ours.gguf", Config(adapter="separate"), Context(tmp_path / "run"))
    got = gguf_file.read(tmp_path / "ours.gguf")
    assert {n: (t.shape, t.type) for n, t in got.tensors.items()} == {
        n: (t.shape, t.type) for n, t in expected.tensors.items()
    }
    for key in ("general.type", "general.architecture", "adapter.type"):
        assert got.metadata[key] == expected.metadata[key]
    for name in got.tensors:
        scales = [f.metadata["adapter.lora.alpha"] if name.endswith("b") else 1.0 for f in (got, expected)]
        ours, other = (
            f.tensor_bytes(name).view("<f4") * scale for f, scale in zip((got, expected), scales, strict=True)
        )
        np.testing.assert_array_equal(ours, other)


def spec(kind: str) -> tuple[str, str]:
    """(style of the tokenizer, name of the pre-tokenizer) that models of a kind have."""
    style = {"mistral": "llama", "phi3": "llama", "gemma2": "gemma", "gemma3": "gemma"}.get(kind.split()[0], "")
    return style, "qwen2" if kind.startswith("qwen2") else "smollm"


@pytest.mark.parametrize("kind", [*decoders.KINDS, *decoders.VARIANTS])
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """Models of the kinds that have SentencePiece tokenizers have one here, with its `tokenizer.model`."""
    style, known = spec(kind)
    if style:
        if importlib.util.find_spec("sentencepiece") is None:
            pytest.skip("the upstream converter needs the package sentencepiece")
        folder = decoders.with_sentencepiece(tmp_path / "model", kind, style)
    else:
        folder = decoders.write_kind(tmp_path / "model", kind)
    wrong, compared = differences(folder, tmp_path, "f16", known)
    assert wrong == []
    assert compared > 35


@pytest.mark.model
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smollm2(smollm2: ModelHandle, tmp_path: Path, kind: str) -> None:
    wrong, compared = differences(smollm2.path, tmp_path, kind, "")
    assert wrong == []
    assert compared > 290

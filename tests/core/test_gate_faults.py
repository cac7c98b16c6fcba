"""The gate catches ten seeded faults and lets clean files through."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama
sys.path.insert(0, str(Path(__file__).parent))

import gguf_edit  # noqa: E402
from edgellm_plugins.export import gguf  # noqa: E402

from edgellm_sdk import gate, ledger  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.models import resolve  # noqa: E402
from edgellm_sdk.types import Artifact, ModelHandle, Prompt  # noqa: E402

PROMPTS: tuple[Prompt, ...] = (
    ({"role": "user", "content": "win a free prize now, call this number today"},),
    ({"role": "system", "content": "answer with one word"}, {"role": "user", "content": "ham or spam?"}),
    "the quick brown fox jumps",
)
SCALE = 2.0


def sharpen(folder: Path) -> None:
    """Give a random model's logits structure, so that a fault moves the distribution: a larger head and attention."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = tensor * 4
        elif "q_proj" in name or "k_proj" in name:
            tensors[name] = tensor * 3
    save_file(tensors, path, metadata={"format": "pt"})


def add_lora(folder: Path, base: ModelHandle, rank: int = 4) -> dict[str, tuple[Any, Any]]:
    """A PEFT LoRA on q (square) and v of both layers; {GGUF name: (A, B)}."""
    draw, tensors, factors = np.random.default_rng(3), {}, {}
    config = json.loads((base.path / "config.json").read_text())
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * config["hidden_size"] // 4
    folder.mkdir()
    for layer in range(config["num_hidden_layers"]):
        for module, short, out in (("q_proj", "attn_q", hidden), ("v_proj", "attn_v", kv)):
            a = (0.1 * draw.standard_normal((rank, hidden))).astype(np.float32)
            b = (0.1 * draw.standard_normal((out, rank))).astype(np.float32)
            name = f"model.layers.{layer}.self_attn.{module}"
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            factors[f"blk.{layer}.{short}.weight"] = (a, b)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "r": rank,
        "lora_alpha": rank * SCALE,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "edgellm_adapter.json").write_text(json.dumps({"kind": "lora"}))
    return factors


class Case:
    """A model with a LoRA, and what it exports to."""

    def __init__(self, folder: Path, make: Callable[..., Path], tied: bool = False, seed: int = 7) -> None:
        import dataclasses

        self.folder = folder
        source = make(folder / "model", tied=tied, seed=seed)
        sharpen(source)
        self.base = resolve(str(source))
        self.lora = add_lora(folder / "lora", self.base)
        self.tuned = dataclasses.replace(self.base, adapters=(folder / "lora",))
        self.context = Context(folder, threads=1)

    def export(self, handle: ModelHandle, kind: str) -> Artifact:
        target = self.folder / f"{'tuned' if handle.adapters else 'base'}-{kind}.gguf"
        return gguf.edgellm_export(handle, target, gguf.Config(type=kind, modelfile=False), self.context)

    def verify(self, handle: ModelHandle, path: Path) -> gate.GateResult:
        artifact = Artifact((path,), ("",), "gguf", "llama_cpp", handle.digest)
        return gate.verify_export(handle, artifact, self.context, PROMPTS)


@pytest.fixture(scope="module")
def case(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gate"), make_tiny_llama)


def failed(result: gate.GateResult) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


@pytest.mark.parametrize(
    ("fault", "kind", "caught_by"),
    [
        ("double BOS", "f32", {"facts", "token ids"}),
        ("wrong chat template", "f32", {"facts", "token ids"}),
        ("swapped RoPE permutation", "f32", {"weights", "kl mean", "top-1"}),
        ("swapped RoPE permutation", "q8_0", {"weights"}),
        ("wrong EOS", "f32", {"facts", "stop ids"}),
        ("wrong block order", "q4_0", {"weights"}),
        ("truncated vocabulary", "f32", {"facts", "weights", "vocabulary"}),
        ("truncated vocabulary", "q8_0", {"facts", "weights", "vocabulary"}),
        ("wrong norm epsilon", "f32", {"facts"}),
    ],
)
def test_faults_of_the_file(case: Case, fault: str, kind: str, caught_by: set[str]) -> None:
    clean = case.export(case.base, kind).path
    broken = gguf_edit.copy(clean, case.folder / "broken.gguf", gguf_edit.FILE_FAULTS[fault])
    result = case.verify(case.base, broken)
    assert not result.passed
    assert caught_by <= failed(result), result.reason
    assert "\n" not in result.reason


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fault", list(gguf_edit.LORA_FAULTS))
def test_faults_of_merging(case: Case, fault: str, kind: str) -> None:
    clean = case.export(case.tuned, kind).path
    change = gguf_edit.LORA_FAULTS[fault]
    broken = gguf_edit.copy(clean, case.folder / "broken.gguf", lambda draft: change(draft, case.lora, SCALE))
    result = case.verify(case.tuned, broken)
    assert "weights" in failed(result), result.reason
    if kind in ("f32", "f16"):
        assert "kl mean" in failed(result), result.reason


def test_a_copy_that_changes_nothing_passes(case: Case) -> None:
    for kind in ("f32", "q4_0"):
        clean = case.export(case.tuned, kind).path
        same = gguf_edit.copy(clean, case.folder / "same.gguf", lambda draft: None)
        result = case.verify(case.tuned, same)
        assert result.passed, result.reason


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize(("tied", "seed"), [(False, 11), (True, 12), (False, 13), (True, 14)])
def test_no_false_alarm(make_tiny_llama: Callable[..., Path], tmp_path: Path, kind: str, tied: bool, seed: int) -> None:
    """Twenty clean exports: five types, tied and untied, merged LoRA and none."""
    clean = Case(tmp_path, make_tiny_llama, tied, seed)
    handle = clean.tuned if seed % 4 >= 2 else clean.base
    result = clean.verify(handle, clean.export(handle, kind).path)
    assert result.passed, result.reason
    assert result.positions > 50


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl", "q4_1", "q5_0", "q8_0"])
def test_blocks_of_a_compressed_model_pass_the_sharp_bound(case: Case, tmp_path: Path, kind: str) -> None:
    """Codes written as they are: no weight differs, so only the engine's activation rounding may show."""
    from edgellm_sdk.checkpoint import QUANTIZED
    from edgellm_sdk.kit import blocks
    from edgellm_sdk.store import save_arrays

    folder = tmp_path / "compressed"
    folder.mkdir()
    for path in case.base.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    packed = {}
    for name in [name for name in tensors if "_proj" in name]:
        packed[name] = blocks.nearest(tensors.pop(name), kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_arrays(folder / QUANTIZED, packed, {"format": dict.fromkeys(packed, kind)})
    handle = resolve(str(folder))
    artifact = gguf.edgellm_export(
        handle, tmp_path / "c.gguf", gguf.Config(embedding="f32", modelfile=False), case.context
    )
    result = gate.verify_export(handle, artifact, case.context, PROMPTS)
    assert result.passed, result.reason
    assert result.tolerance == gate.BLOCKS
    assert result.value("weights") == 0


def test_the_rejected_file_is_kept_aside(case: Case, tmp_path: Path) -> None:
    clean = case.export(case.base, "f32")
    target = tmp_path / "model.gguf"
    gguf_edit.copy(clean.path, target, gguf_edit.FILE_FAULTS["wrong norm epsilon"])
    result = case.verify(case.base, target)
    with pytest.raises(gate.GateError, match="rms_epsilon") as caught:
        gate.enforce(result, Artifact((target,), ("",), "gguf", "llama_cpp", ""))
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert not target.exists() and (tmp_path / "model.rejected.gguf").exists()
    json.dumps(result.as_dict(), allow_nan=False)


def test_the_ledger_reads_a_compressed_source(case: Case) -> None:
    from edgellm_sdk.gguf_file import read

    file = read(case.export(case.base, "f16").path)
    assert ledger.differences(ledger.expected_facts(case.base), ledger.found_facts(file)) == []
    assert ledger.tensor_types(file).keys() == {"F16"}

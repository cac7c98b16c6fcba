"""The gate catches ten seeded faults and lets clean files through."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

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


class Case:
    """A model with a LoRA, and what it exports to."""

    def __init__(self, folder: Path, make: Callable[..., Path], tied: bool = False, seed: int = 7) -> None:
        import dataclasses

        self.folder = folder
        source = make(folder / "model", tied=tied, seed=seed)
        sharpen(source)
        self.base = resolve(str(source))
        self.lora = gguf_edit.add_lora(folder / "lora", source, 3, range(2), 0.1, SCALE)
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
    handle = resolve(str(gguf_edit.as_blocks(case.base.path, tmp_path / "compressed", kind)))
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

"""The gate on every architecture: the ten seeded faults are caught, clean files pass."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama
sys.path.insert(0, str(Path(__file__).parent))

import decoders  # noqa: E402
import gguf_edit  # noqa: E402
from edgellm_plugins.export import gguf  # noqa: E402

from edgellm_sdk import gate, ledger  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.gguf_file import read  # noqa: E402
from edgellm_sdk.models import resolve  # noqa: E402
from edgellm_sdk.types import Artifact, ModelHandle, Prompt  # noqa: E402

PROMPTS: tuple[Prompt, ...] = (
    ({"role": "user", "content": "win a free prize now, call this number today"},),
    ({"role": "system", "content": "answer with one word"}, {"role": "user", "content": "ham or spam?"}),
    "the quick brown fox jumps",
)
SCALE = 2.0
OTHERS = [kind for kind in decoders.KINDS if kind != "llama"]  # llama: test_gate_faults.py
STYLES = {"mistral": "llama", "gemma2": "gemma", "gemma3": "gemma", "phi3": "llama"}
SQUARE = {"qwen3": 16, "gemma2": 16, "gemma3": 16, "mistral": 16}  # heads * size = hidden, for a square q


class Case:
    """A model of one kind with a LoRA, and what it exports to."""

    def __init__(self, folder: Path, kind: str, seed: int = 7) -> None:
        base = kind.split()[0]
        changes: dict[str, Any] = {"head_dim": SQUARE[base]} if base in SQUARE else {}
        if base in ("gemma2", "gemma3"):
            changes["query_pre_attn_scalar"] = 16
        if base in STYLES:
            source = decoders.with_sentencepiece(
                folder / "model", kind, STYLES[base], bool(seed % 2), seed=seed, sharp=True, **changes
            )
        else:
            source = decoders.write_kind(folder / "model", kind, seed, sharp=True, **changes)
        self.folder, self.base = folder, resolve(str(source))
        self.lora = gguf_edit.add_lora(folder / "lora", source, 3, range(2), 0.1, SCALE)
        self.tuned = dataclasses.replace(self.base, adapters=(folder / "lora",))
        self.context = Context(folder, threads=1)

    def export(self, handle: ModelHandle, kind: str) -> Path:
        target = self.folder / f"{'tuned' if handle.adapters else 'base'}-{kind}.gguf"
        return gguf.edgellm_export(handle, target, gguf.Config(type=kind, modelfile=False), self.context).path

    def verify(self, handle: ModelHandle, path: Path) -> gate.GateResult:
        artifact = Artifact((path,), ("",), "gguf", "llama_cpp", handle.digest)
        return gate.verify_export(handle, artifact, self.context, PROMPTS)


@pytest.fixture(scope="module", params=OTHERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gate"), request.param)


def failed(result: gate.GateResult) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


FAULTS = {
    "double BOS": ("f32", {"token ids"}),
    "wrong chat template": ("f32", {"facts", "token ids"}),
    "swapped RoPE permutation": ("f32", {"weights", "kl mean"}),
    "wrong EOS": ("f32", {"facts", "stop ids"}),
    "wrong block order": ("q4_0", {"weights"}),
    "truncated vocabulary": ("f32", {"facts", "weights", "vocabulary"}),
    "wrong norm epsilon": ("f32", {"facts"}),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_of_the_file(case: Case, fault: str) -> None:
    kind, caught_by = FAULTS[fault]
    clean = case.export(case.base, kind)
    broken = gguf_edit.copy(clean, case.folder / "broken.gguf", gguf_edit.FILE_FAULTS[fault])
    result = case.verify(case.base, broken)
    assert caught_by <= failed(result), result.reason


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
@pytest.mark.parametrize("fault", list(gguf_edit.LORA_FAULTS))
def test_faults_of_merging(case: Case, fault: str, kind: str) -> None:
    clean = case.export(case.tuned, kind)
    change = gguf_edit.LORA_FAULTS[fault]
    broken = gguf_edit.copy(clean, case.folder / "broken.gguf", lambda draft: change(draft, case.lora, SCALE))
    result = case.verify(case.tuned, broken)
    assert "weights" in failed(result), result.reason
    if kind == "f16":
        assert "kl mean" in failed(result), result.reason


@pytest.mark.parametrize(("kind", "tuned"), [
    ("f32", False), ("f16", False), ("bf16", False), ("q8_0", False), ("q4_0", False),
    ("f32", True), ("f16", True), ("q8_0", True), ("q4_0", True),
])  # fmt: skip
def test_no_false_alarm(case: Case, kind: str, tuned: bool) -> None:
    """54 clean exports over six architectures; those of llama are in test_gate_faults.py."""
    handle = case.tuned if tuned else case.base
    result = case.verify(handle, case.export(handle, kind))
    assert result.passed, result.reason
    assert result.positions > 50


@pytest.mark.parametrize("kind", [kind for kind in decoders.VARIANTS if kind != "phi3 long"])
def test_no_false_alarm_on_variants(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind, seed=8)
    result = case.verify(case.base, case.export(case.base, "f16"))
    assert result.passed, result.reason


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("gemma2", "gemma2.attn_logit_softcapping", 30.0),
        ("gemma3", "gemma3.rope.freq_base_swa", 1e6),
        ("gemma3", "gemma3.attention.sliding_window", 32),
        ("gemma3 linear", "gemma3.rope.scaling.factor", 4.0),
        ("qwen2 yarn", "qwen2.rope.scaling.factor", 2.0),
        ("phi3 partial", "phi3.rope.dimension_count", 16),
        ("qwen3", "qwen3.attention.key_length", 32),
    ],
)
def test_wrong_keys_are_caught_by_the_facts(kind: str, key: str, value: float, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    clean = case.export(case.base, "f32")
    expected = ledger.expected_facts(case.base)
    assert ledger.differences(expected, ledger.found_facts(read(clean))) == []
    broken = gguf_edit.copy(clean, tmp_path / "broken.gguf", lambda draft: draft.set(key, value))
    problems = ledger.differences(expected, ledger.found_facts(read(broken)))
    assert any(problem.startswith(key.partition(".")[2]) for problem in problems)

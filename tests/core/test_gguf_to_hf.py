"""HF -> GGUF -> HF: the weights, what the model computes, the ids of the tokenizer and the next export are the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parent))

import decoders  # noqa: E402
from edgellm_plugins.export.gguf import Config, edgellm_export  # noqa: E402

from edgellm_sdk import gguf_file  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.errors import ModelError  # noqa: E402
from edgellm_sdk.gguf_to_hf import convert  # noqa: E402
from edgellm_sdk.types import ModelHandle  # noqa: E402

TABLES = ("llama llama3",)  # a table of divisors, from which the parameters of the scaling do not follow
STYLES = {"mistral": "llama", "phi3": "llama", "gemma2": "gemma", "gemma3": "gemma"}


def handle(folder: Path) -> ModelHandle:
    return ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1, (), "tiny")


def export(folder: Path, target: Path) -> Path:
    context = Context(target.parent / "run")
    return edgellm_export(handle(folder), target, Config(type="f32", modelfile=False), context).path


def make(folder: Path, kind: str) -> Path:
    style = STYLES.get(kind.split()[0])
    return decoders.with_sentencepiece(folder, kind, style) if style else decoders.write_kind(folder, kind)


def back(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(path, folder, lambda share, what: None)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in (*decoders.KINDS, *decoders.VARIANTS) if kind not in TABLES])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from edgellm_sdk.kit.loading import load_tokenizer

    source = make(tmp_path / "model", kind)
    path = export(source, tmp_path / "m.gguf")
    folder = back(path, tmp_path / "back")
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        if kind.startswith("gemma") and name.endswith("norm.weight"):  # 1 + gain is stored, in float32
            np.testing.assert_allclose(after[name], array, rtol=0, atol=2**-23)
        else:
            np.testing.assert_array_equal(after[name], array)
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 200).tolist()
    top, kl = decoders.compare(decoders.torch_logits(source, ids), decoders.torch_logits(folder, ids))
    assert top == 1.0 and kl < 1e-10
    old, new = load_tokenizer(handle(source)), load_tokenizer(handle(folder))
    for text in (*decoders.CORPUS, "  two  spaces\n\n\ttabs ", "Übergröße 你好 😀 <tool>x<|end|>y<|im_end|>", "1234.5"):
        assert old.encode(text) == new.encode(text)
    again = export(folder, tmp_path / "again.gguf")
    assert differences(path, again) == []


def differences(one: Path, two: Path) -> list[str]:
    """Tensors and keys that are not the same in both files. Scores that merges do not need may be others."""
    a, b = gguf_file.read(one), gguf_file.read(two)
    found = [name for name in a.tensors.keys() | b.tensors.keys() if not same_tensor(a, b, name)]
    for key in (a.metadata.keys() | b.metadata.keys()) - {"tokenizer.ggml.scores"}:
        have, want = (f.metadata.get(key) for f in (a, b))
        if not bool(np.all(np.asarray(have) == np.asarray(want))):
            found.append(f"{key}: {str(have)[:60]} and {str(want)[:60]}")
    return found


def same_tensor(a: gguf_file.GGUFFile, b: gguf_file.GGUFFile, name: str) -> bool:
    if name not in a.tensors or name not in b.tensors:
        return False
    one, two = (f.tensor_bytes(name).view("<f4") for f in (a, b))
    return one.shape == two.shape and bool(np.abs(one - two).max() <= 2**-23 if "norm" in name else (one == two).all())


@pytest.mark.parametrize(
    ("kind", "key", "new", "message"),
    [
        ("llama llama3", "llama.rope.freq_base", 1e4, "by a table"),
        ("qwen2 yarn", "qwen2.rope.scaling.type", "other", "not converted"),
        ("gemma3", "gemma3.block_count", 3, "does not"),
    ],
)
def test_what_cannot_come_back_is_refused(kind: str, key: str, new: Any, message: str, tmp_path: Path) -> None:
    import gguf_edit

    path = export(make(tmp_path / "model", kind), tmp_path / "m.gguf")
    broken = gguf_edit.copy(path, tmp_path / "broken.gguf", lambda draft: draft.set(key, new))
    with pytest.raises(ModelError, match=message):
        back(broken, tmp_path / "back")


def test_pieces_of_one_score_are_refused(tmp_path: Path) -> None:
    import gguf_edit

    path = export(make(tmp_path / "model", "mistral"), tmp_path / "m.gguf")

    def flatten(draft: gguf_edit.Draft) -> None:
        draft.set("tokenizer.ggml.scores", np.full(len(draft.metadata["tokenizer.ggml.scores"][1]), -1.0, np.float32))

    with pytest.raises(ModelError, match="one score"):
        back(gguf_edit.copy(path, tmp_path / "broken.gguf", flatten), tmp_path / "back")

"""Every architecture: its file is loaded by llama.cpp and computes what torch computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import decoders  # noqa: E402
from edgellm_plugins.export import llama_family  # noqa: E402
from edgellm_plugins.export.gguf import Config, edgellm_export  # noqa: E402

from edgellm_sdk import gguf_file  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.errors import ModelError  # noqa: E402
from edgellm_sdk.types import Artifact, ModelHandle  # noqa: E402

ALL = (*decoders.KINDS, *decoders.VARIANTS)
GELU = ("gemma2", "gemma3")  # ggml looks GELU up in a table of half-precision values


def export(folder: Path, target: Path, **given: Any) -> Artifact:
    handle = ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1, (), "tiny")
    return edgellm_export(handle, target, Config(**{"modelfile": False, **given}), Context(target.parent / "run"))


def metadata(folder: Path, target: Path) -> dict[str, Any]:
    return dict(gguf_file.read(export(folder, target).path).metadata)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.llama
@pytest.mark.parametrize("kind", ALL)
def test_llama_cpp_computes_what_torch_computes(kind: str, tmp_path: Path) -> None:
    """400 random tokens: beyond gemma's tiny window, phi3's original context and the yarn one."""
    pytest.importorskip("llama_cpp")
    folder = decoders.write_kind(tmp_path / "model", kind)
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 400).tolist()
    reference = decoders.torch_logits(folder, ids)
    rounding = 1e-6 if kind.split()[0] in GELU else 1e-9
    top, kl = decoders.compare(
        reference, decoders.engine_logits(export(folder, tmp_path / "m.gguf", type="f32").path, ids)
    )
    assert top >= 0.995 and kl < rounding
    top, kl = decoders.compare(
        reference, decoders.engine_logits(export(folder, tmp_path / "h.gguf", type="f16").path, ids)
    )
    assert top >= 0.98 and kl < 1e-4


@pytest.mark.llama
def test_short_rotary_factors_serve_short_contexts(tmp_path: Path) -> None:
    """llama.cpp rounds a context up to 256 tokens, the model's original context here."""
    pytest.importorskip("llama_cpp")
    rope = decoders.VARIANTS["phi3 long"][1]["rope_parameters"] | {"original_max_position_embeddings": 256}
    folder = decoders.write_kind(
        tmp_path / "model", "phi3 long", original_max_position_embeddings=256, rope_parameters=rope
    )
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 200).tolist()
    artifact = export(folder, tmp_path / "m.gguf", type="f32")
    assert decoders.compare(decoders.torch_logits(folder, ids), decoders.engine_logits(artifact.path, ids))[1] < 1e-9
    (limit,) = artifact.verified["limits"]
    assert "long or the short rotary factors" in limit


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["llama yarn", "qwen3 yarn"])
@pytest.mark.parametrize("odd", [{"attention_factor": 1.5}, {"mscale": 2.0, "mscale_all_dim": 1.0}])
def test_other_yarn_attention_factors(kind: str, odd: dict[str, float], tmp_path: Path) -> None:
    """llama.cpp forgets `yarn_attn_factor`; the file says it in a key that counts."""
    pytest.importorskip("llama_cpp")
    rope = decoders.VARIANTS[kind][1]["rope_parameters"] | odd
    folder = decoders.write_kind(tmp_path / "model", kind, rope_parameters=rope)
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 300).tolist()
    path = export(folder, tmp_path / "m.gguf", type="f32").path
    assert decoders.compare(decoders.torch_logits(folder, ids), decoders.engine_logits(path, ids))[1] < 1e-9


@pytest.mark.llama
@pytest.mark.parametrize("kind", GELU)
@pytest.mark.parametrize("slides", [(True, True, False, True), (False, True, True, False)])
def test_windows_in_another_order(kind: str, slides: tuple[bool, ...], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    types = [f"{'sliding' if each else 'full'}_attention" for each in slides]
    folder = decoders.write_kind(tmp_path / "model", kind, num_hidden_layers=4, layer_types=types)
    path = export(folder, tmp_path / "m.gguf", type="f32").path
    found = gguf_file.read(path)
    assert [bool(v) for v in found.metadata[f"{kind}.attention.sliding_window_pattern"]] == list(slides)
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 200).tolist()
    assert decoders.compare(decoders.torch_logits(folder, ids), decoders.engine_logits(path, ids))[1] < 1e-6


@pytest.mark.parametrize("kind", decoders.KINDS)
def test_every_weight_is_in_the_file(kind: str, tmp_path: Path) -> None:
    """Rows of q and k are reordered where ggml's graph rotates neighbours, gemma's gains are written plus one."""
    from safetensors.numpy import load_file

    folder = decoders.write_kind(tmp_path / "model", kind)
    found = gguf_file.read(export(folder, tmp_path / "m.gguf", type="f32").path)
    slots, source = llama_family.slots(llama_family.read(folder)), load_file(folder / "model.safetensors")
    assert slots.keys() == source.keys() and len(found.tensors) == len(source)
    moved = 0
    for name, array in source.items():
        got = found.tensor_bytes(slots[name].name).view("<f4").reshape(array.shape)
        want = array + 1 if kind in GELU and name.endswith("norm.weight") else array
        if slots[name].heads:
            assert kind in ("llama", "mistral") and not np.array_equal(got, want)
            want, moved = llama_family.permute(want, slots[name].heads), moved + 1
        np.testing.assert_array_equal(got, want)
    assert moved == (4 if kind in ("llama", "mistral") else 0)


KEYS: dict[str, dict[str, Any]] = {
    "mistral": {"general.architecture": "llama", "llama.attention.key_length": 32, "llama.rope.dimension_count": 32},
    "qwen2": {"general.architecture": "qwen2", "qwen2.rope.freq_base": 10000.0, "tokenizer.ggml.pre": "qwen2"},
    "qwen3": {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32},
    "gemma2": {
        "gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.sliding_window": 16,
    },
    "gemma3": {
        "gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4, "gemma3.attention.sliding_window": 16,
    },
    "phi3": {
        "phi3.rope.dimension_count": 16, "phi3.rope.scaling.original_context_length": 512,
        "phi3.attention.sliding_window": 0,
    },
    "phi3 partial": {"phi3.rope.dimension_count": 12},
    "gemma3 linear": {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
    "qwen2 yarn": {
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.original_context_length": 128,
        "qwen2.rope.scaling.yarn_beta_fast": 16.0, "qwen2.rope.scaling.yarn_beta_slow": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_keys(kind: str, tmp_path: Path) -> None:
    found = metadata(decoders.write_kind(tmp_path / "model", kind), tmp_path / "m.gguf")
    assert {key: found.get(key) for key in KEYS[kind]} == KEYS[kind]
    absent = {"qwen2": "rope.dimension_count", "gemma2": "rope.freq_base", "gemma3": "vocab_size", "phi3": "vocab_size"}
    base = kind.split()[0]
    assert f"{base}.{absent.get(base, 'rope.scaling.attn_factor')}" not in found


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"head_dim": 32}, "takes for granted"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}},
            "truncate",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "scales attention by 32"),
        ("gemma2", {"tie_word_embeddings": False}, "output matrix"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types"),
        (
            "gemma3",
            {"rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
            "linear",
        ),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "long_factor"),
        (
            "phi3",
            {"rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 8, "short_factor": [0.0] * 8}},
            "positive numbers",
        ),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.7}}, "part of a head"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "short_mscale": 1.1}}, "short_mscale"),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_compute_is_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = decoders.write_kind(tmp_path / "model", kind)
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        export(folder, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 128}),
        ("phi3", {"sliding_window": 128}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1, "layer_types": None}),
    ],
)
def test_a_window_that_the_engine_ignores_is_told(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = decoders.write_kind(tmp_path / "model", kind)
    assert not any("sliding window" in text for text in export(folder, tmp_path / "m.gguf").verified.get("limits", ()))
    edit(folder, **changes)
    limits = export(folder, tmp_path / "m.gguf").verified["limits"]
    assert any("beyond 128 tokens" in text for text in limits)


def test_gemma_settings_of_old_checkpoints(tmp_path: Path) -> None:
    """Before transformers 5 the rotary bases had keys of their own, and many keys were left to their defaults."""
    folder = decoders.write_kind(tmp_path / "model", "gemma3")
    edit(folder, rope_parameters=None, layer_types=None, tie_word_embeddings=None, rope_theta=5e5,
         rope_local_base_freq=2e4, sliding_window_pattern=3)  # fmt: skip
    found = metadata(folder, tmp_path / "m.gguf")
    assert found["gemma3.rope.freq_base"] == 5e5 and found["gemma3.rope.freq_base_swa"] == 2e4
    pattern = [bool(each) for each in found["gemma3.attention.sliding_window_pattern"]]
    assert pattern == [True, True, False, True, True, False, True]

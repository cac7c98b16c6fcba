"""LoRA adapters on every architecture: the adapter file on its base is the merged model, the rest is refused."""

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

PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"o_proj": 32}, "rank_pattern": {"down_proj": 2}},
    "all": {"use_rslora": True, "alpha_pattern": {"down_proj": 3}, "rank_pattern": {"o_proj": 7}},
}


def export(folder: Path, lora: Path | None, target: Path, **given: Any) -> Artifact:
    handle = ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1, (lora,) if lora else (), "tiny")
    return edgellm_export(handle, target, Config(**{"modelfile": False, **given}), Context(target.parent / "run"))


def peft_lora(base: Path, folder: Path, **config: Any) -> Path:
    """A LoRA that peft wrote on every linear layer, both factors random."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | config
    torch.manual_seed(5)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    tuned.save_pretrained(folder)
    return folder


def peft_logits(base: Path, folder: Path, ids: list[int]) -> Any:
    import torch
    import transformers
    from peft import PeftModel

    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).eval()(torch.tensor([ids])).logits[0].double().numpy()


@pytest.mark.llama
@pytest.mark.parametrize("kind", decoders.KINDS)
@pytest.mark.parametrize("pattern", ["plain", "all"])
def test_the_file_and_the_merged_model_are_what_peft_computes(kind: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    base = decoders.write_kind(tmp_path / "model", kind)
    folder = peft_lora(base, tmp_path / "lora", **PATTERNS[pattern])
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 120).tolist()
    reference, bound = peft_logits(base, folder, ids), 1e-6
    merged = export(base, folder, tmp_path / "merged.gguf", type="f32").path
    assert decoders.compare(reference, decoders.engine_logits(merged, ids))[1] < bound
    plain = export(base, None, tmp_path / "base.gguf", type="f32").path
    adapter = export(base, folder, tmp_path / "adapter.gguf", adapter="separate").path
    assert decoders.compare(reference, decoders.engine_logits(plain, ids, adapter))[1] < bound
    assert decoders.compare(reference, decoders.engine_logits(plain, ids))[1] > 1e-3
    off = decoders.engine_logits(plain, ids, adapter, scale=0.0)
    np.testing.assert_array_equal(off, decoders.engine_logits(plain, ids))


@pytest.mark.parametrize("kind", decoders.KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_factors_come_back_bit_for_bit(kind: str, pattern: str, tmp_path: Path) -> None:
    """A of the file is peft's A; B is peft's B times its true scale over alpha / r, its rows in the engine's order."""
    from edgellm_sdk.kit import adapters

    base = decoders.write_kind(tmp_path / "model", kind)
    folder = peft_lora(base, tmp_path / "lora", **PATTERNS[pattern])
    found = gguf_file.read(export(base, folder, tmp_path / "a.gguf", adapter="separate").path)
    assert found.metadata["general.architecture"] == llama_family.read(base).kind.gguf
    slots, saved = llama_family.slots(llama_family.read(base)), adapters.arrays(folder)
    assert len(found.tensors) == len(saved) > 0
    for name, array in saved.items():
        module, _, part = name.rpartition(".lora_")
        slot = slots[f"{module}.weight"]
        got = found.tensor_bytes(f"{slot.name}.lora_{part.lower()}").view("<f4")
        if part == "B":
            scale = adapters.lora_scale(folder, module) * array.shape[1] / found.metadata["adapter.lora.alpha"]
            array = array * np.float32(scale)
            array = llama_family.permute(array, slot.heads) if slot.heads else array
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("how", ["merge", "separate"])
@pytest.mark.parametrize("kind", ["qwen2 tied", "gemma3", "phi3"])
def test_what_a_file_cannot_say_is_refused(kind: str, how: str, tmp_path: Path) -> None:
    base = decoders.write_kind(tmp_path / "model", kind)
    config = json.loads((peft_lora(base, tmp_path / "lora") / "adapter_config.json").read_text())
    for key, value in (("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "lora_only")):
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ModelError, match=key if key != "bias" else "biases"):
            export(base, tmp_path / "lora", tmp_path / "m.gguf", adapter=how)


@pytest.mark.parametrize("how", ["merge", "separate"])
def test_a_lora_on_a_tied_head_or_an_embedding_is_never_dropped(how: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = decoders.write_kind(tmp_path / "model", "qwen3 tied")
    path = peft_lora(base, tmp_path / "lora") / "adapter_model.safetensors"
    clean = load_file(path)
    for name, message in (
        ("lm_head.lora_A.weight", "head|tied"),
        ("model.embed_tokens.lora_embedding_A", "embed"),
        ("model.layers.9.self_attn.q_proj.lora_A.weight", "no such tensor|unknown"),
    ):
        save_file(clean | {f"base_model.model.{name}": np.ones((4, 64), np.float32)}, path)
        with pytest.raises(ModelError, match=message) as caught:
            export(base, path.parent, tmp_path / "m.gguf", adapter=how)
        assert "\n" not in str(caught.value)

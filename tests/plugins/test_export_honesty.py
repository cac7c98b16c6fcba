"""What a GGUF file says it holds: every storage type, read back by the gguf package and run by llama.cpp."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import decoders  # noqa: E402
from edgellm_plugins.export import llama_family  # noqa: E402
from edgellm_plugins.export.gguf import Config, edgellm_export  # noqa: E402
from edgellm_plugins.export.gguf.method import as_type  # noqa: E402

from edgellm_sdk import checkpoint, store  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.kit import blocks, super_blocks  # noqa: E402
from edgellm_sdk.models import resolve  # noqa: E402

FLOATS = ("f32", "f16", "bf16")
PACKED = (*blocks.FORMATS, *super_blocks.FORMATS)
# llama.cpp multiplies packed weights by activations that it rounds to 8 bits: nats of KL, mean over positions
ROUNDED_ACTIVATIONS = 0.01
IDS = np.random.default_rng(2).integers(3, decoders.VOCABULARY, 96).tolist()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose rows hold whole super-blocks, of three architectures that differ in norms, heads and activation."""
    folder, size = tmp_path_factory.mktemp("wide"), {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    own = {"llama": {}, "qwen3": {}, "gemma3": {"query_pre_attn_scalar": 64}}
    return {kind: decoders.write_kind(folder / kind, kind, **size, **more) for kind, more in own.items()}


def rounded(source: Path, target: Path, fmt: str) -> dict[str, Any]:
    """A folder as `compress` leaves it, its layers' matrices rounded to the nearest; what each was rounded to."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    packed = {name: blocks.nearest(tensors.pop(name), fmt) for name in list(tensors) if "_proj" in name}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    store.save_arrays(target / "quantized.safetensors", packed, {"format": dict.fromkeys(packed, fmt)})
    return packed


def greedy(path: Path) -> list[int]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    try:
        return [token for token, _ in zip(model.generate(IDS[:16], top_k=1), range(12), strict=False)]
    finally:
        model.close()


def every(kind: str, name: str) -> Any:
    return pytest.param(kind, name, marks=(pytest.mark.row if kind == "llama" else pytest.mark.bar)("G1"))


@pytest.mark.llama
@pytest.mark.parametrize(
    ("kind", "name"), [every(kind, name) for kind in ("llama", "qwen3", "gemma3") for name in (*FLOATS, *PACKED)]
)
def test_the_file_is_what_it_says(kind: str, name: str, wide: dict[str, Path], tmp_path: Path) -> None:
    """The tensors are the quantiser's bytes, the engine's logits those of the decoded weights in torch, and two loads
    write the same tokens."""
    pytest.importorskip("llama_cpp")
    folder, wanted = tmp_path / "model", {}
    if name in PACKED:
        wanted = rounded(wide[kind], folder, name)
    else:
        shutil.copytree(wide[kind], folder)
    model = resolve(str(folder))
    config = Config(type=name if name in FLOATS else "auto", embedding=name if name in FLOATS else "f32")
    path = edgellm_export(model, tmp_path / "m.gguf", config, Context(tmp_path / "run")).path

    slots, found = llama_family.slots(llama_family.read(folder)), checkpoint.inspect(folder)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for hf, tensor in found.tensors.items():
        if "_proj" not in hf:
            continue
        slot, stored = slots[hf], written[slots[hf].name]
        assert stored.tensor_type.name == name.upper()
        rows = wanted[hf] if wanted else as_type(found.array(hf), name.upper(), hf)
        rows = llama_family.permute(rows, slot.heads) if slot.heads else rows
        assert stored.data.tobytes() == np.ascontiguousarray(rows).tobytes()
        decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
        values = found.array(hf) if wanted else tensor_as_stored(found.array(hf), name)
        assert np.array_equal(decoded, llama_family.permute(values, slot.heads) if slot.heads else values)
        assert decoded.shape == tensor.shape

    import torch

    with torch.no_grad():
        logits = model.load().model(torch.tensor([IDS])).logits[0].double().numpy()
    _, kl = decoders.compare(logits, decoders.engine_logits(path, IDS))
    assert kl < {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-3}.get(name, ROUNDED_ACTIVATIONS)
    assert greedy(path) == greedy(path)


def tensor_as_stored(values: Any, name: str) -> Any:
    import torch

    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
    return torch.from_numpy(values).to(kind).float().numpy()

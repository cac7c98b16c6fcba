"""What compression methods share that write a model folder: what may be compressed, whose job it is, what stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgellm_plugins.compression import plain_folder
from edgellm_sdk import checkpoint, store
from edgellm_sdk.config import as_dict
from edgellm_sdk.errors import ModelError
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays, ModelHandle


def refuse_quantised(model: ModelHandle) -> None:
    """ModelError when there is nothing left to quantise: a GGUF file or a folder that is already compressed."""
    fix = "compress the model it was made from"
    if model.format != "hf":
        raise ModelError("a GGUF file cannot be compressed again", str(model.path), fix)
    stored = {tensor.stored for tensor in checkpoint.inspect(model.path).tensors.values()}
    if stored & {*checkpoint.BLOCKS, "gptq"}:
        raise ModelError("already quantised", str(model.path), fix)


def described(config: Any) -> dict[str, Any]:
    """The options that shape the result; a text file is named without its folder."""
    values = as_dict(config)
    return {key: Path(value).name if key == "calibration_text" else value for key, value in values.items()}


def job_key(
    model: ModelHandle, version: str, config: Any, windows: Array, plan: Mapping[str, str] | None = None
) -> str:
    """Identity of a job, for its checkpoints: model, version of the plugin, options, plan, every calibration token."""
    text = json.dumps([model.digest, version, described(config), dict(plan or {})], sort_keys=True)
    return hashlib.sha256(text.encode() + windows.astype("<i8").tobytes()).hexdigest()


def kept(source: Path, model: nn.Module, replaced: Collection[str] = ()) -> dict[str, Tensor]:
    """The source's tensors that nothing replaced, merged values in the dtype each was stored in."""
    state, found = model.state_dict(), {}
    for name, tensor in checkpoint.inspect(source).tensors.items():
        if name not in replaced:
            with safe_open(tensor.parts[0].path, framework="pt") as file:
                stored = file.get_tensor(name)
            merged = state.get(name, stored)
            found[name] = merged.to(stored.dtype).contiguous() if merged.shape == stored.shape else stored
    return found


@torch.no_grad()
def write_plain(source: ModelHandle, model: nn.Module, arrays: Arrays, ctx: Context) -> ModelHandle:
    """Write `ctx.folder / "model"`: the merged `model` with `arrays` (parameter name -> new value) in it, every tensor
    in the dtype that the source stores it in. `model` takes the values. StorageError when the disk says no."""
    for name, array in arrays.items():
        model.get_parameter(name).copy_(torch.tensor(array))
    target = ctx.folder / "model"
    with store.replacing(target) as temp:
        plain_folder.copy(source, model, temp)
    return resolve(str(target))

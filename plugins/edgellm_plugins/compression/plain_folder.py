"""A model folder like the one it was loaded from, with other values."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from edgellm_sdk import checkpoint

if TYPE_CHECKING:
    from edgellm_sdk.types import ModelHandle

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def copy(model: ModelHandle, values: nn.Module, folder: Path, widened: Collection[str] = ()) -> None:
    """Write the tensors of `model` with the values that `values` has for them, in the dtypes they were stored in, those
    in `widened` in float32; and every file beside them. Equal inputs give equal bytes."""
    found, state = checkpoint.inspect(model.path), values.state_dict()
    for name in checkpoint.SIDE_FILES:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)
    tensors = {
        name: state[name].to(torch.float32 if name in widened else DTYPES[tensor.stored]).contiguous()
        for name, tensor in found.tensors.items()
        if name in state and tensor.stored in DTYPES and not (found.tied and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

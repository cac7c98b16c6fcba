"""A torch session on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgellm_hardware.cuda import Config
from edgellm_hardware.cuda.probe import probe
from edgellm_hardware.torch_session import TorchSession, handle_of
from edgellm_sdk.errors import DeviceError

if TYPE_CHECKING:
    from edgellm_sdk.types import Artifact, ModelHandle


def deploy(subject: ModelHandle | Artifact, config: Config) -> TorchSession:
    """`subject` on GPU `config.index`; DeviceError naming the reason when torch cannot use it."""
    if not torch.cuda.is_available():
        found = probe()
        reason = found.reason or "torch cannot use the GPU"
        raise DeviceError("CUDA is not available", reason, "choose --device cpu")
    if config.index >= torch.cuda.device_count():
        raise DeviceError(f"there is no GPU {config.index}", f"{torch.cuda.device_count()} found", "choose --index 0")
    return TorchSession(handle_of(subject), f"cuda:{config.index}", config.dtype)

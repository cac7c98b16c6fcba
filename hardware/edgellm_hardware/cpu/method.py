"""A torch session on the processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgellm_hardware.cpu import Config
from edgellm_hardware.torch_session import TorchSession, handle_of

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Artifact, ModelHandle


def deploy(subject: ModelHandle | Artifact, config: Config, ctx: Context) -> TorchSession:
    """`subject` in memory. The thread count is torch's, for the whole process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return TorchSession(handle_of(subject), "cpu", config.dtype)

"""PyTorch on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin
from edgellm_sdk.types import DeviceInfo

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Artifact, ModelHandle, Session


@dataclass(frozen=True)
class Config:
    dtype: str = opt("bfloat16", "number format of the weights", choices=("float32", "bfloat16", "float16"))
    index: int = opt(0, "which GPU", ge=0, le=255)


PLUGIN = Plugin(name="cuda", summary="PyTorch on an NVIDIA GPU", version="0.1.0", config=Config)


@hookimpl
def edgellm_probe() -> DeviceInfo:
    """The driver, the GPUs and their memory, asked of the driver itself; torch is not imported."""
    from edgellm_hardware.cuda.probe import probe

    return probe()


@hookimpl
def edgellm_deploy(subject: ModelHandle | Artifact, device: str, config: Config, ctx: Context) -> Session:
    """A Session on the GPU. DeviceError when there is none that torch can use."""
    from edgellm_hardware.cuda.method import deploy

    return deploy(subject, config)

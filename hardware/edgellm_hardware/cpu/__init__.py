"""PyTorch on this machine's processor: the reference every other backend is compared with."""

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
    dtype: str = opt("float32", "number format of the weights", choices=("auto", "float32", "bfloat16", "float16"))
    threads: int = opt(0, "torch threads; 0 leaves torch's own choice", ge=0, le=1024)


PLUGIN = Plugin(
    name="cpu",
    summary="PyTorch on the processor; the reference of the export gate",
    version="0.1.0",
    config=Config,
)


@hookimpl
def edgellm_probe() -> DeviceInfo:
    """Cores, memory and the instruction sets that matter for matrix products."""
    from edgellm_hardware.cpu.probe import probe

    return probe()


@hookimpl
def edgellm_deploy(subject: ModelHandle | Artifact, device: str, config: Config, ctx: Context) -> Session:
    """A Session on an HF folder or a GGUF file (its weights decoded). ModelError for what cannot be read."""
    from edgellm_hardware.cpu.method import deploy

    return deploy(subject, config, ctx)

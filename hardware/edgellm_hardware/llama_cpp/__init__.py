"""llama.cpp on the CPU, in a child process: a malformed file, an abort or a hang becomes one line, never our death.

It runs GGUF files, and trains a LoRA beside one with methods that need losses alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin
from edgellm_sdk.types import DeviceInfo

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.kit.adapters import Spec
    from edgellm_sdk.kit.objective import Objective
    from edgellm_sdk.types import Artifact, ModelHandle, Session

INSTALL = "pip install 'edgellm-sdk[llama]'"


@dataclass(frozen=True)
class Config:
    context: int = opt(2048, "longest sequence; never more than the model was trained for", unit="tokens", ge=16)
    batch: int = opt(512, "tokens that share one call", unit="tokens", ge=16, le=8192)
    threads: int = opt(0, "threads; 0 takes the physical cores this process may use", ge=0, le=1024)
    mmap: bool = opt(True, "map the file instead of reading it")
    cache: str = opt("f16", "number format of the key/value cache", choices=("f16", "f32"))
    memory: int = opt(0, "largest address space of the child; 0 derives it from the file", unit="MiB", ge=0)
    patience: float = opt(300.0, "longest silence before the child counts as hung", unit="s", ge=0.1)
    contexts: int = opt(
        1, "in training: perturbations evaluated at the same time, sharing weights and threads", ge=1, le=64
    )
    adapters: str = opt("", "LoRA adapter GGUF files, comma-separated, each PATH or PATH@SCALE")


PLUGIN = Plugin(
    name="llama_cpp",
    summary="llama.cpp in a guarded child process: runs GGUF files on the CPU",
    version="0.1.0",
    config=Config,
    aliases=("llama-cpp", "llama.cpp"),
    requires=("llama_cpp",),
)


@hookimpl
def edgellm_probe() -> DeviceInfo:
    """Whether llama-cpp-python is installed, and which release; nothing native is loaded."""
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("llama_cpp") is None:
        return DeviceInfo("llama_cpp", False, f"llama-cpp-python is not installed; {INSTALL}")
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return DeviceInfo("llama_cpp", True, details={"version": version})


@hookimpl
def edgellm_deploy(subject: ModelHandle | Artifact, device: str, config: Config, ctx: Context) -> Session:
    """A Session on a GGUF file. ModelError for a file that cannot run, DeviceError for what the machine lacks."""
    from edgellm_hardware.llama_cpp.method import deploy

    return deploy(subject, config, ctx)


@hookimpl
def edgellm_objective(model: ModelHandle, spec: Spec, max_length: int, config: Config, ctx: Context) -> Objective:
    """The loss of a GGUF file as a function of a LoRA. ConfigError for other kinds of trainable tensors."""
    from edgellm_hardware.llama_cpp.training import Perturbed

    return Perturbed(model, spec, max_length, config, ctx)

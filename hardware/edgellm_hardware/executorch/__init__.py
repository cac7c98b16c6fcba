"""ExecuTorch: P-RGE training as a `.pte` that any ExecuTorch runtime executes, forwards only (arXiv 2409.15520).

`edgellm export --plugin executorch` writes the training program of a model, with a mutable LoRA-FA inside. As a device
of training runs (`--device executorch`) it evaluates the losses of zeroth-order methods. It does not generate text:
export the trained adapter with another plugin for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin
from edgellm_sdk.types import DeviceInfo

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.kit.adapters import Spec
    from edgellm_sdk.kit.objective import Objective
    from edgellm_sdk.types import Artifact, ModelHandle

INSTALL = "pip install 'edgellm-sdk[executorch]'"
LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Config:
    noise: str = opt("graph", "noise drawn in the graph, or an input that the host seeds", choices=("graph", "host"))
    queries: int = opt(4, "q, random directions of one step; the program runs 2q candidates at once", ge=1, le=32)
    batch: int = opt(4, "examples in one call; each meets every candidate", unit="examples", ge=1, le=256)
    tokens: int = opt(128, "static length: longest example", unit="tokens", ge=8, le=8192)
    labels: int = opt(16, "static number of scored tokens in one call", unit="tokens", ge=1, le=4096)
    rank: int = opt(16, "rank of the LoRA-FA factors", ge=1, le=512)
    alpha: float = opt(32.0, "LoRA scale is alpha / rank", ge=0)
    layers: int = opt(0, "train the last K layers; 0 trains all", unit="layers", ge=0)
    targets: str = opt(LINEARS, "module names that get a LoRA, comma-separated")
    backend: str = opt(
        "xnnpack", "who computes: XNNPACK where it can, or portable kernels", choices=("xnnpack", "portable")
    )
    verify: bool = opt(True, "run the written program once and compare its losses with the model's")


PLUGIN = Plugin(
    name="executorch",
    summary="P-RGE training as a forward-only .pte for ExecuTorch runtimes",
    version="0.1.0",
    config=Config,
    paper="arXiv 2409.15520",
    requires=("executorch",),
)


@hookimpl
def edgellm_probe() -> DeviceInfo:
    """Whether executorch and what it imports are installed, and which release; nothing native is loaded."""
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec("executorch") is None:
        return DeviceInfo("executorch", False, f"executorch is not installed; {INSTALL}")
    try:
        version = metadata.version("executorch")
    except metadata.PackageNotFoundError:
        version = "unknown"
    missing = [name for name in ("torchao", "flatbuffers", "ruamel") if find_spec(name) is None]
    if missing:
        return DeviceInfo("executorch", False, f"executorch lacks {', '.join(missing)}; {INSTALL}")
    return DeviceInfo("executorch", True, details={"version": version, "runs": "training programs, no generation"})


@hookimpl
def edgellm_export(model: ModelHandle, target: Any, config: Config, ctx: Context) -> Artifact:
    """The training program at `target`, its companion beside it. ModelError when the file does not match the model."""
    from edgellm_hardware.executorch.method import export

    return export(model, target, config, ctx)


@hookimpl
def edgellm_objective(model: ModelHandle, spec: Spec, max_length: int, config: Config, ctx: Context) -> Objective:
    """The loss of `model` as a function of a LoRA-FA, computed by ExecuTorch. ConfigError for other trainables."""
    from edgellm_hardware.executorch.evaluator import Evaluator

    return Evaluator(model, spec, max_length, config, ctx)

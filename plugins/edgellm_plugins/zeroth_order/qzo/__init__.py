"""QZO: a quantised model trained by its scales alone (arXiv 2505.13430, ICLR 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    """What applies to scales of `Options`: the others are constants here, and no options."""

    train: ClassVar[str] = "full"  # type: ignore[misc]
    layers: ClassVar[int] = 0  # type: ignore[misc]
    rank: ClassVar[int] = 0  # type: ignore[misc]
    alpha: ClassVar[float] = 0.0  # type: ignore[misc]
    targets: ClassVar[str] = ""  # type: ignore[misc]
    hidden_memory: ClassVar[int] = 0  # type: ignore[misc]
    weight_decay: ClassVar[float] = 0.0  # type: ignore[misc]

    step: float = opt(3e-3, "perturbation of a block's outermost weight, eps", ge=1e-7, le=1)
    learning_rate: float = opt(1e-4, "eta, for the outermost weights of blocks", ge=0)
    probes: int = opt(1, "directions of each step, n", ge=1, le=1024)
    clip: float = opt(100.0, "C: a directional derivative counts as at most this; 0 clips none", ge=0)
    floor: float = opt(1e-6, "least magnitude of a scale, unless it began below", ge=0, le=1)


PLUGIN = Plugin(
    name="qzo",
    summary="trains the scales of a quantised model, which keeps its codes and deploys as it is",
    version="0.1.0",
    config=Config,
    paper="arXiv 2505.13430",
)


(
    edgellm_initialise,
    edgellm_assign,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = seed_hooks(__name__)

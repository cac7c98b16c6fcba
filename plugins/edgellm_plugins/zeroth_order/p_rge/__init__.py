"""P-RGE (MobiZO): all perturbed copies of a small adapter in one batched forward (arXiv 2409.15520, EMNLP 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    RATES: ClassVar[tuple[float, float]] = (0.05, 0.05)

    train: str = opt("lora-fa", "what trains: LoRA-FA's B, which every candidate has its own of", choices=("lora-fa",))
    probes: int = opt(4, "q, random directions of one step", ge=1, le=32)
    batch_size: int = opt(16, "E, effective batch: each query sees E / q examples", unit="examples", ge=1, le=4096)
    split: bool = opt(False, "give each query examples of its own instead of the same E / q")
    loops: str = opt(
        "both", "candidates in one call: all 2q, the q of one sign, or 1", choices=("both", "outer", "none")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.probes:
            raise ValueError(
                f"batch size: {self.batch_size} examples cannot be shared equally by {self.probes} queries"
            )


PLUGIN = Plugin(
    name="p-rge",
    summary="all perturbed copies of a LoRA-FA adapter in one batched forward; scalars on the wire",
    version="0.1.0",
    config=Config,
    paper="arXiv 2409.15520",
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

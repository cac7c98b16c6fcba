"""SparseGPT: one-shot pruning that makes the weights still to come take over what each removed weight did.

Paper: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774 (ICML 2023). The
sweep is in `compression/columnwise.py`, the choice of weights in `compression/sparsity.py`, the walk through the model
in `compression/layerwise.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_plugins.compression.sparse_options import Calibrated
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin

FLOAT = "none"


@dataclass(frozen=True)
class Config(Calibrated):
    damping: float = opt(0.01, "added to the Hessian's diagonal, as a fraction of its mean", ge=0, le=1)
    block: int = opt(128, "columns between two updates of the rest of the matrix", ge=1, le=4096)
    mask_block: int = opt(128, "columns whose weights are chosen together, 0 for all; a pattern: its M", ge=0, le=65536)
    refit: bool = opt(False, "solve for the kept weights exactly once they are chosen; minutes more, format none only")
    format: str = opt(
        FLOAT,
        "none: weights stay floats; else quantise what is kept in the same sweep, for formats that can hold a zero "
        "(q4_1 and iq4_nl cannot)",
        choices=(FLOAT, "q4_0", "q5_0", "q8_0", "int2", "int3", "int4", "int8"),
    )
    group_size: int = opt(64, "intN: weights that share a scale, 0 for a whole row (blocks: always 32)", ge=0, le=65536)
    symmetric: bool = opt(True, "intN: grid around zero, without zero points of its own (blocks: by format)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refit and self.format != FLOAT:
            raise ValueError(f"refit: exact weights would leave the grid of {self.format}; leave one of the two out")
        if self.format.startswith("int") and self.group_size % 8:
            raise ValueError("group-size: must be a multiple of 8, or 0 for whole rows")


PLUGIN = Plugin(
    name="sparsegpt",
    summary="zero weights, compensating each in those not yet visited; runtimes gain nothing from the zeros",
    version="0.1.0",
    config=Config,
    paper="SparseGPT, arXiv 2301.00774",
)

edgellm_compress = compress_hook(__name__)

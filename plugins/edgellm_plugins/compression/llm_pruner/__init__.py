"""LLM-Pruner: whole key-value heads with their query heads, and whole FFN channels, by what the loss would lose.

Paper: "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627 (NeurIPS 2023). The arithmetic
is in `method.py`, what is cut in `compression/pruned.py`, the recovery in `compression/recovery.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_plugins.compression.pruning_options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    importance: str = opt(
        "element-first",
        "what a structure is worth: Taylor expansions of the loss by element (first order, Hessian, both) or vector; "
        "l2 and random are there to compare with",
        choices=("element-first", "element-second", "element-mix", "vector", "l2", "random"),
    )
    aggregation: str = opt(
        "sum", "of a group's matrices; last is o_proj or down_proj alone", choices=("sum", "max", "prod", "last")
    )
    ranking: str = opt(
        "local", "every layer loses the same share, or the least important anywhere go", choices=("local", "global")
    )
    attention: bool = opt(True, "prune key-value heads with their query heads, too; else FFN channels alone")
    spare_first: int = opt(-1, "layers at the bottom that stay whole; -1: a tenth of all", unit="layers", ge=-1)
    spare_last: int = opt(-1, "layers at the top that stay whole; -1: one in fifteen", unit="layers", ge=-1)
    multiple: int = opt(32, "FFN widths are multiples of this; 256 suits K-quants", unit="channels", ge=1, le=4096)
    iterations: int = opt(1, "cut in this many steps, judged anew before each", ge=1, le=100)


PLUGIN = Plugin(
    name="llm-pruner",
    summary="remove key-value heads and FFN channels by their Taylor importance; LoRA recovery",
    version="0.1.0",
    config=Config,
    paper="LLM-Pruner, arXiv 2305.11627",
)

edgellm_compress = compress_hook(__name__)

"""Whole blocks out of a decoder: those that change what passes through them least (ShortGPT-like).

Papers: block influence, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
2403.03853; removing by the loss that a removal costs is one of the ways compared in "Compact Language Models via
Pruning and Knowledge Distillation" (Minitron), arXiv 2407.14679. The arithmetic is in `method.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_plugins.compression.pruning_options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    layers: int = opt(0, "blocks to remove; 0: as many as --ratio says", unit="layers", ge=0, le=4096)
    score: str = opt(
        "influence",
        "what says that a block can go: influence, in one pass, or the loss without it, tried for every block anew "
        "after each removal",
        choices=("influence", "loss"),
    )


PLUGIN = Plugin(
    name="depth-prune",
    summary="remove the blocks that change their input least; fewer layers, nothing else, so every runtime gains",
    version="0.1.0",
    config=Config,
    paper="ShortGPT, arXiv 2403.03853",
    aliases=("shortgpt",),
)

edgellm_compress = compress_hook(__name__)

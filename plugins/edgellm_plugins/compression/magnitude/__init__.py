"""Magnitude pruning: the smallest weights of every layer become zero, without looking at any data.

The baseline of "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774: uniform
over layers, one threshold for a whole layer. The choice itself is in `compression/sparsity.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.compression.sparse_options import Sparse
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import ModelHandle


@dataclass(frozen=True)
class Config(Sparse):
    pass


PLUGIN = Plugin(
    name="magnitude",
    summary="set the smallest weights of every layer to zero: the baseline; runtimes gain nothing from the zeros",
    version="0.1.0",
    config=Config,
    paper="baseline of SparseGPT, arXiv 2301.00774",
)


@hookimpl
def edgellm_compress(model: ModelHandle, config: Config, ctx: Context) -> ModelHandle:
    from edgellm_plugins.compression.magnitude.method import compress

    return compress(model, config, ctx)

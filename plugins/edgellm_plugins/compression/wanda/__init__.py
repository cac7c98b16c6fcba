"""Wanda: weights with the smallest |weight| times input norm become zero, within each row, and nothing is updated.

Paper: "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. The score is in
`compression/sparsity.py`, the walk through the model in `compression/layerwise.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_plugins.compression.sparse_options import Calibrated
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Calibrated):
    pass


PLUGIN = Plugin(
    name="wanda",
    summary="zero the weights with the least weight times input norm, row by row; runtimes gain nothing from the zeros",
    version="0.1.0",
    config=Config,
    paper="Wanda, arXiv 2306.11695",
)

edgellm_compress = compress_hook(__name__)

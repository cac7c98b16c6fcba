"""The arithmetic of Wanda (arXiv 2306.11695): prune by |W_ij| * ||x_j||_2 within every output row, no update.

||x_j||_2 over all calibration tokens is, up to a factor that changes no order, the root of the Hessian's diagonal.

Where we differ from the code, and why:
* Inside a block each group of linears sees what the pruned ones before it put out. The code takes all norms of a block
  before it prunes any of its layers; only the next block sees pruned activations. Ours is what SparseGPT is given here
  as well, so that the two differ in the method alone. `sequential` off: norms of the dense model throughout.
* The input norms come from a full Hessian, which the walk computes anyway and the layer errors in the report need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgellm_plugins.compression import layerwise, sparsity
from edgellm_plugins.compression.stored import write_plain
from edgellm_plugins.compression.wanda import PLUGIN, Config

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Arrays, Dataset, Float32, ModelHandle


class Wanda:
    """`layerwise.Method`: prune a group of linears."""

    def __init__(self, config: Config, stored: sparsity.Stored) -> None:
        self.config, self.stored = config, stored

    def solve(self, group: layerwise.Group) -> layerwise.Solved:
        pruned = {}
        for name, weight in zip(group.names, group.weights, strict=True):
            new = weight
            if self.config.prunes(group.block, name):
                sparsity.check_pattern(weight.shape[1], self.config, name)
                new = weight.masked_fill(sparsity.wanda(weight, group.hessian.diagonal(), self.config), 0)
            pruned[name] = self.stored.array(name, new)
        records = sparsity.errors(group, "wanda", pruned, self.config)
        return layerwise.Solved({f"{name}.weight": array for name, array in pruned.items()}, tuple(records))

    def restore(self, name: str, arrays: Arrays) -> Float32:
        return sparsity.restore(name, arrays)


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """Prune the linears of every block into `ctx.folder / "model"`; what stays, stays bit for bit as it was.

    Adapters are merged in float32 first. ModelError for a model that is quantised or has no blocks to walk, DataError
    for too little calibration text.
    """
    loaded = sparsity.load(model, config)
    method = Wanda(config, sparsity.Stored(model.path))
    arrays, records = sparsity.walk(loaded, data, config, ctx, method, "wanda", PLUGIN.version)
    sparsity.summarise("wanda", records, model.parameters, config, ctx)
    handle = write_plain(model, loaded.model, arrays, ctx)
    layerwise.forget(ctx, "wanda")
    return handle

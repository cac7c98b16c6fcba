"""Magnitude pruning of the linears of every block; see `edgellm_plugins.compression.sparsity` for the choice.

Where we differ from the reference's `--gmp`: exactly floor(r c s) weights go, not one more and all ties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edgellm_plugins.compression import sparsity
from edgellm_plugins.compression.magnitude import Config
from edgellm_plugins.compression.stored import write_plain

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, ModelHandle


@torch.no_grad()
def compress(model: ModelHandle, config: Config, ctx: Context) -> ModelHandle:
    """Prune into `ctx.folder / "model"`; everything but the chosen weights stays bit for bit as it was.

    Adapters are merged in float32 first. ModelError for a model that is quantised or has no blocks to walk.
    """
    loaded = sparsity.load(model, config)
    stored = sparsity.Stored(model.path)
    arrays: dict[str, Array] = {}
    records: list[dict[str, Any]] = []
    for name, module in sparsity.linears(loaded.model, config).items():
        weight = module.weight.detach()
        sparsity.check_pattern(weight.shape[1], config, name)
        pruned = stored.array(name, weight.masked_fill(sparsity.magnitude(weight, config), 0))
        arrays[f"{name}.weight"] = pruned
        records.append({"name": name, "shape": list(weight.shape), "zeros": int((pruned == 0).sum())})
    sparsity.summarise("magnitude", records, model.parameters, config, ctx)
    return write_plain(model, loaded.model, arrays, ctx)

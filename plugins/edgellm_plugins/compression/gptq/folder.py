"""The folder a quantised model is written to, whole or not at all.

Block formats: the source's `config.json` and tokenizer, `model.safetensors` with what was not quantised in the source's
own dtypes, `quantized.safetensors` with rows of block bytes and {"format": {tensor: format}}. intN: a standard GPTQ
checkpoint, `model.safetensors` with qweight, qzeros, scales and g_idx, and `quantization_config` in `config.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from edgellm_plugins.compression.gptq import INTEGERS, PLUGIN, Config
from edgellm_plugins.compression.stored import described, kept
from edgellm_sdk import checkpoint, store
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Arrays, ModelHandle


def summarise(records: Sequence[Mapping[str, Any]], fallen: Mapping[str, str], config: Config, ctx: Context) -> None:
    """The measured loss of every layer into `ctx.folder / "layers.json"`, two curves and a note."""
    for number, row in enumerate(records):
        ctx.curve("relative output error over layers, gptq", number, row["gptq"])
        ctx.curve("relative output error over layers, round to nearest", number, row["rtn"])
    store.write_json(ctx.folder / "layers.json", {"config": described(config), "layers": list(records)})
    for change in sorted(set(fallen.values())):
        count = sum(value == change for value in fallen.values())
        ctx.note(f"{count} layers whose rows are no whole blocks: {change}")
    gptq, plain = (sum(row[key] for row in records) / len(records) for key in ("gptq", "rtn"))
    better = sum(row["gptq"] < row["rtn"] for row in records)
    formats = ", ".join(sorted({row["format"] for row in records}))
    ctx.note(
        f"gptq {formats}: mean relative output error {gptq:.5f}, round to nearest {plain:.5f}; "
        f"smaller in {better} of {len(records)} layers"
    )


def write(
    source: ModelHandle,
    model: nn.Module,
    arrays: Arrays,
    formats: Mapping[str, str],
    config: Config,
    ctx: Context,
) -> ModelHandle:
    """Write `ctx.folder / "model"` from the merged float32 `model` and the quantised `arrays`, whose blocks are of
    `formats`; equal inputs give equal bytes. StorageError when the disk says no."""
    target = ctx.folder / "model"
    bits = INTEGERS.get(config.format)
    replaced = {name if bits is None else f"{name.removesuffix('.qweight')}.weight" for name in arrays}
    tensors = kept(source.path, model, replaced)
    settings = store.read_json(source.path / checkpoint.CONFIG)
    if bits is not None:
        tensors.update({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        settings["quantization_config"] = {
            "quant_method": "gptq", "bits": bits, "group_size": config.group_size or -1, "desc_act": config.act_order,
            "sym": config.symmetric, "damp_percent": config.damping, "true_sequential": config.sequential,
            "static_groups": False, "lm_head": False, "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
            "meta": {"quantizer": [f"edgellm:{PLUGIN.version}"]},
        }  # fmt: skip
    with store.replacing(target) as temp:
        for name in checkpoint.SIDE_FILES:
            if name != checkpoint.CONFIG and (source.path / name).is_file():
                shutil.copyfile(source.path / name, temp / name)
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
        if bits is None:
            store.save_arrays(temp / checkpoint.QUANTIZED, arrays, {"format": {n: formats[n] for n in sorted(arrays)}})
        store.write_json(temp / checkpoint.CONFIG, settings)
    return resolve(str(target))

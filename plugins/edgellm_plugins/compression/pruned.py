"""What structural pruning cuts: rows and columns that can only go together, in a live model and in a folder.

In a Llama-type block they are known in closed form (LLM-Pruner, arXiv 2305.11627, section 3.1), with h the length of a
head and r the query heads that share a key-value head:

    FFN channel c        row c of gate_proj and up_proj, column c of down_proj
    key-value head g     rows g h ... (g + 1) h of k_proj and v_proj, rows g r h ... (g + 1) r h of q_proj, the same
                         columns of o_proj

Under grouped-query attention the key-value head with all its r query heads is the least that can go: without one of
them the others would be shared unevenly, which neither transformers nor ggml can compute.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgellm_sdk import checkpoint, store, widths
from edgellm_sdk.errors import ModelError
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import ModelHandle

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)


@dataclass(frozen=True)
class Member:
    """A linear layer of a block: `width` neighbouring rows (axis 0) or columns (axis 1) belong to each group."""

    module: str
    axis: int
    width: int


FFN = (Member("mlp.gate_proj", 0, 1), Member("mlp.up_proj", 0, 1), Member("mlp.down_proj", 1, 1))


def attention(repeat: int, head: int) -> tuple[Member, ...]:
    """The members of a key-value head that `repeat` query heads of length `head` share."""
    queries = repeat * head
    return (
        Member("self_attn.q_proj", 0, queries), Member("self_attn.k_proj", 0, head),
        Member("self_attn.v_proj", 0, head), Member("self_attn.o_proj", 1, queries),
    )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What is left of a block: its number in the source, and there its key-value heads and FFN channels, ascending."""

    layer: int
    heads: tuple[int, ...]
    channels: tuple[int, ...]

    def places(self, repeat: int, head: int) -> Iterator[tuple[Member, Tensor]]:
        """Every member with the rows or columns that stay, ascending int64."""
        for members, groups in ((attention(repeat, head), self.heads), (FFN, self.channels)):
            for member in members:
                first = torch.tensor(groups, dtype=torch.int64)[:, None] * member.width
                yield member, (first + torch.arange(member.width)).flatten()


def shape(layer: nn.Module) -> tuple[int, int, int, int]:
    """(key-value heads, query heads that share one, length of a head, FFN channels) of a live block.

    ModelError for a block that is not built as a Llama's.
    """
    try:
        sizes = {m.module: layer.get_submodule(m.module) for m in (*attention(1, 1), *FFN)}
        head: int = layer.get_submodule("self_attn").head_dim  # type: ignore[assignment]
        rows = {name: module.out_features for name, module in sizes.items() if isinstance(module, nn.Linear)}
        keys = rows["self_attn.k_proj"]
        return keys // head, rows["self_attn.q_proj"] // keys, head, rows["mlp.gate_proj"]
    except (AttributeError, KeyError):
        raise ModelError(
            f"{type(layer).__name__} has other parts than a Llama's block", fix="use depth-prune"
        ) from None


def cut(layer: nn.Module, kept: Kept) -> None:
    """Delete from a live block, in place, everything but what `kept` names in the block as it is now."""
    _, repeat, head, _ = shape(layer)
    with torch.no_grad():
        for member, places in kept.places(repeat, head):
            old: Any = layer.get_submodule(member.module)
            places = places.to(old.weight.device)
            weight = old.weight.index_select(member.axis, places)
            rows, columns = weight.shape
            new = nn.Linear(columns, rows, old.bias is not None, device=weight.device, dtype=weight.dtype)
            new.weight.copy_(weight)
            if old.bias is not None:
                new.bias.copy_(old.bias if member.axis else old.bias[places])
            parent, _, name = member.module.rpartition(".")
            setattr(layer.get_submodule(parent), name, new.requires_grad_(old.weight.requires_grad))


def whole_of(model: ModelHandle) -> list[Kept]:
    """Every block of a model with nothing cut."""
    rows = widths.read(checkpoint.read_json(model.path / checkpoint.CONFIG), str(model.path))
    return [Kept(i, tuple(range(row.kv_heads)), tuple(range(row.ffn))) for i, row in enumerate(rows)]


def write(
    source: ModelHandle, kept: Sequence[Kept], ctx: Context, layer_types: Sequence[str] | None = None
) -> ModelHandle:
    """Write what `kept` names of `source` into `ctx.folder / "model"`: adapters merged, then cut, each tensor in the
    dtype it was stored in. Blocks are numbered anew. `layer_types`, one for each block of the source, for models that
    have several kinds of attention. Equal inputs give equal bytes. StorageError when the disk says no."""
    config = checkpoint.read_json(source.path / checkpoint.CONFIG)
    rows, number = widths.read(config, str(source.path)), {row.layer: i for i, row in enumerate(kept)}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    repeats = [rows[row.layer].heads // rows[row.layer].kv_heads for row in kept]
    places = {
        (row.layer, member.module): (member.axis, indices)
        for row, repeat in zip(kept, repeats, strict=True)
        for member, indices in row.places(repeat, head)
    }
    found, tensors = checkpoint.inspect(source.path), {}
    for name, array in source.tensors():
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(DTYPES.get(found.tensors[name].stored, torch.float32))
        if match := BLOCK.fullmatch(name):
            layer, module, kind = int(match[1]), match[2], match[3]
            if layer not in number:
                continue
            axis, indices = places.get((layer, module), (1, torch.tensor(())))
            if (layer, module) in places and (kind == "weight" or axis == 0):
                tensor = tensor.index_select(axis if kind == "weight" else 0, indices)
            name = f"model.layers.{number[layer]}.{module}.{kind}"
        tensors[name] = tensor.contiguous()
    left = [
        widths.Widths(len(row.heads) * repeat, len(row.heads), len(row.channels))
        for row, repeat in zip(kept, repeats, strict=True)
    ]
    settings = widths.written(config, left)
    if layer_types is not None:
        settings["layer_types"] = [layer_types[row.layer] for row in kept]
    target = ctx.folder / "model"
    with store.replacing(target) as temp:
        for name in checkpoint.SIDE_FILES:
            if name != checkpoint.CONFIG and (source.path / name).is_file():
                shutil.copyfile(source.path / name, temp / name)
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
        store.write_json(temp / checkpoint.CONFIG, settings)
    return resolve(str(target))


def told(source: ModelHandle, smaller: ModelHandle) -> dict[str, Any]:
    """What was reached, for the record: weights before and after, and the widths that are left."""
    rows = widths.read(checkpoint.read_json(smaller.path / checkpoint.CONFIG), str(smaller.path))
    return {
        "parameters": smaller.parameters,
        "parameters before": source.parameters,
        "heads": [row.heads for row in rows],
        "key-value heads": [row.kv_heads for row in rows],
        "channels": [row.ffn for row in rows],
    }

"""A block-quantised model in memory as what it is: codes of a byte, scales, and weights only while they are used.

The matrices come from a folder that `edgellm compress` wrote or from a GGUF file, in formats with one scale for 32
weights (`edgellm_sdk.kit.blocks`). Each is held as levels k, int8, with weight = d * k (+ m), and decoded into a
scratch when the model comes to it: memory is about 9 bits a weight, and there never is a floating-point copy.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgellm_sdk import checkpoint, gguf_file, ledger, models, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks, loading
from edgellm_sdk.kit.blocks import WIDTH
from edgellm_sdk.kit.loading import LoadedModel
from edgellm_sdk.kit.scoring import LOSS, Goal
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Array, ModelHandle

if TYPE_CHECKING:
    from edgellm_sdk.gguf_file import GGUFFile
    from edgellm_sdk.kit.blocks import Bytes

FLOATS = ("F32", "F16", "BF16")
CHUNK = 1 << 18
_COMMAS = (",", ":")
ADVICE = "`edgellm compress --plugin gptq` makes such blocks"


@dataclass(frozen=True)
class Rows:
    """The blocks of one matrix on disk: `read` gives (rows, row bytes) uint8 in transformers' row order."""

    format: str
    read: Callable[[], Bytes]


def sources(model: ModelHandle, ctx: Context) -> tuple[ModelHandle, dict[str, Rows]]:
    """The folder with everything else (configuration, tokenizer, float tensors), and the blocks by tensor name.

    ModelError when there are none, when some have a format without a scale for every 32 weights, or when an adapter
    lies on them.
    """
    folder = models.resolve(str(model.path)) if model.format == "gguf" else model
    where = str(model.path)
    if model.adapters:
        raise ModelError("has an adapter, which cannot be merged into blocks", where, "compress the two together")
    file = _converted_from(model, folder, ctx)
    inside = checkpoint.inspect(folder.path)
    found = _of_folder(inside) if file is None else _of_file(file, inside.tensors)
    if not found:
        raise ModelError(f"holds no weights in blocks ({', '.join(blocks.FORMATS)})", where, ADVICE)
    return folder, found


def _of_folder(found: checkpoint.Checkpoint) -> dict[str, Rows]:
    made = {}
    for name, tensor in found.tensors.items():
        if tensor.stored in blocks.FORMATS:
            made[name] = Rows(tensor.stored, tensor.parts[0].read)
        elif tensor.stored == "gptq" or tensor.stored in checkpoint.BLOCKS:
            raise ModelError(f"{name[:80]} is {tensor.stored}, whose scales cannot train", str(found.folder), ADVICE)
    return made


def _of_file(file: GGUFFile, names: Iterable[str]) -> dict[str, Rows]:
    """Of a Llama, by the tensor names of its folder; the rows of q and k go back from ggml's rotary order."""
    about, made = file.metadata, {}
    if about.get("general.architecture") != "llama":
        raise ModelError("is no Llama, whose blocks alone can be taken from a GGUF file", str(file.path), ADVICE)
    heads = {"attn_q": int(about["llama.attention.head_count"])}
    heads["attn_k"] = int(about.get("llama.attention.head_count_kv", heads["attn_q"]))
    for name in names:
        target = str(ledger.gguf_name(name))
        info = file.tensors.get(target)
        if info is None or info.type in FLOATS:
            continue
        if info.type.lower() not in blocks.FORMATS:
            raise ModelError(f"{target} is {info.type}, whose scales cannot train", str(file.path), ADVICE)
        made[name] = Rows(info.type.lower(), _reader(file, target, heads.get(target.split(".")[-2], 0)))
    return made


def _reader(file: GGUFFile, name: str, heads: int) -> Callable[[], Bytes]:
    path, info = file.path, file.tensors[name]

    def read() -> Bytes:
        # not through the file's map, whose pages would stay resident
        stored = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset).reshape(-1, info.row_bytes)
        if not heads:
            return stored
        rows = np.empty_like(stored)
        rows[ledger.interleave(np.arange(len(stored)), heads)] = stored
        return rows

    return read


def _converted_from(model: ModelHandle, folder: ModelHandle, ctx: Context) -> GGUFFile | None:
    """The GGUF file behind a converted folder, None for other folders. ModelError when it is not at hand.

    A handle forgets where its file was, so it is looked for where the run's recipe says, and held against the digest.
    """
    if model.format == "gguf":
        return gguf_file.read(model.path)
    manifest, recipe = folder.path / store.MANIFEST, ctx.folder / "recipe.json"
    about = store.read_json(manifest).get("about", {}) if manifest.is_file() else {}
    if "converted" not in about:
        return None
    asked = str(store.read_json(recipe).get("model", "")) if recipe.is_file() else ""
    for spec in {model.name, asked} & {models.ALIAS, asked} - {""}:
        path = models.as_file(model, spec).path
        if path.is_file() and models.resolve(str(path)).digest == model.digest:
            return gguf_file.read(path)
    raise ModelError(f"the file {about['converted']!r} that it was made from is not at hand", str(folder.path), ADVICE)


def write(path: Path, shapes: Mapping[str, tuple[str, tuple[int, int]]], read: Callable[[str], Bytes]) -> None:
    """`quantized.safetensors` (see `checkpoint`), the bytes that `store.save_arrays` would write, with one matrix in
    memory at a time: format and (rows, row bytes) of each, and what reads it. StorageError when the disk says no."""
    formats = json.dumps(
        {"format": {name: kind for name, (kind, _) in shapes.items()}}, sort_keys=True, separators=_COMMAS
    )
    header: dict[str, Any] = {"__metadata__": {"edgellm": formats}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name][1])
        header[name] = {"data_offsets": [begin, end], "dtype": "U8", "shape": list(shapes[name][1])}
    text = json.dumps(header, sort_keys=True, separators=_COMMAS, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with store.atomic(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(shapes):
            out.write(np.ascontiguousarray(read(name)).data)


class Matrix:
    """One matrix: `levels` (rows, blocks, 32) int8; `scales` and `mins`, if any, as stored, (rows, blocks) float16;
    `largest`, the magnitude of its format's outermost level."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        form = blocks.block_format(rows.format)
        self.largest = max(map(abs, form.table or (form.low - form.zero, form.high - form.zero)))
        codes, scales, mins = blocks.unpack(rows.read(), rows.format)
        if not np.isfinite(scales).all() or (mins is not None and not np.isfinite(mins).all()):
            raise ModelError("a block's scale is not finite", rows.format)
        levels = (
            np.array(form.table, np.int8)[codes] if form.table else np.subtract(codes, np.int8(form.zero), out=codes)
        )
        self.levels = torch.from_numpy(levels.reshape(*scales.shape, WIDTH)).to(device)
        self.scales = torch.from_numpy(scales.astype(np.float16)).to(device)
        self.mins = None if mins is None else torch.from_numpy(mins.astype(np.float16)).to(device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape[0], self.levels.shape[1] * WIDTH

    def decode(self, scales: Tensor, out: Tensor, begin: int = 0) -> Tensor:
        """Rows begin .. begin + len(out) - 1 into `out`, with `scales` (len(out), blocks) float32 in place of d.

        d * k and + m are rounded to float32 one after the other, as llama.cpp does and `blocks.decode`; a 16-bit `out`
        is rounded once more.
        """
        height = max(1, CHUNK // out.shape[1])
        for top in range(0, len(out), height):
            part = slice(top, top + height)
            rows = slice(begin + top, min(begin + top + height, begin + len(out)))
            values = out[part] if out.dtype == torch.float32 else torch.empty(out[part].shape, device=out.device)
            self._into(values, self.levels[rows], scales[part], None if self.mins is None else self.mins[rows])
            if out.dtype != torch.float32:
                out[part] = values
        return out

    def pick(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows (n,), as stored: (n, columns)."""
        values = torch.empty(len(rows), self.shape[1], device=rows.device)
        mins = None if self.mins is None else self.mins[rows]
        self._into(values, self.levels[rows], self.scales[rows].float(), mins)
        return values.to(dtype)

    @staticmethod
    def _into(values: Tensor, levels: Tensor, scales: Tensor, mins: Tensor | None) -> None:
        grid = values.view(levels.shape)
        grid.copy_(levels)
        grid.mul_(scales[:, :, None])
        if mins is not None:
            grid.add_(mins.float()[:, :, None])


class Packed(Whole):
    """`Whole` over such a model. What `parameters` holds for a matrix in blocks is zeros, so everything needs a `Shift`
    that decodes."""

    def __init__(
        self,
        model: ModelHandle,
        ctx: Context,
        dtype: str = "float32",
        max_length: int = 128,
        goal: Goal = LOSS,
    ) -> None:
        folder, self.rows = sources(model, ctx)
        super().__init__(_Hollow.of(folder, frozenset(self.rows)), dtype, ctx.device, max_length, goal)
        self.matrices = {name: Matrix(rows, self.device) for name, rows in self.rows.items()}


@dataclass(frozen=True, slots=True)
class _Hollow(ModelHandle):
    """A model that is loaded without the matrices in `absent`: each is one zero that is seen at every place."""

    absent: frozenset[str] = frozenset()

    @classmethod
    def of(cls, h: ModelHandle, absent: frozenset[str]) -> _Hollow:
        return cls(h.path, h.digest, h.format, h.architecture, h.dtype, h.parameters, h.adapters, h.name, absent)

    def load(self, dtype: str = "float32", device: str = "cpu", merge: bool = False) -> LoadedModel:
        found = checkpoint.inspect(self.path)
        kind = loading.auto_dtype(device) if dtype == "auto" else loading.DTYPES[dtype]
        hollow = _HollowFolder(found.folder, found.config, found.tensors, found.files, self.absent)
        model = loading.build(hollow, torch.float32)  # a cast to another dtype would fill the zeros in
        zero = torch.zeros(1, dtype=kind, device=device)
        for name, parameter in model.named_parameters():
            parameter.data = zero.expand(parameter.shape) if name in self.absent else parameter.data.to(device, kind)
        model.to(device).eval().requires_grad_(False)
        return LoadedModel(model, loading.load_tokenizer(self), self, kind)


@dataclass(frozen=True)
class _HollowFolder(checkpoint.Checkpoint):
    absent: frozenset[str] = frozenset()

    def array(self, name: str, rows: slice = slice(None)) -> Array:
        if name in self.absent:
            return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), self.tensors[name].shape, (0, 0))[rows]
        return super().array(name, rows)

"""Importance matrices as GGUF files: for each weight the sum of squares of every input, and over how many tokens.

Format: llama.cpp's `imatrix` tool. `general.type` = "imatrix"; `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size`; tensors `NAME.in_sum2` (1, inputs) and `NAME.counts` (1, 1), float32, NAME being a weight's name
in the model's GGUF file. The mean square is what the engine's quantiser weighs a rounding error with; up to a factor it
is the diagonal of GPTQ's Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgellm_plugins.export import gguf_container
from edgellm_plugins.export.gguf_container import Planned, Value
from edgellm_sdk import gguf_file
from edgellm_sdk.errors import ModelError

if TYPE_CHECKING:
    from edgellm_sdk.types import Float32

SUMS, COUNTS = ".in_sum2", ".counts"
FLOOR = 1e-6  # of the mean: inputs that are always 0 made K-quants not finite (llama.cpp issue 11764)
NAME = "imatrix.gguf"


@dataclass(frozen=True)
class Entry:
    """`sums`: (inputs,) float32, of squares over `count` tokens."""

    sums: Float32
    count: float

    def mean_squares(self) -> Float32:
        """(inputs,) float32, all above 0; all 1 when nothing was counted."""
        if not self.count or not self.sums.any():
            return np.ones_like(self.sums)
        means = self.sums / np.float32(self.count)
        return np.ascontiguousarray(np.maximum(means, np.float32(FLOOR) * means.mean()), np.float32)


@dataclass(frozen=True)
class Imatrix:
    """A file's content. `chunks` of `chunk_size` tokens of `datasets` were seen."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def write(imatrix: Imatrix) -> None:
    """To `imatrix.path`; equal contents give equal bytes."""
    plan, data = [], []
    for name, entry in sorted(imatrix.entries.items()):
        plan += [Planned(name + SUMS, (1, len(entry.sums)), "F32"), Planned(name + COUNTS, (1, 1), "F32")]
        data += [(name + SUMS, entry.sums[None]), (name + COUNTS, np.array([[entry.count]], np.float32))]
    metadata = {
        "general.type": Value("string", "imatrix"),
        "imatrix.datasets": Value("array[string]", list(imatrix.datasets)),
        "imatrix.chunk_count": Value("u32", imatrix.chunks),
        "imatrix.chunk_size": Value("u32", imatrix.chunk_size),
    }
    gguf_container.write(imatrix.path, metadata, plan, data)


def read(path: Path) -> Imatrix:
    """ModelError for a file that is no importance matrix, or one with numbers that cannot be."""
    found = gguf_file.read(path)
    if found.metadata.get("general.type") != "imatrix":
        raise ModelError("is not an importance matrix", str(path), "edgellm compress --plugin imatrix makes one")
    entries = {}
    for name in found.tensors:
        if not name.endswith(SUMS):
            continue
        stem = name.removesuffix(SUMS)
        parts = []
        for tensor in (name, stem + COUNTS):
            if tensor not in found.tensors or found.tensors[tensor].type != "F32":
                raise ModelError(f"lacks the numbers of {stem[:60]!r}", str(path))
            parts.append(np.array(found.tensor_bytes(tensor)).reshape(-1).view("<f4"))
        sums, counts = parts
        if len(counts) != 1:
            raise ModelError(f"{stem[:60]!r} has {len(counts)} experts, which are not supported", str(path))
        if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(counts[0]) and counts[0] >= 0):
            raise ModelError(f"the numbers of {stem[:60]!r} are negative or not finite", str(path))
        entries[stem] = Entry(np.array(sums, np.float32), float(counts[0]))
    if not entries:
        raise ModelError("holds no importance of any weight", str(path))
    datasets = found.metadata.get("imatrix.datasets")
    names = tuple(map(str, datasets)) if isinstance(datasets, list) and datasets else ("unknown",)
    chunks, size = (int(found.metadata.get(f"imatrix.chunk_{key}", 0)) for key in ("count", "size"))
    return Imatrix(path, entries, names, chunks, size)

"""How large the GGUF file of a model will be, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_plugins.export import gguf_container, gguf_tokenizer, llama_family, rotary
from edgellm_plugins.export.gguf.method import general
from edgellm_plugins.export.gguf_container import ALIGNMENT, Planned

if TYPE_CHECKING:
    from edgellm_sdk.types import ModelHandle


@dataclass(frozen=True)
class Layout:
    """`fixed` bytes are there whatever the matrices are stored as: header, tokenizer, norms, biases. `matrices` are the
    (rows, columns) of the others, by their transformers names."""

    fixed: int
    matrices: dict[str, tuple[int, int]]


def layout(model: ModelHandle) -> Layout:
    """ModelError for a model that cannot be exported."""
    family = llama_family.read(model.path)
    slots = llama_family.slots(family)
    plan = [Planned(s.name, s.shape, "F16" if len(s.shape) > 1 else "F32") for s in slots.values()]
    plan += [Planned(key, array.shape, "F32") for key, array in rotary.factors(family).items()]
    tokenizer, _, _ = gguf_tokenizer.metadata(model, family.vocabulary)
    metadata = general(model.name or model.path.name, family.gguf, plan) | llama_family.metadata(family) | tokenizer
    whole = gguf_container.size(metadata, plan)
    matrices = {hf: (s.shape[0], s.shape[1]) for hf, s in slots.items() if len(s.shape) == 2}
    return Layout(whole - sum(padded(2 * rows * columns) for rows, columns in matrices.values()), matrices)


def padded(nbytes: int) -> int:
    """What a tensor of `nbytes` takes up in the file."""
    return nbytes + -nbytes % ALIGNMENT

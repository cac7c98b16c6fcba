"""What a model writes after given tokens, and the folder a distilled model is written to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from edgellm_sdk import checkpoint, store
from edgellm_sdk.kit import answers
from edgellm_sdk.models import resolve
from edgellm_sdk.random import Stream
from edgellm_sdk.types import ModelHandle


def drawn(logits: Tensor, temperature: float, stream: Stream) -> Tensor:
    """One token of each row of logits (R, V): from softmax(logits / temperature) in float64 by the inverse of its
    cumulative sum, or the likeliest at 0. (R,) int64."""
    if not temperature:
        return logits.argmax(1)
    rising = (logits.double() / temperature).softmax(1).cumsum(1)
    u = torch.from_numpy(stream.uniform(len(logits))).to(rising.device)[:, None] * rising[:, -1:]
    return torch.searchsorted(rising, u, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


@torch.no_grad()
def continuations(
    model: Any,
    given: Sequence[Sequence[int]],
    stops: Sequence[int],
    new_tokens: int,
    temperature: float,
    stream: Stream,
) -> list[list[int]]:
    """y ~ p(. | x) for every x of `given`: token ids, up to and with the first of `stops`, at most `new_tokens`.

    `model` is in eval mode and keeps keys and values; nothing is kept to back-propagate through.
    """
    tokens = answers.padded(given).to(model.lm_head.weight.device)
    lengths = torch.tensor([len(row) for row in given], device=tokens.device)
    cache = DynamicCache(config=model.config)

    def read(**inputs: Tensor) -> Tensor:
        hidden: Tensor = model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden

    def draw(hidden: Tensor) -> Tensor:
        return drawn(model.lm_head(hidden).float(), temperature, stream)

    def step(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return draw(read(input_ids=ids, position_ids=positions, attention_mask=mask)[:, -1])

    first = draw(read(input_ids=tokens)[torch.arange(len(given), device=tokens.device), lengths - 1])
    return answers.continued(first, lengths, stops, new_tokens, step)


def write_merged(model: ModelHandle, target: Path) -> ModelHandle:
    """`model` with its adapters folded in, as the folder `target`: tensors in the dtype their base is stored in. Equal
    inputs give equal bytes. ModelError when an adapter cannot be merged, StorageError when the disk says no."""
    stored = checkpoint.inspect(model.path).tensors
    tensors = {
        name: torch.tensor(array, dtype=getattr(torch, checkpoint.DTYPES[stored[name].stored]))
        for name, array in model.tensors()
    }
    with store.replacing(target) as temp:
        for name in checkpoint.SIDE_FILES:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, temp / name)
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(target))

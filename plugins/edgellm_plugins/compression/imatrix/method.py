"""Sums of squares of what enters each linear, over full windows of calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise, plain_folder
from edgellm_plugins.compression.imatrix import Config
from edgellm_plugins.compression.stored import refuse_quantised
from edgellm_plugins.export import llama_family
from edgellm_plugins.export.imatrix import NAME, Entry, Imatrix, write
from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ModelError
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle


@torch.no_grad()
def sums_of_squares(model: Any, windows: Tensor, ctx: Context, head: bool = True) -> dict[str, tuple[Tensor, int]]:
    """{linear: (sum of squares of each input (in,) float32, tokens)} of all linears, over `windows` (n, t) int64.

    Linears that read one tensor, such as q, k and v, get equal sums. The head reads what is behind the last norm.
    """
    found: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        before = found.get(name, (torch.zeros(flat.shape[1]), 0))
        found[name] = (before[0] + flat.square().sum(0), before[1] + len(flat))

    def watch(name: str) -> Any:
        return lambda module, args: add(name, args[0])

    body, layers = layerwise.decoder(model)
    output = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_pre_hook(watch(name)) for name, module in linears.items() if module is not output
    ]
    try:
        size = layerwise.batch_size(len(windows), windows.shape[1], layers, torch.float32, ctx.memory)
        with ctx.progress("measuring importance", total=len(windows)) as bar:
            for batch in windows.split(size):
                hidden = body(input_ids=batch, use_cache=False).last_hidden_state
                for name in [name for name, module in linears.items() if head and module is output]:
                    add(name, hidden)
                bar.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return found


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """The merged model with `imatrix.gguf` beside it in `ctx.folder / "model"`.

    ModelError for a model that is quantised or has no place in a GGUF file, DataError for too little text.
    """
    refuse_quantised(model)
    slots = llama_family.slots(llama_family.read(model.path))
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    length = config.calibration_length
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, length, ctx
    )
    sums = sums_of_squares(loaded.model, windows, ctx, config.head)
    tied = checkpoint.inspect(model.path).tied
    entries = {}
    for name, (squares, tokens) in sums.items():
        slot = slots.get(f"{name}.weight")
        if slot is None and tied and name == "lm_head":
            slot = slots["model.embed_tokens.weight"]  # one matrix; the engine quantises it as its head
        if slot is not None:
            entries[slot.name] = Entry(squares.numpy(), tokens)
    text = Path(config.calibration_text).name if config.calibration_text else ""
    source = text or (data.name if data is not None else "") or "data"
    target = ctx.folder / "model"
    with store.replacing(target) as temp:
        plain_folder.copy(model, loaded.model, temp)
        write(Imatrix(temp / NAME, entries, (source,), len(windows), length))
    ctx.note(f"importance of {len(entries)} weights over {windows.numel():,} tokens of {source}")
    return resolve(str(target))

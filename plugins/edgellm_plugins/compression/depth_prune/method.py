"""Depth pruning. Block influence (ShortGPT, arXiv 2403.03853):

    BI_l = 1 - E_t[ cos(h_l,t , h_l+1,t) ]

with h_l,t the hidden state that enters block l at token t and h_l+1,t the one that leaves it. The blocks with the
lowest BI go, judged once on the whole model. With `score = loss` the block goes without which the loss on the
calibration windows is lowest, and the rest is judged again: L forwards for the first block, L - 1 for the next.

What is left is numbered anew, so the result is a plain model of the same architecture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise, pruned, recovery
from edgellm_plugins.compression.depth_prune import Config
from edgellm_plugins.compression.stored import refuse_quantised
from edgellm_sdk import store
from edgellm_sdk.config import as_dict
from edgellm_sdk.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle


@contextmanager
def without(layers: nn.ModuleList, numbers: Collection[int]) -> Iterator[None]:
    """The blocks with these numbers hand on what they are given, for as long as the context is open."""

    def skip(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states

    chosen = [layers[number] for number in numbers]
    try:
        for layer in chosen:
            setattr(layer, "forward", skip)  # noqa: B010 - shadows the class's forward on this instance only
        yield
    finally:
        for layer in chosen:
            layer.__dict__.pop("forward", None)


@torch.no_grad()
def influence(model: nn.Module, windows: Tensor) -> list[float]:
    """BI of every block over all tokens of `windows` (n, tokens) int64, in [0, 2]."""
    body, layers = layerwise.decoder(model)
    total = [0.0] * len(layers)

    def watch(number: int) -> Any:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = result[0] if isinstance(result, tuple) else result
            cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            total[number] += float((1 - cosine).sum())

        return leave

    handles = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for window in windows:
            body(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [value / windows.numel() for value in total]


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    """Mean next-token loss over `windows` (n, tokens) int64: nats a token."""
    return sum(float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in windows) / len(windows)


def greedy(model: Any, windows: Tensor, count: int, ctx: Context) -> tuple[list[int], list[float]]:
    """(`count` blocks in the order they go, the loss after each): every time the one whose removal costs least."""
    _, layers = layerwise.decoder(model)
    gone: list[int] = []
    losses: list[float] = []
    with ctx.progress("trying blocks", sum(len(layers) - i for i in range(count))) as bar:
        for _ in range(count):
            tried = {}
            for number in sorted({*range(len(layers))} - {*gone}):
                with without(layers, [*gone, number]):
                    tried[number] = loss(model, windows)
                bar.advance(1, f"{len(gone)} of {count} gone")
            best = min(tried, key=lambda number: (tried[number], number))
            gone.append(best)
            losses.append(tried[best])
    return gone, losses


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """Write the model without the blocks that matter least into `ctx.folder / "model"`, recovered if asked.

    `ctx.folder / "pruned.json"` tells every block's score and what went. ConfigError when no block would be left,
    ModelError for a quantised model or one without blocks, DataError for too little text.
    """
    refuse_quantised(model)
    loaded = model.load(dtype="float32", device=ctx.device, merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    _, layers = layerwise.decoder(loaded.model)
    count = config.layers or round(config.ratio * len(layers))
    if count >= len(layers):
        raise ConfigError(f"{count} of {len(layers)} blocks would go", "layers", "leave at least one")
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    ).to(loaded.device)
    scores = influence(loaded.model, windows)
    for number, score in enumerate(scores):
        ctx.curve("block influence over blocks", number, score)
    record: dict[str, Any] = {"config": as_dict(config), "influence": scores}
    if config.score == "influence":
        gone = sorted(range(len(layers)), key=lambda number: (scores[number], number))[:count]
    else:
        gone, record["loss after each"] = greedy(loaded.model, windows, count, ctx)
    kept = [row for row in pruned.whole_of(model) if row.layer not in gone]
    kinds = getattr(loaded.model.config, "layer_types", None)
    smaller = pruned.write(model, kept, ctx, list(kinds) if kinds else None)
    ctx.note(f"removed {count} of {len(layers)} blocks: {', '.join(map(str, sorted(gone))) or 'none'}")
    store.write_json(ctx.folder / "pruned.json", record | pruned.told(model, smaller) | {"removed": gone})
    del loaded
    return recovery.recovered(smaller, data, config, ctx)

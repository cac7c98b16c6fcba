"""The token embedding and the output head, quantised after the blocks. The paper leaves them alone.

The head is a linear layer like any other: its H comes from what the quantised blocks put out behind the last norm. Of
an embedding a row is used as it is, so every column costs the same, H = I. A tied matrix is both at once; its H is that
of the head, scaled to a mean diagonal of 1, plus I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise
from edgellm_sdk.kit import overrides

if TYPE_CHECKING:
    from edgellm_plugins.compression.gptq.method import Gptq
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays


def quantise(
    model: Any, arrays: Arrays, windows: Tensor, method: Gptq, ctx: Context
) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """(arrays, records) of the ends that config or plan give a format; empty when they are to be kept.

    The linears named in `arrays` are replaced in `model` by what they have become.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    names = {name: module for name, module in model.named_modules() if module in (embedding, head)}
    if tied:
        names = {name: module for name, module in names.items() if module is embedding}
    wanted = {name: fmt for name in names if (fmt := _format(method, name))}
    if not wanted:
        return {}, []
    found: dict[str, Array] = {}
    records: list[dict[str, Any]] = []
    hessian = torch.eye(embedding.weight.shape[1])
    if tied or any(names[name] is head for name in wanted):
        seen = _behind_the_last_norm(model, arrays, windows, method, ctx)
    for name in wanted:
        if names[name] is head or tied:
            scaled = seen / seen.diagonal().mean().clamp(min=1e-30)
            group = layerwise.Group(-1, (name,), (names[name].weight.float(),), scaled + hessian if tied else scaled, 0)
        else:
            group = layerwise.Group(-1, (name,), (names[name].weight.float(),), hessian, 0)
        method.plan = {**method.plan, f"{name}.weight": wanted[name]}
        solved = method.solve(group)
        found.update(solved.arrays)
        records += solved.records
    return found, records


def _format(method: Gptq, name: str) -> str | None:
    planned = method.plan.get(f"{name}.weight") or overrides.chosen(method.overrides, name)
    return planned or (method.config.embedding if method.config.embedding != "keep" else None)


@torch.no_grad()
def _behind_the_last_norm(model: Any, arrays: Arrays, windows: Tensor, method: Gptq, ctx: Context) -> Tensor:
    """Mean of x x^T over all calibration tokens, (c, c), x as the head sees it behind the quantised blocks."""
    body, layers = layerwise.decoder(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in arrays:
            module.weight.copy_(torch.from_numpy(method.restore(name, arrays)))
    size = layerwise.batch_size(len(windows), windows.shape[1], layers, torch.float32, ctx.memory)
    wide = model.get_input_embeddings().weight.shape[1]
    total = torch.zeros(wide, wide)
    for batch in windows.split(size):
        x = body(input_ids=batch, use_cache=False).last_hidden_state.reshape(-1, wide).float()
        total.addmm_(x.t(), x)
    return total / windows.numel()

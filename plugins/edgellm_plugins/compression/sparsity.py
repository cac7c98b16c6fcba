"""What methods share that set weights to zero: which weights, what that costs a layer, and the way through a model.

Three ways to choose in a layer W (r outputs, c inputs) with the Hessian H of its inputs:

    magnitude   |W_ij|, over the whole layer; no calibration
    wanda       |W_ij| * ||x_j||_2, within each row; ||x_j||^2 is diag(H) up to a factor (arXiv 2306.11695)
    sparsegpt   W_ij^2 / U_jj^2, over r rows and a span of columns, from weights that compensate what went before
                (arXiv 2301.00774)

An N:M pattern keeps the N highest of every M neighbouring *inputs* of a row, by the same scores. Exactly as many go as
asked for: of equal scores the first in memory.

A zero is stored like any other weight. Neither a model folder nor a GGUF file gets smaller by it, and llama.cpp, which
multiplies by zeros as by anything, no faster; every method of this kind says so in its report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.columnwise import row_errors
from edgellm_plugins.compression.stored import described, job_key, refuse_quantised
from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from edgellm_plugins.compression.sparse_options import Calibrated, Sparse
    from edgellm_sdk.context import Context
    from edgellm_sdk.kit.loading import LoadedModel
    from edgellm_sdk.types import Array, Arrays, Dataset, Float32, ModelHandle

NO_GAIN = "zeros are stored like other weights: the files are no smaller and llama.cpp is no faster with them"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def count(share: float, of: int) -> int:
    """floor(share * of), not thrown by the last bit of the product."""
    return math.floor(share * of + 1e-9)


def smallest(values: Tensor, number: int) -> Tensor:
    """True at exactly `number` of the lowest values, of equals the first; any shape."""
    flat = values.flatten()
    if not number:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = flat.kthvalue(number).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen.view(values.shape)


def lowest(scores: Tensor, number: int, dim: int) -> Tensor:
    """True at the `number` lowest scores along `dim`, of equals the first."""
    order = scores.argsort(dim=dim, stable=True).narrow(dim, 0, number)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, order, True)


def _patterned(scores: Tensor, keep: int, of: int) -> Tensor:
    runs = scores.reshape(len(scores), -1, of)
    return lowest(runs, of - keep, 2).view(scores.shape)


def magnitude(weight: Tensor, config: Sparse) -> Tensor:
    """The weights that go, (r, c) bool: the smallest of the whole layer, or of every run of the pattern."""
    scores = weight.abs()
    return _patterned(scores, *config.kept) if config.kept else smallest(scores, count(config.share, scores.numel()))


def wanda(weight: Tensor, diagonal: Tensor, config: Sparse) -> Tensor:
    """The weights that go, (r, c) bool, given diag(H), (c,): equally many in every row."""
    scores = weight.abs() * diagonal.sqrt()
    return _patterned(scores, *config.kept) if config.kept else lowest(scores, count(config.share, scores.shape[1]), 1)


@dataclass(frozen=True)
class Cheapest:
    """`columnwise.Pruner`: of `span` columns the weights whose removal costs least, W_ij^2 * omega_j.

    The rows belong to linears of `rows[k]` outputs, each with its `shares[k]` of zeros over the span jointly: its rows
    may lose unequal numbers. With `keep` the span is a pattern's run and every row keeps that many.
    """

    span: int
    rows: tuple[int, ...]
    shares: tuple[float, ...]
    keep: int = 0

    def choose(self, columns: Tensor, omega: Tensor) -> Tensor:
        saliency = columns.square() * omega[:, None]
        chosen = []
        for part, share in zip(saliency.split(self.rows, dim=1), self.shares, strict=True):
            if self.keep:
                chosen.append(lowest(part, (len(part) - self.keep) if share else 0, 0))
            else:
                chosen.append(smallest(part, count(share, part.numel())))
        return torch.cat(chosen, dim=1)


def pruner(group: layerwise.Group, config: Sparse, span: int) -> Cheapest | None:
    """What a sweep over `group` is to choose by, `span` columns at a time (0: all), or None when everything stays."""
    shares = tuple(config.share if config.prunes(group.block, name) else 0.0 for name in group.names)
    if not any(shares):
        return None
    rows, columns = tuple(len(weight) for weight in group.weights), group.weights[0].shape[1]
    if config.kept is None:
        return Cheapest(span or columns, rows, shares)
    check_pattern(columns, config, group.names[0])
    keep, of = config.kept
    return Cheapest(of, rows, shares, keep)


def check_pattern(columns: int, config: Sparse, name: str) -> None:
    """ModelError unless the layer's inputs divide into runs of the pattern."""
    if config.kept and columns % config.kept[1]:
        raise ModelError(f"its {columns} inputs do not divide into runs of {config.kept[1]}", name, "leave out pattern")


class Stored:
    """Weights in the precision that the source stores them in, so that what is calibrated on is what is written."""

    def __init__(self, source: Path) -> None:
        self._dtypes = {
            name: _DTYPES.get(tensor.stored, torch.float32)
            for name, tensor in checkpoint.inspect(source).tensors.items()
        }

    def array(self, name: str, weight: Tensor) -> Float32:
        """`weight` (out, in) of the linear `name` as it will be read back; ModelError when it overflows."""
        rounded = weight.to(self._dtypes.get(f"{name}.weight", torch.float32)).float()
        if not torch.isfinite(rounded).all():
            raise ModelError("weights are not finite or too large for the type they are stored in", name)
        return rounded.contiguous().numpy()


def errors(group: layerwise.Group, title: str, arrays: Mapping[str, Float32], config: Sparse) -> list[dict[str, Any]]:
    """A JSON row for every pruned layer of a group: relative output errors tr(D H D^T) / tr(W H W^T) of the method
    `title`, whose new weights are `arrays`, and of its cheaper rivals, all on the same inputs."""
    rows, diagonal = [], group.hessian.diagonal()
    for name, weight in zip(group.names, group.weights, strict=True):
        if not config.prunes(group.block, name):
            continue
        made = torch.from_numpy(arrays[name])
        others = {
            "wanda": weight.masked_fill(wanda(weight, diagonal, config), 0),
            "magnitude": weight.masked_fill(magnitude(weight, config), 0),
        }
        size = float(row_errors(weight.t(), group.hessian).sum().clamp(min=1e-30))
        row: dict[str, Any] = {"name": name, "shape": list(weight.shape), "zeros": int((made == 0).sum())}
        for who, other in {**others, title: made}.items():
            row[who] = float(row_errors((weight - other).t(), group.hessian).sum().clamp(min=0)) / size
        rows.append(row | {"tokens": group.tokens})
    return rows


def load(model: ModelHandle, config: Sparse) -> LoadedModel:
    """The model in float32 with its adapters merged. ModelError when it is quantised, ConfigError when the options
    leave none of its layers to prune."""
    refuse_quantised(model)
    loaded = model.load(dtype="float32", merge=True)
    if not linears(loaded.model, config):
        layers = len(layerwise.decoder(loaded.model)[1])
        raise ConfigError(f"none of its {layers} blocks has a layer to prune", fix="change first-block or only")
    return loaded


def linears(model: nn.Module, config: Sparse) -> dict[str, nn.Linear]:
    """The linear layers that `config` prunes, by their name in `model`, in order."""
    layers = layerwise.decoder(model)[1]
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found = {
        f"{prefix}.{number}.{name}": (number, module)
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    return {name: module for name, (number, module) in found.items() if config.prunes(number, name)}


def walk(
    loaded: LoadedModel, data: Dataset | None, config: Calibrated, ctx: Context, method: layerwise.Method, title: str,
    version: str,
) -> tuple[dict[str, Array], list[dict[str, Any]]]:  # fmt: skip
    """`layerwise.walk` with the options of this family; DataError for too little calibration text."""
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(loaded.handle.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    )
    key = job_key(loaded.handle, version, config, windows.numpy())
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return layerwise.walk(
        loaded.model, windows, method, ctx, title=title, key=key, dtype=dtype, sequential=config.sequential
    )


def summarise(
    title: str, records: Sequence[Mapping[str, Any]], parameters: int, config: Sparse, ctx: Context, extra: str = ""
) -> None:
    """What every layer lost into `ctx.folder / "layers.json"`, curves and notes; `parameters` of the whole model."""
    names = [name for name in dict.fromkeys((title, "wanda", "magnitude")) if name in records[0]]
    for number, row in enumerate(records):
        for name in names:
            ctx.curve(f"relative output error over layers, {name}", number, row[name])
    zeros, weights = sum(row["zeros"] for row in records), sum(math.prod(row["shape"]) for row in records)
    shares = {"of the pruned layers": zeros / weights, "of the model": zeros / parameters}
    store.write_json(
        ctx.folder / "layers.json", {"config": described(config), "zeros": shares, "layers": list(records)}
    )
    where = config.pattern or f"{config.share:.0%}"
    told = f"{title} {where}: {shares['of the pruned layers']:.1%} of the weights of {len(records)} layers are zero, "
    ctx.note(f"{told}{shares['of the model']:.1%} of all parameters; {NO_GAIN}{extra}")
    if names:
        means = (f"{name} {sum(row[name] for row in records) / len(records):.5f}" for name in names)
        better = sum(all(row[title] < row[name] for name in names[1:]) for row in records)
        beside = f"; {title} is below the others in {better} of {len(records)} layers" if names[1:] else ""
        ctx.note(f"mean relative output error: {', '.join(means)}{beside}")


def restore(name: str, arrays: Arrays) -> Float32:
    """The weight of the linear `name` from arrays that hold weights as they are."""
    return arrays[f"{name}.weight"]

"""Measure what each matrix can bear, choose a format for each within the budget, show the plan, quantise.

The divergence of one matrix W in one format f is taken as

    cost(W, f) = KL(W in the probe format) * error(W, f) / error(W, probe format)

KL, in nats per token, is measured: the mean of KL(original || rounded) over the probe windows when W alone is rounded,
to the widest format with about four bits that its rows divide into. Error is the rounding error weighted with the mean
square of each input, on some of the rows. Costs are added up over matrices; how far that is from the divergence of the
whole plan (rounded plainly) is measured too and stands in `plan.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.auto_bits import PLUGIN, Config, size_in_bytes
from edgellm_plugins.compression.auto_bits.plan import Choice, solve
from edgellm_plugins.compression.gptq import Config as Gptq
from edgellm_plugins.compression.gptq.method import compress as quantise
from edgellm_plugins.compression.stored import refuse_quantised
from edgellm_plugins.export import gguf_size
from edgellm_sdk import store
from edgellm_sdk.config import as_dict
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import blocks

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle

PROBES = ("iq4_nl", "iq4_xs", "q4_0", "q5_0", "q8_0")  # the first that fits a row and was not excluded
ROWS = 192  # of each matrix, for the rounding error of a format
SPARE = 1024  # bytes: the name of the model is in the file, and is not known yet
CHECKPOINT = "auto-bits"


class Probe:
    """A model whose matrices can be rounded one at a time, and the divergence this causes on `windows` (n, t)."""

    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model, self.windows = model, windows
        self.body, self.layers = layerwise.decoder(model)
        self.modules = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        }
        owner = {id(module): number for number, layer in enumerate(self.layers) for module in layer.modules()}
        self.numbers = {name: owner[id(module)] for name, module in self.modules.items() if id(module) in owner}
        self.hidden: list[Tensor] = []
        self.inputs: dict[str, Tensor] = {}
        self.original = self._first()

    def _first(self) -> Tensor:
        """Log-probabilities of the untouched model (n, t, v); keeps what enters each block, and mean squares."""
        handles = [
            layer.register_forward_pre_hook(lambda module, args: self.hidden.append(args[0])) for layer in self.layers
        ]
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._square(name)))
        try:
            return self._logits().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    def _square(self, name: str) -> Any:
        def arrive(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[name] = args[0].reshape(-1, args[0].shape[-1]).float().square().mean(0)

        return arrive

    def _logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.windows, use_cache=False).logits
        return logits.float()

    @contextmanager
    def _from_block(self, number: int) -> Iterator[None]:
        """Forwards begin at this block, with what entered it in the untouched model."""

        def skip(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return states

        def swap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.hidden[number], *args[1:])

        handle = self.layers[number].register_forward_pre_hook(swap)
        try:
            for layer in self.layers[:number]:
                setattr(layer, "forward", skip)  # noqa: B010 - shadows the class's forward on this instance only
            yield
        finally:
            handle.remove()
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def divergence(self, formats: Mapping[str, str]) -> float:
        """Mean KL(original || rounded) in nats over all positions, with these matrices rounded."""
        before = {name: self.modules[name].weight for name in formats}
        head = self.model.get_output_embeddings()
        try:
            for name, fmt in formats.items():
                fresh = nn.Parameter(self.rounded(name, fmt), requires_grad=False)
                for module in (self.modules[name], head):
                    if module.weight is before[name]:
                        module.weight = fresh
            first = min(self.numbers.get(name, len(self.layers) - 1) for name in formats)
            embedded = any(isinstance(self.modules[name], nn.Embedding) for name in formats)
            with nullcontext() if embedded else self._from_block(first):
                found = self._logits().log_softmax(-1)
            return float((self.original.exp() * (self.original - found)).sum(-1).mean().clamp(min=0))
        finally:
            for name, weight in before.items():
                changed = self.modules[name].weight
                for module in (self.modules[name], head):
                    if module.weight is changed:
                        module.weight = weight

    def importance(self, name: str) -> Tensor:
        """Mean square of each input; of an embedding, whose rows are used as they are, all 1."""
        return self.inputs.get(name, torch.ones(self.modules[name].weight.shape[1])).clamp(min=1e-12)

    def rounded(self, name: str, fmt: str, rows: int = 0) -> Tensor:
        weight = _some(self.modules[name].weight, rows)
        parts = []
        for part in weight.split(4096):
            packed = blocks.lattice(fmt).rounded(part.t().contiguous().float(), self.importance(name))
            parts.append(torch.from_numpy(blocks.decode(packed, fmt)))
        return torch.cat(parts)

    def error(self, name: str, fmt: str) -> float:
        """Rounding error on some of the rows, inputs weighted by their mean square."""
        weight = _some(self.modules[name].weight, ROWS)
        return float(((self.rounded(name, fmt, ROWS) - weight).square() * self.importance(name)).sum())


def _some(weight: Tensor, rows: int) -> Tensor:
    return weight[:: max(len(weight) // rows, 1)] if rows else weight


def fitting(columns: int, formats: Sequence[str]) -> list[str]:
    """Those of `formats` whose blocks divide rows of `columns` weights."""
    return [name for name in formats if columns % blocks.any_format(name).width == 0]


def measure(
    probe: Probe, matrices: Mapping[str, tuple[int, int]], config: Config, key: str, ctx: Context
) -> dict[str, dict[str, float]]:
    """{matrix: {format: expected divergence}}, resumable after every matrix."""
    kept = ctx.resume(CHECKPOINT)
    table: dict[str, dict[str, float]] = kept[1]["table"] if kept is not None and kept[1].get("key") == key else {}
    with ctx.progress("measuring sensitivities", total=len(matrices)) as bar:
        for name, (_, columns) in matrices.items():
            if name not in table:
                allowed = fitting(columns, config.candidates())
                if not allowed:
                    raise ModelError(f"rows of {columns} divide into none of the formats", name, "allow q8_0")
                basis = next((fmt for fmt in PROBES if fmt in allowed), allowed[0])
                measured, unit = probe.divergence({name: basis}), max(probe.error(name, basis), 1e-30)
                table[name] = {fmt: measured * probe.error(name, fmt) / unit for fmt in allowed}
                ctx.checkpoint(CHECKPOINT, {}, {"key": key, "table": table})
            bar.advance(1, name)
    return {name: table[name] for name in matrices}


@torch.no_grad()
def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """`gptq` with the plan of `choose`, into `ctx.folder / "model"`; the plan is in `ctx.folder / "plan.json"` first.

    ConfigError when the budget is below what the smallest formats take.
    """
    refuse_quantised(model)
    formats = choose(model, data, config, ctx)
    settings = Gptq(
        format="q8_0", damping=config.damping, passes=config.passes, calibration_samples=config.calibration_samples,
        calibration_length=config.calibration_length, calibration_text=config.calibration_text, dtype=config.dtype,
        equal_tokens=config.equal_tokens,
    )  # fmt: skip
    handle = quantise(model, data, settings, ctx, formats)
    (ctx.folder / "checkpoint" / f"{CHECKPOINT}.safetensors").unlink(missing_ok=True)
    return handle


@torch.no_grad()
def choose(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> dict[str, str]:
    """The block format of every matrix of the file, by its name in the model."""
    place = gguf_size.layout(model)
    weights = sum(rows * columns for rows, columns in place.matrices.values())
    limit = size_in_bytes(config.max_size) if config.max_size else place.fixed + int(config.bits * weights / 8) + SPARE
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.probe_samples, config.probe_length, ctx
    )
    described = json.dumps([model.digest, PLUGIN.version, config.candidates()]).encode()
    key = hashlib.sha256(described + windows.numpy().astype("<i8").tobytes()).hexdigest()
    probe = Probe(loaded.model, windows)
    costs = measure(probe, place.matrices, config, key, ctx)
    options = {
        name: [
            Choice(fmt, gguf_size.padded(rows * blocks.any_format(fmt).row_bytes(columns)), costs[name][fmt])
            for fmt in costs[name]
        ]
        for name, (rows, columns) in place.matrices.items()
    }
    try:
        plan = solve(options, limit - place.fixed - SPARE)
    except ConfigError as error:
        raise ConfigError(f"{error.what} of {limit:,}", "max-size", "order a larger file") from None
    formats = {name: choice.format for name, choice in plan.items()}
    size = place.fixed + sum(choice.nbytes for choice in plan.values())
    expected, together = sum(choice.cost for choice in plan.values()), probe.divergence(formats)
    store.write_json(
        ctx.folder / "plan.json",
        {
            "config": {**as_dict(config), "calibration_text": Path(config.calibration_text).name}, "limit": limit,
            "bytes": size, "bits per weight": 8 * sum(choice.nbytes for choice in plan.values()) / weights,
            "formats": formats, "sensitivity": costs,
            "divergence, rounded plainly": {"summed": expected, "measured": together},
        },
    )  # fmt: skip
    _show(formats, place.matrices, size, limit, ctx)
    return formats


def _show(formats: Mapping[str, str], matrices: Mapping[str, tuple[int, int]], size: int, limit: int, ctx: Any) -> None:
    """The plan before it runs: per kind of matrix, how many get which format."""
    ctx.note(f"plan: {size:,} bytes of {limit:,} ({100 * size / limit:.1f} %)")
    kinds: dict[str, dict[str, int]] = {}
    for name in matrices:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        row = kinds.setdefault(kind, {})
        row[formats[name]] = row.get(formats[name], 0) + 1
    for kind, row in kinds.items():
        ctx.note(f"  {kind}: {', '.join(f'{count} x {fmt}' for fmt, count in sorted(row.items()))}")

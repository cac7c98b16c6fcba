"""Scales per input channel, chosen for the rounded layer's output and folded into what produces the input.

W x = (W diag(s)) (diag(s)^-1 x): the first factor is what gets quantised, the second goes into the weight of the norm
that the layer reads, or into the rows of the linear before it. With s large where inputs are loud, the weights that
matter are rounded more finely. s_j = m_j^alpha, m_j the size of input j, divided by sqrt(max s min s); alpha is the one
of 0, 1/20, ..., 19/20 with the least tr(D H D^T), D = Q(W diag s) diag(s)^-1 - W, for all linears of one input at once.

Where it is folded: a norm, found by watching whose output a group of linears reads; `up_proj` before `down_proj` (the
product with the gate is elementwise); `v_proj` before `o_proj` (attention mixes tokens, not channels), where the query
heads that share a value head share their scales. Groups that read anything else are left alone, as is a norm that has
other readers, and the last norm, which the output head reads.

Where we differ from the paper: m_j is the root mean square, which the Hessian has on its diagonal (the paper: the mean
magnitude); the search rounds onto the lattice that is stored, on some of the rows; no clipping search, since `gptq`
chooses scales afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise, plain_folder
from edgellm_plugins.compression.awq import PLUGIN, Config
from edgellm_plugins.compression.stored import refuse_quantised
from edgellm_sdk import store
from edgellm_sdk.config import as_dict
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle

ROWS = 128  # of a group's weights, for the search
TOLERANCE = 1e-3  # of the largest logit: what folding may change on a probe, in float32


class Search:
    """`layerwise.Method` that changes nothing: it stores `NAME.scale`, (in,) float32, NAME the group's first linear.

    `shared` maps an `o_proj` to (value heads, query heads of each, head size).
    """

    def __init__(self, config: Config, sources: Mapping[str, str], shared: Mapping[str, tuple[int, int, int]]) -> None:
        self.config, self.sources, self.shared = config, sources, shared

    def solve(self, group: layerwise.Group) -> layerwise.Solved:
        first = group.names[0]
        if first not in self.sources:
            return layerwise.Solved({}, ())
        weights = torch.cat(group.weights)
        weights = weights[:: max(len(weights) // ROWS, 1)]
        size = group.hessian.diagonal().clamp(min=0)
        if first in self.shared:
            heads, each, wide = self.shared[first]
            size = size.view(heads, each, wide).mean(1, keepdim=True).expand(-1, each, -1).reshape(-1)
        size = size.sqrt().clamp(min=1e-8)
        lattice = blocks.lattice(self.config.format)
        if len(size) % lattice.span:
            raise ModelError(f"rows of {len(size)} do not divide into {self.config.format} blocks", first)
        best, kept, plain = torch.inf, torch.ones_like(size), 0.0
        alpha = 0.0
        for step in range(self.config.steps):
            scale = size ** (step / self.config.steps)
            scale = scale / (scale.max() * scale.min()).sqrt()
            packed = lattice.rounded((weights * scale).t().contiguous(), group.hessian.diagonal() / scale.square())
            delta = torch.from_numpy(blocks.decode(packed, self.config.format)) / scale - weights
            error = float(((delta @ group.hessian) * delta).sum())
            plain = error if step == 0 else plain
            if error < best:
                best, kept, alpha = error, scale, step / self.config.steps
        record = {"name": first, "alpha": alpha, "gain": best / max(plain, 1e-30)}
        return layerwise.Solved({f"{first}.scale": kept.numpy()}, (record,))


def sources_of(model: Any, tokens: Tensor) -> tuple[dict[str, str], dict[str, tuple[int, int, int]]]:
    """({first linear of a group: the norm or linear its scales go into}, {o_proj: how its heads are shared}).

    Names are those in the model; `tokens` (1, t) are run once to see which norm is read by whom.
    """
    body, layers = layerwise.decoder(model)
    names = {module: name for name, module in model.named_modules()}
    written: dict[int, nn.Module] = {}
    readers: dict[nn.Module, list[nn.Module]] = {}
    alive: list[Tensor] = []  # so that no two tensors have one id

    def wrote(module: nn.Module, args: Any, output: Any) -> None:
        alive.append(output)
        written[id(output)] = module

    def read(module: nn.Module, args: Any) -> None:
        source = written.get(id(args[0]))
        if source is not None:
            readers.setdefault(source, []).append(module)

    handles = []
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(read))
            elif type(module).__name__.endswith("Norm"):
                handles.append(module.register_forward_hook(wrote))
    try:
        body(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found, shared = {}, {}
    for norm, linears in readers.items():
        weight = getattr(norm, "weight", None)
        wide = len(weight) if isinstance(weight, Tensor) else -1
        if all(linear.in_features == wide for linear in linears):  # a norm of heads is read through a view
            found[names[linears[0]]] = names[norm]
    for name in list(names.values()):
        stem, _, last = name.rpartition(".")
        pair = {"down_proj": "up_proj", "o_proj": "v_proj"}.get(last)
        if pair is None or f"{stem}.{pair}" not in names.values():
            continue
        after, before = model.get_submodule(name), model.get_submodule(f"{stem}.{pair}")
        if last == "o_proj":
            wide = getattr(model.get_submodule(stem), "head_dim", 0)
            if not wide or before.out_features % wide or after.in_features % before.out_features:
                continue
            shared[name] = (before.out_features // wide, after.in_features // before.out_features, wide)
        elif after.in_features != before.out_features:
            continue
        found[name] = f"{stem}.{pair}"
    return found, shared


@torch.no_grad()
def fold(
    model: Any, scales: Mapping[str, Tensor], sources: Mapping[str, str], groups: Mapping[str, tuple[str, ...]],
    shared: Mapping[str, tuple[int, int, int]],
) -> set[str]:  # fmt: skip
    """Multiply every group's weights by its scales and divide its source by them, in place; the tensors changed."""
    changed = set()
    for first, scale in scales.items():
        for name in groups[first]:
            model.get_submodule(name).weight.mul_(scale)
            changed.add(f"{name}.weight")
        source = model.get_submodule(sources[first])
        inverse = scale.reciprocal()
        if first in shared:
            heads, each, wide = shared[first]
            inverse = inverse.view(heads, each, wide)[:, 0].reshape(-1)
        if isinstance(source, nn.Linear):
            source.weight.mul_(inverse[:, None])
        elif "Gemma" in type(source).__name__:  # its norms multiply by 1 + weight
            source.weight.add_(1).mul_(inverse).sub_(1)
        else:
            source.weight.mul_(inverse)
        changed.add(f"{sources[first]}.weight")
        if getattr(source, "bias", None) is not None:
            source.bias.mul_(inverse)
            changed.add(f"{sources[first]}.bias")
    return changed


@torch.no_grad()
def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """The folded model in `ctx.folder / "model"`, changed tensors in float32; the search in `layers.json`.

    ModelError for a model that is quantised, or whose answers on a probe are not the same afterwards.
    """
    refuse_quantised(model)
    loaded = model.load(dtype="float32", merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    )
    options = {**as_dict(config), "calibration_text": ""}
    text = json.dumps([model.digest, PLUGIN.version, options], sort_keys=True).encode()
    key = hashlib.sha256(text + windows.numpy().astype("<i8").tobytes()).hexdigest()
    probe = windows[:1, : layerwise.PROBE_TOKENS]
    sources, shared = sources_of(loaded.model, probe)
    body, layers = layerwise.decoder(loaded.model)
    prefix = next(name for name, module in loaded.model.named_modules() if module is layers)
    groups = {
        f"{prefix}.{number}.{names[0]}": tuple(f"{prefix}.{number}.{name}" for name in names)
        for number, block in enumerate(layerwise.groups_of(body, layers, probe))
        for names in block
    }
    search = Search(config, sources, shared)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    arrays, records = layerwise.walk(loaded.model, windows, search, ctx, title="awq", key=key, dtype=dtype)
    before = loaded.model(input_ids=probe).logits
    scales = {name.removesuffix(".scale"): torch.tensor(scale) for name, scale in arrays.items()}
    changed = fold(loaded.model, scales, sources, groups, shared)
    off = float((loaded.model(input_ids=probe).logits - before).abs().max() / before.abs().max())
    if not off <= TOLERANCE:
        raise ModelError(f"folding changes its answers by {off:.1g} of the largest logit", str(model.path))
    store.write_json(ctx.folder / "layers.json", {"config": options, "layers": records})
    gain = sum(row["gain"] for row in records) / max(len(records), 1)
    ctx.note(f"awq: scales for {len(records)} groups of linears; plain rounding would now err {gain:.3f} times as much")
    with store.replacing(ctx.folder / "model") as temp:
        plain_folder.copy(model, loaded.model, temp, changed)
    layerwise.forget(ctx, "awq")
    return resolve(str(ctx.folder / "model"))

"""LLM-Pruner, arXiv 2305.11627: score dependency groups by a Taylor expansion of the loss, cut the least important.

With g = dL/dw of the mean next-token loss L over the N calibration windows and F = (1/N) sum_j g_j^2 (the diagonal of
the empirical Fisher matrix, for the Hessian's; g_j is the gradient of window j's loss), a row or column W_i scores

    vector           | sum_k w_k g_k |                      eq. 3, first order
    element-first    sum_k | w_k g_k |                      eq. 5, first order: the paper's Element^1
    element-second   sum_k | w_k^2 F_k |                    eq. 5, second order: Element^2
    element-mix      sum_k | w_k g_k - w_k^2 F_k / 2 |      eq. 5 in full

A group (see `compression.pruned`) sums its rows and columns within each matrix, then its matrices by `aggregation`.

Where we differ from the paper and its code (and why):
- Under grouped-query attention the r query heads next to each other belong to one key-value head. The code adds up
  heads g, g + n, g + 2n, ... instead, and so ranks groups by heads of others.
- `ratio` is the share of the blocks' weights, not of the groups, and becomes a whole number of heads and of runs of
  channels before anything is cut: the code's rounding leaves a model with three key-value heads whole below 1/3. Heads
  and channels lose the same share, to within one head; channels take up what heads leave.
- F is divided by N, so that the two terms of eq. 5 are of one scale. Scores are float32, summed in float64.
- Blocks only (the paper's types A and B). Its type C, hidden channels, fared far worse in its own tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgellm_plugins.compression import layerwise, pruned, recovery
from edgellm_plugins.compression.llm_pruner import Config
from edgellm_plugins.compression.pruned import Kept, Member
from edgellm_plugins.compression.stored import refuse_quantised
from edgellm_sdk import store
from edgellm_sdk.config import as_dict
from edgellm_sdk.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Dataset, ModelHandle

PARTS = ("heads", "channels")
TAYLOR = ("vector", "element-first", "element-second", "element-mix")


# What a structure is worth


@dataclass
class Gradient:
    """Of one matrix, each of its shape: `mean` g, and `squares` F where it is asked for."""

    mean: Tensor
    squares: Tensor | None = None


def gradients(model: Any, weights: Sequence[nn.Parameter], windows: Tensor, second: bool) -> list[Gradient]:
    """g and F of `weights` over `windows` (N, tokens) int64, one backward a window, one gradient in memory at a time.

    All windows are of one length, so that the mean of their mean losses is the mean over tokens.
    """
    found = [Gradient(torch.zeros_like(w), torch.zeros_like(w) if second else None) for w in weights]
    places = {weight: place for place, weight in enumerate(weights)}

    def collect(weight: Tensor) -> None:
        gradient, own = weight.grad, found[places[weight]]  # type: ignore[index]
        assert gradient is not None
        own.mean.add_(gradient, alpha=1 / len(windows))
        if own.squares is not None:
            own.squares.addcmul_(gradient, gradient, value=1 / len(windows))
        weight.grad = None

    asked = [weight.requires_grad for weight in weights]
    handles = [weight.requires_grad_(True).register_post_accumulate_grad_hook(collect) for weight in weights]
    try:
        for window in windows:
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
    finally:
        for handle, weight, before in zip(handles, weights, asked, strict=True):
            handle.remove()
            weight.requires_grad_(before)
    return found


def structures(kind: str, weight: Tensor, gradient: Gradient | None, axis: int) -> Tensor:
    """The importance of every row (axis 0) or column (axis 1) of `weight`: (rows or columns,) float64."""
    across = 1 - axis
    if kind == "l2" or gradient is None:
        return weight.double().norm(dim=across)
    first = weight * gradient.mean
    if kind == "vector":
        return first.sum(across, dtype=torch.float64).abs()
    if gradient.squares is not None:
        second = weight.square() * gradient.squares
        first = second if kind == "element-second" else first - second / 2
    return first.abs().sum(across, dtype=torch.float64)


def group_scores(parts: Sequence[tuple[Member, Tensor]], aggregation: str) -> Tensor:
    """The importance of every group, (groups,) float64, from that of its rows and columns, matrix by matrix as they
    run. A group's are neighbours, `width` of them in a matrix: that is what grouped-query attention needs."""
    stacked = torch.stack([scores.view(-1, member.width).sum(1) for member, scores in parts])
    return {"sum": stacked.sum(0), "max": stacked.amax(0), "prod": stacked.prod(0), "last": stacked[-1]}[aggregation]


@dataclass
class Layer:
    """A block on its way: what it had in `heads` and `channels`, what is left (`kept`), and the scores of what is."""

    module: nn.Module
    kept: Kept
    heads: int
    channels: int
    scores: dict[str, Tensor] = field(default_factory=dict)

    def members(self) -> dict[str, tuple[Member, ...]]:
        _, repeat, head, _ = pruned.shape(self.module)
        return {"heads": pruned.attention(repeat, head), "channels": pruned.FFN}

    def matrices(self) -> Iterator[tuple[Member, nn.Parameter]]:
        for members in self.members().values():
            for member in members:
                weight = self.module.get_submodule(member.module).weight
                assert isinstance(weight, nn.Parameter)
                yield member, weight

    def parameters(self, part: str) -> int:
        """Weights of one group of `part`: h D (2 + 2 r) of a key-value head, 3 D of a channel."""
        hidden = self.module.get_submodule("mlp.gate_proj").in_features
        return sum(member.width for member in self.members()[part]) * int(hidden)  # type: ignore[arg-type]


def score(layers: Sequence[Layer], model: Any, windows: Tensor, config: Config, ctx: Context, turn: int) -> None:
    """Fill in the scores of every layer. ModelError when they are not finite."""
    if config.importance == "random":
        for layer in layers:
            stream = ctx.stream("random importance", layer.kept.layer * config.iterations + turn)
            for part, count in (("heads", len(layer.kept.heads)), ("channels", len(layer.kept.channels))):
                layer.scores[part] = torch.from_numpy(stream.uniform(count))
        return
    weights = [weight for layer in layers for _, weight in layer.matrices()]
    found: list[Gradient] | list[None] = [None] * len(weights)
    if config.importance in TAYLOR:
        found = gradients(model, weights, windows, config.importance in ("element-second", "element-mix"))
    rest = iter(zip(weights, found, strict=True))
    for layer in layers:
        for part, members in layer.members().items():
            pairs = [(member, next(rest)) for member in members]
            parts = [(m, structures(config.importance, w.detach(), g, m.axis)) for m, (w, g) in pairs]
            layer.scores[part] = group_scores(parts, config.aggregation)
            if not torch.isfinite(layer.scores[part]).all():
                raise ModelError("the gradients are not finite", f"layer {layer.kept.layer}", "check the model's loss")


# How much goes, and what


def runs_of(scores: Tensor, size: int) -> list[tuple[float, list[int]]]:
    """What can only go together, cheapest first: runs of `size` groups in ascending order of importance (the lower
    number first among equals), the first shorter where `size` does not divide their number. (mean score, places)."""
    order = torch.argsort(scores, stable=True).tolist()
    edges = [0, *range(len(order) % size or size, len(order) + 1, size)]
    runs = [order[a:b] for a, b in pairwise(edges)]
    return [(float(scores[run].mean()), run) for run in runs]


def choose(runs: Sequence[list[tuple[float, list[int]]]], amount: int, quotas: Sequence[int] | None) -> list[set[int]]:
    """The places that go in each layer, `amount` groups in all to within half a run; a layer's last run stays.

    Always the cheapest next run of any layer goes, of equals the lowest layer's. With `quotas` every layer loses that
    many runs first, and at most one more.
    """
    last = [len(row) - 1 for row in runs]
    taken = [0] * len(runs) if quotas is None else [min(pair) for pair in zip(quotas, last, strict=True)]
    most = last if quotas is None else [min(n + 1, end) for n, end in zip(taken, last, strict=True)]
    gone = sum(len(places) for row, n in zip(runs, taken, strict=True) for _, places in row[:n])
    while left := [i for i, n in enumerate(taken) if n < most[i]]:
        best = min(left, key=lambda i: (runs[i][taken[i]][0], i))
        size = len(runs[best][taken[best]][1])
        if gone + size / 2 > amount:
            break
        taken[best] += 1
        gone += size
    return [{place for _, places in row[:n] for place in places} for row, n in zip(runs, taken, strict=True)]


def lose(layers: Sequence[Layer], part: str, amount: int, size: int, ranking: str) -> list[set[int]]:
    """The places, among what each layer has now, of the groups of `part` that go for `amount` to be gone since the
    start. Under local ranking every layer loses the same share, to within a run."""
    began = [getattr(layer, part) for layer in layers]
    lost = [n - len(layer.scores[part]) for n, layer in zip(began, layers, strict=True)]
    quotas = None
    if ranking == "local":
        share = amount / sum(began) + 1e-9
        quotas = [max(0, int(share * n) - already) // size for n, already in zip(began, lost, strict=True)]
    return choose([runs_of(layer.scores[part], size) for layer in layers], amount - sum(lost), quotas)


def step(layers: Sequence[Layer], target: int, config: Config) -> None:
    """Cut the scored `layers` until `target` of the weights they began with are gone, to within half a run of channels.
    ConfigError when they cannot lose so many."""
    had = {part: sum(getattr(layer, part) for layer in layers) for part in PARTS}
    each = {part: layers[0].parameters(part) for part in PARTS}
    share = target / sum(had[part] * each[part] for part in PARTS)
    heads: list[set[int]] = [set() for _ in layers]
    if config.attention:
        heads = lose(layers, "heads", round(share * had["heads"]), 1, config.ranking)
    left = sum(len(layer.kept.heads) - len(gone) for layer, gone in zip(layers, heads, strict=True))
    rest = target - (had["heads"] - left) * each["heads"]
    channels = lose(layers, "channels", max(0, round(rest / each["channels"])), config.multiple, config.ranking)
    for layer, no_heads, no_channels in zip(layers, heads, channels, strict=True):
        stay = [p for p in range(len(layer.kept.heads)) if p not in no_heads]
        wide = [p for p in range(len(layer.kept.channels)) if p not in no_channels]
        pruned.cut(layer.module, Kept(layer.kept.layer, tuple(stay), tuple(wide)))
        own = layer.kept
        layer.kept = Kept(own.layer, tuple(own.heads[p] for p in stay), tuple(own.channels[p] for p in wide))
    reached = sum((had[part] - sum(len(getattr(layer.kept, part)) for layer in layers)) * each[part] for part in PARTS)
    if target - reached > config.multiple * each["channels"]:
        raise ConfigError(
            f"the layers that may be cut lose {reached:,} weights at most, and {target:,} were asked for",
            "ratio", "lower it, spare fewer layers, or lower --multiple",
        )  # fmt: skip


def allowed(count: int, config: Config) -> range:
    """The layers that may be cut, of `count`. ConfigError when none is left."""
    first = round(count / 10) if config.spare_first < 0 else config.spare_first
    last = round(count / 15) if config.spare_last < 0 else config.spare_last
    if first + last >= count:
        raise ConfigError(f"{first} and {last} of {count} layers spared leave none to cut", "spare-first")
    return range(first, count - last)


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """Write the pruned model into `ctx.folder / "model"`, recovered if asked; `ctx.folder / "pruned.json"` tells what
    every layer kept. ConfigError when the ratio cannot be reached, ModelError for a model that is quantised or not
    built as a Llama, DataError for too little text."""
    refuse_quantised(model)
    loaded = model.load(dtype="float32", device=ctx.device, merge=True)
    if loaded.tokenizer is None:
        raise ModelError("has no tokenizer to calibrate with", str(model.path))
    windows = layerwise.calibration(
        loaded.tokenizer, data, config.calibration_text, config.calibration_samples, config.calibration_length, ctx
    ).to(loaded.device)
    blocks = layerwise.decoder(loaded.model)[1]
    kept = pruned.whole_of(model)
    every = [Layer(blocks[row.layer], row, len(row.heads), len(row.channels)) for row in kept]
    body = sum(l.heads * l.parameters("heads") + l.channels * l.parameters("channels") for l in every)
    chosen = allowed(len(blocks), config)
    layers = every[chosen.start : chosen.stop]
    with ctx.progress("judging and cutting", config.iterations) as bar:
        for turn in range(config.iterations):
            score(layers, loaded.model, windows, config, ctx, turn)
            step(layers, round(config.ratio * body * (turn + 1) / config.iterations), config)
            bar.advance(1, f"step {turn + 1} of {config.iterations}")
    smaller = pruned.write(model, [layer.kept for layer in every], ctx)
    tell(model, smaller, every, config, ctx)
    del loaded, layers, every, blocks
    return recovery.recovered(smaller, data, config, ctx)


def tell(model: ModelHandle, smaller: ModelHandle, layers: Sequence[Layer], config: Config, ctx: Context) -> None:
    """The record, two curves and a note."""
    told: Mapping[str, Any] = pruned.told(model, smaller)
    for layer in layers:
        ctx.curve("share of channels kept over layers", layer.kept.layer, len(layer.kept.channels) / layer.channels)
        ctx.curve("share of heads kept over layers", layer.kept.layer, len(layer.kept.heads) / layer.heads)
    rows = [{"heads": list(layer.kept.heads), "channels": list(layer.kept.channels)} for layer in layers]
    store.write_json(ctx.folder / "pruned.json", {"config": as_dict(config), "kept": rows, **told})
    gone = told["parameters before"] - told["parameters"]
    heads = sum(layer.heads - len(layer.kept.heads) for layer in layers)
    channels = sum(layer.channels - len(layer.kept.channels) for layer in layers)
    ctx.note(
        f"removed {heads} key-value heads and {channels} channels: {gone / 1e6:.2f} of "
        f"{told['parameters before'] / 1e6:.2f} million weights, {gone / told['parameters before']:.1%}"
    )

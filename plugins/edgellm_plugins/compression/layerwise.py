"""What methods share that compress a decoder one block at a time, each on inputs the compressed blocks before it made.

Calibration tokens go through the embedding once and their hidden states stay in memory. The blocks are then walked in
order, and inside a block its linear layers in the order they run, grouped by shared input: {q, k, v}, {o},
{gate, up}, {down} in a Llama. A group is solved the moment its inputs are complete, in the middle of the block's
forward, so the rest of that same forward already sees the compressed weights ("true-sequential", arXiv 2210.17323's
code). When all samples fit one batch a block therefore costs exactly one forward; otherwise a batch stops at the first
unsolved group and is run again once that is solved.

Nothing here knows an architecture: the groups come from watching which linears receive the same tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgellm_sdk.errors import DataError, ModelError

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Arrays, Dataset, Float32

PROBE_TOKENS = 8  # enough to see which linears share an input
DEFAULT_MEMORY = 1 << 30  # bytes of activations kept in flight when the user set no budget
MAX_TEXT = 64 << 20
TINY = 1e-30  # mean square of an input that is nothing but zeros


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same input.

    `names` are module names in the model, `weights` their (out, in) float32 values before compression, `hessian` the
    (in, in) float32 mean over samples of 2 x x^T summed over tokens, from `tokens` calibration tokens; with
    `equal_tokens` every x is scaled to a mean square of 1 first.
    """

    block: int
    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    hessian: Tensor
    tokens: int


@dataclass(frozen=True)
class Solved:
    """What a group became: `arrays` to be stored, and `records`, JSON rows about its layers."""

    arrays: Arrays
    records: tuple[dict[str, Any], ...]


class Method(Protocol):
    """A layer-by-layer method."""

    def solve(self, group: Group) -> Solved: ...


@runtime_checkable
class Restoring(Protocol):
    """A method that changes weights: those behind a layer are calibrated on what it has become, from the stored arrays
    alone."""

    def restore(self, name: str, arrays: Arrays) -> Float32:
        """The (out, in) float32 weight that the layer `name` now has."""
        ...


def decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The part of a causal model that maps token ids to hidden states, and its blocks. ModelError without them."""
    body = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not isinstance(body, nn.Module) or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(f"{type(model).__name__} has no decoder blocks to walk", fix="use a Llama-type model")
    return body, layers


class _Stop(Exception):
    """Leaves a block's forward once a group has seen its inputs."""


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def groups_of(body: nn.Module, layers: nn.ModuleList, tokens: Tensor) -> list[list[tuple[str, ...]]]:
    """Per block, the names (relative to it) of the linears that share an input tensor, in the order they run."""
    calls: list[list[tuple[str, Tensor]]] = [[] for _ in layers]

    def watch(number: int, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: calls[number].append((name, args[0]))

    handles = [
        module.register_forward_pre_hook(watch(number, name))
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with _hooks(handles):
        body(input_ids=tokens[:1, :PROBE_TOKENS], use_cache=False)
    found: list[list[tuple[str, ...]]] = []
    for block in calls:
        groups: list[tuple[str, ...]] = []
        for place, (name, x) in enumerate(block):
            if place and block[place - 1][1] is x:
                groups[-1] += (name,)
            else:
                groups.append((name,))
        found.append(groups)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors inside tuples and lists in another dtype, everything else untouched."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def embed(
    body: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Hidden states before block 0, one tensor per batch, and every block's other arguments (masks, positions).

    All batches have one shape, so the arguments of the first serve all of them. The blocks themselves do not run.
    """
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is layers[0]:
            hidden.append(args[0].to(dtype))
        if len(arguments) < len(layers):
            arguments.append({name: _cast(value, dtype) for name, value in kwargs.items()})

    def skip(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    with _hooks(handles):
        try:
            for layer in layers:
                setattr(layer, "forward", skip)  # noqa: B010 - shadows the class's forward on this instance only
            for batch in batches:
                body(input_ids=batch, use_cache=False)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
    return hidden, arguments


@dataclass
class _Block:
    """One block on its way through all batches. `current` is the first group that is not solved yet."""

    number: int
    prefix: str
    module: nn.Module
    sources: Mapping[str, Tensor]
    groups: list[tuple[str, ...]]
    method: Method
    restoring: Restoring | None
    batches: int
    equal_tokens: bool
    current: int = 0
    batch: int = 0
    seen: set[int] = field(default_factory=set)
    samples: int = 0
    tokens: int = 0
    hessian: Tensor | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def arrive(module: nn.Module, args: tuple[Any, ...]) -> None:
            if index != self.current:
                return  # solved before, or a later batch's way to a group that is still being collected
            self._accumulate(args[0])
            if len(self.seen) < self.batches:
                raise _Stop
            self._solve()

        return arrive

    def _accumulate(self, x: Tensor) -> None:
        """Running mean over samples, in float32: H <- H n / (n + b) + 2 / (n + b) x x^T, b samples at once."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.equal_tokens:
            flat = flat * flat.square().mean(1, keepdim=True).clamp(min=TINY).rsqrt()
        if self.hessian is None:
            self.hessian = flat.new_zeros(flat.shape[1], flat.shape[1])
        total = self.samples + x.shape[0]
        self.hessian.addmm_(flat.t(), flat, beta=self.samples / total, alpha=2 / total)
        self.samples, self.tokens = total, self.tokens + len(flat)
        self.seen.add(self.batch)

    def _solve(self) -> None:
        names, hessian = self.groups[self.current], self.hessian
        assert hessian is not None
        if not torch.isfinite(hessian).all():
            raise ModelError("activations are not finite", f"{self.prefix}{names[0]}", "try --dtype float32")
        weights = tuple(self.sources[name] for name in names)
        group = Group(self.number, tuple(self.prefix + n for n in names), weights, hessian, self.tokens)
        solved = self.method.solve(group)
        self.arrays.update(solved.arrays)
        self.records += solved.records
        self.put(names)
        self.current, self.hessian, self.samples, self.tokens = self.current + 1, None, 0, 0
        self.seen = set()

    def put(self, names: Sequence[str]) -> None:
        """Compressed weights into the running block, unless calibration is to see the original model throughout."""
        if self.restoring is None:
            return
        for name in names:
            weight = self.module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(torch.tensor(self.restoring.restore(self.prefix + name, self.arrays)))

    def skip(self, kept: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        """Take over what an earlier run computed, so that `forward` only runs the block."""
        assert kept is not None
        self.arrays = kept[0]
        for names in self.groups:
            self.put(names)
        self.current = len(self.groups)

    def forward(self, hidden: list[Tensor], arguments: Mapping[str, Any]) -> None:
        """All batches through the block, solving its groups on the way; `hidden` holds its outputs afterwards."""
        first = [self.module.get_submodule(names[0]) for names in self.groups]
        with _hooks([m.register_forward_pre_hook(self.hook(i)) for i, m in enumerate(first)]):
            self._forward(hidden, arguments)

    def _forward(self, hidden: list[Tensor], arguments: Mapping[str, Any]) -> None:
        done = [False] * len(hidden)
        while not all(done):
            for self.batch in range(len(hidden)):
                if done[self.batch] or self.batch in self.seen:
                    continue
                try:
                    result = self.module(hidden[self.batch], **arguments)
                except _Stop:
                    continue
                hidden[self.batch] = result[0] if isinstance(result, tuple) else result
                done[self.batch] = True


def batch_size(windows: int, tokens: int, layers: nn.ModuleList, dtype: torch.dtype, memory: int | None) -> int:
    """Windows per forward: the largest divisor of `windows` whose activations of one block fit a quarter of `memory`.

    A block's activations are estimated as twice what its linears put out.
    """
    width = 2 * sum(m.out_features for m in layers[0].modules() if isinstance(m, nn.Linear))
    fitting = (memory or 4 * DEFAULT_MEMORY) // 4 // max(tokens * width * dtype.itemsize, 1)
    return max(d for d in range(1, windows + 1) if windows % d == 0 and (d <= fitting or d == 1))


@torch.no_grad()
def walk(
    model: nn.Module,
    windows: Tensor,
    method: Method,
    ctx: Context,
    *,
    title: str,
    key: str,
    dtype: torch.dtype = torch.float32,
    sequential: bool = True,
    equal_tokens: bool = False,
) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """Every linear of every block through `method`; returns the arrays to store and the records, in model order.

    `model` in float32 is not changed; `windows` (n, tokens) int64 are full, without padding; `dtype` is that of the
    forwards. With `sequential` false, or a method that is not `Restoring`, every layer is calibrated on the original
    model's activations; for `equal_tokens` see `Group`. After each block its arrays go to the checkpoint
    `title-NUMBER`; a rerun with the same `key` continues behind the last whole one and ends in the same bytes.
    ModelError for a model without blocks or with activations that are not finite.
    """
    body, layers = decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    done = len(_finished(ctx, title, key, len(layers)))
    with ctx.progress(title, total=len(layers)) as bar:
        if done < len(layers):
            size = batch_size(len(windows), windows.shape[1], layers, dtype, ctx.memory)
            batches = [windows[i : i + size] for i in range(0, len(windows), size)]
            plan = groups_of(body, layers, windows)
            hidden, arguments = embed(body, layers, batches, dtype)
            for number, layer in enumerate(layers):
                block = _Block(
                    number=number, prefix=f"{prefix}.{number}.", module=copy.deepcopy(layer).to(dtype),
                    sources={name: _weight(layer, name) for names in plan[number] for name in names},
                    groups=plan[number], method=method, batches=len(batches),
                    equal_tokens=equal_tokens,
                    restoring=method if sequential and isinstance(method, Restoring) else None,
                )  # fmt: skip
                if number < done:
                    block.skip(ctx.resume(_checkpoint(title, number)))
                block.forward(hidden, arguments[number])
                if number >= done:
                    ctx.checkpoint(_checkpoint(title, number), block.arrays, {"key": key, "records": block.records})
                bar.advance(1, f"block {number + 1}/{len(layers)}")
    arrays: dict[str, Array] = {}
    records: list[dict[str, Any]] = []
    for stored, rows in _finished(ctx, title, key, len(layers)):  # kept on disk until now, not in memory
        arrays.update(stored)
        records += rows
    return arrays, records


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _checkpoint(title: str, number: int) -> str:
    return f"{title}-{number:04d}"


def _finished(ctx: Context, title: str, key: str, blocks: int) -> list[tuple[dict[str, Array], list[dict[str, Any]]]]:
    """Whole checkpoints of this very job, from block 0 up to the first that is missing."""
    found = []
    for number in range(blocks):
        kept = ctx.resume(_checkpoint(title, number))
        if kept is None or kept[1].get("key") != key:
            break
        found.append((kept[0], kept[1]["records"]))
    return found


def forget(ctx: Context, title: str) -> None:
    """Remove the checkpoints of `walk`, once its result is stored for good."""
    for path in (ctx.folder / "checkpoint").glob(f"{title}-*.safetensors"):
        path.unlink()


def calibration(tokenizer: Any, data: Dataset | None, text: str, samples: int, length: int, ctx: Context) -> Tensor:
    """Full windows without padding, (at most `samples`, `length`) int64, from the text file `text` or, when that is
    empty, from the user's examples in random order, one behind the other. Windows of a longer text are drawn with the
    stream `calibration`. DataError when not even one window can be filled or the file cannot be read."""
    from edgellm_sdk.kit.prompts import encode

    stream = ctx.stream("calibration")
    if text:
        ids = list(tokenizer(_read(Path(text)), add_special_tokens=False, verbose=False)["input_ids"])
        where = text
    elif data is not None and len(data):
        ids, where = [], data.name or "the data"
        order = stream.permutation(len(data)).tolist()
        for start in range(0, len(order), 256):
            if len(ids) >= samples * length:
                break
            chosen = [data.examples[i] for i in order[start : start + 256]]
            ids += [token for encoded in encode(tokenizer, chosen, length) for token in encoded.tokens]
        ids = ids[: samples * length]
    else:
        raise DataError("nothing to calibrate on", fix="pass --data or --calibration-text FILE")
    count = len(ids) // length
    if not count:
        raise DataError(
            f"only {len(ids)} tokens to calibrate on, one window needs {length}", where, "lower --calibration-length"
        )
    chosen_windows = stream.sample(range(count), samples) if count > samples else list(range(count))
    if count < samples:
        ctx.note(f"calibration: {where} fills {count} windows of {length} tokens, not {samples}")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)[chosen_windows]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise DataError(f"larger than {MAX_TEXT >> 20} MiB", str(path), "pass a part of it")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", str(path), "save it as UTF-8") from None

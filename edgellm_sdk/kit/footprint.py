"""Memory and time of a client's turn, foretold from the shape of the model and checked against what is measured.

Arithmetic only, no weights. Bytes are resident: `floor` (the process before the model) + weights + working set.
Back-propagation is ours (`edgellm_plugins.training.backprop`): the input of every trained layer, one layer's graph,
logits in chunks, and four copies of what trains with its optimiser. A forward pass keeps one layer at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from edgellm_sdk import store
from edgellm_sdk.errors import ModelError
from edgellm_sdk.types import ModelHandle, Profile

GRAPH = 10
"""Arrays as wide as the hidden state that a layer's graph holds: two norms, q, k, v, o, two residuals, their gradients
in flight; three as wide as its FFN are counted apart."""
COPIES = 6
"""theta, its gradient, two moments, theta as it was sent, the change."""
HELD = 2
"""What does not train is there as it was sent, and in the model."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """Of a Llama-type model: counts, and the bytes of a scalar of its weights in memory."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    bytes: int

    @property
    def per_layer(self) -> int:
        """Parameters of one layer, embedding and head left out."""
        return max(0, self.parameters - self.vocabulary * self.hidden) // self.layers


def shape_of(model: ModelHandle, precision: str = "auto") -> Shape:
    """From the model's config. ModelError where that lacks a size."""
    told = store.read_json(model.path / "config.json") if model.path.is_dir() else {}
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes: list[Any] = [told.get(name) for name in names]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError("its config does not tell all its sizes", str(model.path), "give a Llama-type HF folder")
    layers, hidden, inner, heads, vocabulary = sizes
    dtype = model.dtype if precision == "auto" else precision
    return Shape(model.parameters, layers, hidden, inner, heads, vocabulary, BYTES.get(dtype, 4))


@dataclass(frozen=True)
class Turn:
    """One client's work: `trained` layers from the top, `scalars` that train, `steps` of `batch` texts of `length`, of
    each of which `scored` positions go through the vocabulary. `held` scalars are sent and used, but do not train."""

    trained: int
    scalars: int
    steps: int
    batch: int
    length: int
    chunk: int = 64
    probes: int = 0
    scored: int = 4
    held: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def memory(shape: Shape, turn: Turn, floor: int) -> int:
    """Resident bytes; by back-propagation, or with `probes` by forward passes alone."""
    weights = shape.parameters * shape.bytes
    layer = turn.tokens * (GRAPH * shape.hidden + 3 * shape.inner) * shape.bytes
    attention = turn.batch * shape.heads * turn.length**2 * 4
    logits = turn.chunk * shape.vocabulary * (8 if shape.bytes == 2 else 4)
    if turn.probes:
        return floor + weights + layer + attention + logits + 3 * 4 * turn.scalars
    inputs = turn.trained * turn.tokens * shape.hidden * shape.bytes
    return floor + weights + inputs + 2 * layer + attention + logits + 4 * (COPIES * turn.scalars + HELD * turn.held)


def flops(shape: Shape, turn: Turn) -> float:
    """Floating-point operations of all steps, 2 a parameter and token for a forward pass. Frozen layers below the
    trained ones run once a step. Trained ones run for every probe; for back-propagation once, once more to have their
    activations again, and as long for the gradient by their input. Attention over the texts is left out."""
    layer = 2.0 * shape.per_layer * turn.tokens
    head = 2.0 * shape.vocabulary * shape.hidden * turn.batch * min(turn.scored, turn.length)
    times = 2 * turn.probes if turn.probes else 3
    return turn.steps * ((shape.layers - turn.trained) * layer + times * (turn.trained * layer + head))


def seconds(shape: Shape, turn: Turn, rate: float, profile: Profile, down: int, up: int) -> float:
    """Computing at `rate` flop/s plus carrying `down` and `up` bytes over the client's link, where that is known."""
    carried = sum(8 * size / link for size, link in ((down, profile.down), (up, profile.up)) if link)
    return flops(shape, turn) / rate + carried


def cores_here() -> int:
    """Cores that torch uses in this process."""
    import torch

    return torch.get_num_threads()


def core_rate(shape: Shape) -> float:
    """flop/s of a core in a matrix product of the sizes these models have, in the dtype of the weights: the best of
    five, on this machine, on torch's threads."""
    import torch

    dtype = torch.float32 if shape.bytes == 4 else torch.bfloat16
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        best = max(best, 4 * 2 * 512 * 576 * 1536 / (time.perf_counter() - began))
    return best / cores_here()

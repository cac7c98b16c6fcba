"""P-RGE's step as one forward-only program, arXiv 2409.15520 (its on-device module), and its lowering to a `.pte`.

State (2q, D) float32, first the q plus copies, then the q minus copies; D counts all modules' B. One call:

    n_j  = (plus_j - minus_j) / 2                      the old perturbation, eps z_j, recovered from the state
    B    = (plus_j + minus_j) / 2 - eta / q * sum_j g_j n_j / eps
    plus_j, minus_j = B + eps z'_j, B - eps z'_j
    losses of the 2q candidates in one batched forward

so restoring, updating, perturbing and evaluating are one execution, and the application only feeds g back. The first
call finds a state of equal copies and is given g = 0.

`graph` draws z' in the graph (`aten.randn`), as published: nothing crosses the boundary but scalars, and the noise
differs from run to run, as the runtime seeds it from the machine. `host` takes z' (q, D) as an input, for runs that
repeat: 4 q D bytes a step. Both keep the recurrence in the graph. Passing noise was preferred to writing the state
through the runtime's view of it, because every runtime can pass an input and a view exists in the Python binding.
`candidates` has no state: the perturbed adapters (P, D) themselves are an input and the losses of all labels come
back, which serves any method that evaluates losses (`evaluator`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm_hardware.executorch.llama import Llama

STATE = "state"


@dataclass(frozen=True)
class Shape:
    """Static sizes of a program: q `queries`, b `batch` examples, T `tokens`, N `labels` scored positions."""

    queries: int
    batch: int
    tokens: int
    labels: int


class Step(nn.Module):
    """The training program; `noise` is `graph` or `host`."""

    state: Tensor

    def __init__(self, llama: Llama, shape: Shape, noise: str) -> None:
        super().__init__()
        self.llama, self.queries, self.noise = llama, shape.queries, noise
        self.register_buffer(STATE, torch.zeros(2 * shape.queries, llama.layout.size))

    def forward(
        self, tokens: Tensor, places: Tensor, targets: Tensor, weights: Tensor, g: Tensor, eta: Tensor, eps: Tensor,
        z: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean losses (2q,), plus then minus, of the slots with weight 1 (unused ones have 0).

        tokens, places, targets as in `Llama`; weights (N,), g (q,), eta (1,), eps (1,), z (q, D): float32.
        """
        q = self.queries
        state = self.state
        plus, minus = state[:q], state[q:]
        old = (plus - minus) * 0.5
        centre = (plus + minus) * 0.5 - eta / eps * (g.view(q, 1) * old).mean(0, keepdim=True)
        drawn = torch.randn(q, state.shape[1]) if z is None else z
        fresh = torch.cat((centre + eps * drawn, centre - eps * drawn))
        state.copy_(fresh)
        nll: Tensor = self.llama(tokens, places, targets, fresh)
        return (nll * weights).sum(-1) / weights.sum()


def inputs(shape: Shape, size: int, kind: str) -> tuple[Tensor, ...]:
    """Example inputs of a program of `kind`, all its static shapes; `size` is D."""
    slots = shape.labels
    batch = (
        torch.zeros(shape.batch, shape.tokens, dtype=torch.long),
        torch.zeros(slots, dtype=torch.long),
        torch.zeros(slots, dtype=torch.long),
    )
    if kind == "candidates":
        return (*batch, torch.zeros(2 * shape.queries, size))
    step = (torch.ones(slots), torch.zeros(shape.queries), torch.zeros(1), torch.ones(1))
    return (*batch, *step, torch.zeros(shape.queries, size)) if kind == "host" else (*batch, *step)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch, its exporter and their native libraries write notes to stderr, loggers and warnings: not here."""
    level = logging.root.manager.disable
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        logging.disable(level)


def lower(llama: Llama, shape: Shape, kind: str, backend: str) -> bytes:
    """The `.pte` of `llama` for `kind` graph, host or candidates; `backend` is xnnpack or portable."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # type: ignore[import-not-found, unused-ignore]
            XnnpackPartitioner,
        )
        from executorch.exir import (  # type: ignore[import-not-found, unused-ignore]
            ExecutorchBackendConfig,
            to_edge_transform_and_lower,
        )

        module = llama if kind == "candidates" else Step(llama, shape, kind)
        with torch.no_grad():
            exported = torch.export.export(module.eval(), inputs(shape, llama.layout.size, kind), strict=False)
        partitioners = [XnnpackPartitioner()] if backend == "xnnpack" else []
        edge = to_edge_transform_and_lower(exported, partitioner=partitioners)
        made = edge.to_executorch(ExecutorchBackendConfig(emit_mutable_buffer_names=True))
        return bytes(made.buffer)

"""FFA-LoRA, arXiv 2403.12313: dW = s B A_0. A_0 is drawn once, the same for everybody, and frozen; B starts at 0 and

    B <- sum_k p_k B_k,  so that  s B A_0 = sum_k p_k s B_k A_0  exactly.

With noise on what is sent the product stays linear in it, where (B + xi_B)(A + xi_A) has a product of noises.

Where we differ from the paper (and why):
- A_0 is that of the method's start, sent to a client in its first turn and remembered there, not drawn by the client:
  nobody can hold another one. Every later turn costs B each way.
- What is no factor (norms, biases) trains and is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellm_plugins.aggregation import halves
from edgellm_plugins.aggregation.factors import B
from edgellm_plugins.aggregation.ffa_lora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Assignment, State, Update


def always_b(number: int) -> str:
    """The factor that trains in round `number`."""
    return B


def assign(state: State, clients: Sequence[str], ctx: Context) -> Mapping[str, Assignment]:
    """B to train; A_0 in a first turn."""
    return halves.assign(state, clients, always_b, ctx)


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The mean of B."""
    return halves.aggregate(state, updates, config, (B,), ctx)

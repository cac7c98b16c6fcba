"""RoLoRA, arXiv 2502.01755: odd rounds train B with A frozen, even rounds A with B frozen, and

    B <- sum_k p_k B_k   or   A <- sum_k p_k A_k,   each the exact mean of the products.

B comes first: at B = 0 the gradient of A is zero.

Where we differ from the paper (and why):
- A client that took part in the last round is sent the factor that changed in it, and holds the other; one that did not
  is sent both.
- What is no factor (norms, biases) trains and is averaged in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellm_plugins.aggregation import halves
from edgellm_plugins.aggregation.factors import A, B
from edgellm_plugins.aggregation.rolora import Config
from edgellm_sdk.context import Context
from edgellm_sdk.types import Assignment, State, Update


def alternate(number: int) -> str:
    """The factor that trains in round `number`."""
    return B if number % 2 else A


def assign(state: State, clients: Sequence[str], ctx: Context) -> Mapping[str, Assignment]:
    """The factor of the round to train, on the other one."""
    return halves.assign(state, clients, alternate, ctx)


def aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    """The mean of the factor that trained."""
    return halves.aggregate(state, updates, config, (B, A), ctx)

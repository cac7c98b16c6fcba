"""GRZO: a direction for every example of a minibatch at the cost of one (arXiv 2606.02857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    RATES: ClassVar[tuple[float, float]] = (0.02, 5e-5)
    """In units of 2 eps: a step has length about eta * sqrt(d / B)."""

    batch_size: int = opt(16, "examples in a minibatch, B: so many directions", unit="examples", ge=2, le=4096)
    probes: int = opt(1, "gaussian tensors of each step, with 2 forwards and B directions each", ge=1, le=64)
    rule: str = opt("sgd", "step; momentum replays a window of the log", choices=("sgd", "momentum"))


PLUGIN = Plugin(
    name="grzo",
    summary="a sign-flipped direction for every example at the cost of one, steps divided by their spread",
    version="0.1.0",
    config=Config,
    paper="arXiv 2606.02857",
)


(
    edgellm_initialise,
    edgellm_assign,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = seed_hooks(__name__)

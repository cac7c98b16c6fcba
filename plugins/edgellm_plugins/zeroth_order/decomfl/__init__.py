"""DeComFL: dimension-free communication with fresh shared seeds (arXiv 2405.15861, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Local
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Local):
    RATES: ClassVar[tuple[float, float]] = (0.01, 5e-6)

    probes: int = opt(5, "directions of each step, P", ge=1, le=1024)


PLUGIN = Plugin(
    name="decomfl",
    summary="the same fresh directions for all clients of a round; only scalars both ways",
    version="0.1.0",
    config=Config,
    paper="arXiv 2405.15861",
    linear=lambda config: "",
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

"""FZOO: normalised steps from one-sided random-sign probes (arXiv 2506.09034, ICLR 2026)."""

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
    """In units of eps: a step has length eta * sqrt(d / N)."""

    probes: int = opt(8, "directions of each step, N", ge=2, le=1024)


PLUGIN = Plugin(
    name="fzoo",
    summary="one-sided sign probes, steps divided by the spread of their losses",
    version="0.1.0",
    config=Config,
    paper="arXiv 2506.09034",
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

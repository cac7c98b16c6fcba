"""Sparse-MeZO: only the smaller weights move (arXiv 2402.15751, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import TRAINS, Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Options):
    train: str = opt("full", "what trains: every weight, or a small set of tensors", choices=TRAINS)
    steps: int = opt(
        1, "local steps of a client in a round; more than 1 for a client alone", unit="steps", ge=1, le=100_000
    )
    keep: float = opt(0.25, "share of each matrix, its smallest weights, that moves", ge=0.001, le=1)


PLUGIN = Plugin(
    name="sparse-mezo",
    summary="MeZO on the weights of small magnitude",
    version="0.1.0",
    config=Config,
    paper="arXiv 2402.15751",
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

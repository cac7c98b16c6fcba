"""P-RGE (MobiZO): all perturbed copies of a small adapter in one batched forward (arXiv 2409.15520, EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update


@dataclass(frozen=True)
class Config:
    queries: int = opt(4, "q, random directions of one step", ge=1, le=32)
    batch: int = opt(16, "E, effective batch: each query sees E / q examples", unit="examples", ge=1, le=4096)
    split: bool = opt(False, "give each query examples of its own instead of the same E / q")
    loops: str = opt(
        "both", "candidates in one call: all 2q, the q of one sign, or 1", choices=("both", "outer", "none")
    )
    step: float = opt(0.01, "eps, the finite-difference step", ge=1e-6, le=1)
    steps: int = opt(4, "local steps of a client in a round", unit="steps", ge=1, le=10_000)
    learning_rate: float = opt(0.05, "eta, the step of plain SGD on the client", ge=0)
    layers: int = opt(2, "train the last K layers; 0 trains all", unit="layers", ge=0)
    rank: int = opt(16, "rank of the LoRA-FA factors", ge=1, le=512)
    alpha: float = opt(32.0, "LoRA scale is alpha / rank", ge=0)
    targets: str = opt("down_proj", "module names that get a LoRA, comma-separated")
    max_length: int = opt(128, "longest example", unit="tokens", ge=8)
    hidden_memory: int = opt(512, "budget for kept hidden states of frozen layers; 0 keeps none", unit="MB", ge=0)
    precision: str = opt("auto", "of the frozen base", choices=("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self) -> None:
        if self.batch % self.queries:
            raise ValueError(f"batch: {self.batch} examples cannot be shared equally by {self.queries} queries")


PLUGIN = Plugin(
    name="p-rge",
    summary="all perturbed copies of a LoRA-FA adapter in one batched forward; scalars on the wire",
    version="0.1.0",
    config=Config,
    paper="arXiv 2409.15520",
)


@hookimpl
def edgellm_initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    from edgellm_plugins.zeroth_order.p_rge.method import initialise

    return initialise(model, config, ctx)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.zeroth_order.p_rge.method import assign

    return assign(state, clients, ctx)


@hookimpl
def edgellm_finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    from edgellm_plugins.zeroth_order.p_rge.method import finetune

    return finetune(model, data, assignment, config, ctx)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_plugins.zeroth_order.p_rge.method import screen

    return screen(updates, state)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.zeroth_order.p_rge.method import aggregate

    return aggregate(state, updates, config, ctx)


@hookimpl
def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    from edgellm_plugins.zeroth_order.p_rge.method import personalise

    return personalise(model, state, folder, config, ctx)


@hookimpl
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    from edgellm_plugins.zeroth_order.p_rge.method import measure

    return measure(subject, data, ctx)

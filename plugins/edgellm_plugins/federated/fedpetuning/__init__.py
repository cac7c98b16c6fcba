"""FedPETuning: five ways to tune few parameters, in one federation (arXiv 2212.10025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_plugins.federated.options import Local
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update


@dataclass(frozen=True)
class Config(Local):
    tune: str = opt(
        "lora",
        "what trains: LoRA, a prefix of keys and values, two bottlenecks a layer, biases, or all weights of the layers",
        choices=("lora", "prefix", "adapter", "bitfit", "full"),
    )
    rank: int = opt(8, "lora: r", ge=1, le=512)
    alpha: float = opt(0.0, "lora: the update is scaled by alpha / rank; 0 takes the rank", ge=0)
    width: int = opt(16, "adapter: width of a bottleneck", ge=1, le=4096)
    norms: bool = opt(False, "adapter and bitfit: the gains of norms train too")
    prefix_length: int = opt(8, "prefix: learned keys and values of a layer", unit="tokens", ge=1, le=4096)
    prefix_hidden: int = opt(512, "prefix: width of the MLP that makes it; 0 trains it directly", ge=0, le=8192)
    learning_rate: float = opt(1e-3, "eta, a round's first step; full wants 10 to 100 times less", ge=0)
    keep: str = opt("best", "the state that becomes the model: best watched, or last", choices=("best", "last"))


PLUGIN = Plugin(
    name="fedpetuning",
    summary="LoRA, prefix, adapter, BitFit or full layers, trained by clients and averaged",
    version="0.1.0",
    config=Config,
    paper="arXiv 2212.10025",
    linear=lambda config: "",
)


@hookimpl
def edgellm_initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    from edgellm_plugins.federated.fedpetuning.method import initialise

    return initialise(model, config, ctx)


@hookimpl
def edgellm_finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    from edgellm_plugins.federated.fedpetuning.method import finetune

    return finetune(model, data, assignment, config, ctx)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_plugins.federated.local import screen

    return screen(updates, state, ctx.configs[PLUGIN.name], ctx)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], ctx: Context) -> State:
    from edgellm_plugins.training.backprop import aggregate

    return aggregate(state, updates, ctx)


@hookimpl
def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    from edgellm_plugins.federated.fedpetuning.method import personalise

    return personalise(model, state, folder, config, ctx)


@hookimpl
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    from edgellm_plugins.federated.fedpetuning.method import measure

    return measure(subject, data, ctx)

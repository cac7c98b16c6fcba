"""FedIT: federated instruction tuning of LoRA factors (arXiv 2305.05644)."""

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
    targets: str = opt("q_proj,k_proj,v_proj,o_proj", "module names that get a LoRA, comma-separated, or all-linear")
    rank: int = opt(8, "r, the rank of B A", ge=1, le=512)
    alpha: float = opt(16.0, "the update is scaled by alpha / rank", ge=0)
    learning_rate: float = opt(3e-4, "eta, a round's first step", ge=0)
    train_on_inputs: bool = opt(False, "the loss falls on the prompts too")
    template: str = opt(
        "chat", "how an instruction is put to the model: its own chat template, or Alpaca's", choices=("chat", "alpaca")
    )


PLUGIN = Plugin(
    name="fedit",
    summary="LoRA on every client's instructions, its factors averaged",
    version="0.1.0",
    config=Config,
    paper="arXiv 2305.05644",
    linear=lambda config: "",
)


@hookimpl
def edgellm_initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    from edgellm_plugins.federated.fedit.method import initialise

    return initialise(model, config, ctx)


@hookimpl
def edgellm_finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    from edgellm_plugins.federated.fedit.method import finetune

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
    from edgellm_plugins.federated.fedit.method import personalise

    return personalise(model, state, folder, config, ctx)


@hookimpl
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    from edgellm_plugins.federated.fedit.method import measure

    return measure(subject, data, ctx)

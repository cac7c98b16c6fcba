"""FedSA-LoRA: A is shared, every client's B stays with the client (arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, ModelHandle, Session, State, Update


@dataclass(frozen=True)
class Config(Weighted):
    client: str = opt("", "whose model is written as the run's; empty: the first that took part")


PLUGIN = Plugin(
    name="fedsa-lora",
    summary="A is averaged, every client keeps a B of its own: personal models",
    version="0.1.0",
    config=Config,
    paper="arXiv 2410.01463",
)


@hookimpl
def edgellm_assign(state: State, clients: Sequence[str], ctx: Context) -> Mapping[str, Assignment]:
    from edgellm_plugins.aggregation.fedsa_lora.method import assign

    return assign(state, clients, ctx)


@hookimpl
def edgellm_prepare(assignment: Assignment, ctx: Context) -> Assignment:
    from edgellm_plugins.aggregation.fedsa_lora.method import prepare

    return prepare(assignment, ctx)


@hookimpl(wrapper=True)
def edgellm_finetune(assignment: Assignment, ctx: Context) -> Generator[None, Update, Update]:
    from edgellm_plugins.aggregation.fedsa_lora.method import kept

    return kept((yield), assignment, ctx)


@hookimpl(wrapper=True)
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Generator[None, Any, Any]:
    from edgellm_plugins.aggregation.fedsa_lora.method import measured

    return measured((yield), subject, data, ctx)


@hookimpl(wrapper=True)
def edgellm_personalise(state: State, folder: Path, ctx: Context) -> Generator[None, ModelHandle, ModelHandle]:
    from edgellm_plugins.aggregation.fedsa_lora.method import personal

    return personal((yield), state, folder, ctx.configs[PLUGIN.name], ctx)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)

"""FwdLLM: federated fine-tuning with perturbed inferences (arXiv 2308.13894, USENIX ATC 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_plugins.zeroth_order.options import own_directions
from edgellm_sdk.config import opt
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Assignment, Dataset, Metric, ModelHandle, Session, State, Update


@dataclass(frozen=True)
class Config:
    train: str = opt(
        "lora-fa",
        "which small set of tensors trains; norm means biases, or norm gains where a model has none",
        choices=("lora", "lora-fa", "adapter", "norm", "layers"),
    )
    layers: int = opt(2, "train the last K layers; 0 trains all", unit="layers", ge=0)
    rank: int = opt(16, "rank of the LoRA kinds", ge=1, le=512)
    alpha: float = opt(32.0, "LoRA scale is alpha / rank", ge=0)
    targets: str = opt("down_proj", "module names that get a LoRA, comma-separated")
    reduction: int = opt(16, "adapter: hidden width over bottleneck width", ge=1)
    learning_rate: float = opt(0.5, "eta, the server's peak step", ge=0)
    warmup: float = opt(0.05, "share of the rounds with a linear warm-up, linear decay after it", ge=0, le=1)
    optimizer: str = opt("sgd", "the server's step rule", choices=("sgd", "adam"))
    step: float = opt(0.05, "h, the finite-difference step", ge=1e-6, le=1)
    difference: str = opt("central", "2 forwards a perturbation, or 1 and a shared one", choices=("central", "forward"))
    perturbations: int = opt(4, "perturbations of each client in a round", ge=1, le=256)
    tau: float = opt(0.0, "variance threshold of the accept test; 0 calibrates it", ge=0)
    calibration: float = opt(1.0, "with tau 0: threshold = this x the variance of the first round", ge=0)
    limit: int = opt(32, "accept at the latest after this many perturbations for each client", ge=1)
    variance_of: str = opt("", "measure the variance on tensors whose name ends so; empty means all")
    sampling: bool = opt(True, "on every other step prefer directions aligned with the last gradient")
    candidates: int = opt(10, "with sampling: candidates drawn for each direction used", ge=2, le=1000)
    ranking: str = opt("signed", "with sampling: rank by cosine or by its magnitude", choices=("signed", "magnitude"))
    weighting: str = opt("examples", "weight of a client's gradients", choices=("examples", "equal"))
    wire: str = opt("seeds", "clients send scalars, or whole gradients", choices=("seeds", "tensors"))
    directions: str = opt(
        "own",
        "of a client in a round: its own, or the same as all others, so that scalars can be added up",
        choices=("own", "shared"),
    )
    batch_size: int = opt(8, "examples in a client's minibatch", unit="examples", ge=1)
    max_length: int = opt(128, "longest example", unit="tokens", ge=8)
    hidden_memory: int = opt(512, "budget for kept hidden states of frozen layers; 0 keeps none", unit="MB", ge=0)
    share: int = opt(0, "perturbed values in one call; 0 chooses by batch size", ge=0, le=64)
    precision: str = opt("auto", "of the frozen base", choices=("auto", "float32", "bfloat16", "float16"))


PLUGIN = Plugin(
    name="fwdllm",
    summary="perturbed inferences on a few tensors, as many as their variance asks for",
    version="0.1.0",
    config=Config,
    paper="arXiv 2308.13894",
    linear=lambda config: "" if config.wire == "tensors" else own_directions(config),
)


@hookimpl
def edgellm_initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    from edgellm_plugins.zeroth_order.fwdllm.method import initialise

    return initialise(model, config, ctx)


@hookimpl
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Config, ctx: Context
) -> Mapping[str, Assignment]:
    from edgellm_plugins.zeroth_order.fwdllm.method import assign

    return assign(state, clients, data, config, ctx)


@hookimpl
def edgellm_finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    from edgellm_plugins.zeroth_order.fwdllm.method import finetune

    return finetune(model, data, assignment, config, ctx)


@hookimpl
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    from edgellm_plugins.zeroth_order.fwdllm.method import screen

    return screen(updates, state)


@hookimpl
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Config, ctx: Context) -> State:
    from edgellm_plugins.zeroth_order.fwdllm.method import aggregate

    return aggregate(state, updates, config, ctx)


@hookimpl
def edgellm_personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    from edgellm_plugins.zeroth_order.fwdllm.method import personalise

    return personalise(model, state, folder, config, ctx)


@hookimpl
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    from edgellm_plugins.zeroth_order.fwdllm.method import measure

    return measure(subject, data, ctx)

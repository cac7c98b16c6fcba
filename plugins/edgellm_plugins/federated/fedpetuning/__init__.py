"""FedPETuning: five ways to tune few parameters, in one federation (arXiv 2212.10025)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.federated.options import Local
from edgellm_plugins.training.hooks import training_hooks
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin


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


(
    edgellm_initialise,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = training_hooks(__name__)

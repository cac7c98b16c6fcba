"""Options that the methods of this family share. A method inherits them and changes defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from edgellm_sdk.config import opt

TRAINS = ("full", "lora", "lora-fa", "adapter", "norm", "layers")
LEAST_STEP = 1e-6  # below, a difference of losses is rounding in every dtype


@dataclass(frozen=True)
class Small:
    """Which small set of tensors trains, and how examples reach it."""

    layers: int = opt(2, "train the last K layers; 0 trains all", unit="layers", ge=0)
    rank: int = opt(16, "rank of the LoRA kinds", ge=1, le=512)
    alpha: float = opt(32.0, "LoRA scale is alpha / rank", ge=0)
    targets: str = opt("down_proj", "module names that get a LoRA, comma-separated")
    batch_size: int = opt(16, "examples in a minibatch", unit="examples", ge=1)
    max_length: int = opt(128, "longest example", unit="tokens", ge=8)
    hidden_memory: int = opt(512, "budget for kept hidden states of frozen layers; 0 keeps none", unit="MB", ge=0)
    precision: str = opt("auto", "of the model", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Local(Small):
    """Small, and a client's local steps. A whole model needs far smaller ones than a few tensors on it."""

    RATES: ClassVar[tuple[float, float]] = (0.01, 1e-6)
    """Default learning rates: of small sets, of whole models."""

    train: str = opt(
        "lora-fa",
        "what trains: every weight, or a small set of tensors",
        choices=TRAINS,
    )
    steps: int = opt(10, "local steps of a client in a round", unit="steps", ge=1, le=100_000)
    step: float = opt(0.0, "perturbation scale, eps; 0 takes 0.05, or 1e-3 with train full", ge=0, le=1)
    learning_rate: float = opt(0.0, "eta; 0 takes the method's default for what trains", ge=0, le=1000)
    share: float = opt(1.0, "share of the layers that each direction moves, drawn from its seed", ge=0.01, le=1)

    def __post_init__(self) -> None:
        if 0 < self.step < LEAST_STEP:
            raise ValueError(f"step: {self.step:g} is below {LEAST_STEP:g}, where a difference of losses is rounding")
        whole = self.train == "full"
        if not self.step:
            object.__setattr__(self, "step", 1e-3 if whole else 0.05)
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", self.RATES[whole])


@dataclass(frozen=True)
class Options(Local):
    """Local, and what is minimised, the estimate and the rule of each step."""

    objective: str = opt(
        "loss",
        "what is minimised: cross-entropy, or minus label accuracy, token F1 or Rouge-L of greedy answers",
        choices=("loss", "accuracy", "f1", "rouge"),
    )
    new_tokens: int = opt(32, "objectives f1 and rouge: longest answer", unit="tokens", ge=1, le=1024)
    probes: int = opt(4, "directions of each step, n", ge=1, le=1024)
    schedule: str = opt("constant", "of the learning rate over the run", choices=("constant", "linear"))
    warmup: float = opt(0.0, "share of the run with a linear warm-up", ge=0, le=0.9)
    weight_decay: float = opt(0.0, "lambda: each step also shrinks the weights by eta * lambda", ge=0)
    rule: str = opt("sgd", "step; adam and momentum replay a window of the log", choices=("sgd", "momentum", "adam"))
    beta1: float = opt(0.9, "momentum and adam: decay of the first moment", ge=0, le=0.9999)
    beta2: float = opt(0.999, "adam: decay of the second moment", ge=0, le=0.99999)
    window: int = opt(32, "momentum and adam: steps replayed", unit="steps", ge=1, le=10_000)


@dataclass(frozen=True)
class Candidates(Local):
    """Local, and the candidate seeds."""

    RATES: ClassVar[tuple[float, float]] = (0.01, 3e-7)

    seeds: int = opt(1024, "K, seeds of the whole training", ge=1, le=65_536)
    limit: float = opt(0.0, "leave out a step whose two losses differ by more; 0 keeps all", unit="nats", ge=0)
    directions: str = opt(
        "own",
        "seeds a client draws in a round: its own, or the same as all others, so that scalars can be added up",
        choices=("own", "shared"),
    )


def own_directions(config: Any) -> str:
    """Why the mean of clients' scalars says nothing, "" when all clients take the same directions."""
    return "" if config.directions == "shared" else "clients draw directions of their own: use directions = shared"

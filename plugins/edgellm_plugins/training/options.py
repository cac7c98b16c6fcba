"""Options that the methods of this family share. A method inherits them and adds its own."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_sdk.config import opt

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Options:
    layers: int = opt(0, "train the last K layers; 0 trains all", unit="layers", ge=0)
    targets: str = opt(LINEARS, "module names that get a LoRA, comma-separated")
    learning_rate: float = opt(5e-4, "eta, the peak step", ge=0)
    warmup: float = opt(0.05, "share of all steps with a linear warm-up, linear decay after it", ge=0, le=1)
    optimizer: str = opt(
        "adamw", "a client's step rule; its state starts anew in every round", choices=("adamw", "sgd")
    )
    weight_decay: float = opt(0.0, "decoupled weight decay", ge=0)
    clip: float = opt(1.0, "largest norm of a gradient over all tensors; 0 is any", ge=0)
    steps: int = opt(4, "steps of each client in a round", ge=1, le=1_000_000)
    batch_size: int = opt(8, "examples in a minibatch", unit="examples", ge=1)
    max_length: int = opt(128, "longest example", unit="tokens", ge=8)
    chunk: int = opt(64, "scored positions that go through the vocabulary at once", unit="tokens", ge=1)
    hidden_memory: int = opt(512, "budget for kept hidden states of frozen layers; 0 keeps none", unit="MB", ge=0)
    precision: str = opt("auto", "of the frozen base", choices=("auto", "float32", "bfloat16", "float16"))

    @property
    def parts(self) -> bool:
        """Whether a client may train some of theta and use the rest as it was sent (`types.FROZEN`)."""
        return True

"""Options that the methods of this family share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt


@dataclass(frozen=True)
class Local(Options):
    """Passes over a client's data from what the server sent, with an optimiser and a schedule of its own."""

    targets: str = opt("q_proj,v_proj", "module names that get a LoRA, comma-separated, or all-linear")
    warmup: float = opt(0.0, "share of a round's steps with a linear warm-up, linear decay after it", ge=0, le=1)
    epochs: int = opt(1, "E, passes of a client over its data in a round", ge=1, le=10_000)
    steps: int = opt(0, "steps of each client in a round; 0 makes whole passes", ge=0, le=1_000_000)
    micro_batch: int = opt(0, "examples at once, gradients added up to a minibatch; 0 takes it whole", ge=0)


def steps_of(config: Local, examples: int) -> int:
    """Steps of a client in a round."""
    return config.steps or config.epochs * math.ceil(examples / config.batch_size)

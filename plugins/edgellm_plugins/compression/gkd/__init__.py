"""GKD: distil a teacher into a smaller model on what that model writes itself.

Paper: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", arXiv 2306.13649 (ICLR 2024).
The arithmetic is in `divergence.py`, the walk through the data in `method.py`. Its corners:

    supervised fine-tuning        --divergence likelihood --on-policy 0
    plain distillation            --divergence forward-kl --on-policy 0
    sequence-level distillation   --divergence likelihood --on-policy 0 --source teacher
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.compression.hooks import compress_hook
from edgellm_plugins.training.options import Options
from edgellm_sdk.config import opt
from edgellm_sdk.registry import Plugin

LEAST_PROMPT = 8  # tokens


@dataclass(frozen=True)
class Config(Options):
    teacher: str = opt("", "model to learn from, of the same tokenizer; empty: what the student was compressed from")
    divergence: str = opt(
        "jsd",
        "between the teacher's next-token distribution and the student's, or the likelihood of the tokens alone",
        choices=("forward-kl", "reverse-kl", "jsd", "likelihood"),
    )
    beta: float = opt(
        0.5, "jsd: weight of the teacher in the mixture; near 0 as forward-kl, near 1 as reverse-kl", ge=0, le=1
    )
    on_policy: float = opt(0.5, "lambda, the share of steps on what the student writes itself", ge=0, le=1)
    source: str = opt(
        "data", "completions of the other steps: the data's or the teacher's own", choices=("data", "teacher")
    )
    temperature: float = opt(1.0, "of what is written; 0 takes the likeliest token", ge=0, le=10)
    new_tokens: int = opt(32, "longest completion that is written", unit="tokens", ge=1, le=4096)
    opening: int = opt(
        8, "of a text without a prompt, what is given before a completion is written", unit="tokens", ge=1
    )
    average: str = opt(
        "sequence", "over a completion's tokens, then completions; or over all tokens", choices=("sequence", "token")
    )
    reward: str = opt(
        "none", "on-policy steps also raise this score of what is written", choices=("none", "f1", "rouge")
    )
    reward_weight: float = opt(0.5, "1 - alpha, the reward's weight against the divergence's alpha", ge=0, le=1)
    tune: str = opt("lora", "what trains; full: all weights of the chosen layers", choices=("lora", "full"))
    rank: int = opt(16, "r, the rank of the LoRA", ge=1, le=512)
    alpha: float = opt(32.0, "the LoRA is scaled by alpha / rank", ge=0)
    steps: int = opt(100, "steps in all", ge=1, le=1_000_000)
    optimizer: str = opt("adamw", "the step rule", choices=("adamw", "sgd"))

    def __post_init__(self) -> None:
        if self.divergence == "jsd" and self.beta in (0, 1):
            raise ValueError("beta: jsd is 0 for every student at 0 and at 1; use forward-kl or reverse-kl")
        if self.divergence == "likelihood" and self.on_policy:
            raise ValueError("on-policy: a student learns nothing from the likelihood of what it writes; use 0")
        if self.reward != "none" and not self.on_policy:
            raise ValueError("reward: only steps on what the student writes earn one; raise on-policy")
        if self.writes and self.new_tokens > self.max_length - LEAST_PROMPT:
            raise ValueError(f"new-tokens: {self.new_tokens} of {self.max_length} leave no room for a prompt")

    @property
    def writes(self) -> bool:
        """Whether completions are ever written, by the student or the teacher."""
        return self.on_policy > 0 or self.source == "teacher"

    @property
    def needs_teacher(self) -> bool:
        return self.divergence != "likelihood" or self.source == "teacher"


PLUGIN = Plugin(
    name="gkd",
    summary="distil a teacher into a pruned model, on the student's own text, by KL, reverse KL or JSD",
    version="0.1.0",
    config=Config,
    paper="GKD, arXiv 2306.13649",
    aliases=("distil",),
)

edgellm_compress = compress_hook(__name__)

"""GPTQ calibrated on a device's own messages: its divergence on other messages of the kind, by damping and passes.

    python cookbook/benchmarks/gptq_damping.py

SmolLM2-135M in q4_0, 16 windows of 256 tokens of the sms-spam training messages under the chat template; the mean
KL(model || compressed) in nats over every token of 200 held-out prompts, and over their answers' first token alone.
The other side, text unlike the calibration text, is `gptq_held_out.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import edgellm_sdk as edgellm
from edgellm_sdk import data, store
from edgellm_sdk.kit import prompts
from edgellm_sdk.models import resolve
from edgellm_sdk.report import environment

PROMPTS, LONGEST = 200, 192
DAMPINGS, PASSES = (0.01, 0.1), (0, 1, 4)


@torch.no_grad()
def answers(model: str, batch: list[prompts.Encoded]) -> list[Tensor]:
    """log p of each prompt's next tokens, (tokens, vocabulary) float16 for memory's sake."""
    loaded = resolve(model).load("float32", merge=True).model
    return [loaded(torch.tensor([row.tokens[: row.start]])).logits[0].log_softmax(-1).half() for row in batch]


def divergence(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    rows = [(p.float().exp() * (p.float() - q.float())).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(rows).mean()), statistics.mean(float(row[-1]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gptq_damping.json")
    asked = parser.parse_args()
    tokenizer = resolve("smollm2-135m").load().tokenizer
    batch = prompts.encode(tokenizer, data.read("sms-spam", "test").examples[:PROMPTS], LONGEST)
    before = answers("smollm2-135m", batch)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temp:
        for damping in DAMPINGS:
            for passes in PASSES:
                folder = Path(temp) / f"{damping:g}-{passes}"
                done = edgellm.compress(
                    "gptq", "smollm2-135m", folder, data="sms-spam",
                    options={"damping": damping, "passes": passes, "calibration_length": 256},
                )  # fmt: skip
                tokens, answer = divergence(before, answers(str(folder), batch))
                rows.append({"damping": damping, "passes": passes, "kl": tokens, "kl_answer": answer,
                             "seconds": done.report.wall_seconds})  # fmt: skip
                print(rows[-1], flush=True)
    store.write_json(asked.output, {
        "command": "python cookbook/benchmarks/gptq_damping.py", "environment": environment(), "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()

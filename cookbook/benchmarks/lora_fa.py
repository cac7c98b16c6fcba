"""LoRA-FA beside LoRA: held-out loss after the same number of steps, each at the learning rate that suits it.

    python cookbook/benchmarks/lora_fa.py --work runs/lora-fa

SmolLM2-135M, a spam filter, the FFN of the last layer, 200 steps of 8 messages. LoRA of rank 8 and LoRA-FA of rank 16
train about as many numbers; LoRA-FA once with B's own gradient and once with the projected one. Three learning rates,
three seeds; the rate with the lowest mean held-out loss counts. All runs are kept in --work.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from compare import prepared

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.report import Report, environment

SET = {"layers": 1, "targets": "gate_proj,up_proj,down_proj", "steps": 10, "batch_size": 8, "max_length": 96}
B_ONLY = {"rank": 16, "alpha": 32.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, rank 8": ("lora", {"rank": 8, "alpha": 16.0}),
    "lora-fa, rank 16": ("lora-fa", B_ONLY),
    "lora-fa, rank 16, projected": ("lora-fa", B_ONLY | {"correction": "projection"}),
}
TASK, RATES, STEPS, SEEDS = "sms-spam", (3e-4, 1e-3, 3e-3, 1e-2), 200, 3
MEASURED = ("validation loss", "balanced accuracy")


def run(work: Path, name: str, rate: float, seed: int) -> dict[str, Any]:
    plugin, given = ARMS[name]
    folder = work / "".join(c if c.isalnum() else "-" for c in f"{name} {rate:g} {seed}")
    if not (folder / "report.json").is_file():
        rounds = STEPS // int(SET["steps"])
        edgellm.finetune(
            plugin, "smollm2-135m", output=folder, rounds=rounds, watch=rounds, seed=seed, hidden=work / "hidden",
            options=SET | given | {"learning_rate": rate}, resume=folder.is_dir(), **prepared(work, [TASK])[TASK],
        )  # fmt: skip
    found = Report.read(folder).metrics
    return {"learning_rate": rate, "seed": seed} | {name: found[name].value for name in MEASURED}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lora_fa.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {}
    for name in ARMS:
        runs = [run(asked.work, name, rate, seed) for rate in RATES for seed in range(SEEDS)]
        means = {r: statistics.mean(x["validation loss"] for x in runs if x["learning_rate"] == r) for r in RATES}
        rate = min(means, key=lambda r: means[r])
        best = [x for x in runs if x["learning_rate"] == rate]
        arms[name] = {
            "learning_rate": rate,
            "held-out loss": means[rate],
            "balanced accuracy": statistics.mean(x["balanced accuracy"] for x in best),
            "runs": runs,
        }
        print(name, {k: v for k, v in arms[name].items() if k != "runs"}, flush=True)
    reference = arms["lora, rank 8"]["held-out loss"]
    told = {name: {**arm, "over_lora": arm["held-out loss"] / reference} for name, arm in arms.items()}
    command = "python cookbook/benchmarks/lora_fa.py --work runs/lora-fa"
    store.write_json(asked.output, {"command": command, "environment": environment(), "arms": told})


if __name__ == "__main__":
    main()

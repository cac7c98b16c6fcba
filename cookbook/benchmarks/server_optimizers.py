"""Server optimisers on one federation: held-out loss over rounds, three seeds.

    python cookbook/benchmarks/server_optimizers.py --work runs/server-optimizers

A random Llama of four layers of width 64 on the built-in messages, six clients whose labels are skewed (Dirichlet
0.3), LoRA by plain SGD, 12 rounds of 4 steps. Of several server rates the one with the lowest mean final loss counts.
The clients' own rate is the same for all rules, and the largest server rate tried won each time: the table shows that
the rules run and converge. Their order on a model this small says nothing about their order on another.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import edgellm_sdk as edgellm
from edgellm_sdk import data, store
from edgellm_sdk.kit.tiny import write_model
from edgellm_sdk.report import Report, environment

RATES: dict[str, tuple[float, ...]] = {
    "fedavg": (1.0,),
    "fedavgm": (0.3, 1.0, 2.0),
    "fedadam": (0.01, 0.03, 0.1),
    "fedadamw": (0.01, 0.03, 0.1),
}
SEEDS, ROUNDS = 3, 12
SET = {
    "rank": 4, "layers": 0, "targets": "q_proj,v_proj,down_proj", "steps": 4, "batch_size": 8, "max_length": 48,
    "optimizer": "sgd", "learning_rate": 0.05, "precision": "float32",
}  # fmt: skip
LOSS = "validation loss over rounds"


def run(work: Path, model: Path, rule: str, rate: float, seed: int) -> list[list[float]]:
    """[round, loss], measured every other round."""
    folder = work / f"{rule}-{rate:g}-{seed}"
    if not (folder / "report.json").is_file():
        edgellm.finetune(
            "lora", str(model), "sms-spam", folder, clients=6, rounds=ROUNDS, partition="dirichlet:0.3", seed=seed,
            aggregate=rule, watch=2, balance=True, resume=folder.is_dir(), options={**SET, rule: {"server_rate": rate}},
        )  # fmt: skip
    return [[float(x), float(y)] for x, y in Report.read(folder).curves[LOSS]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "server_optimizers.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = asked.work / "model"
    if not model.is_dir():
        texts = [f"{example.prompt} {example.completion}" for example in data.read("sms-spam").examples[:400]]
        write_model(model, texts)
    told: dict[str, Any] = {}
    for rule, rates in RATES.items():
        curves = {rate: [run(asked.work, model, rule, rate, seed) for seed in range(SEEDS)] for rate in rates}
        final = {rate: statistics.mean(curve[-1][1] for curve in found) for rate, found in curves.items()}
        rate = min(final, key=lambda rate: final[rate])
        mean = [[row[0][0], statistics.mean(y for _, y in row)] for row in zip(*curves[rate], strict=True)]
        told[rule] = {"server_rate": rate, "mean loss over rounds": mean, "runs": curves[rate], "final": final}
        print(f"{rule:10} {rate:<6g}" + "".join(f"{y:8.3f}" for _, y in mean), flush=True)
    command = "python cookbook/benchmarks/server_optimizers.py --work runs/server-optimizers"
    store.write_json(asked.output, {"command": command, "environment": environment(), "rules": told})


if __name__ == "__main__":
    main()

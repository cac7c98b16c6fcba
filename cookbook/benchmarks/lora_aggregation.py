"""What becomes of LoRAs that are averaged: rules beside each other, over how unlike the clients are.

    python cookbook/benchmarks/lora_aggregation.py --work runs/lora-aggregation
    python cookbook/benchmarks/lora_aggregation.py --work runs/tiny --arms fedavg,flora --partitions iid \
        --clients 3 --rounds 2 --steps 1 --seeds 1 --rates 1e-3

SmolLM2-135M, TREC questions dealt to ten clients by Dirichlet(0.1), Dirichlet(1) and evenly; q, k, v and o of the last
four layers, rank 8, ten rounds of four steps and of twenty. Every arm first takes the learning rate, of --rates, that
ends at the lowest held-out loss on Dirichlet(1) with a seed of its own. `flexlora` at equal ranks is the control of the
exact rules: exact but for the rank. The last arms have clients of ranks 2, 4, 8 and 16 of an adapter of rank 16. A row
is written as it finishes; all runs are kept in --work, and what is there is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compare import prepared

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.report import Report, environment

MODEL, TASK = "smollm2-135m", "trec"
SET = {"targets": "q_proj,k_proj,v_proj,o_proj", "batch_size": 8, "max_length": 96, "warmup": 0.05}
UNLIKE = "2,4,8,16"
# What is shown: plugin, its options, rank of the method.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "fedavg": ("fedavg", {}, 8),
    "ffa-lora": ("ffa-lora", {}, 8),
    "rolora": ("rolora", {}, 8),
    "fedex-lora": ("fedex-lora", {}, 8),
    "flora": ("flora", {}, 8),
    "flexlora": ("flexlora", {}, 8),
    "fedsa-lora": ("fedsa-lora", {}, 8),
    "flora, unlike ranks": ("flora", {"ranks": UNLIKE}, 16),
    "flexlora, unlike ranks": ("flexlora", {"ranks": UNLIKE}, 16),
    "hetlora, unlike ranks": ("hetlora", {"ranks": UNLIKE}, 16),
    "fedavg, smallest rank": ("fedavg", {}, 2),
}
TUNING_SEED, TUNING_PARTITION = 100, "dirichlet:1"
LOSS, ACCURACY = "validation loss", "balanced accuracy"


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split("|" if "|" in text else ",") if part.strip()]


def run(asked: argparse.Namespace, arm: str, partition: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """One federation, done now or found in --work, as a row."""
    rule, given, rank = ARMS[arm]
    named = f"{arm} {partition} {asked.clients} {asked.rounds} {steps} {asked.layers} {rate:g} {seed}"
    folder = asked.work / "".join(c if c.isalnum() else "-" for c in named)
    if not (folder / "report.json").is_file():
        method = SET | {
            "layers": asked.layers,
            "rank": rank,
            "alpha": 2.0 * rank,
            "steps": steps,
            "learning_rate": rate,
        }
        edgellm.finetune(
            "lora", MODEL, output=folder, clients=asked.clients, rounds=asked.rounds, partition=partition, seed=seed,
            aggregate=rule, watch=asked.rounds, options=method | {rule: given}, resume=folder.is_dir(),
            **prepared(asked.work, [TASK])[TASK],
        )  # fmt: skip
    report = Report.read(folder)
    errors = [y for _, y in report.curves.get("aggregation error over rounds", [])]
    return {
        "arm": arm, "partition": partition, "steps": steps, "learning_rate": rate, "seed": seed,
        "held-out loss": report.metrics[LOSS].value, "balanced accuracy": report.metrics[ACCURACY].value,
        "aggregation error, first": errors[0] if errors else None,
        "aggregation error, largest": max(errors, default=None),
        "uploaded bytes": int(report.metrics["uploaded"].value),
        "downloaded bytes": int(report.metrics["downloaded"].value), "seconds": report.wall_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lora_aggregation.json")
    parser.add_argument("--arms", default="|".join(ARMS), help="separated by commas, or by | where a name has one")
    parser.add_argument("--partitions", default="dirichlet:0.1,dirichlet:1,iid")
    parser.add_argument("--steps", default="4,20", help="steps of a client in a round")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3", help="one: nothing is tuned")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    told = " ".join(
        f"--{name} {value}" for name, value in vars(asked).items() if name not in ("work", "output", "arms")
    )
    rows: list[dict[str, Any]] = []
    tuned: list[dict[str, Any]] = []
    rates = [float(rate) for rate in listed(asked.rates)]
    for steps in map(int, listed(asked.steps)):
        for arm in listed(asked.arms):
            tries = [run(asked, arm, TUNING_PARTITION, steps, rate, TUNING_SEED) for rate in rates[1:] and rates]
            rate = min(tries, key=lambda row: row["held-out loss"])["learning_rate"] if tries else rates[0]
            tuned += tries
            for partition in listed(asked.partitions):
                for seed in range(asked.seeds):
                    row = run(asked, arm, partition, steps, rate, seed)
                    rows.append(row)
                    print({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                    command = f"python cookbook/benchmarks/lora_aggregation.py --work runs/lora-aggregation {told}"
                    found = {"command": command, "environment": environment(), "rows": rows, "tuning": tuned}
                    store.write_json(asked.output, found)


if __name__ == "__main__":
    main()

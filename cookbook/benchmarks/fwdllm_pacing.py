"""How many perturbations a step of FwdLLM should wait for: its variance test against fixed numbers.

    python cookbook/benchmarks/fwdllm_pacing.py

SmolLM2-135M, four kinds of TREC questions, 16 clients, equal budgets of perturbed inferences. `fixed k` steps after k
perturbations of every client; `adaptive` asks for one perturbation of every client at a time until the variance of
their mean is a quarter of that of the first round; `adaptive, no sampling` draws all directions unbiased. Every arm
gets the same learning rates, and for each arm the rate with the best final accuracy counts. The cost unit is the
perturbed inference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from archives import TREC_PROMPT, trec

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.report import environment

CLIENTS = 16
KINDS = ("DESC", "ENTY", "HUM", "NUM")
CHANCE = 1 / len(KINDS)
ALWAYS = 1e9  # a threshold that accepts every round
ARMS: dict[str, dict[str, Any]] = {
    "fixed 1": {"perturbations": 1, "tau": ALWAYS},
    "fixed 4": {"perturbations": 4, "tau": ALWAYS},
    "fixed 16": {"perturbations": 16, "tau": ALWAYS},
    "adaptive": {"perturbations": 1, "calibration": 0.25},
    "adaptive, no sampling": {"perturbations": 1, "calibration": 0.25, "sampling": False},
}
SHARED = {"layers": 1, "rank": 32, "alpha": 64.0, "optimizer": "adam", "batch_size": 8, "max_length": 96}
TARGETS = (0.45, 0.5)


def run(arm: str, rate: float, seed: int, forwards: int, folder: Path, data: Path) -> dict[str, Any]:
    options = SHARED | ARMS[arm] | {"learning_rate": rate}
    rounds = max(2, forwards // (2 * CLIENTS * options["perturbations"]))
    done = edgellm.finetune(
        "fwdllm",
        model="smollm2-135m",
        data=str(data),
        output=folder / f"{arm}-{rate}-{seed}".replace(" ", "-"),
        clients=CLIENTS,
        rounds=rounds,
        task_prompt=TREC_PROMPT,
        seed=seed,
        watch=max(1, rounds // 20),
        hidden=folder / "hidden",
        options=options,
    )
    curves = done.report.curves
    accuracy = curves["balanced accuracy over forwards"]
    accepted = [n for _, n in curves["perturbations accepted over steps"]]
    quarter = max(1, len(accepted) // 4)
    return {
        "arm": arm, "learning_rate": rate, "seed": seed, "forwards": accuracy[-1][0], "steps": len(accepted),
        "accuracy": accuracy[-1][1], "best_accuracy": max(value for _, value in accuracy),
        "forwards_to": {str(t): next((x for x, value in accuracy if value >= t), None) for t in TARGETS},
        "perturbations_first_quarter": statistics.mean(accepted[:quarter]),
        "perturbations_last_quarter": statistics.mean(accepted[-quarter:]),
        "accuracy_over_forwards": accuracy, "seconds": done.report.wall_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--forwards", type=int, default=6400)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fwdllm_pacing.json")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temp:
        data = trec(Path(temp) / "trec", KINDS, test=200)
        for seed in asked.seeds:
            for rate in asked.rates:
                for arm in ARMS:
                    rows.append(run(arm, rate, seed, asked.forwards, Path(temp), data))
                    shown = {k: v for k, v in rows[-1].items() if k != "accuracy_over_forwards"}
                    print(json.dumps(shown), flush=True)
    summary = {}
    for arm in ARMS:
        mean = {
            rate: statistics.mean(r["accuracy"] for r in rows if r["arm"] == arm and r["learning_rate"] == rate)
            for rate in asked.rates
        }
        best = max(mean, key=lambda rate: mean[rate])
        chosen = [r for r in rows if r["arm"] == arm and r["learning_rate"] == best]
        summary[arm] = {
            "learning_rate": best,
            "accuracy": mean[best],
            "accuracy_by_seed": [r["accuracy"] for r in chosen],
            "forwards_to": {str(t): [r["forwards_to"][str(t)] for r in chosen] for t in TARGETS},
        }
    command = "python cookbook/benchmarks/fwdllm_pacing.py"
    asked_for = {"forwards": asked.forwards, "rates": asked.rates, "seeds": asked.seeds, "chance": CHANCE}
    result = {"command": command, "environment": environment(), **asked_for, "arms": summary, "runs": rows}
    store.write_json(asked.output, result)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()

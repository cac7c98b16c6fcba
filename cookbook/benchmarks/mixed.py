"""Clients of three kinds in one federation, against each kind alone, at equal rounds.

    python cookbook/benchmarks/mixed.py [--seeds 0 1 2 3 4]

Six kinds of TREC questions, SmolLM2-135M, LoRA-FA on `down_proj` of the last layer, 16 clients dealt by Dirichlet(0.5):
4 train 32 columns of B by back-propagation, 4 train 8, 8 send scalars along seeded directions. `all` has all of them,
every other arm the clients of one kind with their data, in as many rounds; the arms share learning rates, chosen for
each kind alone on a seed that is not used again. Loss and accuracy on the same held-out questions; differences are
paired by seed with Student's 95 % interval. Every arm's row is written when it is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archives import TREC_PROMPT, trec

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.data import read
from edgellm_sdk.federate.partition import partition
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment

KINDS = ("backprop:32", "backprop:8", "backprop:32", "backprop:8", "scalars", "scalars", "scalars", "scalars")
NAMES = {"backprop:32": "rank 32", "backprop:8": "rank 8", "scalars": "scalars"}
CLIENTS, ROUNDS, TUNING_SEED = 16, 20, 100
SHARED: dict[str, Any] = {
    "layers": 1, "targets": "down_proj", "rank": 32, "alpha": 64.0, "steps": 4, "batch_size": 8, "max_length": 96,
    "probes": 8, "warmup": 0.0,
}  # fmt: skip
RATES = {"learning_rate": (5e-4, 2e-3, 8e-3), "scalar_rate": (0.003, 0.01, 0.03)}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}


def dealt(source: Path, seed: int, folder: Path) -> Path:
    """The questions with the client that holds each as their user."""
    train = read(str(source), "train", TREC_PROMPT)
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    parts = partition(train, "dirichlet:0.5", CLIENTS, Stream(seed, "partition"))
    folder.mkdir(parents=True, exist_ok=True)
    owners = {index: client for client, indices in parts.items() for index in indices}
    lines = [json.dumps({**row, "user": owners[n]}) for n, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    for part in ("valid", "test"):
        (folder / f"{part}.jsonl").write_bytes((source / f"{part}.jsonl").read_bytes())
    return folder


def only(data: Path, kind: str, folder: Path) -> Path:
    """The data of the clients of one kind."""
    kept = [f"client-{k:03d}" for k in range(CLIENTS) if KINDS[k % len(KINDS)] == kind]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for line in (data / "train.jsonl").read_text().splitlines() if json.loads(line)["user"] in kept]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    for part in ("valid", "test"):
        (folder / f"{part}.jsonl").write_bytes((data / f"{part}.jsonl").read_bytes())
    return folder


def run(arm: str, data: Path, rates: dict[str, float], seed: int, folder: Path) -> dict[str, Any]:
    kinds = ",".join(KINDS) if arm == "all" else arm
    done = edgellm.finetune(
        "mixed", "smollm2-135m", str(data), folder / "run", partition="user", rounds=ROUNDS, seed=seed, watch=0,
        task_prompt=TREC_PROMPT, hidden=folder.parent / "hidden", options={**SHARED, **rates, "kinds": kinds},
    )  # fmt: skip
    metrics = done.report.metrics
    return {
        "arm": NAMES.get(arm, arm), "seed": seed, **rates, "loss": metrics["validation loss"].value,
        "accuracy": metrics["balanced accuracy"].value, "uploaded": metrics["uploaded"].value,
        "clients": int(metrics["uploaded"].n), "seconds": done.report.wall_seconds,
    }  # fmt: skip


def best_rates(source: Path, work: Path) -> dict[str, float]:
    """For back-propagation by the wider kind alone, for scalars by theirs alone."""
    found = {}
    data = dealt(source, TUNING_SEED, work / "tuning")
    for name, kind in (("learning_rate", "backprop:32"), ("scalar_rate", "scalars")):
        own = only(data, kind, work / f"tuning {name}")
        losses = {}
        for rate in RATES[name]:
            with tempfile.TemporaryDirectory(dir=work) as temp:
                losses[rate] = run(kind, own, {name: rate}, TUNING_SEED, Path(temp))["loss"]
            print(name, rate, losses[rate], flush=True)
        found[name] = min(losses, key=lambda rate: losses[rate])
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    arms = sorted({row["arm"] for row in rows})
    by_arm = {arm: {row["seed"]: row for row in rows if row["arm"] == arm} for arm in arms}
    found: dict[str, Any] = {}
    for arm, mine in by_arm.items():
        found[arm] = {name: statistics.mean(row[name] for row in mine.values()) for name in ("loss", "accuracy")}
        pairs = [by_arm["all"][seed]["loss"] - row["loss"] for seed, row in mine.items() if seed in by_arm["all"]]
        if arm != "all" and len(pairs) > 1:
            half = T95[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
            centre = statistics.mean(pairs)
            found[arm]["all_minus_this"] = [centre, centre - half, centre + half]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mixed.json")
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python cookbook/benchmarks/mixed.py", "environment": environment(), "options": SHARED,
        "clients": CLIENTS, "kinds": KINDS, "rounds": ROUNDS, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temp:
        work = Path(temp)
        source = trec(work / "trec", test=200)
        result["rates"] = best_rates(source, work)
        for seed in asked.seeds:
            data = dealt(source, seed, work / f"data-{seed}")
            for arm in ("all", *NAMES):
                own = data if arm == "all" else only(data, arm, work / f"data-{seed}-{arm}")
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    result["rows"].append(run(arm, own, result["rates"], seed, Path(folder)))
                print(json.dumps(result["rows"][-1]), flush=True)
                result["summary"] = summary(result["rows"])
                store.write_json(asked.output, result)
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()

"""FedIT beside what each client can do alone and what all data in one place could: loss on everybody's instructions.

    python cookbook/benchmarks/fedit.py --work runs/fedit

SmolLM2-135M without its chat template, short Alpaca pairs in nine categories, eight clients, as many passes over the
data in every arm. Three seeds for each way of dealing: iid, shards (two categories a client) and Dirichlet shares of
alpha 0.1, 0.5 and 10. All adapters are measured on held-out pairs of every category, so that a client's own can be told
from those it never saw. `aggregation error` is that of averaged factors, the mean over the rounds. `memory` compares
the peak of LoRA's training process with that of training all weights of all layers, on one minibatch size. Runs are
kept in --work; `--model tiny --rounds 2 --seeds 1 --held-out 4` tries the whole way in a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from instructions import short_pairs, without_template

import edgellm_sdk as edgellm
from edgellm_sdk import models, store
from edgellm_sdk.data import read
from edgellm_sdk.federate.partition import partition
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.conformance_runs import tiny_model
from edgellm_sdk.random import Stream
from edgellm_sdk.report import Report, environment
from edgellm_sdk.types import Dataset, Example

CLIENTS, LEAST = 8, 4
DEALINGS = {"iid": "iid", "shards": "label:2", "0.1": "dirichlet:0.1", "0.5": "dirichlet:0.5", "10": "dirichlet:10"}
OPTIONS: dict[str, Any] = {"rank": 8, "alpha": 16.0, "batch_size": 8, "learning_rate": 1e-3}
MEMORY = {"lora": {"rank": 8, "targets": "q_proj,k_proj,v_proj,o_proj"}, "full": {}}


def write_data(work: Path, held_out: int) -> dict[str, list[dict[str, str]]]:
    """Training pairs by category; the held-out ones, equally many of each, become files of `work / "held"`."""
    train = {}
    for name, rows in short_pairs().items():
        path = work / "held" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:held_out]))
        train[name] = rows[held_out:]
    return train


def dealt(train: Mapping[str, Sequence[Mapping[str, str]]], spec: str, seed: int) -> dict[str, list[dict[str, str]]]:
    """Each client's rows with their category; drawn again until every client has some."""
    rows = [{**row, "category": name} for name in sorted(train) for row in train[name]]
    examples = tuple(Example(row["instruction"], row["output"], row["category"]) for row in rows)
    data = Dataset(examples, "", "", tuple(sorted(train)))
    for attempt in range(1000):
        parts = partition(data, spec, CLIENTS, Stream(seed, "deal", attempt))
        if min(map(len, parts.values())) >= LEAST:
            return {client: [rows[i] for i in part] for client, part in parts.items()}
    raise ValueError(f"{spec} gives no {CLIENTS} clients {LEAST} pairs each")


def run(
    folder: Path, model: str, rows: Sequence[Mapping[str, str]], rounds: int, seed: int, clients: int = 1
) -> dict[str, Any]:
    """One training run over all rounds; `rows` carry `user` where there are several clients."""
    if not (folder / "report.json").is_file():
        data = folder.with_name(folder.name + ".jsonl")
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        edgellm.finetune(
            "fedit", model, str(data), folder, rounds=rounds, watch=0, seed=seed, options=OPTIONS,
            partition="user" if clients > 1 else "iid", resume=folder.is_dir(),
        )  # fmt: skip
    report = Report.read(folder)
    errors = [y for _, y in report.curves.get("aggregation error over rounds", [])]
    return {
        "uploaded": report.metrics["uploaded"].value,
        "aggregation error": statistics.mean(errors) if errors else None,
    }


@torch.no_grad()
def losses(model: str, held: Path) -> dict[str, float]:
    """Mean loss per token of the answers, by category, and over all categories alike (`union`)."""
    live, found = models.resolve(model).load(merge=True), {}
    for path in sorted(held.glob("*.jsonl")):
        total, count = 0.0, 0
        for row in prompts.encode(live.tokenizer, read(str(path)).examples, 128):
            logits = live.model(input_ids=torch.tensor([row.tokens])).logits[0, row.start - 1 : -1].double()
            total += float(F.cross_entropy(logits, torch.tensor(row.tokens[row.start :]), reduction="sum"))
            count += len(row.tokens) - row.start
        found[path.stem] = total / count
    return found | {"union": statistics.mean(found.values())}


def compared(work: Path, model: str, name: str, seed: int, rounds: int, train: Any, base: float) -> dict[str, Any]:
    """One way of dealing, one seed: the federation, every client alone, and all data in one place."""
    parts, folder = dealt(train, DEALINGS[name], seed), work / f"{name}-{seed}"
    union = [{**row, "user": client} for client, rows in parts.items() for row in rows]
    told = run(folder / "federated", model, union, rounds, seed, CLIENTS)
    federated = losses(str(folder / "federated"), work / "held")
    everything = [row for rows in parts.values() for row in rows]
    run(folder / "central", model, everything, rounds, seed)
    central = losses(str(folder / "central"), work / "held")["union"]
    alone, gains = {}, {"seen": [], "unseen": []}  # type: ignore[var-annotated]
    for client, rows in parts.items():
        run(folder / client, model, rows, rounds, seed)
        own = losses(str(folder / client), work / "held")
        alone[client] = own["union"]
        seen = {row["category"] for row in rows}
        for category in train:
            gains["seen" if category in seen else "unseen"].append(own[category] - federated[category])
    return {
        "seed": seed, "dealing": name, "federated": federated["union"], "centralised": central, "alone": alone,
        "best alone": min(alone.values()), "gain over alone": {
            kind: statistics.mean(values) if values else None for kind, values in gains.items()
        },
        "share of what centralised gains that is missed": (federated["union"] - central) / (base - central), **told,
    }  # fmt: skip


def memory(work: Path, model: str) -> dict[str, int]:
    """Peak resident bytes of a fresh process that trains two steps."""
    found, data = {}, work / "held" / "explain.jsonl"
    for tune, options in MEMORY.items():
        folder = work / f"memory-{tune}"
        command = [sys.executable, "-m", "edgellm_sdk.cli.main", "finetune", "--plugin", "fedpetuning", "--tune", tune]
        command += ["--model", model, "--data", str(data), "--output", str(folder), "--rounds", "1", "--watch", "0"]
        command += ["--steps", "2", "--batch-size", "8", "--max-length", "256", "--quiet"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        if not (folder / "report.json").is_file():
            subprocess.run(command, check=True)
        found[tune] = Report.read(folder).peak_rss_bytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="or tiny, to try the script")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=24, help="pairs of each category")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fedit.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    source = str(tiny_model().path) if asked.model == "tiny" else asked.model
    model = str(without_template(source, asked.work / "model"))
    train = write_data(asked.work, asked.held_out)
    base = losses(model, asked.work / "held")
    print(f"base {base['union']:.4f}", flush=True)
    rows = []
    for name in DEALINGS:
        for seed in range(asked.seeds):
            rows.append(compared(asked.work, model, name, seed, asked.rounds, train, base["union"]))
            print({key: value for key, value in rows[-1].items() if key != "alone"}, flush=True)
    curve = []
    for name in ("0.1", "0.5", "10"):
        mine = [row for row in rows if row["dealing"] == name]
        errors = [row["aggregation error"] for row in mine if row["aggregation error"] is not None]
        loss = statistics.mean(row["federated"] for row in mine)
        error = statistics.mean(errors) if errors else math.nan
        curve.append({"alpha": float(name), "loss": loss, "aggregation error": error if errors else None})
    peaks = memory(asked.work, model)
    told = {
        "command": "python cookbook/benchmarks/fedit.py --work runs/fedit", "environment": environment(),
        "model": asked.model, "rounds": asked.rounds, "options": OPTIONS, "base": base, "runs": rows,
        "heterogeneity": curve, "memory": {**peaks, "lora over full": peaks["lora"] / peaks["full"]},
    }  # fmt: skip
    store.write_json(asked.output, told)


if __name__ == "__main__":
    main()

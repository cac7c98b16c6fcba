"""Five ways to tune few parameters, under label skew: accuracy, and the bytes it takes to come near full tuning.

    python cookbook/benchmarks/fedpetuning.py --work runs/fedpetuning

SmolLM2-135M, TREC questions of six kinds, twenty clients of one size whose mixtures of labels are Dirichlet(alpha x
the labels' shares), ten of them in a round, the last four layers. Every way of tuning gets the learning rate of three
that ends at the lowest held-out loss with alpha 1 and a seed of its own: at one rate for all, small sets look broken.
Then alpha 0.1, 1 and 10, three seeds each. BitFit trains norm gains, the model having no biases.

`accuracy` is balanced accuracy on held-out questions at the end of a run. `bytes to target` are those that clients sent
until a watched round first had 95 % of the mean accuracy of full tuning at that alpha; None where no round had. The
curves are of the rounds themselves, not of the best so far. All runs are kept in --work;
`--model tiny --rounds 2 --seeds 1 --train 80` tries the whole way in minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from archives import TREC_LABELS, TREC_PROMPT, trec

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.kit.conformance_runs import tiny_model
from edgellm_sdk.report import Report, environment

WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "full": ({"tune": "full"}, (3e-5, 1e-4, 3e-4)),
    "lora": ({"tune": "lora", "rank": 8}, (1e-3, 3e-3, 1e-2)),
    "adapter": ({"tune": "adapter", "width": 16}, (1e-3, 3e-3, 1e-2)),
    "prefix": ({"tune": "prefix", "prefix_length": 16}, (3e-4, 1e-3, 3e-3)),
    "bitfit": ({"tune": "bitfit", "norms": True}, (3e-3, 1e-2, 3e-2)),
}
ALPHAS, CLIENTS, TUNING_SEED, NEAR = (0.1, 1.0, 10.0), 20, 100, 0.95
SET = {"layers": 4, "batch_size": 8, "max_length": 96, "keep": "last"}


def write_data(folder: Path, train: int, digits: bool) -> None:
    """The questions as files; `digits` for labels where a tokenizer is too small to tell words by their first token."""
    places = {label: str(place) for place, label in enumerate(sorted(TREC_LABELS.values()))}
    for path in trec(folder).glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = rows[:train] if path.stem == "train" else rows[:100] if digits else rows
        told = [{**row, "label": places[row["label"]] if digits else row["label"]} for row in rows]
        store.write_bytes(path, "".join(json.dumps(row) + "\n" for row in told).encode())


def run(asked: argparse.Namespace, way: str, rate: float, alpha: float, seed: int) -> dict[str, Any]:
    folder = asked.work / f"{way}-{rate:g}-{alpha:g}-{seed}"
    if not (folder / "report.json").is_file():
        edgellm.finetune(
            "fedpetuning", asked.source, str(asked.work / "trec"), folder, clients=CLIENTS,
            clients_per_round=CLIENTS // 2, rounds=asked.rounds, partition=f"skew:{alpha:g}", seed=seed, watch=1,
            task_prompt=TREC_PROMPT, options=SET | WAYS[way][0] | {"learning_rate": rate}, resume=folder.is_dir(),
        )  # fmt: skip
    report = Report.read(folder)
    uploaded = report.metrics["uploaded"].value
    return {
        "alpha": alpha, "seed": seed, "accuracy": report.metrics["balanced accuracy"].value,
        "loss": report.metrics["validation loss"].value, "uploaded": uploaded,
        "curve": [[x * uploaded / asked.rounds, y] for x, y in report.curves["balanced accuracy over rounds"]],
    }  # fmt: skip


def compared(asked: argparse.Namespace) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for way, (_, rates) in WAYS.items():
        tried = {rate: run(asked, way, rate, 1.0, TUNING_SEED)["loss"] for rate in rates}
        rate = min(tried, key=lambda rate: tried[rate])
        ways[way] = {"learning_rate": rate, "tried": {f"{r:g}": loss for r, loss in tried.items()}}
        ways[way]["runs"] = [run(asked, way, rate, alpha, seed) for alpha in ALPHAS for seed in range(asked.seeds)]
        print(way, rate, [(r["alpha"], round(r["accuracy"], 3)) for r in ways[way]["runs"]], flush=True)
    for way, told in ways.items():
        told["accuracy"] = {f"{alpha:g}": _mean(told, alpha) for alpha in ALPHAS}
        told["drop from 10 to 0.1"] = told["accuracy"]["10"] - told["accuracy"]["0.1"]
        for entry in told["runs"]:
            target = NEAR * _mean(ways["full"], entry["alpha"])
            entry["bytes to target"] = next((sent for sent, y in entry["curve"] if sent and y >= target), None)
        print(way, told["accuracy"], flush=True)
    return ways


def _mean(told: dict[str, Any], alpha: float) -> float:
    return statistics.mean(entry["accuracy"] for entry in told["runs"] if entry["alpha"] == alpha)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="or tiny, to try the script")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000, help="questions, of all clients together")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fedpetuning.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    asked.source = str(tiny_model().path) if asked.model == "tiny" else asked.model
    write_data(asked.work / "trec", asked.train, asked.model == "tiny")
    ways = compared(asked)
    command = "python cookbook/benchmarks/fedpetuning.py --work runs/fedpetuning"
    settings = {name: getattr(asked, name) for name in ("model", "rounds", "seeds", "train")}
    store.write_json(asked.output, {"command": command, "environment": environment(), **settings, "ways": ways})


if __name__ == "__main__":
    main()

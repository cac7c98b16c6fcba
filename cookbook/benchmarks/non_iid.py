"""Unlike clients at equal rounds: server optimisers, FedProx and SCAFFOLD against FedAvg.

    python cookbook/benchmarks/non_iid.py [--seeds 0 1 2 3 4] [--tasks trec sms-spam] [--alphas 0.1 0.5]

SmolLM2-135M, LoRA on the FFN of the last layer, labels dealt to 10 clients by Dirichlet(alpha), all of them in each of
12 rounds, 8 local steps. Two settings of the local work, each with a FedAvg of its own: AdamW, as `lora` has it, for
the server optimisers and FedProx; SGD at a constant rate for SCAFFOLD, whose control variates mean nothing without.
Every arm's rates are chosen by held-out loss on a seed that is not used again, on the same task and alpha: FedAvg's
local rate, the local and the server rate of a server optimiser together, FedProx's mu at FedAvg's rate; SCAFFOLD has
FedAvg's rate and nothing to choose. Differences from FedAvg are paired by seed, with Student's
95 % interval. A row is written when its run is done, and a run that has a row is not done again.
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
from compare import messages

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.data import SMS_PROMPT
from edgellm_sdk.report import environment

CLIENTS, ROUNDS, TRAIN, TUNING_SEED = 10, 12, 1000, 100
SHARED: dict[str, Any] = {
    "layers": 1, "targets": "gate_proj,up_proj,down_proj", "steps": 8, "batch_size": 8, "max_length": 96, "warmup": 0.0,
}  # fmt: skip
ADAMW, SGD = {"optimizer": "adamw"}, {"optimizer": "sgd", "clip": 0.0}
PROMPTS = {"trec": TREC_PROMPT, "sms-spam": SMS_PROMPT}
LOCAL = (2e-3, 8e-3)  # tried with server optimisers
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[float, ...], tuple[float, ...]]] = {
    # local work, arguments, the arm's own number, what of it is tried, local rates tried (none: the basis's)
    "fedavg": (ADAMW, {}, "", (), (5e-4, 2e-3, 8e-3, 3.2e-2)),
    "fedavgm": (ADAMW, {"aggregate": "fedavgm"}, "fedavgm.server_rate", (0.1, 0.3), LOCAL),
    "fedadam": (ADAMW, {"aggregate": "fedadam"}, "fedadam.server_rate", (0.003, 0.01, 0.03), LOCAL),
    "fedyogi": (ADAMW, {"aggregate": "fedyogi"}, "fedyogi.server_rate", (0.003, 0.01, 0.03), LOCAL),
    "fedprox": (ADAMW, {"around": "fedprox"}, "fedprox.mu", (0.01, 0.1, 1.0), ()),
    "fedavg, sgd": (SGD, {}, "", (), (0.0125, 0.05, 0.2)),
    "scaffold": (SGD, {"around": "scaffold"}, "", (), ()),
}
BASIS = {"fedavgm": "fedavg", "fedadam": "fedavg", "fedyogi": "fedavg", "fedprox": "fedavg", "scaffold": "fedavg, sgd"}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def prepared(task: str, folder: Path) -> Path:
    """The task's files, with TRAIN training rows."""
    if not (folder / "train.jsonl").is_file():
        trec(folder, test=200) if task == "trec" else messages(folder)
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(lines[:TRAIN]))
    return folder


def run(arm: str, number: float | None, rate: float, place: dict[str, Any], work: Path) -> dict[str, Any]:
    """One run; `rate` is the local learning rate, `number` the arm's own."""
    local, arguments, free, _, _ = ARMS[arm]
    options: dict[str, Any] = {**SHARED, **local, "learning_rate": rate}
    plugin, _, option = free.partition(".")
    if option and number is not None:
        options[plugin] = {option: number}
    data = prepared(place["task"], work / place["task"])
    with tempfile.TemporaryDirectory(dir=work) as temp:
        done = edgellm.finetune(
            "lora", "smollm2-135m", str(data), Path(temp) / "run", clients=CLIENTS, rounds=ROUNDS,
            partition=f"dirichlet:{place['alpha']}", seed=place["seed"], task_prompt=PROMPTS[place["task"]],
            watch=max(1, ROUNDS // 4), hidden=work / "hidden", options=options, **arguments,
        )  # fmt: skip
    metrics, curves = done.report.metrics, done.report.curves
    return {
        "arm": arm, "number": number, "learning_rate": rate, **place, "loss": metrics["validation loss"].value,
        "accuracy": metrics["balanced accuracy"].value, "over_rounds": curves["validation loss over rounds"],
        "seconds": done.report.wall_seconds,
    }  # fmt: skip


class Book:
    """The result file; a row is looked up before it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty: dict[str, Any] = {"tuning": [], "rows": []}
        self.content = store.read_json(path) if path.is_file() else empty

    def row(self, part: str, arm: str, number: float | None, rate: float, place: dict[str, Any], work: Path) -> Any:
        wanted = {"arm": arm, "number": number, "learning_rate": rate, **place}
        for row in self.content[part]:
            if all(row[name] == value for name, value in wanted.items()):
                return row
        self.content[part].append(run(arm, number, rate, place, work))
        self.content |= {
            "command": "python cookbook/benchmarks/non_iid.py", "environment": environment(), "options": SHARED,
            "clients": CLIENTS, "rounds": ROUNDS, "training_rows": TRAIN, "summary": summary(self.content["rows"]),
        }  # fmt: skip
        store.write_json(self.path, self.content)
        told = self.content[part][-1]
        print(part, json.dumps({k: v for k, v in told.items() if k != "over_rounds"}), flush=True)
        return told

    def forget(self, task: str, alpha: float, best: dict[str, tuple[float, float | None]]) -> None:
        """Drops rows of rates that are no longer the best of those tried."""
        self.content["rows"] = [
            row
            for row in self.content["rows"]
            if (row["task"], row["alpha"]) != (task, alpha) or (row["learning_rate"], row["number"]) == best[row["arm"]]
        ]


def chosen(arm: str, task: str, alpha: float, basis: float, book: Book, work: Path) -> tuple[float, float | None]:
    """The arm's local rate and its own number that do best by held-out loss on the tuning seed."""
    place = {"task": task, "alpha": alpha, "seed": TUNING_SEED}
    numbers: tuple[float | None, ...] = ARMS[arm][3] or (None,)
    tried = [(rate, number) for rate in ARMS[arm][4] or (basis,) for number in numbers]
    if len(tried) == 1:
        return tried[0]
    found = {pair: book.row("tuning", arm, pair[1], pair[0], place, work)["loss"] for pair in tried}
    return min(found, key=lambda pair: found[pair])


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for task, alpha in sorted({(row["task"], row["alpha"]) for row in rows}):
        here = [row for row in rows if (row["task"], row["alpha"]) == (task, alpha)]
        by_arm = {arm: {row["seed"]: row for row in here if row["arm"] == arm} for arm in ARMS}
        for arm, mine in by_arm.items():
            if not mine:
                continue
            line = {"task": task, "alpha": alpha, "arm": arm, "seeds": len(mine)}
            line |= {name: statistics.mean(row[name] for row in mine.values()) for name in ("loss", "accuracy")}
            basis = by_arm[BASIS[arm]] if arm in BASIS else {}
            pairs = [row["loss"] - basis[seed]["loss"] for seed, row in mine.items() if seed in basis]
            if len(pairs) > 1:
                half = T95[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5
                line["minus_fedavg"] = [statistics.mean(pairs) + sign * half for sign in (0, -1, 1)]
            found.append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", choices=tuple(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--work", type=Path, help="folder for data and hidden states, to go on another time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "non_iid.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        work, book = asked.work or Path(temp), Book(asked.output)
        for task in asked.tasks:
            for alpha in asked.alphas:
                best: dict[str, tuple[float, float | None]] = {}
                for arm in ARMS:
                    basis = best[BASIS[arm]][0] if arm in BASIS else 0.0
                    best[arm] = chosen(arm, task, alpha, basis, book, work)
                book.forget(task, alpha, best)
                for seed in asked.seeds:
                    for arm, (rate, number) in best.items():
                        book.row("rows", arm, number, rate, {"task": task, "alpha": alpha, "seed": seed}, work)
        print(json.dumps(book.content["summary"], indent=2))


if __name__ == "__main__":
    main()

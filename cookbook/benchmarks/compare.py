"""The zeroth-order methods beside each other and beside back-propagation, each at the learning rate that suits it.

    python cookbook/benchmarks/compare.py --work runs/compare tune
    python cookbook/benchmarks/compare.py --work runs/compare few forwards shuffled time bytes memory

SmolLM2-135M, a spam filter and TREC questions, up to 1024 examples to train on. All arms train the same tensors,
LoRA-FA's B on down_proj of the last layer, and `lora`, back-propagation, its A as well. `tune` gives every arm three
learning rates, schedules if it has them, and a seed of its own, and keeps what ends at the lowest held-out loss: once
for 300 forwards, once for 1000. The comparisons are `edgellm bench compare` at equal forwards, seconds, bytes and
memory, and, as a control, at equal forwards on shuffled labels. All runs are kept in --work: what is there is not run
again, and `--work`/KIND/TASK/report.html is the page to look at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archives import TREC_PROMPT, trec

import edgellm_sdk as edgellm
from edgellm_sdk import config, registry, store
from edgellm_sdk.data import SMS_PROMPT, read
from edgellm_sdk.random import Stream
from edgellm_sdk.report import Report, environment
from edgellm_sdk.steps.comparison import Arm

MODEL = "smollm2-135m"
# Rank 64: with a small one the loss depends on what A happens to project on, and methods drown in that.
SET = {"layers": 1, "rank": 64, "alpha": 128.0, "targets": "down_proj", "batch_size": 16, "max_length": 96}
# Rank 64: with a small one the loss depends on what A happens to project on, and methods drown in that.
SET = {"layers": 1, "rank": 64, "alpha": 128.0, "targets": "down_proj", "batch_size": 16, "max_length": 96}
# The learning rate falls linearly to 0, as it does in fwdllm and lora; FedKSeed's sums have one for all rounds.
FALLING = {"schedule": "linear"}
# The names that are shown: plugin, options, learning rates tried, each constant and falling linearly to 0 where the
# method has that choice (fwdllm and lora always fall, FedKSeed's sums have one rate for all rounds).
ARMS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "mezo": ("mezo", {"probes": 1}, (0.01, 0.03, 0.1)),
    "fzoo": ("fzoo", {}, (0.03, 0.1, 0.3)),
    "grzo": ("grzo", {}, (0.03, 0.1, 0.3)),
    "lozo": ("lozo", {"probes": 1}, (0.01, 0.03, 0.1)),
    "p-rge": ("p-rge", {}, (0.01, 0.03, 0.1)),
    "fedkseed": ("fedkseed", {}, (0.01, 0.03, 0.1)),
    "fwdllm": ("fwdllm", {"optimizer": "adam"}, (0.03, 0.1, 0.3)),
    "lora": ("lora", {}, (0.001, 0.003, 0.01)),
}
SCHEDULED = ("mezo", "fzoo", "grzo", "lozo", "p-rge")
TRAIN, HELD_OUT = 1024, 128
TASKS = {"sms-spam": SMS_PROMPT, "trec": TREC_PROMPT}
KINDS: dict[str, dict[str, Any]] = {
    "few": {"equal": "forwards", "budget": 300},
    "forwards": {"equal": "forwards", "budget": 1000},
    "shuffled": {"equal": "forwards", "budget": 1000},
    "time": {"equal": "time", "budget": 20},
    "bytes": {"equal": "bytes", "budget": 300_000, "clients": 4, "partition": "dirichlet:0.5"},
    "memory": {"equal": "memory", "budget": 1024, "seconds": 20},
}
TUNING_SEED = 100
BACK_PROPAGATION = 3  # forwards of a step


def prepared(work: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each task as a folder of train, valid and test files, and how it is asked."""
    for name in names:
        folder = work / name
        if not (folder / "train.jsonl").is_file():
            if name == "trec":
                trec(folder, test=HELD_OUT)
            else:
                messages(folder)
            lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
            store.write_bytes(folder / "train.jsonl", "".join(lines[:TRAIN]).encode())
    return {name: {"data": str(work / name), "task_prompt": TASKS[name]} for name in names}


def shuffled(data: str) -> str:
    """A copy of a task whose training labels are permuted: who learns something from it has seen the held-out part."""
    folder = Path(data)
    copy = folder.with_name(f"{folder.name}-shuffled")
    if not (copy / "train.jsonl").is_file():
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        order = Stream(0, "shuffled labels").permutation(len(rows)).tolist()
        mixed = [json.dumps(row | {"label": rows[i]["label"]}) + "\n" for row, i in zip(rows, order, strict=True)]
        for name in ("test", "valid"):
            store.write_bytes(copy / f"{name}.jsonl", (folder / f"{name}.jsonl").read_bytes())
        store.write_bytes(copy / "train.jsonl", "".join(mixed).encode())
    return str(copy)


def messages(folder: Path) -> None:
    """Spam and other messages in turn, as many of each."""
    data = read("sms-spam")
    order = Stream(0, "benchmark").permutation(len(data)).tolist()
    kinds = [[i for i in order if data.examples[i].label == label] for label in data.labels]
    before, after = SMS_PROMPT.split("{text}")
    rows = []
    for index in (i for group in zip(*kinds, strict=False) for i in group):
        example = data.examples[index]
        text = str(example.prompt[0]["content"])  # type: ignore[index]
        row = {"text": text.removeprefix(before).removesuffix(after), "label": example.completion}
        rows.append(json.dumps(row) + "\n")
    parts = {"test": rows[:HELD_OUT], "valid": rows[HELD_OUT : 2 * HELD_OUT], "train": rows[2 * HELD_OUT :]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        store.write_bytes(folder / f"{name}.jsonl", "".join(part).encode())


def rounds_for(arm: str, forwards: float, options: Mapping[str, Any]) -> int:
    """Rounds of a single client that cost about that many forwards."""
    plugin = ARMS[arm][0]
    made: Any = config.build(registry.get(plugin, "finetune").plugin.config, options, plugin)
    if plugin == "fwdllm":
        return max(1, int(forwards / (2 * made.perturbations)))
    each = {"lora": BACK_PROPAGATION, "fzoo": 9, "p-rge": 2}.get(plugin, 2)
    return max(1, int(forwards / (each * made.steps)))


def tried(arm: str) -> list[dict[str, Any]]:
    """The options among which an arm's are chosen."""
    schedules = [{"schedule": name} for name in ("constant", "linear")] if arm in SCHEDULED else [{}]
    return [{"learning_rate": rate} | schedule for rate in ARMS[arm][2] for schedule in schedules]


def tuned_for(kind: str) -> int:
    """The forwards of the tuning runs that a comparison follows."""
    return 300 if kind == "few" else 1000


def tuning_run(work: Path, forwards: int, task: str, arm: str, options: Mapping[str, Any]) -> Path:
    parts = [arm, *(f"{value:g}" if isinstance(value, float) else value for value in options.values())]
    return work / f"tune-{forwards}" / task / "-".join(parts)


def tune(work: Path, names: Sequence[str], arms: Sequence[str], forwards: int) -> list[dict[str, Any]]:
    """Final held-out loss of every arm on every task with all that is tried."""
    for task, settings in prepared(work, names).items():
        for arm in arms:
            plugin, given, _ = ARMS[arm]
            for chosen in tried(arm):
                options, folder = SET | given | chosen, tuning_run(work, forwards, task, arm, chosen)
                if not (folder / "report.json").is_file():
                    rounds = rounds_for(arm, forwards, options)
                    edgellm.finetune(
                        plugin, MODEL, output=folder, rounds=rounds, seed=TUNING_SEED, watch=rounds, options=options,
                        resume=folder.is_dir(), hidden=work / "hidden", **settings,
                    )  # fmt: skip
                print(task, arm, chosen, Report.read(folder).metrics["validation loss"].value, flush=True)
    return tuning(work, forwards)


def tuning(work: Path, forwards: int) -> list[dict[str, Any]]:
    """task, arm, options and final held-out loss of every tuning run there is."""
    rows = []
    for task in TASKS:
        for arm in ARMS:
            for chosen in tried(arm):
                folder = tuning_run(work, forwards, task, arm, chosen)
                if (folder / "report.json").is_file():
                    loss = Report.read(folder).metrics["validation loss"].value
                    rows.append({"task": task, "arm": arm, "options": chosen, "loss": loss})
    return rows


def best(work: Path, forwards: int) -> dict[str, dict[str, dict[str, Any]]]:
    """task -> arm -> the options with the lowest loss."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(tuning(work, forwards), key=lambda row: -row["loss"]):
        found.setdefault(row["task"], {})[row["arm"]] = row["options"]
    return found


def compare(work: Path, kind: str, names: Sequence[str], arms: Sequence[str], seeds: int) -> dict[str, Any]:
    """One comparison on each task, with that task's rates."""
    result: dict[str, Any] = {}
    for task, settings in prepared(work, names).items():
        chosen = best(work, tuned_for(kind))[task]
        settings |= {"data": shuffled(settings["data"])} if kind == "shuffled" else {}
        made = [Arm(name, ARMS[name][0], SET | ARMS[name][1] | chosen[name]) for name in arms]
        done = edgellm.compare("", MODEL, output=work / kind / task, arms=made, seeds=seeds, **settings, **KINDS[kind])
        curves = {
            name: [[round(x), round(y, 4)] for x, y in points]
            for name, points in done.report.curves.items()
            if " over forwards" in name
        }
        notes = done.report.notes
        result[task] = {"options": chosen, "table": done.report.tables[0], "curves": curves, "notes": notes}
        print(done.report.tables[0], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", choices=("tune", *KINDS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compare.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    result = store.read_json(asked.output) if asked.output.is_file() else {}
    for what in asked.what:
        if what == "tune":
            for forwards in sorted({tuned_for(kind) for kind in KINDS}):
                result[f"tuning for {forwards}"] = tune(asked.work, asked.tasks, asked.arms, forwards)
        else:
            result[what] = result.get(what, {}) | compare(asked.work, what, asked.tasks, asked.arms, asked.seeds)
        result |= {"command": "python cookbook/benchmarks/compare.py", "environment": environment()}
        store.write_json(asked.output, result)


if __name__ == "__main__":
    main()

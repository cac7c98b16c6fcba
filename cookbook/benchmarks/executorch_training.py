"""P-RGE inside ExecuTorch on a CPU: what a training program weighs, what a step takes, what it learns.

    python cookbook/benchmarks/executorch_training.py --part time --noise graph --queries 4 [--layers 0] [--tokens 64]
    python cookbook/benchmarks/executorch_training.py --part export
    python cookbook/benchmarks/executorch_training.py --part learn --seed 0
    python cookbook/benchmarks/executorch_training.py --part backprop --seed 0
    python cookbook/benchmarks/executorch_training.py --part memory

SmolLM2-135M, float32, XNNPACK, LoRA-FA of rank 16 on every linear layer of the last `layers` (0: all). Each part adds
its figures to the one result file.

time      a step of four queries, in one call of q = 4 or in four of q = 1, in a fresh process, on four examples of T
          tokens; the median of the repeats after one warm-up.
export    writes the programs that the next parts run into the user's cache.
learn     host noise, four queries, four real messages a step, half of them spam, in a process that has no model but the
          program; the held-out loss is computed by the program itself, its state restored afterwards.
backprop  the same adapter, start, messages and number of steps with Adam and torch's gradients.
memory    resident bytes of a fresh process after ten calls: a training step, and inference on the same four examples by
          a program without state or update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from edgellm_hardware.executorch import Config, method
from edgellm_hardware.executorch.program import Shape, lower
from edgellm_hardware.executorch.trainer import Program, Trainer, batch_inputs

from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.kit import adapters, loading, prompts
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Dataset

MB = 1 << 20
HELD = 32
TRAIN = Config(noise="host", queries=4, batch=4, tokens=80, labels=8, layers=2)
TRAINED = 165_888  # scalars in B of two layers at rank 16
INFER = Shape(1, 2, TRAIN.tokens, TRAIN.labels)


def exported(folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    path, began = folder / f"{config.noise}-{config.queries}.pte", time.perf_counter()
    artifact = method.export(models.resolve("smollm2-135m"), path, config, Context(folder, seed=0))
    seconds = time.perf_counter() - began
    return path, {
        "export_seconds": seconds,
        "file_mb": path.stat().st_size / MB,
        "companion_mb": artifact.files[1].stat().st_size / MB,
        "loss_difference": artifact.verified["loss difference"],
    }


def timed(noise: str, queries: int, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    rows = [Encoded(tuple(draw.integers(0, 49152, tokens).tolist()), tokens - 2, k) for k in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(noise=noise, queries=queries, batch=4, tokens=tokens, labels=8, layers=layers)
        path, facts = exported(Path(folder), config)
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        trainer = Trainer(path, 1e-3)
        facts["load_seconds"] = time.perf_counter() - began
        times, drawing = [], []
        for step in range(repeats + 1):
            began = time.perf_counter()
            for _ in range(4 // queries):
                trainer.step(rows)
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.noise(step)
            drawing.append(time.perf_counter() - began)
    return {
        **facts,
        "state_mb": trainer.state.numel() * 4 / MB,
        "rss_mb_loading_and_training": (psutil.Process().memory_info().rss - before) / MB,
        "seconds_of_four_queries": statistics.median(times[1:]),
        "tokens_per_second": 2 * 4 * 4 * tokens / statistics.median(times[1:]),
        "seconds_each": times[1:],
        "seconds_of_which_noise": statistics.median(drawing[1:]) if noise == "host" else 0.0,
    }


def balanced(data: Dataset, skip: int, count: int) -> Dataset:
    order = Stream(0, "benchmark").permutation(len(data)).tolist()
    each, first = count // len(data.labels), skip // len(data.labels)
    of = [[i for i in order if data.examples[i].label == label][first : first + each] for label in data.labels]
    return data.select([index for group in zip(*of, strict=True) for index in group])


def messages(seed: int) -> dict[str, list[list[Encoded]]]:
    """Minibatches of four: `train` by the seed, `held out` the same for every seed."""
    data, tokenizer = read("sms-spam"), loading.load_tokenizer(models.resolve("smollm2-135m"))
    held_out = prompts.encode(tokenizer, balanced(data, 0, HELD).examples, TRAIN.tokens)
    train = prompts.encode(tokenizer, balanced(data, HELD, 512).examples, TRAIN.tokens)
    train = [train[i] for i in Stream(seed, "order").permutation(len(train)).tolist()]
    return {name: [rows[k : k + 4] for k in range(0, len(rows), 4)] for name, rows in
            (("train", train), ("held out", held_out))}  # fmt: skip


def clocks() -> Any:
    """(seconds, CPU seconds of all threads of this process)."""
    return np.array([time.perf_counter(), time.process_time()])


def programs() -> Path:
    return models.cache_folder() / "benchmarks" / "executorch"


def learned(steps: int, rate: float, seed: int) -> dict[str, Any]:
    batches = messages(seed)
    trainer, curve, losses, rss = Trainer(programs() / "host-4.pte", rate, seed=seed), [], [], []
    spent = np.zeros(2)
    for step in range(steps + 1):
        if step % (steps // 6) == 0:
            curve.append(
                [step, *spent.tolist(), statistics.mean(trainer.evaluate(rows) for rows in batches["held out"])]
            )
            rss.append(psutil.Process().memory_info().rss / MB)
            print(curve[-1], flush=True)
        if step < steps:
            began = clocks()
            losses.append(float(trainer.step(batches["train"][step % len(batches["train"])]).mean()))
            spent += clocks() - began
    return {
        "learning_rate": rate, "held_out_examples": HELD, "trainable": trainer.layout.size,
        "step, seconds in steps, CPU seconds in steps, held-out loss": curve, "training_losses": losses, "rss_mb": rss,
        "seconds_per_step": spent[0] / steps, "cpu_seconds_per_step": spent[1] / steps,
    }  # fmt: skip


def back_propagated(steps: int, rate: float, seed: int) -> dict[str, Any]:
    batches, ctx = messages(seed), Context(Path(), seed=0)
    spec = adapters.Spec("lora-fa", TRAIN.layers, TRAIN.rank, TRAIN.alpha, adapters.module_names(TRAIN.targets))
    live, trainables, _ = method.prepared(models.resolve("smollm2-135m"), spec, TRAIN.tokens, ctx)
    live.requires_grad_(False)
    leaves = {name: torch.from_numpy(value.copy())[None].requires_grad_() for name, value in trainables.initial.items()}
    trainables.set(leaves)
    optimiser, curve, spent = torch.optim.Adam(list(leaves.values()), rate), [], np.zeros(2)

    def loss(rows: list[Encoded]) -> torch.Tensor:
        tokens, places, targets, weights = batch_inputs(rows, Shape(1, 4, TRAIN.tokens, TRAIN.labels))
        hidden = live.model(input_ids=tokens, use_cache=False).last_hidden_state
        logp = live.lm_head(hidden.flatten(0, 1)[places]).log_softmax(-1)
        return -(logp.gather(-1, targets[:, None])[:, 0] * weights).sum() / weights.sum()

    for step in range(steps + 1):
        if step % (steps // 6) == 0:
            with torch.no_grad():
                curve.append(
                    [step, *spent.tolist(), statistics.mean(float(loss(rows)) for rows in batches["held out"])]
                )
            print(curve[-1], flush=True)
        if step < steps:
            began = clocks()
            optimiser.zero_grad()
            loss(batches["train"][step % len(batches["train"])]).backward()
            optimiser.step()
            spent += clocks() - began
    return {
        "learning_rate": rate, "step, seconds in steps, CPU seconds in steps, held-out loss": curve,
        "seconds_per_step": spent[0] / steps, "cpu_seconds_per_step": spent[1] / steps,
        "rss_mb": psutil.Process().memory_info().rss / MB,
    }  # fmt: skip


def written() -> dict[str, Any]:
    """The training program, and one that infers: two candidates on two examples are the four rows of a minibatch."""
    programs().mkdir(parents=True, exist_ok=True)
    _, facts = exported(programs(), TRAIN)
    spec = adapters.Spec("lora-fa", TRAIN.layers, TRAIN.rank, TRAIN.alpha, adapters.module_names(TRAIN.targets))
    handle, ctx = models.resolve("smollm2-135m"), Context(programs(), seed=0)
    llama = method.prepared(handle, spec, TRAIN.tokens, ctx)[2]
    store.write_bytes(programs() / "infer.pte", lower(llama, INFER, "candidates", TRAIN.backend))
    return facts


def resident(case: str) -> dict[str, Any]:
    """Resident MB of this process before the program and after ten calls of it."""
    rows, found = messages(0)["train"][:10], {}
    found["before"] = psutil.Process().memory_info().rss / MB
    if case == "training":
        trainer = Trainer(programs() / "host-4.pte", 1e-3)
        for batch in rows:
            trainer.step(batch)
    else:
        program = Program(programs() / "infer.pte")
        for batch in rows:
            tokens, places, targets, _ = batch_inputs(batch[:2], INFER)
            program([tokens, places, targets, torch.zeros(2, TRAINED)])
    found["after"] = psutil.Process().memory_info().rss / MB
    return found


def memory() -> dict[str, Any]:
    """`resident` of both cases, each in a process of its own."""
    found: dict[str, Any] = {}
    for case in ("inference", "training"):
        command = [sys.executable, __file__, "--part", "memory", "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[case] = json.loads(done.stdout)
    rise = {case: mb["after"] - mb["before"] for case, mb in found.items()}
    whole = found["training"]["after"] / found["inference"]["after"]
    return {**found, "training_over_inference": whole, "program_alone": rise["training"] / rise["inference"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("time", "export", "learn", "backprop", "memory"), required=True)
    parser.add_argument("--noise", choices=("graph", "host"), default="graph")
    parser.add_argument("--queries", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: 0.02, or 0.002 with gradients")
    parser.add_argument("--case", choices=("inference", "training"), default=None)
    here = Path(__file__).parent / "results" / "executorch_training.json"
    parser.add_argument("--output", type=Path, default=here)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(resident(asked.case)))
        return
    command = "python cookbook/benchmarks/executorch_training.py"
    if asked.part == "time":
        part = timed(asked.noise, asked.queries, asked.layers, asked.tokens, asked.repeats)
        command += f" --part time --noise {asked.noise} --queries {asked.queries} --layers {asked.layers}"
        command += f" --tokens {asked.tokens} --repeats {asked.repeats}"
        calls = f"{4 // asked.queries} call(s) of q={asked.queries}"
        name = f"time, layers {asked.layers}, {asked.tokens} tokens, noise {asked.noise}, {calls}"
    elif asked.part in ("learn", "backprop"):
        train, rate = (learned, 0.02) if asked.part == "learn" else (back_propagated, 0.002)
        rate = asked.learning_rate or rate
        part, name = train(asked.steps, rate, asked.seed), f"{asked.part}, seed {asked.seed}"
        command += f" --part {asked.part} --steps {asked.steps} --learning-rate {rate:g} --seed {asked.seed}"
    else:
        part, name = (written() if asked.part == "export" else memory()), asked.part
        command += f" --part {asked.part}"
    result = store.read_json(asked.output) if asked.output.exists() else {}
    result |= {"environment": environment(), name: {"command": command, **part}}
    store.write_json(asked.output, result)
    print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
